"""Turn documents into the train and val shards of a data set, in constant memory.

The documents are tokenized on all cores. Texts are written one after another, and an interrupted
preparation goes on where it was. Instruction data, whose examples must not see each other, are
packed into rows of a fixed length.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import CHUNK_TOKENS, EXAMPLE_START, TRAINED, UINT8, ShardWriter, Tokens
from data.texts import CommonEnding, Documents, Piece
from data.tokenizers import CharTokenizer, Tokenizer
from gpt12.errors import UserError
from gpt12.files import lock_folder, write_atomically

BATCH_CHARACTERS = 500_000  # a thread's share at a time: handing it over then costs little
FEW_DOCUMENTS = 20  # fewer texts are split by tokens: one of them may be most of the data
SAVE_TOKENS = 20_000_000  # tokens between two saves of the progress
OPEN_ROWS = 64  # rows that wait for an example that still fits
# Version of what is made of texts. What an older version prepared in data/cache is prepared again.
FORMAT = 4

Encoded = tuple[int, Piece, np.ndarray]  # a document's index, one of its pieces, the piece's ids


def prepare_texts(
    name: str,
    documents: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float = 0.1,
    *,
    block_size: int = 1024,
    max_tokens: int | None = None,
    text_bytes: int | None = None,
) -> None:
    """Write the train and val shards and meta.json of some documents into a folder.

    If this is killed and called again, it goes on after the last saved text and leaves the same
    shards. Instruction data, which are small, start again; their rows have block_size tokens.

    max_tokens: leave out the documents after this many tokens.
    text_bytes: how many bytes of text there are, for the progress bar; default: the files' size.
    Raises UserError for texts that cannot be read, or that are too short to train and validate on.
    """
    from tqdm import tqdm

    split = ValidationSplit(documents, val_fraction)
    if text_bytes is None and documents.files:
        text_bytes = sum(file.stat().st_size for file in documents.files)
    meta = describe_tokenizer(tokenizer)
    locked = f"Another process is preparing the data in {folder}. Wait until it has ended."
    with lock_folder(folder, if_locked=UserError(locked)):
        progress = Progress()
        if documents.kind == "text":
            progress = Progress.load(folder)
        rest = documents.skip(progress.next)
        blank = progress.next - progress.documents
        with tqdm(
            desc=name,
            total=text_bytes,
            unit="B",
            unit_scale=True,
            disable=None,  # no bar in a log file
        ) as bar:
            encoded = _encode_documents(rest, tokenizer, progress, bar, max_tokens)
            if documents.kind == "text":
                _write_texts(encoded, split, progress, folder, tokenizer.dtype)
            else:
                meta |= _write_rows(encoded, split, progress, folder, tokenizer, block_size)
                meta |= {"kind": documents.kind, "system": _commonest_system(rest)}
        if min(progress.train, progress.val) < 2:
            raise UserError(_too_short(name, progress, meta))
        meta |= {"notes": documents.notes, "documents": progress.documents}
        meta["blank"] = blank + rest.blank
        meta["source_sha256"] = progress.source_sha256
        if tokenizer.name == "model":
            tokenizer.save(folder)
        write_atomically(folder / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
        (folder / "progress.json").unlink(missing_ok=True)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what meta.json says about the tokenizer."""
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.text_ids,
        "chars": "".join(tokenizer.names) if tokenizer.name == "char" else None,
    }


def _too_short(name: str, progress: Progress, meta: dict[str, Any]) -> str:
    tokens = progress.train + progress.val
    message = f"{name} is too short to train on and to validate: it has {tokens} tokens."
    if meta.get("left_out"):
        message += (
            f" {meta['left_out']} of {progress.documents} examples were left out, because a row of "
            f"{meta['row']} tokens has no room for their answers. Shorten them, or pass a larger "
            "--block_size=."
        )
    return message


def _commonest_system(documents: Documents) -> str | None:
    """Return the system message that most conversations have, or None if most have none."""
    ranking = documents.systems.most_common(1)
    return ranking[0][0] if ranking else None


# --------------------------------------------------------------------------------------------------
# Which split


