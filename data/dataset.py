"""Open a data set by its name or path: its shards, its tokenizer, and what is known about it.

A data set that is small, or a text, is prepared when it is first opened.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.prepare import FEW_DOCUMENTS, ROW_FORMAT, check_characters, prepare_texts
from data.readers import SUFFIXES
from data.shards import UINT16, Tokens, find_shards
from data.texts import CHAT_TEMPLATE, CHAT_TEMPLATE_OF_CHARACTERS, Documents, prompt_template
from data.tokenizers import CharTokenizer, Tokenizer, from_meta, get_tokenizer
from gpt12.errors import UserError
from gpt12.files import exists, sha256

DATA = Path(__file__).parent
SMALL = ("shakespeare", "shakespeare_char")  # data sets of ours that are prepared unasked
SHOWN_FILES = 5  # a warning about skipped files names at most this many


@dataclass
class Dataset:
    """A data set that is ready to be trained on.

    meta: the content of meta.json, empty if there is none (nanoGPT's data sets have none).
    tokenizer: None if it is not known.
    train: None if the folder holds only val shards.
    warnings: what the user should know about the data.
    """

    name: str
    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer | None
    vocab_size: int
    train: Tokens | None
    val: Tokens
    warnings: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What the data are: "text", "prompt" (prompts and completions) or "messages"."""
        return self.meta.get("kind", "text")

    @property
    def documents(self) -> int | None:
        """The number of documents, or None if it is not known."""
        return self.meta.get("documents")

    @property
    def source_sha256(self) -> str | None:
        """The hash of the text that the shards were made from, or None if it is not known."""
        return self.meta.get("source_sha256")


def open_dataset(
    name: str,
    *,
    tokenizer: str | Tokenizer = "auto",
    val_fraction: float = 0.1,
    text_column: str = "text",
    block_size: int,
) -> Dataset:
    """Open a data set, preparing it first if necessary.

    name: a folder in data/; or the path of a folder of shards, of a text file, or of a folder of
        text files; or hf:owner/name. Texts are tokenized once, into data/cache/.
    tokenizer: "auto" is the data set's own one, or gpt2 for texts.
    Raises UserError if the data set does not exist or is damaged, or if it was made with another
    tokenizer or row length.
    """
    check_exists(name)
    folder = DATA / name if _is_named(name) else Path(name)
    warnings: list[str] = []
    try:
        if _is_named(name) and not find_shards(folder, "val"):
            _prepare_named(folder)
        if not find_shards(folder, "val"):
            asked = "gpt2" if tokenizer == "auto" else tokenizer
            folder, warnings = _prepare_text(name, asked, val_fraction, text_column, block_size)
    except OSError as error:  # a full disk, no right to write, the network
        raise UserError(
            f"{name} could not be prepared: {error}. "
            "What is done so far is kept: run the command again to continue."
        ) from error
    dataset = _read_dataset(name, folder)
    dataset.warnings += warnings
    _check_tokenizer(dataset, tokenizer)
    row = dataset.meta.get("row", block_size)
    if row != block_size:
        raise UserError(f"{folder} holds rows of {row} tokens. Use --block_size={row}.")
    if folder.parent == DATA / "cache":
        _check_val_share(dataset, val_fraction)
    return dataset


# ----------------------------------------------------------------------------------------------
# Finding


def check_exists(name: str) -> None:
    """Raise UserError if there is no data set of this name. This takes no time."""
    if _is_named(name) or name.startswith("hf:") or exists(name):
        return
    shown = repr(name[:200])
    known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
    looks_like_path = "/" in name or os.sep in name or name.lower().endswith(SUFFIXES)
    if looks_like_path:
        problem = f"There is no data set {shown}: no such file or folder exists."
    else:
        problem = f"There is no data set {shown}."
        for near in difflib.get_close_matches(name, known, 1):
            problem += f" Did you mean {near}?"
    endings = ", ".join(SUFFIXES[:-1])
    raise UserError(
        f"{problem} It may be one of {', '.join(known)}, a {endings} or {SUFFIXES[-1]} file, a "
        "folder of such files, or hf:owner/name."
    )


def _is_named(name: str) -> bool:
    """Return whether a name is that of a folder in data/."""
    return name != "" and Path(name).name == name and os.path.isdir(DATA / name)  # noqa: PTH112


# ----------------------------------------------------------------------------------------------
# Preparing


def _prepare_named(folder: Path) -> None:
    """Prepare a data set in data/ that has no shards, if it is one of our small ones."""
    if folder.name in SMALL:
        importlib.import_module(f"data.{folder.name}.prepare").prepare(folder)
    elif (folder / "prepare.py").exists():
        raise UserError(
            f"The data set {folder.name} is not prepared. Run: python {folder / 'prepare.py'} (its "
            f"first lines say what that takes)\n{_other_data()}"
        )
    else:
        raise UserError(
            f"{folder} holds neither val shards (val_*.bin, *_val_*.bin, val.bin) nor a prepare.py."
        )


def _other_data() -> str:
    import torch

    preset = "char" if torch.cuda.is_available() else "cpu"
    return (
        "Or choose other data, for example --dataset=my.txt, or a preset that brings its own: "
        f"config/train_shakespeare_{preset}.py"
    )


def _prepare_text(
    name: str,
    tokenizer: str | Tokenizer,
    val_fraction: float,
    text_column: str,
    block_size: int,
) -> tuple[Path, list[str]]:
    """Return the folder in data/cache/ that holds a text's shards, and what the user should know.

    The folder's name has a hash of everything that decides what the shards hold, so a folder that
    exists is what was asked for.
    """
    documents = None
    warnings: list[str] = []
    content: Any = name
    if not name.startswith("hf:"):  # the hub is asked only for what is not there yet
        documents = Documents(name, text_column)
        content = [(file.name, sha256(file)) for file in documents.files]
        if documents.skipped:
            warnings.append(_describe_skipped(name, documents.skipped))
    made_with = tokenizer
    if isinstance(tokenizer, Tokenizer):
        # By name, so that a resumed run, which brings its model's tokenizer, finds its data again.
        made_with = tokenizer.name if tokenizer.name in ("gpt2", "bytes") else tokenizer.sha256
    stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:50] or "texts"  # as all systems allow
    made_by = [content, made_with, val_fraction, text_column]
    folders = {}
    for kind, rows in (("text", None), ("rows", (block_size, ROW_FORMAT))):
        digest = hashlib.sha256(json.dumps([*made_by, rows]).encode()).hexdigest()
        folders[kind] = DATA / "cache" / f"{stem}-{digest[:12]}"
        if folders[kind].exists():
            return folders[kind], warnings
    documents = documents or Documents(name, text_column)
    finished = folders["text" if documents.kind == "text" else "rows"]
    building = finished.with_name(f"{finished.name}.tmp")
    prepare_texts(
        name,
        documents,
        _tokenizer_for(name, documents, tokenizer),
        building,
        val_fraction,
        block_size=block_size,
    )
    return building.rename(finished), warnings


