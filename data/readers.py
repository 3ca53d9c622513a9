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
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gpt12.errors import UserError
from gpt12.files import exists

ROW_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
SUFFIXES = (".txt", ".md", *ROW_SUFFIXES)  # each also as .gz
DELIMITERS = (",", ";", "\t", "|")
END_OF_TEXT = "<|endoftext|>"  # separates the documents of a text file
START_OF_TEXT = "<|startoftext|>"  # begins them in files made for gpt-2-simple, and says nothing
REPLACE = "utf-8-replace"  # the encoding in which bytes that are not UTF-8 become U+FFFD
# The common ones besides UTF-8, of which the likeliest are shown.
ENCODINGS = """cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 koi8_r cp932 euc_jp cp949
    gb18030 big5""".split()
BLOCK_CHARACTERS = 1 << 16  # read at once from a text file
SAMPLE_BYTES = 1 << 18  # what a file's encoding is guessed from
SAMPLE_LINES = 100  # before the bad one
BINARY = bytes({*range(32)} - {*b"\b\t\n\v\f\r\x1b"})  # in no text of one byte a character
ROWS_AT_ONCE = 1000  # from parquet files and the hub; row by row takes three times as long
BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UNREADABLE = (OSError, EOFError, zlib.error)  # what reading a file may raise

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]


def find_files(path: Path, encoding: str) -> tuple[list[Path], list[Path]]:
    """Return the files to read for a data set, and the files that are no text, sorted.

    path: a file, or a folder, whose subfolders are searched, too. Hidden files and folders, and
        node_modules, are neither read nor counted.
    Raises UserError if there is nothing to read.
    """
    if not exists(path):
        raise UserError(f"There is no file or folder {str(path)[:200]!r}.")
    candidates = [path]
    if path.is_dir():
        candidates = []
        for file in sorted(path.rglob("*")):
            parts = file.relative_to(path).parts
            hidden = any(part.startswith(".") or part == "node_modules" for part in parts)
            if file.is_file() and not hidden:
                candidates.append(file)
    files: list[Path] = []
    skipped: list[Path] = []
    for file in candidates:
        is_text = suffix_of(file) in SUFFIXES or _is_text(file, encoding)
        (files if is_text else skipped).append(file)
    if not files:
        raise UserError(
            f"{path} holds no text and no val shards. These files are read: "
            f"{', '.join(SUFFIXES)}, each also as .gz, and plain text with any other ending."
        )
    return files, skipped


def suffix_of(file: Path) -> str:
    """Return a file's ending in lower case, without the .gz of a compressed one."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def file_rows(file: Path, text_column: str, encoding: str) -> Rows:
    """Yield the place and the content of each row of a file.

    text_column: the column that a text file's content gets. Its value is an iterator of blocks of
        text; with text_column="line", each line that is not blank is a row.
    """
    suffix = suffix_of(file)
    if suffix == ".parquet":
        return _parquet_rows(file)
    blocks = _blocks(file, encoding)
    lines = itertools.chain.from_iterable(blocks)
    if suffix in (".csv", ".tsv"):
        return _table_rows(file, lines)
    if suffix in (".json", ".jsonl"):
        return _json_rows(file, lines)
    if text_column == "line":
        return ((str(file), {"line": line.rstrip("\n")}) for line in lines if not line.isspace())
    return ((str(file), {text_column: text}) for text in _texts(blocks))


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which no file can hold, by U+FFFD. A JSON escape may bring them."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# --------------------------------------------------------------------------------------------------
# Bytes to lines


def _open(file: Path) -> BinaryIO:
    stream = gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")
    return stream  # type: ignore[return-value]


def _decode(file: Path, encoding: str) -> Iterator[list[str]]:
    """Yield a file's lines with \\n at their ends, as many at once as make a block.

    Raises UnicodeError at a byte that is not in the encoding, and at a NUL, which no text holds.
    """
    with _open(file) as stream:
        begin = stream.read(2)
        stream.seek(0)
        codec = "utf-8-sig" if encoding in ("utf-8", REPLACE) else encoding
        if begin in BOMS:
            codec = "utf-16"
        errors = "replace" if encoding == REPLACE else "strict"
        text = io.TextIOWrapper(stream, codec, errors)  # makes every line end a \n
        while lines := text.readlines(BLOCK_CHARACTERS):
            if encoding == REPLACE:
                lines = [line.replace("\0", "\ufffd") for line in lines]
            elif any("\0" in line for line in lines):
                raise UnicodeError
            yield lines


def _is_text(file: Path, encoding: str) -> bool:
    """Tell whether a file of unknown ending begins as text, in this encoding or another one."""
    try:
        with _open(file) as stream:
            begin = stream.read(BLOCK_CHARACTERS)
        if encoding != REPLACE:  # in which everything can be decoded
            next(_decode(file, encoding), None)
            return True
    except UnicodeError:
        pass
    except UNREADABLE:
        return False
    return begin.startswith(BOMS) or begin == begin.translate(None, BINARY)


def is_utf8(file: Path) -> bool:
    """Tell whether a file is UTF-8 and has characters that show it."""
    try:
        return any([not line.isascii() for lines in _decode(file, "utf-8") for line in lines])
    except (*UNREADABLE, UnicodeError):
        return False


def _blocks(file: Path, encoding: str) -> Iterator[list[str]]:
    """Yield a file's lines in blocks. Raises UserError for what cannot be read."""
    try:
        yield from _decode(file, encoding)
    except UnicodeError:
        raise UserError(_explain_encoding(file, encoding)) from None
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read: {error}.") from None