class ValidationSplit:
    """Decides which documents are for validation: those whose index has a hash below a fraction.

    Among the first FEW_DOCUMENTS chance might choose none, so there the smallest hashes are chosen,
    at least one. Documents added after those do not change the side of earlier ones. If there are
    fewer texts than that, none is chosen, and prepare_texts splits them by tokens.
    """

    def __init__(self, documents: Documents, fraction: float) -> None:
        self.fraction = fraction
        ends = (document for document, piece in documents if piece.last)
        self._first = list(itertools.islice(ends, FEW_DOCUMENTS))
        by_hash = sorted(self._first, key=_hash_below_one)
        self._chosen = by_hash[: max(1, round(len(self._first) * fraction))]
        if len(self._first) < FEW_DOCUMENTS and documents.kind == "text":
            self._chosen = []

    def __contains__(self, document: int) -> bool:
        if document in self._first:
            return document in self._chosen
        return _hash_below_one(document) < self.fraction


def _hash_below_one(document: int) -> float:
    """Hash a document's index to a number from 0 to 1."""
    digest = hashlib.sha256(str(document).encode()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32


# --------------------------------------------------------------------------------------------------
# Tokenizing


@dataclass
class Progress:
    """How far a preparation has come. progress.json keeps it beside the shards."""

    next: int = 0  # the index of the document that comes next
    documents: int = 0  # read to their end
    train: int = 0  # tokens written
    val: int = 0
    source_sha256: str = ""  # each piece is hashed together with the hash of all pieces before it

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Return where an interrupted preparation was, else the beginning."""
        file = folder / "progress.json"
        return cls(**json.loads(file.read_bytes())) if file.exists() else cls()

    def save(self, folder: Path) -> None:
        """Write progress.json. The tokens that it counts must be on the disk."""
        write_atomically(folder / "progress.json", json.dumps(asdict(self)).encode())

    def add(self, document: int, piece: Piece) -> int:
        """Count a piece that was read, and return its size."""
        text = piece.text.encode()
        before = bytes.fromhex(self.source_sha256)
        self.source_sha256 = hashlib.sha256(before + text).hexdigest()
        if piece.last:
            self.next = document + 1
            self.documents += 1
        return len(text)


def _encode_documents(
    documents: Documents,
    tokenizer: Tokenizer,
    progress: Progress,
    bar: Any,
    max_tokens: int | None,
) -> Iterator[Encoded]:
    """Yield the pieces of documents with their ids, and keep progress and bar up to date."""
    tokens = progress.train + progress.val
    begins_document = True
    for document, piece, ids in _encode(documents, tokenizer):
        if max_tokens is not None and tokens >= max_tokens and begins_document:
            return
        bar.update(progress.add(document, piece))
        tokens += len(ids)
        begins_document = piece.last
        yield document, piece, ids


def _encode(documents: Documents, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode pieces on all cores. (The tokenizers let other threads run meanwhile.)"""
    end = np.array(_end_ids(documents, tokenizer), tokenizer.dtype)

    def encode(batch: list[tuple[int, Piece]]) -> list[Encoded]:
        encoded = []
        for document, piece in batch:
            ids = tokenizer.encode(piece.text)
            if piece.end:
                ids = np.concatenate((ids, end))
            encoded.append((document, piece, ids))
        return encoded

    cores = os.cpu_count() or 1
    batches = _batches(documents)
    with ThreadPoolExecutor(cores) as threads:
        while ahead := list(itertools.islice(batches, 2 * cores)):
            for encoded in threads.map(encode, ahead):
                yield from encoded


def _batches(documents: Documents) -> Iterator[list[tuple[int, Piece]]]:
    """Yield the pieces in lists of BATCH_CHARACTERS or a little more."""
    batch = []
    characters = 0
    for document, piece in documents:
        batch.append((document, piece))
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    yield batch


def _end_ids(documents: Documents, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a document.

    A character tokenizer has no end token. There a line end keeps several documents apart.
    """
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    if "\n" in tokenizer.names and not documents.is_one_text:
        return tokenizer.encode("\n").tolist()
    return []


def characters_of(documents: Documents) -> set[str]:
    """Return all characters of some documents."""
    found: set[str] = set()
    for _, piece in documents:
        found.update(piece.text)
    return found


def check_characters(documents: Documents, tokenizer: CharTokenizer) -> None:
    """Raise UserError if a tokenizer of another data set lacks characters of these documents."""
    found = characters_of(documents)
    if documents.kind == "messages" and not set("#:\n").issubset(tokenizer.names):
        raise UserError(
            f"{documents.source} holds conversations, and the tokenizer does not know all "
            "characters of the chat template's headings, such as '### Assistant:'. "
            'Give them as "prompt" and "completion", which are taken as they are.'
        )
    tokenizer.check_characters(found, source=documents.source)


# --------------------------------------------------------------------------------------------------
# Texts


def _write_texts(
    encoded: Iterator[Encoded],
    split: ValidationSplit,
    progress: Progress,
    folder: Path,
    dtype: np.dtype,
) -> None:
    """Write texts as shards, and save the progress now and then."""
    train = ShardWriter(folder, "train", dtype, start=progress.train)
    val = ShardWriter(folder, "val", dtype, start=progress.val)
    saved = progress.train + progress.val
    for document, piece, ids in encoded:
        writer = val if document in split else train
        writer.add(ids)
        progress.train = train.count
        progress.val = val.count
        if piece.last and train.count + val.count - saved >= SAVE_TOKENS:
            train.flush()
            val.flush()
            progress.save(folder)
            saved = train.count + val.count
    train.close()
    if val.count == 0 and train.count >= 2:
        (folder / "progress.json").unlink(missing_ok=True)  # what follows is not repeatable
        progress.train = min(int(train.count * (1 - split.fraction)), train.count - 2)
        _move_end(val, folder, keep=progress.train)
        progress.val = val.count
    val.close()


def _move_end(val: ShardWriter, folder: Path, keep: int) -> None:
    """Move all but the first `keep` tokens from the train shards to val."""
    tokens = Tokens.open(folder, "train")
    for start in range(keep, len(tokens), CHUNK_TOKENS):
        length = min(CHUNK_TOKENS, len(tokens) - start)
        val.add(tokens.gather(np.array([start]), length)[0])
    tokens.close()
    ShardWriter(folder, "train", val.dtype, start=keep).close()


# --------------------------------------------------------------------------------------------------
# Instruction data


def _write_rows(
    encoded: Iterator[Encoded],
    split: ValidationSplit,
    progress: Progress,
    folder: Path,
    tokenizer: Tokenizer,
    block_size: int,
) -> dict[str, Any]:
    """Write instruction data as rows. Return what meta.json says about them."""
    padding = tokenizer.eot or 0
    train = RowWriter(folder, "train", tokenizer.dtype, block_size, padding)
    val = RowWriter(folder, "val", tokenizer.dtype, block_size, padding)
    ending = CommonEnding()
    ids_of_example: list[np.ndarray] = []
    mask_of_example: list[np.ndarray] = []
    for document, piece, ids in encoded:
        if not piece.trained:
            ending.add(piece.text)
        ids_of_example.append(ids)
        mask_of_example.append(np.full(len(ids), TRAINED if piece.trained else 0, UINT8))
        if piece.last:
            writer = val if document in split else train
            writer.add(np.concatenate(ids_of_example), np.concatenate(mask_of_example))
            ids_of_example = []
            mask_of_example = []
    train.close()
    val.close()
    progress.train = train.tokens.count
    progress.val = val.tokens.count
    return {
        "row": block_size,
        "cut": train.cut + val.cut,
        "left_out": train.left_out + val.left_out,
        "prompt_ending": ending.text(),
    }


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
    cut: examples so far that were longer than a row. left_out: those without a trained token.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, size: int, padding: int) -> None:
        self.tokens = ShardWriter(folder, split, dtype)
        self.mask = ShardWriter(folder, f"{split}_mask", UINT8)
        self.size = size
        self.padding = padding
        self.cut = 0
        self.left_out = 0
        self._open_rows: list[Row] = []

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Place one example. mask is TRAINED where a token is a target, else 0."""
        if len(ids) > self.size:
            self.cut += 1
            ids = ids[: self.size]
            mask = mask[: self.size]
        mask = np.concatenate([[EXAMPLE_START], mask[1:]])
        if TRAINED not in mask:
            self.left_out += 1
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