def _tokenizer_for(name: str, documents: Documents, tokenizer: str | Tokenizer) -> Tokenizer:
    """Return the tokenizer for some documents; "char" is made from their characters."""
    if isinstance(tokenizer, CharTokenizer):
        check_characters(name, documents, tokenizer)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer != "char":
        return get_tokenizer(tokenizer)
    characters = set() if documents.is_one_text else {"\n"}  # a line end keeps documents apart
    for piece in documents:
        characters.update(piece.text)
    return CharTokenizer("".join(sorted(characters)))


def _describe_skipped(name: str, skipped: list[Path]) -> str:
    shown = ", ".join(file.name for file in skipped[:SHOWN_FILES])
    if len(skipped) > SHOWN_FILES:
        shown += f" and {len(skipped) - SHOWN_FILES:,} more"
    files = "file was" if len(skipped) == 1 else "files were"
    return (
        f"{len(skipped):,} {files} skipped in {name}, because only {', '.join(SUFFIXES)} are read: "
        f"{shown}."
    )


# ----------------------------------------------------------------------------------------------
# Reading


def _read_dataset(name: str, folder: Path) -> Dataset:
    """Read a data set from a folder with shards."""
    if (folder / "progress.json").exists():
        raise UserError(
            f"The preparation of {folder} is not finished. Start it again to continue it."
        )
    val = Tokens.open(folder, "val")
    train = Tokens.open(folder, "train") if find_shards(folder, "train") else None
    splits = [val] if train is None else [val, train]
    meta: dict[str, Any] = {}
    tokenizer = None
    warnings = []
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_bytes())
        tokenizer = from_meta(meta, folder)
        vocab_size = meta["vocab_size"]
        warnings = _warnings_about_examples(meta, tokenizer)
        if tokenizer is not None and meta.get("kind", "text") != "text":
            tokenizer.chat_template = _chat_template(meta, has_end_token=tokenizer.eot is not None)
    elif (folder / "meta.pkl").exists() or val.dtype != UINT16:
        vocab_size = max(split.max_id() for split in splits) + 1
        warnings.append(
            f"{folder} has no meta.json (a meta.pkl is never opened, because it can run programs). "
            f"The vocabulary is assumed to have {vocab_size:,} ids, the largest one plus one. The "
            "ids cannot be turned into text."
        )
    else:
        tokenizer = get_tokenizer("gpt2")  # as in nanoGPT
        vocab_size = tokenizer.vocab_size
    for split in splits:
        split.check_vocab(vocab_size)
    return Dataset(name, folder, meta, tokenizer, vocab_size, train, val, warnings)


