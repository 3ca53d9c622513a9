"""Read rows out of .txt, .md, .csv and .jsonl files and Hugging Face data sets, in constant memory.

A row is a dictionary from column to content. Each comes with the place where it stands, for
messages.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt12.errors import UserError
from gpt12.files import exists

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".csv", ".jsonl")
BLOCK_BYTES = 1 << 16  # read at once from a text file
HUB_ROWS = 1000  # rows taken at once from the hub; row by row takes three times as long

Row = Mapping[str, Any]


def find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files to read for a data set, and the files of a folder that are skipped, sorted.

    path: a file, or a folder, whose subfolders are searched, too. Hidden files and folders are
    neither read nor counted as skipped.
    Raises UserError if there is nothing to read.
    """
    if not exists(path):
        raise UserError(f"There is no file or folder {str(path)[:200]!r}.")
    endings = ", ".join(SUFFIXES)
    if not path.is_dir():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{path}: unknown ending. If it is plain text, rename it to {path.name}.txt. "
                f"Known: {endings}."
            )
        return [path], []
    files = []
    skipped = []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if hidden or not file.is_file():
            continue
        if file.suffix.lower() in SUFFIXES:
            files.append(file)
        else:
            skipped.append(file)
    if not files:
        raise UserError(f"{path} holds no text files: none ends in {endings}.")
    return files, skipped


def file_rows(file: Path, text_column: str) -> Iterator[tuple[str, Row]]:
    """Yield the place and the content of each row of a file.

    text_column: the column that a text file's content gets. Its value is an iterator of blocks of
    text; with text_column="line", each line that is not blank is a row.
    """
    suffix = file.suffix.lower()
    if suffix == ".csv":
        return _csv_rows(file, (text_column, "prompt", "completion"))
    if suffix == ".jsonl":
        return _jsonl_rows(file)
    if text_column == "line":
        return _line_rows(file)
    return iter([(str(file), {text_column: _text_blocks(file)})])


def _line_rows(file: Path) -> Iterator[tuple[str, Row]]:
    for line in _read_lines(file):
        if not line.isspace():
            yield str(file), {"line": line.rstrip("\r\n")}


def _text_blocks(file: Path) -> Iterator[str]:
    """Yield the text of a file in blocks, with line ends as \\n."""
    for block in _read_lines(file, block_bytes=BLOCK_BYTES):
        yield block.replace("\r\n", "\n").replace("\r", "\n")


def _read_lines(file: Path, block_bytes: int = 0) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, without a byte order mark.

    block_bytes: if not 0, yield blocks of whole lines that have at least this many bytes.
    """
    offset = 0
    line_number = 1
    try:
        with file.open("rb") as stream:
            while True:
                block = stream.read(block_bytes) + stream.readline()
                if not block:
                    return
                text = _decode(file, block, offset, line_number)
                if offset == 0:
                    text = text.removeprefix("\ufeff")
                yield text
                offset += len(block)
                line_number += block.count(b"\n")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None


def _decode(file: Path, block: bytes, offset: int, line_number: int) -> str:
    """Decode a block of a file that begins at the given offset and line."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        begins_as_utf16 = offset == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff")
        encoding = "UTF-16" if begins_as_utf16 else "WINDOWS-1252"
        line = line_number + block[: error.start].count(b"\n")
        raise UserError(
            f"{file} is not UTF-8: line {line} holds the byte 0x{block[error.start]:02x} at offset "
            f"{offset + error.start:,}. Convert it: "
            f"iconv -f {encoding} -t UTF-8 {file} > new{file.suffix}"
        ) from None


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_read_lines(file), 1):
        if line.isspace():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is broken JSON: {error.msg}, column {error.colno}.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is broken JSON: {error}.") from None
        if not isinstance(row, dict):
            raise UserError(
                f'{where} should be an object like {{"text": "..."}} but is {line.strip():.60}.'
            )
        yield where, row


def _csv_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a .csv file with a header.

    columns: the columns that may be used; none of them may occur twice.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131,072 characters
    # strict, because else a quotation mark that is never closed swallows the rest of the file.
    reader = csv.DictReader(_read_lines(file), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if len(names) == 1 and ";" in names[0] and names[0] not in columns:
            raise UserError(
                f"{file}: its columns seem to be separated by ';'. Save it with ',' between them."
            )
        for column in columns:
            if names.count(column) > 1:
                raise UserError(
                    f"{file} has {names.count(column)} columns named {column!r}. Rename all but "
                    "one, or name another column with --text_column=."
                )
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            fields_beyond_header = row.get(None, ())
            if any(fields_beyond_header):
                raise UserError(
                    f"{where} has more fields than the header. A text with a comma in it should "
                    "stand in quotation marks."
                )
            yield where, row
    except csv.Error as error:
        line = reader.line_num + 1
        raise UserError(f"{file}, line {line} begins a row of broken CSV: {error}.") from None


def hub_rows(source: str, skip: int) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a hub data set's training split, streamed, without its first `skip` rows.

    source: hf:owner/name or hf:owner/name:config.
    """
    import datasets

    name, _, config = source.removeprefix("hf:").partition(":")
    number = skip
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for table in stream.skip(skip).with_format("arrow").iter(HUB_ROWS):
            for row in table.to_pylist():
                yield f"{source}, row {number}", row
                number += 1
    except Exception as error:  # the library raises many kinds of exceptions
        raise UserError(
            f"{source} cannot be read: {type(error).__name__}: {error}\n"
            "Check the name, the network and, for a private data set, `hf auth login`. Or save its "
            "texts as .txt, .csv or .jsonl files: python train.py --dataset=FOLDER"
        ) from error
