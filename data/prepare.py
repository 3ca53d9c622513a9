"""Turn documents into the train and val shards of a data set, in constant memory.

An interrupted preparation continues where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.encode import encode_pieces
from data.rows import RowWriter
from data.shards import CHUNK_TOKENS, TRAINED, UINT8, ShardWriter, Tokens
from data.texts import CommonEnding, Documents, Piece, chat_pieces
from data.tokenizers import CharTokenizer, Tokenizer
from gpt12.errors import UserError
from gpt12.files import lock_folder, write_atomically

if TYPE_CHECKING:
    from tqdm import tqdm

FEW_DOCUMENTS = 20  # fewer texts are split by tokens: one of them may be most of the data
SAVE_TOKENS = 20_000_000  # tokens between two saves of the progress


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
) -> None:
    """Write the train and val shards and meta.json of some documents into a folder.

    If this is killed and called again, it continues and leaves the same shards. Instruction data,
    which are small, start again; they are packed into rows of block_size tokens.

    max_tokens: leave out the documents after this many tokens.
    expected_tokens: for the progress bar, if neither max_tokens nor the files' size says the end.
    Raises UserError for texts that cannot be read, or that are too short to train and validate on.
    """
    from tqdm import tqdm

    split = ValidationSplit(documents, val_fraction)
    source_bytes = sum(file.stat().st_size for file in documents.files)
    meta = _describe_tokenizer(tokenizer)
    locked = f"Another process is preparing the data in {folder}. Wait until it has ended."
    with lock_folder(folder, if_locked=locked):
        made_by = _made_by(documents, tokenizer, val_fraction)
        so_far = PreparationProgress(made_by)
        if documents.kind == "text":
            so_far = PreparationProgress.load(folder, made_by)
        with tqdm(
            desc=name,
            total=max_tokens or expected_tokens,
            initial=so_far.train + so_far.val,
            unit=" tokens",
            unit_scale=True,
            disable=None,  # no bar in a log file
        ) as bar:
            encoded = _encode_documents(documents, tokenizer, so_far, bar, source_bytes, max_tokens)
            if documents.kind == "text":
                _write_texts(encoded, split, so_far, folder, tokenizer.dtype)
            else:
                ending = CommonEnding()
                cut = _write_rows(encoded, split, so_far, folder, tokenizer, block_size, ending)
                meta |= {"kind": documents.kind, "row": block_size, "cut": cut}
                if documents.kind == "prompt":
                    meta["prompt_ending"] = ending.text()
        if min(so_far.train, so_far.val) < 2:
            raise UserError(_too_short(name, so_far, meta))
        meta |= {"documents": so_far.documents, "source_sha256": so_far.source_sha256}
        write_atomically(folder / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
        (folder / "progress.json").unlink(missing_ok=True)


def _describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what meta.json says about the tokenizer."""
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": len(tokenizer.names),  # without added tokens, which no text becomes
        "chars": "".join(tokenizer.names) if isinstance(tokenizer, CharTokenizer) else None,
    }


def _made_by(documents: Documents, tokenizer: Tokenizer, val_fraction: float) -> list[Any]:
    """Return everything that decides what the shards hold."""
    stats = [file.stat() for file in documents.files]
    size = sum(stat.st_size for stat in stats)
    changed = max((stat.st_mtime_ns for stat in stats), default=0)
    return [
        documents.source,
        documents.text_column,
        size,
        changed,
        tokenizer.sha256,
        val_fraction,
    ]


def _too_short(name: str, so_far: PreparationProgress, meta: dict[str, Any]) -> str:
    tokens = so_far.train + so_far.val
    message = f"{name} is too short to train on and to validate: it has {tokens} tokens."
    if meta.get("cut"):
        message += (
            f" {meta['cut']} of {so_far.documents} examples were longer than a row of "
            f"{meta['row']} tokens, and left out if nothing of the answer remained. Shorten them, "
            "or pass a larger --block_size=."
        )
    return message


def check_characters(name: str, documents: Documents, tokenizer: CharTokenizer) -> None:
    """Raise UserError if a tokenizer of another data set lacks characters of these documents.

    name: the data set's name, for messages.
    """
    if documents.kind == "messages":
        heading = chat_pieces([{"role": "assistant", "content": ""}])[0].text
        unknown = sorted(set(heading).difference(tokenizer.names))
        if unknown:
            raise UserError(
                f"{name} holds conversations, and the tokenizer does not know "
                f"{', '.join(map(repr, unknown))}, which the chat template's heading {heading!r} "
                'needs. Give them as "prompt" and "completion", which are taken as they are.'
            )
    found: set[str] = set()
    for piece in documents:
        found.update(piece.text)
    tokenizer.check_characters(found, source=name)


class ValidationSplit:
    """Decides which documents are for validation: those whose index has a hash below a fraction.

    Among the first FEW_DOCUMENTS chance might choose none, so there the smallest hashes are chosen,
    at least one. Documents added after those do not change the side of earlier ones. If there are
    fewer texts than that, none is chosen, and prepare_texts splits them by tokens.
    """

    def __init__(self, documents: Documents, fraction: float) -> None:
        self.fraction = fraction
        ends = (piece for piece in documents if piece.last)
        self._first = sum(1 for _ in itertools.islice(ends, FEW_DOCUMENTS))
        by_hash = sorted(range(self._first), key=_hash_below_one)
        self._chosen = set(by_hash[: max(1, round(self._first * fraction))])
        if self._first < FEW_DOCUMENTS and documents.kind == "text":
            self._chosen = set()

    def __contains__(self, document: int) -> bool:
        if document < self._first:
            return document in self._chosen
        return _hash_below_one(document) < self.fraction


