"""Print lines and tables to the terminal. Under torchrun only rank 0 prints."""

from __future__ import annotations

from typing import TextIO

from gpt12.distributed import torchrun_ranks


def printable(text: str, stream: TextIO) -> str:
    """Return the text with a question mark for each character that the stream cannot show.

    A Windows console may be in cp1252, and a model may write any character.
    """
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def say(text: str) -> None:
    """Print a line at once, on rank 0 only."""
    if torchrun_ranks().rank == 0:
        print(text, flush=True)


class Table:
    """Cells in columns: the first column is aligned to the left, the others to the right.

    A column whose cells are all empty is not printed.
    """

    def __init__(self, *titles: str):
        self.titles = titles
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """Add a row. Cells that are left out are empty."""
        missing = len(self.titles) - len(cells)
        self.rows.append((*cells, *([""] * missing)))

    def lines(self) -> list[str]:
        """Return the titles and the rows as text, nothing if there is no row."""
        if not self.rows:
            return []
        columns: list[list[str]] = []
        for i, title in enumerate(self.titles):
            cells = [row[i] for row in self.rows]
            if not any(cells):
                continue
            width = max(len(cell) for cell in (title, *cells))
            if columns:
                columns.append([cell.rjust(width) for cell in (title, *cells)])
            else:
                columns.append([cell.ljust(width) for cell in (title, *cells)])
        return ["  ".join(cells).rstrip() for cells in zip(*columns)]

    def print(self) -> None:
        """Print the table, if it has a row."""
        for line in self.lines():
            say(line)
