"""Texts to shards: tokenized on all cores, in constant memory, going on where a kill stopped it."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.shards import CHUNK_TOKENS, UINT8, ShardWriter, Tokens, token_dtype
from data.texts import Documents, Piece, chat_pieces
from data.tokenizers import CharTokenizer, Tokenizer
from gpt12.errors import UserError
from gpt12.files import lock_folder, write_atomically

if TYPE_CHECKING:
    from tqdm import tqdm

FEW = 20  # fewer texts than this are split by tokens: one of them may be most of the data
BATCH = 500_000  # characters that a thread encodes at once: enough that handing them over costs nothing
SAVE_TOKENS = 20_000_000  # tokens between two notes of the progress
OPEN_ROWS = 64  # rows that wait for an example that still fits

Encoded = Iterator[tuple[int, Piece, np.ndarray]]  # index of the document, a piece of it, its ids with what ends it


@dataclass
class Progress:
    """How far a preparation has come: what progress.json holds, true of the shards on the disk beside it."""

    made_by: list[Any]
    documents: int = 0  # read to their end
    pieces: int = 0  # read of the one after
    size: int = 0  # bytes read, as UTF-8
    train: int = 0  # tokens written
    val: int = 0
    source_sha256: str = ""  # of the hash so far and the next piece, in turn

    @classmethod
    def load(cls, folder: Path, made_by: list[Any]) -> Progress:
        """Where an interrupted preparation of the same texts was, else the beginning."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = cls(**json.loads((folder / "progress.json").read_bytes()))
            if found.made_by == made_by:
                return found
        return cls(made_by)

    def save(self, folder: Path, train: ShardWriter, val: ShardWriter) -> None:
        train.flush()
        val.flush()
        self.train, self.val = train.count, val.count
        write_atomically(folder / "progress.json", json.dumps(asdict(self)).encode())

    def add(self, piece: Piece) -> None:
        text = piece.text.encode("utf-8", "surrogatepass")
        self.source_sha256 = hashlib.sha256(bytes.fromhex(self.source_sha256) + text).hexdigest()
        self.size += len(text)
        self.documents += piece.last
        self.pieces = 0 if piece.last else self.pieces + 1


