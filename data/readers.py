"""Read rows out of files and Hugging Face data sets: one reader for each kind of file.

A row is a dictionary from column to content. Each comes with the place where it stands, for
messages. Line ends (CR, LF, CRLF) become LF.
"""

from __future__ import annotations

import codecs
import collections
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gpt12.errors import UserError

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".jsonlines", ".parquet")
SUFFIXES = (".txt", ".md", *TABLES)  # each also as .gz
DELIMITERS = (",", ";", "\t", "|")
END_OF_TEXT = "<|endoftext|>"  # separates the documents of a text file
# Files made for gpt-2-simple have one at the beginning of each document, too.
MARK = re.compile(r"(<\|(?:end|start)oftext\|>\n?)")
REPLACE = "utf-8-replace"  # the encoding in which bytes that are not UTF-8 become U+FFFD
# The common ones besides UTF-8, of which the likeliest are shown.
ENCODINGS = """cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 koi8_r cp932 euc_jp cp949
    gb18030 big5 utf_16_le utf_16_be""".split()
SAMPLE_BYTES = 1 << 18  # what a file's encoding is guessed from, after
SAMPLE_LINES = 100  # so many lines before the bad one
ROWS_AT_ONCE = 1000  # from parquet files and the hub; row by row takes three times as long
BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UNREADABLE = (OSError, EOFError, zlib.error)  # what reading a file may raise

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]


def file_rows(file: Path, text_column: str, encoding: str) -> Rows:
    """Yield the place and the content of each row of a file.

    text_column: the column that a text file's content gets. Its value is an iterator of lines; with
        text_column="line", each line that is not blank is a row.
    encoding: of the files that are not UTF-8.
    """
    suffix = suffix_of(file)
    if suffix == ".parquet":
        return _parquet_rows(file)
    lines = _lines(file, encoding)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(file, lines, encoding)
    if suffix in TABLES:
        return _json_rows(file, lines)
    if text_column == "line":
        return ((str(file), {"line": line.rstrip("\n")}) for line in lines if not line.isspace())
    return ((str(file), {text_column: text}) for text in split_documents(lines))


def find_files(path: Path) -> list[Path]:
    """Return a file alone, or all files of a folder and of its subfolders, sorted.

    Hidden files and folders, and node_modules, are left out.
    """
    if not path.is_dir():
        return [path]
    files = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        hidden = any(part.startswith(".") or part == "node_modules" for part in parts)
        if file.is_file() and not hidden:
            files.append(file)
    return files