def _explain_encoding(file: Path, encoding: str) -> str:
    """Return a message about the first byte that is not in the encoding, and the likely ones."""
    import charset_normalizer

    number = 0
    lines: collections.deque[bytes] = collections.deque(maxlen=SAMPLE_LINES)
    with _open(file) as stream:
        for line in stream:
            number += 1
            lines.append(line)
            try:
                start = line.decode("utf-8" if encoding == REPLACE else encoding).find("\0")
            except UnicodeDecodeError as error:
                start = error.start
            if start >= 0:
                break
        # Whole lines, because no encoding fits to the half of a character.
        sample = b"".join([*lines, *stream.readlines(SAMPLE_BYTES)])
    message = f"{file} is not {encoding}: line {number} holds the byte 0x{line[start]:02x}."
    decoded = sample.decode("utf-8", "replace")
    bad = decoded.count("\ufffd") + decoded.count("\0")
    if sum(character > "\x7f" for character in decoded) > 2 * bad:
        return f"{message} To go on with U+FFFD in the place of such bytes: --encoding={REPLACE}"
    strange = line[0 if start < 40 else start :][:80]
    matches = charset_normalizer.from_bytes(sample, cp_isolation=ENCODINGS)
    guesses = []
    for match in matches:  # each stands for all encodings in which the sample is the same text
        guesses.append("cp1252" if "cp1252" in match.could_be_from_charset else match.encoding)
    if b"\0" in strange:  # every other byte of Latin text in UTF-16 is 0
        guesses = ["utf_16_be" if strange[:1] == b"\0" else "utf_16_le"]
    guesses = guesses[:3] or [name for name in ENCODINGS if _decodes(line, name)] or ENCODINGS
    message += " Pass the encoding in which this line is right:"
    for guess in guesses:
        shown = strange.decode(guess, "replace").splitlines()[0]
        message += f"\n  --encoding={guess:10} {shown}"
    return message


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Lines to rows


def _texts(blocks: Iterator[list[str]]) -> Iterator[Iterator[str]]:
    """Yield the documents of a text file, each in blocks."""

    def parts() -> Iterator[tuple[int, str]]:
        document = 0
        for lines in blocks:
            first, *others = "".join(lines).replace(START_OF_TEXT, "").split(END_OF_TEXT)
            yield document, first
            for other in others:
                document += 1
                if text := other.removeprefix("\n"):
                    yield document, text

    for _, texts in itertools.groupby(parts(), key=lambda part: part[0]):
        yield (text for _, text in texts)


def _json_rows(file: Path, lines: Iterator[str]) -> Rows:
    """Yield a row of each line, or of each element of an array."""
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        where = f"{file}, line {number}"
        if line.rstrip().endswith(("{", ",")) and not line.lstrip().startswith("["):
            raise UserError(
                f"{where} begins an object of several lines. Make it a list of rows, "
                '[{"text": "..."}, ...], or write each row on a line of its own.'
            )
        if line.lstrip().startswith("["):
            array = _parse(where, line + "".join(line for _, line in numbered))
            for element, row in enumerate(array, 1):
                yield f"{file}, row {element}", row
        elif line.strip():
            yield where, _parse(where, line)


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is broken JSON: {error}.") from None


def _table_rows(file: Path, lines: Iterator[str]) -> Rows:
    """Yield the rows of a table with a header."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131,072 characters
    header = next(lines, "")
    before = 0  # lines before the header
    delimiter = max(DELIMITERS, key=header.count)
    if match := re.match(r'(?i)sep=([^"\n])', header):  # Excel's
        delimiter = match[1]
        header = next(lines, "")
        before = 1
    # strict, because else a quotation mark that is never closed swallows the rest of the file.
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    end = before + 1  # of what was read
    advice = f"A text with {delimiter!r} or a quotation mark in it should stand in quotation marks"
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
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


def _parquet_rows(file: Path) -> Rows:
    from pyarrow import parquet

    number = 0
    try:
        with _open(file) as stream:
            for batch in parquet.ParquetFile(stream).iter_batches(ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except Exception as error:  # the library raises many kinds of exceptions
        raise UserError(f"{file} cannot be read: {error}.") from None


def hub_rows(source: str, skip: int) -> Rows:
    """Yield the rows of a hub data set, streamed, without its first `skip` rows.

    source: hf:owner/name, hf:owner/name:config or hf:owner/name:config:split. The split is train
    if it is not given.
    """
    import datasets

    name, config, split, *_ = [*source.removeprefix("hf:").split(":"), "", ""]
    number = skip
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for table in stream.skip(skip).with_format("arrow").iter(ROWS_AT_ONCE):
            for row in table.to_pylist():
                yield f"{source}, row {number}", row
                number += 1
    except Exception as error:  # the library raises many kinds of exceptions
        raise UserError(
            f"{source} cannot be read: {type(error).__name__}: {error}\n"
            "Check the name, the network and, for a private data set, `hf auth login`. Or save its "
            "texts as .txt, .csv or .jsonl files: python train.py --dataset=FOLDER"
        ) from error