def _chat_template(meta: dict[str, Any], has_end_token: bool) -> str:
    """Return how a question to a model that is trained on these data is written."""
    if meta.get("kind") == "messages":
        return CHAT_TEMPLATE if has_end_token else CHAT_TEMPLATE_OF_CHARACTERS
    return prompt_template(meta.get("prompt_ending", ""), has_end_token)


def _warnings_about_examples(meta: dict[str, Any], tokenizer: Tokenizer | None) -> list[str]:
    """Return what the user should know about instruction data; nothing for plain text."""
    warnings = []
    if tokenizer is not None and tokenizer.eot is None and "row" in meta:
        warning = "This tokenizer has no end-of-text token, so answers will not end by themselves."
        if "\n" in tokenizer.names:
            warning += " Sample with --stop='\\n'."
        warnings.append(warning)
    if meta.get("prompt_ending") == "":
        warnings.append(
            "The prompts have no common ending, so the model cannot see where a question ends and "
            "its answer begins. End every prompt in the same way, for example with a line end."
        )
    if meta.get("cut"):
        warnings.append(
            f"{meta['cut']:,} of {meta['documents']:,} examples were longer than a row of "
            f"{meta['row']} tokens and were cut."
        )
    return warnings


def _check_tokenizer(dataset: Dataset, tokenizer: str | Tokenizer) -> None:
    """Raise UserError if a data set was made with another tokenizer than the given one."""
    if tokenizer == "auto":
        return
    own = dataset.tokenizer
    if isinstance(tokenizer, Tokenizer):
        asked = "that of the model"
        same = own is not None and own.sha256 == tokenizer.sha256
    else:
        asked = tokenizer
        same = own is not None and own.name == tokenizer
    if not same:
        made_with = "an unknown tokenizer" if own is None else f"the tokenizer {own.name}"
        raise UserError(
            f"{dataset.folder} was made with {made_with}, not with {asked}. "
            "Pass the text itself: --dataset=FILE."
        )
    if isinstance(tokenizer, Tokenizer) and own is not None:
        # The model's may have more tokens, and its files go back as they came.
        dataset.tokenizer = tokenizer
        if dataset.kind != "text":
            tokenizer.chat_template = own.chat_template


def _check_val_share(dataset: Dataset, val_fraction: float) -> None:
    """Warn if chance put a share into val that is far from val_fraction.

    Instruction data are not checked: their rows are padded, so tokens do not measure the share.
    """
    if dataset.train is None or dataset.kind != "text" or (dataset.documents or 0) < FEW_DOCUMENTS:
        return
    held_out = len(dataset.val)
    total = held_out + len(dataset.train)
    share = held_out / total
    if share < val_fraction / 2 or share > 2 * val_fraction:
        dataset.warnings.append(
            f"validation has {held_out:,} of {total:,} tokens, {share:.2%}, not about "
            f"{val_fraction:.2%}: each document, however long, belongs to one side. For another "
            "share split long documents, or choose another --val_fraction."
        )
