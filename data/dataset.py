"""Open a data set by its name or path: its shards, its tokenizer, and what is known about it.

A data set that is small, or a text, is prepared when it is first opened.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data.prepare import FEW_DOCUMENTS, check_characters, prepare_texts
from data.readers import SUFFIXES
from data.rows import ROW_FORMAT
from data.shards import UINT16, Tokens, find_shards
from data.texts import CHAT_TEMPLATE, CHAT_TEMPLATE_OF_CHARACTERS, Documents, prompt_template
from data.tokenizers import CharTokenizer, Tokenizer, from_meta, get_tokenizer
from gpt12.errors import UserError
from gpt12.files import exists, sha256

DATA = Path(__file__).parent
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
    skipped: list[Path] = []
    try:
        if _is_named(name):
            folder = DATA / name
            _prepare_named(folder)
        elif find_shards(Path(name), "val"):
            folder = Path(name)
        else:
            if tokenizer == "auto":
                tokenizer = "gpt2"
            request = DatasetRequest(name, tokenizer, val_fraction, text_column, block_size)
            folder, skipped = _prepare_cache(request)
    except OSError as error:  # a full disk, no right to write, the network
        raise UserError(
            f"{name} could not be prepared: {error}. "
            "What is done so far is kept: run the command again to continue."
        ) from error
    dataset = _read_dataset(name, folder)
    _check_tokenizer(dataset, tokenizer)
    _check_row_length(dataset, block_size)
    if skipped:
        dataset.warnings.append(_describe_skipped(name, skipped))
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


class Script(NamedTuple):
    """What a data set's prepare.py says without being run."""

    has_prepare: bool  # it defines the function prepare()
    cost: str | None  # what preparing takes, if that is more than a moment


