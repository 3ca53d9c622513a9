"""A data set by its name or path: token shards, the tokenizer that made them, and how they are made out of texts."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError
from data.prepare import prepare_texts
from data.run import sha256
from data.shards import UINT16, Tokens, find
from data.texts import CHAT_TEMPLATE, Documents
from data.tokenizers import CharTokenizer, Tokenizer, from_meta, get_tokenizer

__all__ = ["Dataset", "open_dataset", "prepare_texts"]

DATA = Path(__file__).parent


@dataclass
class Dataset:
    """A data set that is ready: its splits, and what is known of them. `train` is None if there are only val shards."""

    name: str
    folder: Path
    tokenizer: Tokenizer | None
    vocab_size: int
    meta: dict[str, Any]
    train: Tokens | None
    val: Tokens
    source_sha256: str | None
    documents: int | None
    warnings: list[str]


def open_dataset(
    name: str,
    *,
    tokenizer: str | Tokenizer = "auto",
    val_fraction: float = 0.1,
    text_column: str = "text",
    block_size: int,
    progress: bool = True,
) -> Dataset:
    """Open the data set `name`, preparing it if need be.

    name: a folder of data/; else a path to a folder of shards, a text file or a folder of text files; or
    hf:owner/name. Texts are tokenized once into data/cache/. tokenizer: auto takes the data set's own, for texts gpt2.
    UserError for a data set that does not exist, is damaged, or was made with another tokenizer or row length.
    """
    try:
        folder = DATA / name
        if Path(name).name == name and folder.is_dir():
            _prepare_named(folder)
        elif not find(folder := Path(name), "val"):
            tokenizer = "gpt2" if tokenizer == "auto" else tokenizer
            folder = _prepare_cache(name, tokenizer, val_fraction, text_column, block_size, progress)
    except OSError as error:
        raise UserError(
            f"{name} could not be prepared: {error}. What is done is kept; the same command goes on there."
        ) from error
    dataset = _open(name, folder)
    wanted = tokenizer if isinstance(tokenizer, str) else tokenizer.sha256
    own = ("auto", dataset.tokenizer.name, dataset.tokenizer.sha256) if dataset.tokenizer else ("auto",)
    if wanted not in own:
        raise UserError(
            f"{folder} was made with {f'the tokenizer {own[1]}' if own[1:] else 'an unknown tokenizer'}, not with the "
            f"{wanted if wanted == tokenizer else 'model'}'s. Give its text as --dataset=FILE."
        )
    if dataset.meta.get("row", block_size) != block_size:
        raise UserError(f"{folder} holds rows of {dataset.meta['row']} tokens: use --block_size={dataset.meta['row']}.")
    return dataset


def _prepare_named(folder: Path) -> None:
    """Run data/<name>/prepare.py if its shards are missing; UserError if that takes more than a moment."""
    unfinished = (folder / "progress.json").exists()
    if find(folder, "val") and not unfinished:
        return
    command = f"python {folder / 'prepare.py'}"
    if not (folder / "prepare.py").exists():
        raise UserError(f"{folder} holds neither val shards (val_*.bin, *_val_*.bin, val.bin) nor a prepare.py.")
    module = importlib.import_module(f"data.{folder.name}.prepare")
    if not hasattr(module, "prepare") or hasattr(module, "COST"):
        state = "is not finished; this goes on where it was" if unfinished else "is not prepared; this does it"
        raise UserError(f"The data set {folder.name} {state} ({getattr(module, 'COST', 'once')}): {command}")
    module.prepare()


def _prepare_cache(
    name: str, tokenizer: str | Tokenizer, val_fraction: float, text_column: str, block_size: int, progress: bool
) -> Path:
    """The folder in data/cache of these texts' shards; whatever would change the shards changes its name."""
    hub = name.startswith("hf:")
    if not hub and not os.path.exists(name):
        known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"There is no data set {name!r}." + (f" Did you mean {near[0]}?" if near else "") + " It may be one of "
            f"{', '.join(known)}, a .txt, .csv or .jsonl file, a folder of these, or hf:owner/name."
        )
    documents = None if hub else Documents(name, text_column)  # the hub is asked only for what is not there yet
    stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:50]
    content = [(file.name, sha256(file)) for file in documents.files] if documents else name
    made_with = tokenizer if isinstance(tokenizer, str) else tokenizer.sha256

    def folder_of(row: int | None) -> Path:
        made_by = json.dumps([content, made_with, val_fraction, text_column, row])
        return DATA / "cache" / f"{stem}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}"

    for folder in (folder_of(None), folder_of(block_size)):
        if folder.exists():
            return folder
    documents = documents or Documents(name, text_column)
    folder = folder_of(None if documents.kind == "text" else block_size)
    # One name for all contents: what a kill leaves is gone on with, what a mistake leaves is overwritten.
    building = DATA / "cache" / f"{stem}-{documents.kind}.tmp"
    if tokenizer == "char":
        tokenizer = CharTokenizer("".join(sorted(set().union(*(piece.text for piece in documents)))))
    elif isinstance(tokenizer, str):
        tokenizer = get_tokenizer(tokenizer)
    prepare_texts(name, documents, tokenizer, building, val_fraction, block_size=block_size, progress=progress)
    building.rename(folder)
    return folder


def _open(name: str, folder: Path) -> Dataset:
    """The data set in a folder with shards, as it is."""
    warnings, meta, tokenizer = [], {}, None
    val = Tokens.open(folder, "val")
    train = Tokens.open(folder, "train") if find(folder, "train") else None
    splits = [split for split in (train, val) if split is not None]
    if (folder / "meta.json").exists():
        meta = _read_meta(folder / "meta.json")
        vocab_size, tokenizer = meta["vocab_size"], from_meta(meta, folder)
        if tokenizer is not None and meta.get("kind") == "messages":
            tokenizer.chat_template = CHAT_TEMPLATE
        if meta.get("cut"):
            warnings.append(
                f"{meta['cut']:,} of {meta['documents']:,} examples did not fit into {meta['row']} tokens and were cut."
            )
    elif (folder / "meta.pkl").exists() or val.dtype != UINT16:
        vocab_size = max(split.max_id() for split in splits) + 1
        warnings.append(
            f"{folder} has no meta.json (a meta.pkl is never opened: it can run programs). It is trained with a "
            f"vocabulary of {vocab_size:,}, the largest id plus one, but its samples cannot be turned into text."
        )
    else:
        tokenizer = get_tokenizer("gpt2")  # as in nanoGPT: bare shards are GPT-2's
        vocab_size = tokenizer.vocab_size
    for split in splits:
        split.check_vocab(vocab_size)
    return Dataset(
        name,
        folder,
        tokenizer,
        vocab_size,
        meta,
        train,
        val,
        meta.get("source_sha256"),
        meta.get("documents"),
        warnings,
    )


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text("utf-8"))
        numbers = [meta["vocab_size"], *(meta[key] for key in ("documents", "row", "cut") if meta.get(key) is not None)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). Prepare the data again.") from None
    if not all(type(number) is int and number >= 0 for number in numbers) or not meta["vocab_size"]:
        raise UserError(f"{path} is damaged: its numbers should be whole and not negative, and are {numbers}.")
    return meta
