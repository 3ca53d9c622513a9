"""Documents out of .txt, .csv and .jsonl files, folders of these, and the Hugging Face hub, in constant memory."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt12.errors import UserError

SUFFIXES = (".txt", ".csv", ".jsonl")
PIECE = 500_000  # characters encoded at once: small enough that memory is flat and every core has some
# GPT-2's tokenizer cuts before a space or line end that follows something else, so that the ids of the parts are the
# ids of the whole; the last such place.
CUT = re.compile(r"(?s).*\S(?=[ \n])")

# How a conversation is written. The assistant's answers, and the end token after each, are what is trained.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n\n' }}"
    "{% endfor %}"
    "{{ '### Assistant:\n' if add_generation_prompt else '' }}"
)
ROLES = ("system", "user", "assistant")


class Piece(NamedTuple):
    """A stretch of a document that is encoded by itself."""

    text: str
    trained: bool = True  # its tokens, and the end token after it, are targets
    end: bool = True  # the end token follows
    last: bool = True  # the document ends here


def chat_pieces(messages: Sequence[Mapping[str, str]]) -> list[Piece]:
    """A conversation by CHAT_TEMPLATE; if its last message is not the assistant's, then as a prompt for the answer."""
    pieces, prompt = [], ""
    for message in messages:
        role, content = message["role"], message["content"].strip()
        prompt += f"### {role.capitalize()}:\n"
        if role == "assistant":
            pieces += [Piece(prompt, trained=False, end=False, last=False), Piece(content, last=False)]
            prompt = ""
        else:
            prompt += f"{content}\n\n"
    if prompt:
        return [*pieces, Piece(f"{prompt}### Assistant:\n", trained=False, end=False)]
    return [*pieces[:-1], *(piece._replace(last=True) for piece in pieces[-1:])]