def _prepare_named(folder: Path) -> None:
    """Run the prepare.py of a folder in data/ if its shards are missing.

    Raises UserError if it takes more than a moment, or if it is a script of another kind.
    """
    if find_shards(folder, "val"):
        return
    path = folder / "prepare.py"
    if not path.exists():
        raise UserError(
            f"{folder} holds neither val shards (val_*.bin, *_val_*.bin, val.bin) nor a prepare.py."
        )
    script = _inspect_script(path)
    if not script.has_prepare:
        raise UserError(
            f"The data set {folder.name} is not prepared, and {path} has no function prepare() to "
            f"call. Run it as a script: python {path}\n{_other_data()}"
        )
    if script.cost is not None:
        raise UserError(
            f"The data set {folder.name} is not prepared. Run ({script.cost}): python {path}\n"
            f"{_other_data()}"
        )
    spec = importlib.util.spec_from_file_location(f"data.{folder.name}.prepare", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.prepare()


def _inspect_script(path: Path) -> Script:
    """Look at a prepare.py without running it: nanoGPT's scripts do their work when imported."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a Python file that can be read: {error}.") from None
    has_prepare = False
    cost = None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "prepare":
            has_prepare = True
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COST":
            cost = "it takes a while"
            if isinstance(node.value, ast.Constant):
                cost = str(node.value.value)
    return Script(has_prepare, cost)


def _other_data() -> str:
    import torch

    preset = "char" if torch.cuda.is_available() else "cpu"
    return (
        "Or choose other data, for example --dataset=my.txt, or a preset that brings its own: "
        f"config/train_shakespeare_{preset}.py"
    )


class DatasetRequest(NamedTuple):
    """A text to prepare: the arguments of open_dataset that decide what its shards hold."""

    name: str
    tokenizer: str | Tokenizer
    val_fraction: float
    text_column: str
    block_size: int


def _prepare_cache(request: DatasetRequest) -> tuple[Path, list[Path]]:
    """Return the folder in data/cache/ that holds a text's shards, and the files that are skipped.

    The folder's name has a hash of everything that decides what the shards hold, so a folder that
    exists is what was asked for.
    """
    from_hub = request.name.startswith("hf:")
    documents = None
    skipped: list[Path] = []
    content: Any = request.name
    if not from_hub:  # the hub is asked only for what is not there yet
        documents = Documents(request.name, request.text_column)
        skipped = documents.skipped
        content = [(file.name, sha256(file)) for file in documents.files]
    as_text = _cache_folder(request, content, rows=None)
    as_rows = _cache_folder(request, content, rows=(request.block_size, ROW_FORMAT))
    for folder in (as_text, as_rows):
        if folder.exists():
            return folder, skipped
    if documents is None:
        documents = Documents(request.name, request.text_column)
    tokenizer = _tokenizer_for(documents, request)
    # Texts of the same name share this folder, whatever they hold: an interrupted preparation
    # continues in it, and a failed one is overwritten.
    building = DATA / "cache" / f"{_cache_stem(request.name)}-{documents.kind}.tmp"
    prepare_texts(
        request.name,
        documents,
        tokenizer,
        building,
        request.val_fraction,
        block_size=request.block_size,
    )
    finished = as_text if documents.kind == "text" else as_rows
    return building.rename(finished), skipped


def _cache_stem(name: str) -> str:
    """Return the readable part of a cache folder's name, with characters that all systems allow."""
    return re.sub(r"[^\w.-]+", "-", Path(name).stem)[:50] or "texts"


def _cache_folder(request: DatasetRequest, content: Any, rows: tuple[int, int] | None) -> Path:
    """Return the cache folder for a text.

    rows: length and format of the rows that instruction data are packed into; None for plain text.
    """
    tokenizer = request.tokenizer
    if isinstance(tokenizer, CharTokenizer):
        made_with = tokenizer.sha256
    elif isinstance(tokenizer, Tokenizer):
        # By name, so that a resumed run, which brings its model's tokenizer, finds its data again.
        made_with = tokenizer.name
    else:
        made_with = tokenizer
    made_by = json.dumps([content, made_with, request.val_fraction, request.text_column, rows])
    digest = hashlib.sha256(made_by.encode()).hexdigest()
    return DATA / "cache" / f"{_cache_stem(request.name)}-{digest[:12]}"


def _tokenizer_for(documents: Documents, request: DatasetRequest) -> Tokenizer:
    """Return the tokenizer for some documents; "char" is made from their characters."""
    tokenizer = request.tokenizer
    if isinstance(tokenizer, CharTokenizer):
        check_characters(request.name, documents, tokenizer)
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
        meta = _read_meta(folder / "meta.json")
        tokenizer = from_meta(meta, folder)
        vocab_size = meta["vocab_size"]
        warnings = _warnings_about_examples(meta, tokenizer)
        if tokenizer is not None:
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


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        numbers = {"vocab_size": meta["vocab_size"] - 1}
        for key in ("documents", "row", "cut"):
            numbers[key] = meta.get(key, 0)
        for key, number in numbers.items():
            if type(number) is not int or number < 0:
                raise ValueError(f'"{key}" is not a number that is possible')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}). Prepare the data again."
        ) from None
    return meta


def _chat_template(meta: dict[str, Any], has_end_token: bool) -> str | None:
    """Return how a question to a model that is trained on these data is written."""
    if meta.get("kind") == "messages":
        return CHAT_TEMPLATE if has_end_token else CHAT_TEMPLATE_OF_CHARACTERS
    if meta.get("prompt_ending"):
        return prompt_template(meta["prompt_ending"], has_end_token)
    return None


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


# ----------------------------------------------------------------------------------------------
# Checking


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
    if isinstance(tokenizer, Tokenizer) and own is not None and tokenizer.added_tokens:
        # The model's tokenizer has more tokens than the data use. A checkpoint should keep them.
        tokenizer.chat_template = own.chat_template
        dataset.tokenizer = tokenizer


def _check_row_length(dataset: Dataset, block_size: int) -> None:
    row = dataset.meta.get("row", block_size)
    if row != block_size:
        raise UserError(f"{dataset.folder} holds rows of {row} tokens. Use --block_size={row}.")


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
