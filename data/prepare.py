"""Turn documents into the train and val shards of a data set.

The documents are tokenized on all cores. Texts are written one after another, in constant memory,
and an interrupted preparation goes on where it was. Examples with questions and answers must not
see each other: they are packed whole into windows of a fixed length.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.shards import (
    EXAMPLE_START,
    TRAINED,
    UINT8,
    ShardWriter,
    Tokens,
    find_shards,
    token_dtype,
    write_shards,
)
from data.texts import FEW_DOCUMENTS, Documents, Found, Piece
from data.tokenizers import Tokenizer, get_tokenizer
from gpt12.errors import UserError
from gpt12.files import lock_folder, sha256, write_atomically

PIECES_AT_ONCE = 32  # a thread's share at a time: handing it over then costs little
SAVE_TOKENS = 20_000_000  # tokens between two saves of the progress
OPEN_WINDOWS = 64  # windows that wait for an example that still fits
# Version of what is made of texts. What an older version prepared in data/cache is prepared again.
FORMAT = 7


@dataclass
class Written:
    """What has been written of a data set. progress.json keeps it, so that a later call goes on."""

    next: int = 0  # the index of the document that comes next
    count: int = 0  # documents written; the others were blank
    train: int = 0  # tokens written
    val: int = 0


class Encoded(NamedTuple):
    """A piece of a document as ids, with its end token."""

    document: int  # its index
    ids: np.ndarray
    trained: bool


def prepare_texts(
    documents: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float = 0.1,
    *,
    block_size: int = 1024,
    max_tokens: float = float("inf"),
) -> None:
    """Write the train and val shards of some documents, and what belongs to them, into a folder.

    The tokenizer there has the chat template for questions like those of the examples.
    If this is killed and called again, it goes on after the last saved text and leaves the same
    shards. Examples, which are small, start again; their windows have block_size tokens.

    max_tokens: leave out the texts after this many tokens.
    Raises UserError for texts that cannot be read, or that are too short to train and validate on.
    """
    locked = f"Another process is preparing the data in {folder}. Wait until it has ended."
    with lock_folder(folder, if_locked=UserError(locked)):
        found = Found()
        if documents.kind == "text":
            written = _write_texts(documents, found, tokenizer, folder, val_fraction, max_tokens)
            window = None
        else:
            written = _write_examples(documents, found, tokenizer, folder, val_fraction, block_size)
            window = block_size
        notes = documents.notes + found.notes
        blank = found.count - written.count
        if blank:
            notes.append(f"{blank:,} blank texts or answers were left out.")
        if min(written.train, written.val) < 2:
            tokens = written.train + written.val
            problem = f"is too short to train on and to validate: it has {tokens} tokens."
            raise UserError(" ".join([documents.source, problem, *notes]))
        tokenizer = copy.copy(tokenizer)  # the model's own one keeps its template
        tokenizer.chat_template = None
        if window is not None:
            tokenizer.chat_template = found.chat_template(documents.kind, tokenizer.eot is not None)
        write_meta(folder, tokenizer, written.count, notes, window)
        (folder / "progress.json").unlink(missing_ok=True)


def prepare_corpus(
    folder: Path, source: str, val_fraction: float, max_tokens: float = float("inf")
) -> None:
    """Tokenize a hub data set with GPT-2's tokenizer into a folder.

    Raises UserError if it is prepared already.
    """
    if (folder / "meta.json").exists() and not (folder / "progress.json").exists():
        raise UserError(
            f"{folder} is prepared already. To prepare it again, delete meta.json and the .bin "
            "files in it."
        )
    tokenizer = get_tokenizer("gpt2")
    prepare_texts(Documents(source), tokenizer, folder, val_fraction, max_tokens=max_tokens)


def write_meta(
    folder: Path,
    tokenizer: Tokenizer,
    document_count: int,
    notes: list[str],
    window: int | None = None,
) -> None:
    """Write the tokenizer's files and meta.json beside the shards of a data set.

    notes: what the user should know about the data.
    window: the block_size for which examples were packed; None for texts.
    """
    tokenizer.save(folder)
    digest = sha256(find_shards(folder, "val")[0])
    meta = {"documents": document_count, "val_sha256": digest, "window": window, "notes": notes}
    write_atomically(folder / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())


def is_for_validation(document: int, first: list[int], fraction: float) -> bool:
    """Tell whether a document is for validation: the hash of its index lies below the fraction.

    Among the first ones chance might choose none, so there the smallest hashes are chosen, at least
    one. Documents added later do not change the side of earlier ones.

    first: the indices of the first FEW_DOCUMENTS.
    """
    if document not in first:
        return _hash_below_one(document) < fraction
    by_hash = sorted(first, key=_hash_below_one)
    return document in by_hash[: max(1, round(len(first) * fraction))]


def _hash_below_one(document: int) -> float:
    """Hash a document's index to a number from 0 to 1."""
    digest = hashlib.sha256(str(document).encode()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32


def _encode(documents: Documents, found: Found, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode the pieces of the documents on all cores, and show how far it is.

    The first found.count documents are left out; `found` gets what is found in the others.

    A document becomes the tokens that its tokenizer begins every text with (GPT-2's: none), those
    of its pieces, and its end: the end-of-text token, or a line end where there is none.
    """
    from tqdm import tqdm

    # A chat template decides what begins an example.
    begin = np.array(tokenizer.begin if documents.kind == "text" else [], np.uint32)
    end = np.array(tokenizer.end, np.uint32)
    if tokenizer.eot is None and len(documents.first_indices) == 1:
        end = end[:0]  # a line end keeps documents apart; after a single text it is not needed

    def encode(share: list[tuple[int, Piece]]) -> list[Encoded]:
        encoded = []
        for document, piece in share:
            ids = tokenizer.encode(piece.text, piece.after)
            if not piece.after:  # the first of a text
                ids = np.concatenate((begin, ids))
            if piece.end:
                ids = np.concatenate((ids, end))
            encoded.append(Encoded(document, ids, piece.trained))
        return encoded

    pieces = documents.pieces(found)
    cores = os.cpu_count() or 1
    with (
        ThreadPoolExecutor(cores) as threads,
        # disable=None: shown on a terminal only
        tqdm(desc=documents.source, unit=" tokens", unit_scale=True, disable=None) as bar,
    ):
        while any(
            shares := [list(itertools.islice(pieces, PIECES_AT_ONCE)) for _ in range(2 * cores)]
        ):
            for share in threads.map(encode, shares):
                yield from share
                bar.update(sum(len(encoded.ids) for encoded in share))


# --------------------------------------------------------------------------------------------------
# Texts


def _write_texts(
    documents: Documents,
    found: Found,
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float,
    max_tokens: float,
) -> Written:
    """Write each text to the shards of its split, after those that an interrupted call has saved.

    Few texts are all written to train. Then the end of train moves to val.
    """
    file = folder / "progress.json"
    # By order: an older version has other names in it.
    written = Written(*json.loads(file.read_bytes()).values()) if file.exists() else Written()
    found.count = written.next
    first = documents.first_indices
    few = len(first) < FEW_DOCUMENTS
    dtype = token_dtype(tokenizer.text_vocab_size)
    train = ShardWriter(folder, "train", dtype, start=written.train)
    val = ShardWriter(folder, "val", dtype, start=written.val)
    saved = written.train + written.val
    encoded = _encode(documents, found, tokenizer)
    for document, pieces in itertools.groupby(encoded, key=lambda piece: piece.document):
        is_val = not few and is_for_validation(document, first, val_fraction)
        writer = val if is_val else train
        for piece in pieces:
            writer.add(piece.ids)
        written = Written(document + 1, written.count + 1, train.count, val.count)
        total = train.count + val.count
        if total >= max_tokens:
            found.count = document + 1  # pieces ahead of it were read
            break
        if total - saved >= SAVE_TOKENS:
            train.flush()
            val.flush()
            write_atomically(file, json.dumps(asdict(written)).encode())
            saved = total
    train.close()
    val.close()
    if few:
        _move_end_to_val(folder, written, val_fraction)
    return written


def _move_end_to_val(folder: Path, written: Written, val_fraction: float) -> None:
    """Move the last tokens of the train shards, at least two, to val."""
    keep = min(int(written.train * (1 - val_fraction)), written.train - 2)
    if keep < 2:
        return  # there is too little text
    # If the program is stopped from here on, the next call prepares everything again.
    (folder / "progress.json").unlink(missing_ok=True)
    tokens = Tokens(folder, "train")
    val = ShardWriter(folder, "val", tokens.dtype)
    for chunk in tokens.chunks(keep):
        val.add(chunk)
    tokens.close()
    ShardWriter(folder, "train", tokens.dtype, start=keep).close()
    val.close()  # the last step: a data set is there when it has a val shard
    written.val = written.train - keep
    written.train = keep


# --------------------------------------------------------------------------------------------------
# Questions and answers

# Ids, and a mask: TRAINED where a token is a target, else 0.
Example = tuple[np.ndarray, np.ndarray]


def _write_examples(
    documents: Documents,
    found: Found,
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float,
    block_size: int,
) -> Written:
    """Write examples, packed into windows, and note what the user should know about them.

    An example that is longer than a window is cut, and left out if nothing trained remains.
    """
    first = documents.first_indices
    examples: dict[str, list[Example]] = {"train": [], "val": []}
    written = Written()
    cut = 0
    encoded = _encode(documents, found, tokenizer)
    for document, group in itertools.groupby(encoded, key=lambda piece: piece.document):
        pieces = list(group)
        ids = np.concatenate([piece.ids for piece in pieces])
        masks = [np.full(len(piece.ids), TRAINED * piece.trained, UINT8) for piece in pieces]
        mask = np.concatenate(masks)
        cut += len(ids) > block_size
        written.count += 1
        if mask[1:block_size].any():
            split = "val" if is_for_validation(document, first, val_fraction) else "train"
            examples[split].append((ids[:block_size], mask[:block_size]))
    written.train = write_packed(folder, "train", examples["train"], block_size, tokenizer)
    written.val = write_packed(folder, "val", examples["val"], block_size, tokenizer)
    if tokenizer.eot is None:
        advice = "Sample with --stop='\\n'." if tokenizer.end else "Use another --tokenizer=."
        found.notes.append(
            "This tokenizer has no end-of-text token, so answers will not end by themselves. "
            f"{advice}"
        )
    if found.unanswered:
        found.notes.append(
            f"{found.unanswered:,} conversations end with a message that has no answer. It was "
            "left out."
        )
    if documents.kind == "prompt" and found.ending == "":
        found.notes.append(
            "The prompts have no common ending, so the model cannot see where a question ends and "
            "its answer begins. End every prompt in the same way, for example with a line end."
        )
    if cut:
        left_out = written.count - len(examples["train"]) - len(examples["val"])
        found.notes.append(
            f"{cut:,} of {written.count:,} examples were longer than {block_size} tokens and "
            f"were cut; {left_out:,} were left out, because nothing of the answer remained. A "
            "larger --block_size= keeps more."
        )
    return written


def write_packed(
    folder: Path, split: str, examples: list[Example], size: int, tokenizer: Tokenizer
) -> int:
    """Write examples, packed whole into windows of `size` tokens, as shards and mask shards.

    An example goes into the first open window that has room for it. Its first token is never a
    target, because no token of the example comes before it.

    The mask says where each example starts. So the model can keep attention inside an example and
    count positions from its start: an example is computed as if it were alone.

    The end token, or id 0, fills the end of a window. Returns the number of tokens.
    """
    used: list[int] = []  # tokens in each window
    places = []  # where each example begins
    for ids, _ in examples:
        open_windows = range(max(0, len(used) - OPEN_WINDOWS), len(used))
        fitting = (window for window in open_windows if used[window] + len(ids) <= size)
        window = next(fitting, len(used))
        if window == len(used):
            used.append(0)
        places.append(window * size + used[window])
        used[window] += len(ids)
    # Targets are the inputs shifted by one, so the last window needs a token to end with.
    length = len(used) * size + 1
    dtype = token_dtype(tokenizer.text_vocab_size)
    tokens = np.full(length, tokenizer.eot or 0, dtype)
    mask = np.zeros(length, UINT8)
    for place, (ids, trained) in zip(places, examples):
        tokens[place : place + len(ids)] = ids
        mask[place : place + len(ids)] = trained
        mask[place] = EXAMPLE_START
    write_shards(folder, split, tokens, dtype)
    write_shards(folder, f"{split}_mask", mask, UINT8)
    return length
