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

from data.prepare import (
    FORMAT,
    characters_of,
    check_characters,
    prepare_texts,
)
from data.readers import SUFFIXES
from data.shards import UINT16, Tokens, find_shards
from data.texts import Documents, chat_template
from data.tokenizers import CharTokenizer, Tokenizer, from_meta, get_tokenizer
from gpt12.errors import UserError
from gpt12.files import exists, sha256

DATA = Path(__file__).parent
SMALL = ("shakespeare", "shakespeare_char")  # data sets of ours that are prepared unasked


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
    encoding: str = "utf-8",
    block_size: int,
) -> Dataset:
    """Open a data set, preparing it first if necessary.

    name: a folder in data/; or the path of a folder of shards, of a text file, or of a folder of
        text files; or hf:owner/name:config:split. Texts are tokenized once, into data/cache/.
    tokenizer: "auto" is the data set's own one, or gpt2 for texts.
    Raises UserError if the data set does not exist or is damaged, or if it was made with another
    tokenizer or row length.
    """
    check_exists(name)
    folder = DATA / name if _is_named(name) else Path(name).expanduser()
    try:
        if find_shards(folder, "val"):
            pass
        elif _is_named(name) and (folder / "prepare.py").exists():
            _prepare_named(folder)
        else:
            source = name if name.startswith("hf:") else str(folder)
            documents = (source, text_column, encoding)
            asked = "gpt2" if tokenizer == "auto" else tokenizer
            folder = _prepare_text(documents, asked, val_fraction, block_size)
    except OSError as error:  # a full disk, no right to write, the network
        raise UserError(
            f"{name} could not be prepared: {error}. "
            "What is done so far is kept: run the command again to continue."
        ) from error
    dataset = _read_dataset(name, folder)
    _check_tokenizer(dataset, tokenizer)
    row = dataset.meta.get("row", block_size)
    if row != block_size:
        raise UserError(f"{folder} holds rows of {row} tokens. Use --block_size={row}.")
    return dataset


# ----------------------------------------------------------------------------------------------
# Finding


def check_exists(name: str) -> None:
    """Raise UserError if there is no data set of this name. This takes no time."""
    if _is_named(name) or name.startswith("hf:") or exists(os.path.expanduser(name)):  # noqa: PTH111
        return
    shown = repr(name[:200])
    known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
    near = difflib.get_close_matches(name, known, 1)
    problem = f"There is no data set {shown}: no such file or folder exists."
    if near:
        problem += f" Did you mean {near[0]}?"
    raise UserError(
        f"{problem} It may be one of {', '.join(known)}, a file ({', '.join(SUFFIXES)}), a folder "
        "of such files, or hf:owner/name."
    )


def _is_named(name: str) -> bool:
    """Return whether a name is that of a folder in data/."""
    return name != "" and Path(name).name == name and os.path.isdir(DATA / name)  # noqa: PTH112


# ----------------------------------------------------------------------------------------------
# Preparing


def _prepare_named(folder: Path) -> None:
    """Prepare a data set in data/, if it is one of our small ones."""
    if folder.name in SMALL:
        importlib.import_module(f"data.{folder.name}.prepare").prepare(folder)
        return
    raise UserError(
        f"The data set {folder.name} is not prepared. Run: python {folder / 'prepare.py'} (its "
        f"first lines say what that takes)\n{_other_data()}"
    )


def _other_data() -> str:
    import torch

    preset = "char" if torch.cuda.is_available() else "cpu"
    return (
        "Or choose other data, for example --dataset=my.txt, or a preset that brings its own: "
        f"config/train_shakespeare_{preset}.py"
    )


def _prepare_text(
    arguments: tuple[str, str, str],
    tokenizer: str | Tokenizer,
    val_fraction: float,
    block_size: int,
) -> Path:
    """Return the folder in data/cache/ that holds a text's shards.

    The folder's name has a hash of everything that decides what the shards hold, so a folder that
    exists is what was asked for.

    arguments: those of Documents.
    """
    name = arguments[0]
    documents = None
    content: Any = name
    if not name.startswith("hf:"):  # the hub is asked only for what is not there yet
        documents = Documents(*arguments)
        content = [(file.name, sha256(file)) for file in documents.files]
    made_with = tokenizer
    if isinstance(tokenizer, Tokenizer):
        # By name, so that a resumed run, which brings its model's tokenizer, finds its data again.
        made_with = tokenizer.name if tokenizer.name in ("gpt2", "bytes") else tokenizer.sha256
    made_by = [FORMAT, content, *arguments[1:], made_with, val_fraction]
    stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:50] or "texts"  # as all systems allow
    folders = {}
    for kind, row in (("text", None), ("rows", block_size)):
        digest = hashlib.sha256(json.dumps([*made_by, row]).encode()).hexdigest()
        folders[kind] = DATA / "cache" / f"{stem}-{digest[:12]}"
        if folders[kind].exists():
            return folders[kind]
    documents = documents or Documents(*arguments)
    finished = folders["text" if documents.kind == "text" else "rows"]
    building = finished.with_name(f"{finished.name}.tmp")
    own = _tokenizer_for(documents, tokenizer)
    prepare_texts(name, documents, own, building, val_fraction, block_size=block_size)
    return building.rename(finished)


def _tokenizer_for(documents: Documents, tokenizer: str | Tokenizer) -> Tokenizer:
    """Return the tokenizer for some documents; "char" is made from their characters."""
    if isinstance(tokenizer, CharTokenizer):
        check_characters(documents, tokenizer)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer != "char":
        return get_tokenizer(tokenizer)
    characters = characters_of(documents)
    if not documents.is_one_text:
        characters.add("\n")  # a line end keeps documents apart
    return CharTokenizer("".join(sorted(characters)))


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
        warnings = _warnings_about_texts(meta, tokenizer)
        if tokenizer is not None and "kind" in meta:
            tokenizer.chat_template = chat_template(
                meta["kind"],
                has_end_token=tokenizer.eot is not None,
                ending=meta.get("prompt_ending", ""),
                system=meta.get("system"),
            )
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


def _warnings_about_texts(meta: dict[str, Any], tokenizer: Tokenizer | None) -> list[str]:
    """Return what the user should know about the texts that were prepared."""
    warnings = list(meta.get("notes", ()))
    if tokenizer is not None and tokenizer.eot is None and "row" in meta:
        warning = "This tokenizer has no end-of-text token, so answers will not end by themselves."
        if "\n" in tokenizer.names:
            warning += " Sample with --stop='\\n'."
        warnings.append(warning)
    if meta.get("kind") == "prompt" and meta.get("prompt_ending") == "":
        warnings.append(
            "The prompts have no common ending, so the model cannot see where a question ends and "
            "its answer begins. End every prompt in the same way, for example with a line end."
        )
    if meta.get("blank"):
        warnings.append(f"{meta['blank']:,} blank texts or answers were left out.")
    if meta.get("cut"):
        warnings.append(
            f"{meta['cut']:,} of {meta['documents']:,} examples were longer than a row of "
            f"{meta['row']} tokens and were cut; {meta['left_out']:,} were left out, because "
            "nothing of the answer remained."
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
