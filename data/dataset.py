"""Open a data set by its name or path: its shards, its tokenizer, and what is known about it.

A data set that is small, or a text, is prepared when it is first opened.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

from data.prepare import FORMAT, prepare_texts
from data.shards import UINT16, Tokens, find_shards
from data.texts import Documents
from data.tokenizers import CharTokenizer, Tokenizer, get_tokenizer, load_tokenizer
from gpt12.errors import UserError
from gpt12.files import exists, is_folder, sha256

DATA = Path(__file__).parent
SMALL = ("shakespeare", "shakespeare_char")  # data sets of ours that are prepared unasked


class Dataset:
    """A data set that is ready to be trained on, out of a folder with shards.

    tokenizer: None if it is not known.
    train: None if the folder holds only val shards.
    notes: what the user should know about the data.
    document_count: None if it is not known.
    val_sha256: the hash of the first val shard, or None for shards that were not made here.
    window: the block_size for which examples were packed, or None for texts, which go with any.
    """

    def __init__(self, name: str, folder: Path) -> None:
        if (folder / "progress.json").exists():
            raise UserError(
                f"The preparation of {folder} is not finished. Start it again to continue it."
            )
        self.name = name
        self.folder = folder
        meta = _read_meta(folder / "meta.json")
        self.document_count: int | None = meta.get("documents")
        self.val_sha256: str | None = meta.get("val_sha256")
        self.window: int | None = meta.get("window", meta.get("row"))  # "row" until FORMAT 6
        self.notes: list[str] = list(meta.get("notes", ()))
        self.val = Tokens(folder, "val")
        self.train: Any = Tokens(folder, "train") if find_shards(folder, "train") else None
        splits = [self.val] if self.train is None else [self.val, self.train]
        self.tokenizer = load_tokenizer(folder)
        if self.tokenizer is None and not meta and not (folder / "meta.pkl").exists():
            if self.val.dtype == UINT16:
                self.tokenizer = get_tokenizer("gpt2")  # as in nanoGPT
        if self.tokenizer is not None:
            self.text_vocab_size = self.tokenizer.text_vocab_size
        else:
            self.text_vocab_size = max(split.max_id() for split in splits) + 1
            self.notes.append(
                f"{folder} has no tokenizer (a meta.pkl is never opened, because it can run "
                f"programs). The vocabulary is assumed to have {self.text_vocab_size:,} ids, the "
                "largest one plus one. The ids cannot be turned into text."
            )
        for split in splits:
            split.check_vocab(self.text_vocab_size)

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
    tokenizer: a name; or a model's tokenizer; "auto" is the data set's own one, or gpt2 for texts.
    Raises UserError if the data set does not exist or is damaged, or if it was made with another
    tokenizer or for another block_size.
    """
    check_exists(name)
    folder = DATA / name if _is_named(name) else Path(name).expanduser()
    try:
        if find_shards(folder, "val"):
            pass
        elif (folder / "prepare.py").exists() and folder.parent.resolve() == DATA.resolve():
            _prepare_named(folder)
        else:
            source = name if name.startswith("hf:") else str(folder)
            documents = Documents(source, text_column, encoding)
            asked = "gpt2" if tokenizer == "auto" else tokenizer
            folder = _prepare_documents(documents, asked, val_fraction, block_size)
    except OSError as error:  # a full disk, no right to write, the network
        raise UserError(
            f"{name} could not be prepared: {error}. "
            "What is done so far is kept: run the command again to continue."
        ) from error
    dataset = Dataset(name, folder)
    if dataset.window not in (None, block_size):
        raise UserError(
            f"{folder} was prepared for block_size={dataset.window}. Use "
            f"--block_size={dataset.window}."
        )
    if tokenizer != "auto":
        dataset.tokenizer = _as_asked(dataset, tokenizer)
    return dataset


# ----------------------------------------------------------------------------------------------
# Finding