def _hash_below_one(document: int) -> float:
    """Hash a document's index to a number from 0 to 1."""
    digest = hashlib.sha256(str(document).encode()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32


@dataclass
class PreparationProgress:
    """How far a preparation has come, as saved in progress.json beside the shards."""

    made_by: list[Any]
    documents: int = 0  # read to their end
    pieces: int = 0  # read of the document after these
    size: int = 0  # bytes read, as UTF-8
    train: int = 0  # tokens written
    val: int = 0
    source_sha256: str = ""  # each piece is hashed together with the hash of all pieces before it

    @classmethod
    def load(cls, folder: Path, made_by: list[Any]) -> PreparationProgress:
        """Return where an interrupted preparation of the same texts was, else the beginning."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            content = json.loads((folder / "progress.json").read_bytes())
            so_far = cls(**content)
            if so_far.made_by == made_by:
                return so_far
        return cls(made_by)

    def save(self, folder: Path) -> None:
        """Write progress.json. The tokens that it counts must be on the disk."""
        write_atomically(folder / "progress.json", json.dumps(asdict(self)).encode())

    def add(self, piece: Piece) -> None:
        """Count a piece that was read."""
        text = piece.text.encode("utf-8", "surrogatepass")
        before = bytes.fromhex(self.source_sha256)
        self.source_sha256 = hashlib.sha256(before + text).hexdigest()
        self.size += len(text)
        if piece.last:
            self.documents += 1
            self.pieces = 0
        else:
            self.pieces += 1


class EncodedPiece(NamedTuple):
    """A piece with the index of its document, and its ids with those that end it."""

    document: int
    piece: Piece
    ids: np.ndarray


def _encode_documents(
    documents: Documents,
    tokenizer: Tokenizer,
    so_far: PreparationProgress,
    bar: tqdm,
    source_bytes: int,
    max_tokens: int | None,
) -> Iterator[EncodedPiece]:
    """Yield everything after `so_far` in order, and keep it and the bar up to date.

    A document comes in pieces: the parts of a long text, the prompt and the answer of an example.
    source_bytes: the size of the files, from which the bar's end is estimated; 0 if unknown.
    """
    # so_far.pieces: those of the document in progress that are encoded already.
    rest = itertools.islice(documents.skip(so_far.documents), so_far.pieces, None)
    tokens = so_far.train + so_far.val
    estimate_total = bar.total is None and source_bytes > 0
    for piece, ids in encode_pieces(rest, tokenizer, _end_ids(documents, tokenizer)):
        begins_document = so_far.pieces == 0
        if max_tokens is not None and tokens >= max_tokens and begins_document:
            return
        document = so_far.documents
        so_far.add(piece)
        tokens += len(ids)
        if estimate_total and so_far.size > 0:
            bar.total = tokens * source_bytes // so_far.size
        bar.update(len(ids))
        yield EncodedPiece(document, piece, ids)


def _end_ids(documents: Documents, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a document.

    A character tokenizer has no end token. There a line end keeps several documents apart.
    """
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    if "\n" in tokenizer.names and not documents.is_one_text:
        return tokenizer.encode("\n").tolist()
    return []


def _write_texts(
    encoded: Iterator[EncodedPiece],
    split: ValidationSplit,
    so_far: PreparationProgress,
    folder: Path,
    dtype: np.dtype,
) -> None:
    """Write texts as shards, and save the progress now and then."""
    train = ShardWriter(folder, "train", dtype, start=so_far.train)
    val = ShardWriter(folder, "val", dtype, start=so_far.val)
    saved = so_far.train + so_far.val
    for document, _, ids in encoded:
        writer = val if document in split else train
        writer.add(ids)
        so_far.train = train.count
        so_far.val = val.count
        if so_far.train + so_far.val - saved >= SAVE_TOKENS:
            train.flush()
            val.flush()
            so_far.save(folder)
            saved = so_far.train + so_far.val
    train.close()
    if so_far.val == 0 and so_far.train >= 2:
        _move_end_to_val(val, split.fraction, so_far, folder, dtype)
    val.close()


def _move_end_to_val(
    val: ShardWriter, fraction: float, so_far: PreparationProgress, folder: Path, dtype: np.dtype
) -> None:
    """Move the last tokens from train to val, at least two.

    If this is killed before the progress is saved, train still holds all tokens. If it is killed
    afterwards, both hold the end, and the ShardWriter that starts at `keep` removes it from train.
    """
    keep = min(int(so_far.train * (1 - fraction)), so_far.train - 2)
    tokens = Tokens.open(folder, "train")
    for start in range(keep, len(tokens), CHUNK_TOKENS):
        length = min(CHUNK_TOKENS, len(tokens) - start)
        val.add(tokens.gather(np.array([start]), length)[0])
    tokens.close()
    val.flush()
    so_far.train = keep
    so_far.val = val.count
    so_far.save(folder)
    train = ShardWriter(folder, "train", dtype, start=keep)
    train.close()


def _write_rows(
    encoded: Iterator[EncodedPiece],
    split: ValidationSplit,
    so_far: PreparationProgress,
    folder: Path,
    tokenizer: Tokenizer,
    block_size: int,
    ending: CommonEnding,
) -> int:
    """Write instruction data as rows. Return how many examples were too long and were cut.

    ending: is told each prompt.
    """
    padding = tokenizer.eot or 0
    train = RowWriter(folder, "train", tokenizer.dtype, block_size, padding)
    val = RowWriter(folder, "val", tokenizer.dtype, block_size, padding)
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
    so_far.train = train.tokens.count
    so_far.val = val.tokens.count
    return train.cut + val.cut