def prepare_texts(
    name: str,
    documents: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float = 0.1,
    *,
    block_size: int = 1024,
    max_tokens: int | None = None,
    expected_tokens: int | None = None,
    progress: bool = True,
) -> None:
    """Write the train and val shards and meta.json of `documents` into `folder`.

    Killed and called again, it goes on where it was and leaves the same shards. Instruction data, which are small,
    begin anew, and are packed into rows of block_size. max_tokens: documents after so many are left out.
    expected_tokens: for the progress bar, where neither that nor the files' size says when it ends.
    UserError for texts that cannot be read, or that are too short to train on and to validate.
    """
    from tqdm import tqdm

    if documents.kind == "messages" and isinstance(tokenizer, CharTokenizer):
        _check_template(tokenizer)
    in_val = val_documents(documents, val_fraction)
    stats = [file.stat() for file in documents.files]
    size, changed = sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)
    made_by = [documents.source, documents.text_column, size, changed, tokenizer.sha256, val_fraction]
    meta: dict[str, Any] = {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "chars": "".join(tokenizer.names) if isinstance(tokenizer, CharTokenizer) else None,
    }
    with lock_folder(folder, f"Another process is preparing the data in {folder}. Wait until it ends."):
        note = Progress.load(folder, made_by) if documents.kind == "text" else Progress(made_by)
        total, initial, disable = max_tokens or expected_tokens, note.train + note.val, None if progress else True
        with tqdm(desc=name, total=total, initial=initial, unit_scale=True, unit=" tokens", disable=disable) as bar:
            encoded = _encoded(documents, tokenizer, note, bar, size, max_tokens)
            if documents.kind == "text":
                tokens = _write_texts(encoded, in_val, note, folder, token_dtype(tokenizer.vocab_size), val_fraction)
            else:
                tokens, cut = _write_rows(encoded, in_val, folder, tokenizer, block_size)
                meta |= {"kind": documents.kind, "row": block_size, "cut": cut}
        if min(tokens) < 2:
            message = f"{name} is too short to train on and to validate: it has {sum(tokens)} tokens."
            if meta.get("cut"):
                message += (
                    f" {meta['cut']} of {note.documents} examples were longer than a row of {block_size} tokens, and left out "
                    "where nothing of the answer remained: shorten them, or pass a larger --block_size=."
                )
            raise UserError(message)
        meta |= {"documents": note.documents, "source_sha256": note.source_sha256}
        write_atomically(folder / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
        (folder / "progress.json").unlink(missing_ok=True)


def _check_template(tokenizer: CharTokenizer) -> None:
    """Refuse a conversation whose headings these characters cannot write; the user has not typed them."""
    head = chat_pieces([{"role": "assistant", "content": ""}])[0].text
    if lacking := sorted(set(head).difference(tokenizer.names)):
        raise UserError(
            f"The chat template's heading {head!r} holds {', '.join(map(repr, lacking))}, not among the {tokenizer.vocab_size} "
            'characters that the model knows. Give the conversations as "prompt" and "completion", which are taken as they are.'
        )


def val_documents(documents: Documents, fraction: float) -> Callable[[int], bool]:
    """Which documents are for validation: by the hash of their index, those below `fraction` of all hashes.

    Of the first FEW, where chance might pick none, the rounded share (at least one) with the smallest hashes; none if
    there are only so few texts, which are split by tokens.
    """

    def share(document: int) -> float:
        return int.from_bytes(hashlib.sha256(str(document).encode()).digest()[:4], "little") / 2**32

    count = sum(1 for _ in itertools.islice((piece for piece in documents if piece.last), FEW))
    first = sorted(range(count), key=share)[: max(1, round(count * fraction))]
    if count < FEW and documents.kind == "text":
        first = []
    return lambda document: document in first if document < count else share(document) < fraction


def _encoded(
    documents: Documents, tokenizer: Tokenizer, note: Progress, bar: tqdm, size: int, max_tokens: int | None
) -> Encoded:
    """All that comes after `note`, which is kept up to date."""
    tokens, estimate = note.train + note.val, bar.total is None
    end = [] if tokenizer.eot is None else [tokenizer.eot]
    if tokenizer.eot is None and "\n" in tokenizer.names and not documents.whole:
        end = tokenizer.encode("\n").tolist()  # among characters no end token keeps texts apart
    for piece, ids in _encode(itertools.islice(documents.skip(note.documents), note.pieces, None), tokenizer, end):
        if max_tokens and tokens >= max_tokens and not note.pieces:
            return
        document = note.documents
        note.add(piece)
        tokens += len(ids)
        if estimate and size and note.size:
            bar.total = tokens * size // note.size
        bar.update(len(ids))
        yield document, piece, ids


def _encode(pieces: Iterable[Piece], tokenizer: Tokenizer, end: list[int]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its ids and what ends it, encoded while those before are written and those after are read."""
    tail = np.array(end, token_dtype(tokenizer.vocab_size))

    def encode(batch: list[Piece]) -> list[tuple[Piece, np.ndarray]]:
        ids = [tokenizer.encode(piece.text) for piece in batch]
        return [(p, np.concatenate((i, tail)) if p.end else i) for p, i in zip(batch, ids)]

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as threads:
        waiting: collections.deque[Future[list[tuple[Piece, np.ndarray]]]] = collections.deque()
        for batch in _batches(pieces):
            waiting.append(threads.submit(encode, batch))
            if len(waiting) > 2 * cores:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _write_texts(
    encoded: Encoded, in_val: Callable[[int], bool], note: Progress, folder: Path, dtype: np.dtype, fraction: float
) -> tuple[int, int]:
    """Write all documents, noting the progress; the tokens of each split."""
    train = ShardWriter(folder, "train", dtype, start=note.train)
    val = ShardWriter(folder, "val", dtype, start=note.val)
    saved = note.train + note.val
    for document, _, ids in encoded:
        (val if in_val(document) else train).add(ids)
        if train.count + val.count - saved >= SAVE_TOKENS:
            note.save(folder, train, val)
            saved = train.count + val.count
    if val.count == 0 and train.count >= 2:
        # The last tokens move over. A kill before the note leaves them in train, where they are found again; a later
        # one leaves them in both, and the writer that starts at `keep` cuts them off.
        train.close()
        tokens, keep = Tokens.open(folder, "train"), min(int(train.count * (1 - fraction)), train.count - 2)
        for start in range(keep, len(tokens), CHUNK_TOKENS):
            val.add(tokens.gather(np.array([start]), min(CHUNK_TOKENS, len(tokens) - start))[0])
        train.count = keep
        note.save(folder, train, val)
        train = ShardWriter(folder, "train", dtype, start=keep)
    train.close()
    val.close()
    return train.count, val.count


def _write_rows(
    encoded: Encoded, in_val: Callable[[int], bool], folder: Path, tokenizer: Tokenizer, block_size: int
) -> tuple[tuple[int, int], int]:
    """Pack all examples; the tokens of each split, and how many examples were too long and were cut."""
    dtype, padding = token_dtype(tokenizer.vocab_size), tokenizer.eot or 0
    train, val = (RowWriter(folder, split, dtype, block_size, padding) for split in ("train", "val"))
    parts: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for document, piece, ids in encoded:
        parts.append(ids)
        masks.append(np.full(len(ids), piece.trained, UINT8))
        if piece.last:
            (val if in_val(document) else train).add(np.concatenate(parts), np.concatenate(masks))
            parts, masks = [], []
    train.close()
    val.close()
    return (train.tokens.count, val.tokens.count), train.cut + val.cut


class RowWriter:
    """Packs examples whole into rows of `size` tokens, written as a split's shards and mask shards.

    An example goes into the first open row that has room. One longer than a row is cut, and left out if nothing
    trained remains. A row's first token is no target, since what would predict it is not in the row.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, size: int, padding: int):
        self.tokens, self.mask = ShardWriter(folder, split, dtype), ShardWriter(folder, f"{split}_mask", UINT8)
        self.size, self.padding, self.cut = size, padding, 0
        self._rows: list[tuple[list[np.ndarray], list[np.ndarray]]] = []  # the ids and masks of their examples
        self._room: list[int] = []

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Place one example; mask is 1 where a token is a target."""
        self.cut += len(ids) > self.size
        ids, mask = ids[: self.size], mask[: self.size]
        if not mask.any():
            return
        row = next((row for row, room in enumerate(self._room) if room >= len(ids)), None)
        if row is None:
            if len(self._rows) == OPEN_ROWS:
                self._write(0)
            row = len(self._rows)
            self._rows.append(([], []))
            self._room.append(self.size)
        self._rows[row][0].append(ids)
        self._rows[row][1].append(mask)
        self._room[row] -= len(ids)

    def _write(self, row: int) -> None:
        room, (ids, masks) = self._room.pop(row), self._rows.pop(row)
        mask = np.concatenate([*masks, np.zeros(room, UINT8)])
        mask[0] = 0
        self.tokens.add(np.concatenate([*ids, np.full(room, self.padding)]))
        self.mask.add(mask)

    def close(self) -> None:
        """Write the rows that are still open, and a last token after them: it ends the last row's targets."""
        while self._rows:
            self._write(0)
        if self.tokens.count:
            self.tokens.add(np.array([self.padding]))
            self.mask.add(np.zeros(1, UINT8))
        self.tokens.close()
        self.mask.close()