class Documents:
    """The documents of a file, a folder or a hub data set as a flat stream of pieces; each iteration starts anew.

    source: a path, or "hf:owner/name", or "hf:owner/name:config" where there are several.
    text_column: the field with the text in .csv, .jsonl and on the hub; "line" makes each line of a .txt a document.
    kind: "text"; "prompt" for rows with a prompt and a completion, both taken verbatim; "messages" for conversations.
    files: what is read, in this order; nothing for the hub. whole: they are one document, a single .txt.
    UserError, naming file and line, for what cannot be read, while iterating too.
    """

    def __init__(self, source: str | Path, text_column: str = "text") -> None:
        self.source, self.text_column, self._skip = str(source), text_column, 0
        self.files = [] if self.source.startswith("hf:") else _find(Path(source))
        self.whole = [f.suffix.lower() for f in self.files] == [".txt"] and text_column != "line"
        self.kind = next((self._kind_of(where, row) for where, row in self._rows()), "text")

    def skip(self, count: int) -> Documents:
        """These documents without the first `count`."""
        rest = copy.copy(self)
        rest._skip += count
        return rest

    def __iter__(self) -> Iterator[Piece]:
        for where, row in self._rows():
            if (kind := self._kind_of(where, row)) != self.kind:
                raise UserError(f"{where} is of kind {kind!r}, what came before of kind {self.kind!r}: separate them.")
            if kind == "messages":
                yield from _conversation(where, row["messages"])
                continue
            for field in (self.text_column,) if kind == "text" else ("prompt", "completion"):
                if not isinstance(row[field], str | Iterator):
                    raise UserError(f"{where}: {field!r} should be a text and is {row[field]!r:.60}.")
            if kind == "text":
                yield from _split(row[self.text_column])
            else:
                yield Piece(row["prompt"], trained=False, end=False, last=False)
                yield Piece(row["completion"])

    def _kind_of(self, where: str, row: Mapping[str, Any]) -> str:
        if self.text_column in row:
            return "text"
        if "prompt" in row and "completion" in row:
            return "prompt"
        if "messages" in row:
            return "messages"
        raise UserError(
            f"{where} has no {self.text_column!r}, only {', '.join(map(repr, row))}. "
            "Name the one that holds the text with --text_column=."
        )

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where it stands, row) of each document; the text of a whole .txt comes in blocks."""
        if self.files:
            return itertools.islice(itertools.chain.from_iterable(map(self._file_rows, self.files)), self._skip, None)
        return _hub_rows(self.source, self._skip)

    def _file_rows(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        if file.suffix.lower() == ".csv":
            return _csv_rows(file, (self.text_column, "prompt", "completion"))
        if file.suffix.lower() == ".jsonl":
            return _jsonl_rows(file)
        if self.text_column == "line":
            return ((str(file), {"line": line.rstrip("\r\n")}) for line in _lines(file) if not line.isspace())
        blocks = (block.replace("\r\n", "\n").replace("\r", "\n") for block in _lines(file, size=1 << 16))
        return iter([(str(file), {self.text_column: blocks})])


def _split(text: str | Iterator[str]) -> Iterator[Piece]:
    """A document, given whole or in blocks, in pieces of at most PIECE characters."""
    held, size = [], 0
    for block in [text] if isinstance(text, str) else text:
        held.append(block)
        size += len(block)
        if size > PIECE:
            rest, start = "".join(held), 0
            while len(rest) - start > PIECE:
                match = CUT.match(rest, start, start + PIECE)
                end = match.end() if match else start + PIECE  # a text without a space must be cut somewhere
                yield Piece(rest[start:end], end=False, last=False)
                start = end
            held = [rest[start:]]
            size = len(held[0])
    yield Piece("".join(held))


def _conversation(where: str, messages: Any) -> list[Piece]:
    def is_message(message: Any) -> bool:
        return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)

    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise UserError(
            f'{where}: "messages" should be a list of {{"role": ..., "content": a text}}, a role being one of '
            f"{', '.join(ROLES)}, and is {messages!r:.100}."
        )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where}: the assistant says nothing in these messages, so there is nothing to train on.")
    return chat_pieces(messages[: answers[-1] + 1])


def _find(path: Path) -> list[Path]:
    """The file itself, or those of a folder and the folders in it, sorted."""
    if not os.path.exists(path):  # noqa: PTH110 (unlike Path.exists, False for a name that no system allows)
        raise UserError(f"There is no file or folder {str(path)[:200]!r}.")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file() and f.name[0] != ".")
    if not files or files[0].suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} {'holds' if path.is_dir() else 'is'} no text that is known: {', '.join(SUFFIXES)}.")
    return files


def _lines(file: Path, size: int = 0) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, or blocks of lines of `size` bytes or more; no byte order mark."""
    offset, number = 0, 1
    try:
        with file.open("rb") as stream:
            while part := stream.read(size) + stream.readline():
                yield part.decode("utf-8").removeprefix("" if offset else "\ufeff")
                offset, number = offset + len(part), number + part.count(b"\n")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if not offset and part[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        number, offset = number + part[: error.start].count(b"\n"), offset + error.start
        raise UserError(
            f"{file} is not UTF-8: line {number} holds the byte 0x{part[error.start]:02x} at offset {offset:,}. "
            f"Convert it: iconv -f {encoding} -t UTF-8 {file} > new{file.suffix}"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None


def _jsonl_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(file), 1):
        if line.isspace():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{where} is broken JSON: {reason}.") from None
        if not isinstance(row, dict):
            raise UserError(f'{where} should be an object like {{"text": "..."}} and is {line.strip():.60}.')
        yield where, row


def _csv_rows(file: Path, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; its default refuses texts over 131,072 characters
    # Strict: else one quotation mark that is never closed swallows the rest of the file in silence.
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in wanted if names.count(name) > 1), None):
            raise UserError(
                f"{file} has {names.count(twice)} columns named {twice!r}: rename those that are not meant, or name "
                "another with --text_column=."
            )
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if any(row.get(None, ())):
                raise UserError(
                    f"{where} has more fields than the header: a text with a comma in it should stand in quotation marks."
                )
            yield where, row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num + 1} begins a row of broken CSV: {error}.") from None


def _hub_rows(source: str, skip: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The training split of a hub data set, streamed, without its first `skip` rows."""
    name, _, config = source.removeprefix("hf:").partition(":")
    import datasets

    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        tables = stream.skip(skip).with_format("arrow").iter(1000)  # three times as fast as row by row
        for number, row in enumerate((row for table in tables for row in table.to_pylist()), skip):
            yield f"{source}, row {number}", row
    except Exception as error:  # a foreign library's: whatever it is, the name or the network is what can be mended
        raise UserError(
            f"{source} cannot be read: {type(error).__name__}: {error}\nCheck the name, the network and, for a private "
            "one, `hf auth login`; or get its texts as .txt, .csv or .jsonl files: python train.py --dataset=FOLDER"
        ) from error
