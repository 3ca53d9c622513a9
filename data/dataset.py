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
from dataclasses import dataclass
from pathlib import Path

from data.prepare import FORMAT, prepare_texts
from data.readers import SUFFIXES
from data.shards import UINT16, Tokens, find_shards
from data.texts import Documents
from data.tokenizers import CharTokenizer, Tokenizer, get_tokenizer, load_tokenizer
from gpt12.errors import UserError
from gpt12.files import exists, sha256

DATA = Path(__file__).parent
SMALL = ("shakespeare", "shakespeare_char")  # data sets of ours that are prepared unasked


@dataclass
class Dataset:
    """A data set that is ready to be trained on.

    tokenizer: None if it is not known.
    train: None if the folder holds only val shards.
    warnings: what the user should know about the data.
    documents: their number, or None if it is not known.
    val_sha256: the hash of the first val shard, or None for shards that were not made here.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer | None
    vocab_size: int
    train: Tokens | None
    val: Tokens
    warnings: list[str]
    documents: int | None
    val_sha256: str | None

    @property
    def tokenizer_name(self) -> str | None:
        """The name of the tokenizer, or None if it is not known."""
        return self.tokenizer.name if self.tokenizer else None


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
    return _read_dataset(name, folder, tokenizer, block_size)


# ----------------------------------------------------------------------------------------------
# Finding


def check_exists(name: str) -> None:
    """Raise UserError if there is no data set of this name. This takes no time."""
    if _is_named(name) or name.startswith("hf:") or exists(os.path.expanduser(name)):  # noqa: PTH111
        return
    known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
    problem = f"There is no data set {name[:200]!r}: no such file or folder exists."
    for near in difflib.get_close_matches(name, known, 1):
        problem += f" Did you mean {near}?"
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
    if folder.name not in SMALL:
        raise UserError(
            f"The data set {folder.name} is not prepared. Run: python {folder / 'prepare.py'} (its "
            "first lines say what that takes). Or name other data: --dataset=my.txt"
        )
    importlib.import_module(f"data.{folder.name}.prepare").prepare(folder)


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
    content: object = name
    if not name.startswith("hf:"):  # the hub is asked only for what is not there yet
        documents = Documents(*arguments)
        content = [(file.name, sha256(file)) for file in documents.files]
    made_with = tokenizer
    if isinstance(tokenizer, Tokenizer):
        # By name, so that a resumed run, which brings its model's tokenizer, finds its data again.
        made_with = tokenizer.name if tokenizer.name in ("gpt2", "bytes") else tokenizer.sha256
    made_by = json.dumps([FORMAT, content, *arguments[1:], made_with, val_fraction])
    digest = hashlib.sha256(made_by.encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:50] or "texts"  # as all systems allow
    texts = DATA / "cache" / f"{stem}-{digest}"
    rows = texts.with_name(f"{texts.name}-{block_size}")
    for folder in (texts, rows):
        if folder.exists():
            return folder
    documents = documents or Documents(*arguments)
    finished = texts if documents.kind == "text" else rows
    building = finished.with_name(f"{finished.name}.tmp")
    if tokenizer == "char":
        tokenizer = _characters_of(documents)
    elif isinstance(tokenizer, str):
        tokenizer = get_tokenizer(tokenizer)
    prepare_texts(name, documents, tokenizer, building, val_fraction, block_size=block_size)
    return building.rename(finished)


def _characters_of(documents: Documents) -> CharTokenizer:
    """Return a tokenizer that knows the characters of some documents."""
    found: set[str] = set()
    for _, piece in documents:
        found.update(piece.text)
    if len(documents.first) > 1:
        found.add("\n")  # a line end keeps documents apart
    return CharTokenizer("".join(sorted(found)))


# ----------------------------------------------------------------------------------------------
# Reading


def _read_dataset(name: str, folder: Path, asked: str | Tokenizer, block_size: int) -> Dataset:
    """Read a data set from a folder with shards, and check that it is as it was asked for."""
    if (folder / "progress.json").exists():
        raise UserError(
            f"The preparation of {folder} is not finished. Start it again to continue it."
        )
    meta_file = folder / "meta.json"
    try:
        meta = {**json.loads(meta_file.read_bytes())} if meta_file.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{meta_file} is no JSON object. Prepare the data again.") from None
    row = meta.get("row") or block_size
    if row != block_size:
        raise UserError(f"{folder} holds rows of {row} tokens. Use --block_size={row}.")
    val = Tokens.open(folder, "val")
    train = Tokens.open(folder, "train") if find_shards(folder, "train") else None
    splits = [val] if train is None else [val, train]
    warnings = list(meta.get("notes", ()))
    tokenizer = load_tokenizer(folder)
    if tokenizer is None and not meta and not (folder / "meta.pkl").exists():
        if val.dtype == UINT16:
            tokenizer = get_tokenizer("gpt2")  # as in nanoGPT
    if tokenizer is not None:
        vocab_size = tokenizer.text_ids
    else:
        vocab_size = max(split.max_id() for split in splits) + 1
        warnings.append(
            f"{folder} has no tokenizer (a meta.pkl is never opened, because it can run programs). "
            f"The vocabulary is assumed to have {vocab_size:,} ids, the largest one plus one. The "
            "ids cannot be turned into text."
        )
    for split in splits:
        split.check_vocab(vocab_size)
    if asked != "auto":
        tokenizer = _as_asked(folder, tokenizer, asked, is_text=val.mask is None)
    return Dataset(
        name=name,
        folder=folder,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        train=train,
        val=val,
        warnings=warnings,
        documents=meta.get("documents"),
        val_sha256=meta.get("val_sha256"),
    )


def _as_asked(
    folder: Path, own: Tokenizer | None, asked: str | Tokenizer, is_text: bool
) -> Tokenizer:
    """Return the tokenizer for a data set. Raises UserError if another one than its own is asked.

    asked: a name, or a model's tokenizer.
    """
    if own is not None and isinstance(asked, Tokenizer) and own.sha256 == asked.sha256:
        if not is_text:
            asked.chat_template = own.chat_template
        return asked  # it may have more tokens, and its files go back as they came
    if own is not None and own.name == asked:
        return own
    made_with = "an unknown tokenizer" if own is None else f"the tokenizer {own.name}"
    wanted = "that of the model" if isinstance(asked, Tokenizer) else asked
    raise UserError(
        f"{folder} was made with {made_with}, not with {wanted}. "
        "Pass the text itself: --dataset=FILE."
    )
