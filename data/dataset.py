"""A data set by its name or path: its shards, the tokenizer that made them, and how they come to be there."""

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

from data.prepare import FEW, prepare_texts
from data.shards import UINT16, Tokens, find_shards
from data.texts import CHAT_TEMPLATE, Documents
from data.tokenizers import CharTokenizer, Tokenizer, from_meta, get_tokenizer
from gpt12.errors import UserError
from gpt12.files import sha256

__all__ = ["Dataset", "check_exists", "open_dataset", "prepare_texts"]

DATA = Path(__file__).parent


@dataclass
class Dataset:
    """A data set that is ready. meta is its meta.json; what is not known (nanoGPT's sets have no such file) is None."""

    name: str
    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer | None
    vocab_size: int
    train: Tokens | None  # None where there are only val shards
    val: Tokens
    warnings: list[str]

    @property
    def documents(self) -> int | None:
        return self.meta.get("documents")

    @property
    def source_sha256(self) -> str | None:
        return self.meta.get("source_sha256")


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

    name: a folder of data/; else a path to a folder of shards, to a text file, or to a folder of text files; or
    hf:owner/name. Texts are tokenized once, into data/cache/. tokenizer: "auto" is the data set's own, for texts gpt2.
    UserError for a data set that does not exist, is damaged, or was made with another tokenizer or row length.
    """
    check_exists(name)
    try:
        folder = Path(name)
        if folder.name == name != "" and (DATA / name).is_dir():
            folder = DATA / name
            _prepare_named(folder)
        elif not find_shards(folder, "val"):
            tokenizer = "gpt2" if tokenizer == "auto" else tokenizer
            folder = _prepare_cache(name, tokenizer, val_fraction, text_column, block_size, progress)
    except OSError as error:  # a full disk, no right to write, the network
        raise UserError(
            f"{name} could not be prepared: {error}. What is done is kept; begin again to go on."
        ) from error
    dataset = _open(name, folder)
    own, row = dataset.tokenizer, dataset.meta.get("row", block_size)
    wanted = tokenizer if isinstance(tokenizer, str) else tokenizer.sha256
    if wanted != "auto" and (own is None or wanted not in (own.name, own.sha256)):
        raise UserError(
            f"{folder} was made with {f'the tokenizer {own.name}' if own else 'an unknown tokenizer'}, not with "
            f"{tokenizer if isinstance(tokenizer, str) else 'that of the model'}. Pass the text itself: --dataset=FILE."
        )
    if row != block_size:
        raise UserError(f"{folder} holds rows of {row} tokens: use --block_size={row}.")
    held, total = len(dataset.val), len(dataset.val) + len(dataset.train or ())
    # In rows of examples padding counts, too, and a handful of these fills a row as well as a hundred.
    chance = folder.parent == DATA / "cache" and (dataset.documents or 0) >= FEW and "row" not in dataset.meta
    if chance and not val_fraction / 2 <= held / total <= 2 * val_fraction:
        dataset.warnings.append(
            f"validation has {held:,} of {total:,} tokens, {held / total:.2%}, not about {val_fraction:.2%}: a document goes "
            "whole to one side, however long. For another share cut long ones, or choose another --val_fraction."
        )
    return dataset


def check_exists(name: str) -> None:
    """UserError if there is nothing by this name or path: to be known before a model is fetched."""
    # Unlike Path's, these two do not raise for a name that no system can have.
    named = Path(name).name == name != "" and os.path.isdir(DATA / name)  # noqa: PTH112
    if not (named or name.startswith("hf:") or os.path.exists(name)):  # noqa: PTH110
        known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"There is no data set {name!r}." + (f" Did you mean {near[0]}?" if near else "") + " It may be one of "
            f"{', '.join(known)}, a .txt, .csv or .jsonl file, a folder of these, or hf:owner/name."
        )


def _prepare_named(folder: Path) -> None:
    """Run data/<name>/prepare.py if its shards are missing; UserError if that takes more than a moment."""
    if find_shards(folder, "val"):
        return
    if not (folder / "prepare.py").exists():
        raise UserError(f"{folder} holds neither val shards (val_*.bin, *_val_*.bin, val.bin) nor a prepare.py.")
    module = importlib.import_module(f"data.{folder.name}.prepare")
    if hasattr(module, "COST") or not hasattr(module, "prepare"):
        import torch

        cost, preset = getattr(module, "COST", "once"), "char" if torch.cuda.is_available() else "cpu"
        raise UserError(
            f"The data set {folder.name} is not prepared. Run ({cost}): python {folder / 'prepare.py'}\n"
            "Or choose other data, say --dataset=my.txt, or a preset that brings its own: "
            f"config/train_shakespeare_{preset}.py"
        )
    module.prepare()


def _prepare_cache(
    name: str, tokenizer: str | Tokenizer, val_fraction: float, text_column: str, block_size: int, progress: bool
) -> Path:
    """The folder in data/cache of these texts' shards, whose name holds all that made them."""
    hub = name.startswith("hf:")
    documents = None if hub else Documents(name, text_column)  # the hub is asked only for what is not there yet
    content = [(file.name, sha256(file)) for file in documents.files] if documents else name
    # By name where that says it all: resuming, which brings the model's own tokenizer, finds what the run began with.
    chars = isinstance(tokenizer, CharTokenizer)
    made_with = tokenizer if isinstance(tokenizer, str) else tokenizer.sha256 if chars else tokenizer.name
    stem = DATA / "cache" / (re.sub(r"[^\w.-]+", "-", Path(name).stem)[:50] or "texts")
    for row in (None, block_size):  # only instruction data depend on the block size
        made_by = json.dumps([content, made_with, val_fraction, text_column, row])
        folder = Path(f"{stem}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}")
        if folder.exists():
            return folder
        if row is None:
            as_text = folder
    documents = documents or Documents(name, text_column)
    if tokenizer == "char":
        apart = "" if documents.whole else "\n"
        tokenizer = CharTokenizer("".join(sorted(set(apart).union(*(piece.text for piece in documents)))))
    elif isinstance(tokenizer, str):
        tokenizer = get_tokenizer(tokenizer)
    # One name for all contents: what a kill leaves is gone on with, and what a mistake leaves is overwritten.
    building = Path(f"{stem}-{documents.kind}.tmp")
    prepare_texts(name, documents, tokenizer, building, val_fraction, block_size=block_size, progress=progress)
    return building.rename(as_text if documents.kind == "text" else folder)