def check_exists(name: str) -> None:
    """Raise UserError if there is no data set of this name. This takes no time."""
    path = os.path.expanduser(name)  # noqa: PTH111 (that of Path raises for an unknown user)
    if _is_named(name) or name.startswith("hf:") or exists(path):
        return
    known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
    raise UserError(
        f"There is no data set {name[:200]!r}: no such file or folder exists. It may be one of "
        f"{', '.join(known)}, a file, a folder of texts, or hf:owner/name."
    )


def _is_named(name: str) -> bool:
    """Return whether a name is that of a folder in data/."""
    return name not in ("", "..") and Path(name).name == name and is_folder(DATA / name)


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


def _prepare_documents(
    documents: Documents, tokenizer: str | Tokenizer, val_fraction: float, block_size: int
) -> Path:
    """Return the folder in data/cache/ that holds some documents' shards, preparing it if needed.

    The folder's name has a hash of everything that decides what the shards hold, so a folder that
    exists is what was asked for. That of packed examples ends with their block_size, too.
    """
    files = [(file.name, sha256(file)) for file in documents.files]
    content = files or documents.source  # the hub is asked only for what is not there yet
    made_with = tokenizer
    if isinstance(tokenizer, Tokenizer):
        # By name, so that a resumed run, which brings its model's tokenizer, finds its data again.
        made_with = tokenizer.name if tokenizer.name in ("gpt2", "bytes") else tokenizer.sha256
    reading = (documents.text_column, documents.encoding)
    decisive = json.dumps([FORMAT, content, *reading, made_with, val_fraction])
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", Path(documents.source).stem)[:50] or "texts"
    texts = DATA / "cache" / f"{stem}-{digest}"
    packed = DATA / "cache" / f"{stem}-{digest}-{block_size}"
    for folder in (texts, packed):
        if folder.exists():
            return folder
    finished = texts if documents.kind == "text" else packed
    if tokenizer == "char":
        tokenizer = _characters_of(documents)
    elif isinstance(tokenizer, str):
        tokenizer = get_tokenizer(tokenizer)
    building = finished.with_name(f"{finished.name}.tmp")
    prepare_texts(documents, tokenizer, building, val_fraction, block_size=block_size)
    return building.rename(finished)


def _characters_of(documents: Documents) -> CharTokenizer:
    """Return a tokenizer that knows the characters of some documents."""
    found = {character for _, piece in documents.pieces() for character in piece.text}
    if len(documents.first_indices) > 1:
        found.add("\n")  # a line end keeps documents apart
    return CharTokenizer("".join(sorted(found)))


# ----------------------------------------------------------------------------------------------
# Reading


def _read_meta(file: Path) -> dict[str, Any]:
    """Return what meta.json says, or nothing if there is none."""
    try:
        return {**json.loads(file.read_bytes())} if file.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{file} is no JSON object. Prepare the data again.") from None


def _as_asked(dataset: Dataset, asked: str | Tokenizer) -> Tokenizer:
    """Return the tokenizer for a data set. Raises UserError if another one than its own is asked.

    asked: a name, or a model's tokenizer.
    """
    own = dataset.tokenizer
    if own is not None and isinstance(asked, Tokenizer) and own.sha256 == asked.sha256:
        if asked.chat_template not in (None, own.chat_template):
            dataset.notes.append(
                "The model's chat template gives way to that of the data: ### User: and "
                "### Assistant: in conversations, or prompts as they are."
                if own.chat_template
                else "The model's chat template is left out, because the data are plain text."
            )
        asked.chat_template = own.chat_template
        return asked  # it may have more tokens, and its files go back as they came
    if own is not None and own.name == asked:
        return own
    made_with = "an unknown tokenizer" if own is None else f"the tokenizer {own.name}"
    wanted = "that of the model" if isinstance(asked, Tokenizer) else asked
    raise UserError(
        f"{dataset.folder} was made with {made_with}, not with {wanted}. "
        "Pass the text itself: --dataset=FILE."
    )