def suffix_of(file: Path) -> str:
    """Return a file's ending in lower case, without the .gz of a compressed one."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which no file can hold, by U+FFFD. A JSON escape may bring them."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# --------------------------------------------------------------------------------------------------
# Lines to rows


def split_documents(lines: Iterable[str]) -> Iterator[Iterator[str]]:
    """Yield the documents that marks for the end, or for the beginning, of a text keep apart.

    Each is an iterator of lines, which is over when the next one is asked for.
    """
    parts = itertools.chain.from_iterable(map(MARK.split, lines))
    for mark, document in itertools.groupby(filter(None, parts), key=MARK.match):
        if mark is None:
            yield document


def _json_rows(file: Path, lines: Iterator[str]) -> Rows:
    """Yield a row of each line, or of each element of an array."""
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if line.lstrip().startswith("["):
            array = _parse(where, line + "".join(lines))
            for element, row in enumerate(array, 1):
                yield f"{file}, row {element}", row
        elif line.strip():
            yield where, _parse(where, line)


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is broken JSON: {error}. Write each row on a line of its own, or all of them "
            'as a list: [{"text": "..."}, ...].'
        ) from None


def _csv_rows(file: Path, lines: Iterator[str], encoding: str) -> Rows:
    """Yield the rows of a table with a header."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131,072 characters
    header = next(lines, "")
    before = 0  # lines before the header
    delimiter = max(DELIMITERS, key=header.count)
    if match := re.match(r'(?i)sep=([^"\n])', header):  # Excel's
        delimiter = match[1]
        header = next(lines, "")
        before = 1
    quoted = True
    if suffix_of(file) == ".tsv":
        quoted = _has_quotation(_lines(file, encoding), tabs=header.count("\t"))
    # strict, because else a quotation mark that is never closed swallows the rest of the file.
    reader = csv.DictReader(
        itertools.chain([header], lines),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    end = before  # of what was read
    advice = f"A text with {delimiter!r} or a quotation mark in it should stand in quotation marks"
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        end += reader.line_num
        for row in reader:
            end = before + reader.line_num
            where = f"{file}, line {end}"
            if any(row.pop(None, ())):
                raise UserError(f"{where} has more fields than the header. {advice}.")
            yield where, row
    except csv.Error as error:
        raise UserError(
            f"{file}, line {end + 1} begins a row of broken CSV: {error}. {advice}, and each mark "
            "in the text twice."
        ) from None


def _has_quotation(lines: Iterator[str], tabs: int) -> bool:
    """Tell whether the quotation marks of a .tsv file quote. In many they are only characters.

    They do not if one is not closed, or if they join lines that have all their tabs already.

    tabs: how many a row has.
    """
    lines, again = itertools.tee(lines)
    rows = csv.reader(lines, delimiter="\t", strict=True)
    end = 0
    try:
        for _ in rows:
            joined = list(itertools.islice(again, rows.line_num - end))  # the row's lines
            end = rows.line_num
            whole = all(line.count("\t") == tabs for line in joined)
            if whole and tabs > 0 and len(joined) > 1:
                return False
    except csv.Error:
        return False
    return True


def _parquet_rows(file: Path) -> Rows:
    from pyarrow import parquet

    try:
        with _open(file) as stream:
            yield from _numbered(file, parquet.ParquetFile(stream).iter_batches(ROWS_AT_ONCE))
    except Exception as error:  # the library raises many kinds of exceptions
        raise UserError(f"{file} cannot be read: {error}.") from None


def hub_rows(source: str) -> Rows:
    """Yield the rows of a hub data set, streamed.

    source: hf:owner/name, hf:owner/name:config or hf:owner/name:config:split. The split is train
        if it is not given.
    """
    import datasets

    name, config, split, *_ = [*source.removeprefix("hf:").split(":"), "", ""]
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _numbered(source, stream.with_format("arrow").iter(ROWS_AT_ONCE))
    except Exception as error:  # the library raises many kinds of exceptions
        raise UserError(
            f"{source} cannot be read: {type(error).__name__}: {error}\n"
            "Check the name, the network and, for a private data set, `hf auth login`. Or save its "
            "texts as .txt, .csv or .jsonl files: python train.py --dataset=FOLDER"
        ) from error


def _numbered(source: object, tables: Iterable[Any]) -> Rows:
    """Yield the place and the content of each row of pyarrow's tables."""
    rows = itertools.chain.from_iterable(table.to_pylist() for table in tables)
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


# --------------------------------------------------------------------------------------------------
# Bytes to lines


def _open(file: Path) -> BinaryIO:
    stream = gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")
    return stream  # type: ignore[return-value]


def is_text(file: Path) -> bool:
    """Tell whether a file has a known ending or begins as text, with no byte 0 but in UTF-16."""
    if suffix_of(file) in SUFFIXES:
        return True
    try:
        with _open(file) as stream:
            begin = stream.read(SAMPLE_BYTES)
    except UNREADABLE:
        return False
    return b"\0" not in begin or begin.startswith(BOMS)


def _lines(file: Path, encoding: str) -> Iterator[str]:
    """Yield a file's lines with \\n at their ends. Raises UserError for what cannot be read."""
    try:
        if encoding not in ("utf-8", REPLACE) and _is_utf8(file):
            encoding = "utf-8"
        try:
            yield from _decode(file, encoding)
        except UnicodeError:
            raise UserError(_explain_encoding(file, encoding)) from None
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read: {error}.") from None


def _is_utf8(file: Path) -> bool:
    """Tell whether a file is UTF-8 and has characters that show it."""
    try:  # sum reads it all
        return sum(not line.isascii() for line in _decode(file, "utf-8")) > 0
    except UnicodeError:
        return False


def _decode(file: Path, encoding: str) -> Iterator[str]:
    """Yield a file's lines.

    Raises UnicodeError at a byte that is not in the encoding, and at a NUL, which no text holds.
    """
    with _open(file) as stream:
        codec = "utf-8-sig" if encoding in ("utf-8", REPLACE) else encoding
        if stream.read(2) in BOMS:
            codec = "utf-16"
        stream.seek(0)
        errors = "replace" if encoding == REPLACE else "strict"
        for line in io.TextIOWrapper(stream, codec, errors):  # makes every line end a \n
            if "\0" not in line:
                yield line
            elif encoding == REPLACE:
                yield line.replace("\0", "\ufffd")
            else:
                raise UnicodeError


def _explain_encoding(file: Path, encoding: str) -> str:
    """Return a message about the first byte that is not in the encoding, and the likely ones."""
    import charset_normalizer

    lines: collections.deque[bytes] = collections.deque(maxlen=SAMPLE_LINES)
    number = 0
    with _open(file) as stream:
        for line in stream:
            number += 1
            lines.append(line)
            bad = _find_bad_byte(line, encoding)
            if bad >= 0:
                break
        # Whole lines, because no encoding fits to the half of a character.
        sample = b"".join([*lines, *stream.readlines(SAMPLE_BYTES)])
    message = f"{file} is not {encoding}: line {number} holds the byte 0x{line[bad]:02x}."
    decoded = sample.decode("utf-8", "replace")
    bad_bytes = decoded.count("\ufffd") + decoded.count("\0")
    if sum(character > "\x7f" for character in decoded) > 2 * bad_bytes:
        return f"{message} To go on with U+FFFD in the place of such bytes: --encoding={REPLACE}"
    guesses = []
    for match in charset_normalizer.from_bytes(sample, cp_isolation=ENCODINGS):
        same = match.could_be_from_charset  # the encodings in which the sample is this text
        guesses.append("cp1252" if "cp1252" in same else match.encoding)
    message += " Pass the encoding in which this line is right:"
    guesses = guesses[:3] or [name for name in ENCODINGS if _find_bad_byte(line, name) < 0]
    rest = sample[sample.index(line) :]
    decoded_lines = zip(*[rest.decode(guess, "replace").splitlines() for guess in guesses])
    shown = max(decoded_lines, key=lambda same_line: len(set(same_line)), default=())
    same_begin = len(os.path.commonprefix(shown))  # noqa: RUF071 (of characters, not folders)
    begin = max(0, same_begin - 40)
    for guess, text in zip(guesses, shown):
        message += f"\n  --encoding={guess:10} {text[begin:][:80]}"
    return message


def _find_bad_byte(line: bytes, encoding: str) -> int:
    """Return the place of the first byte that is no text in the encoding, or -1."""
    try:
        return line.decode(encoding).find("\0")
    except UnicodeDecodeError as error:
        return error.start