def _open(name: str, folder: Path) -> Dataset:
    """The data set in a folder with shards, as it is."""
    if (folder / "progress.json").exists():
        raise UserError(
            f"The preparation of {folder} is not finished: begin it again to go on, or delete progress.json."
        )
    val, train = Tokens.open(folder, "val"), Tokens.open(folder, "train") if find_shards(folder, "train") else None
    splits = [split for split in (val, train) if split is not None]
    meta: dict[str, Any] = {}
    tokenizer, warnings = None, []
    if (folder / "meta.json").exists():
        meta = _read_meta(folder / "meta.json")
        vocab_size, tokenizer = meta["vocab_size"], from_meta(meta, folder)
        if tokenizer is not None and meta.get("kind") == "messages":
            tokenizer.chat_template = CHAT_TEMPLATE
        if tokenizer is not None and tokenizer.eot is None and "row" in meta:
            stop = "; sample with --stop='\\n'" if "\n" in tokenizer.names else ""
            warnings.append(f"This tokenizer has no end of text: answers will not end by themselves{stop}.")
        if meta.get("cut"):
            warnings.append(f"{meta['cut']:,} of {meta['documents']:,} examples were longer than a row and were cut.")
    elif (folder / "meta.pkl").exists() or val.dtype != UINT16:
        vocab_size = max(split.max_id() for split in splits) + 1
        warnings.append(
            f"{folder} has no meta.json (a meta.pkl is never opened: it can run programs). Its vocabulary is taken to "
            f"be {vocab_size:,}, the largest id plus one, and what a model of it writes cannot be turned into text."
        )
    else:
        tokenizer = get_tokenizer("gpt2")  # as in nanoGPT, shards without a word are GPT-2's
        vocab_size = tokenizer.vocab_size
    for split in splits:
        split.check_vocab(vocab_size)
    return Dataset(name, folder, meta, tokenizer, vocab_size, train, val, warnings)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        numbers = [meta["vocab_size"] - 1, *(meta.get(key, 0) for key in ("documents", "row", "cut"))]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"a number is missing, negative or not whole: {numbers}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). Prepare the data again.") from None
    return meta
