"""Pack the examples of instruction data into rows of a fixed length."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.shards import EXAMPLE_START, TRAINED, UINT8, ShardWriter

OPEN_ROWS = 64  # rows that wait for an example that still fits
# Version of the rows and of what meta.json says about them. What an older version packed is packed
# again.
ROW_FORMAT = 3


@dataclass
class Row:
    """A row that is not full yet: the ids and masks of its examples."""

    room: int  # tokens that still fit
    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)


class RowWriter:
    """Pack examples whole into rows of `size` tokens, and write them as shards and mask shards.

    An example goes into the first open row that has room for it. One that is longer than a row is
    cut, and left out if nothing trained remains. An example's first token is never a target,
    because no token of the example comes before it.

    The mask says where each example starts. So the model can keep attention inside an example and
    count positions from its start: an example is computed as if it were alone.

    padding: the id that fills the end of a row.
    cut: examples so far that were longer than a row.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, size: int, padding: int) -> None:
        self.tokens = ShardWriter(folder, split, dtype)
        self.mask = ShardWriter(folder, f"{split}_mask", UINT8)
        self.size = size
        self.padding = padding
        self.cut = 0
        self._open_rows: list[Row] = []

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Place one example. mask is TRAINED where a token is a target, else 0."""
        if len(ids) > self.size:
            self.cut += 1
            ids = ids[: self.size]
            mask = mask[: self.size]
        mask = np.concatenate([[EXAMPLE_START], mask[1:]])
        if TRAINED not in mask:
            return
        row = self._row_with_room(len(ids))
        row.ids.append(ids)
        row.masks.append(mask)
        row.room -= len(ids)

    def _row_with_room(self, tokens: int) -> Row:
        for row in self._open_rows:
            if row.room >= tokens:
                return row
        if len(self._open_rows) == OPEN_ROWS:
            self._write(self._open_rows.pop(0))
        row = Row(room=self.size)
        self._open_rows.append(row)
        return row

    def _write(self, row: Row) -> None:
        ids = np.concatenate([*row.ids, np.full(row.room, self.padding)])
        mask = np.concatenate([*row.masks, np.zeros(row.room, UINT8)])
        self.tokens.add(ids)
        self.mask.add(mask)

    def close(self) -> None:
        """Write the rows that are still open, and one token after them.

        Targets are the inputs shifted by one, so the last row needs a token to end with.
        """
        for row in self._open_rows:
            self._write(row)
        self._open_rows = []
        if self.tokens.count > 0:
            self.tokens.add(np.array([self.padding]))
            self.mask.add(np.zeros(1, UINT8))
        self.tokens.close()
        self.mask.close()
