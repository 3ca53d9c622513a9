"""Turn the rows of a data set into documents, and documents into the pieces that are tokenized.

A document is a text, a prompt with its completion, or a conversation.
"""

from __future__ import annotations

import codecs
import collections
import functools
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data.chat import (
    ENDING_CHARACTERS,
    Message,
    chat_template,
    common_ending,
    questions_and_answers,
)
from data.readers import (
    END_OF_TEXT,
    REPLACE,
    SUFFIXES,
    TABLES,
    Row,
    file_rows,
    find_files,
    hub_rows,
    is_text,
    replace_surrogates,
    split_documents,
    suffix_of,
)
from gpt12.errors import UserError
from gpt12.files import exists

# A longer text is tokenized in pieces of about this size, on all cores and in constant memory.
PIECE_CHARACTERS = 20_000
# GPT-2's tokenizer never joins a line end to a non-white character before it. A text that is cut
# between the two has the same ids as the uncut text. Such a line ends where it can be cut.
CUT = re.compile(r"\S\n\Z")
SPLIT_NAME = re.compile(r"(train|valid|validation|val|dev|test)[.-]")  # as in test.jsonl
FEW_DOCUMENTS = 20  # fewer texts are split by tokens: one of them may be most of the data


class Form(NamedTuple):
    """What a row may look like.

    kind: "text"; "prompt" for a prompt and a completion, joined as they are; "messages" for a
        conversation.
    columns: the row has all of these.
    optional: columns that are used if they are there.
    """

    kind: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ("system",)


# The first form counts whose columns a row has. --text_column=text comes after these, another one
# before.
FORMS = (
    Form("messages", ("messages",)),  # each with role and content
    Form("messages", ("conversations",)),  # ShareGPT's: from and value
    Form("messages", ("instruction", "output"), ("system", "input")),  # Alpaca's
    Form("messages", ("question", "answer")),
    Form("messages", ("prompt", "response")),
    Form("prompt", ("prompt", "completion"), ()),
)
COLUMNS = {column for form in FORMS for column in (*form.columns, *form.optional)}
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",  # ShareGPT's names
    "gpt": "assistant",
}
# Columns, and keys of a message, that change what is to be learned.
REFUSED = ("tool_calls", "function_call", "tools", "history")
# The keys of a message that mean something. Others are named in a note.
MESSAGE_KEYS = {"role", "from", "content", "value", "weight", "train", *REFUSED}


class Piece(NamedTuple):
    """A part of a document that is tokenized by itself.

    A short text is one piece. In examples each answer is one, and what stands before each answer.

    after: what comes before it: "" is nothing, "text" is a piece that it continues, "end" is an end
        token. Many tokenizers write the beginning of a text in another way than its middle.
    trained: its tokens, and the end token after it, are targets.
    end: an end token follows.
    """

    text: str
    after: str = ""
    trained: bool = True
    end: bool = True


@dataclass
class Found:
    """What a pass over documents has found so far. Documents.pieces() fills it in.

    count: the documents, with those that are left out.
    unanswered: the conversations that end with a question.
    single_turn: each conversation has one answer.
    prompts: the ends of all prompts.
    systems: how many conversations have each system message; None stands for no message.
    notes: what the user should know about the rows.
    """

    count: int = 0
    unanswered: int = 0
    single_turn: bool = True
    prompts: set[str] = field(default_factory=set)
    systems: collections.Counter[str | None] = field(default_factory=collections.Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def ending(self) -> str:
        """The text with which all prompts end."""
        return common_ending(self.prompts)

    def chat_template(self, kind: str, has_end_token: bool) -> str:
        """Return the template by which a model that learned the examples can be asked."""
        [(system, _)] = self.systems.most_common(1)
        return chat_template(kind, has_end_token, self.ending, system, self.single_turn)


class Documents:
    """The documents of a file, a folder or a hub data set, as a stream of pieces.

    Reading raises UserError, with file and line, for what cannot be read.

    source: a path, or "hf:owner/name", "hf:owner/name:config", "hf:owner/name:config:split".
    text_column: the column with the text. "line" makes each line of a text file a document.
    encoding: of the files that are not UTF-8; REPLACE is UTF-8 whose bad bytes become U+FFFD.
    files: the files that are read, in this order; none for the hub.
    notes: what the user should know about the files.
    """

    def __init__(
        self, source: str | Path, text_column: str = "text", encoding: str = "utf-8"
    ) -> None:
        self.source = str(source)
        self.text_column = text_column
        self.encoding = encoding
        self.files: list[Path] = []
        self.notes: list[str] = []
        if not self.source.startswith("hf:"):
            self._find_files()

    @functools.cached_property
    def kind(self) -> str:
        """The kind of all rows' form, which the first row shows."""
        for _, _, form in self._rows():
            return form.kind
        return "text"

    @functools.cached_property
    def first_indices(self) -> list[int]:
        """The indices of the first FEW_DOCUMENTS documents, or of all if they are fewer."""
        documents = itertools.groupby(index for index, _ in self.pieces())
        return [index for index, _ in itertools.islice(documents, FEW_DOCUMENTS)]

    def pieces(self, found: Found | None = None) -> Iterator[tuple[int, Piece]]:
        """Yield each piece with the index of its document.

        Blank texts and examples with a blank answer are left out; they have an index all the same.

        found: gets what is found. The pass begins after the first found.count documents.
        """
        found = found or Found()
        begin = ""
        for where, row, form in self._rows(found.count):
            begin = begin or where
            if form.kind != self.kind:
                raise UserError(
                    f"{where} is of kind {form.kind!r}, and the rows before, from {begin}, "
                    f"are of kind {self.kind!r}. Put them into separate data sets."
                )
            is_text = form.kind == "text"
            pieces = self._text(where, row) if is_text else self._example(where, row, form, found)
            for piece in pieces:
                yield found.count, piece
            found.count += 1

    # ----------------------------------------------------------------------------------------------
    # Rows

    def _rows(self, skip: int = 0) -> Iterator[tuple[str, Row, Form]]:
        """Yield the place, the content and the form of each row, but not of the first `skip`."""
        if self.source.startswith("hf:"):
            rows = hub_rows(self.source)
        else:
            rows = itertools.chain.from_iterable(
                file_rows(file, self.text_column, self.encoding) for file in self.files
            )
        for where, row in itertools.islice(rows, skip, None):
            known = self._with_known_names(where, row)
            yield where, known, self._form(where, known)

    def _with_known_names(self, where: str, row: Row) -> Row:
        """Return a row in which a column that is written as `Question` is the `question`."""
        if not isinstance(row, Mapping):
            raise UserError(
                f'{where} should be an object like {{"text": "..."}} but is {row!r:.60}.'
            )
        known = {column.lower(): column for column in (*COLUMNS, self.text_column)}
        renamed = {}
        for column, value in row.items():
            name = known.get(column.lower(), column)
            renamed[column if name in row else name] = value
        return renamed

    def _form(self, where: str, row: Row) -> Form:
        """Return the form that a row has."""
        text = Form("text", (self.text_column,))
        for form in [*FORMS, text] if self.text_column == "text" else [text, *FORMS]:
            if all(column in row for column in form.columns):
                return form
        known = ", ".join(" with ".join(form.columns) for form in FORMS)
        file = where.partition(", line ")[0]
        place = f"The header of {file}" if suffix_of(Path(file)) in (".csv", ".tsv") else where
        raise UserError(
            f"{place} has no {self.text_column!r}, only {', '.join(map(repr, row))}. Name the "
            f"column with the text (--text_column=), or give questions and answers: {known}."
        )

    def _text(self, where: str, row: Row) -> Iterator[Piece]:
        """Yield the pieces of a row's text.

        Marks for the end of a text may separate several in it. Each gets an end, but all are one
        document and go to the same split.
        """
        text = row[self.text_column]
        if isinstance(text, Iterator):
            return split_text(text)
        lines = io.StringIO(_read_cell(where, row, self.text_column))
        return itertools.chain.from_iterable(map(split_text, split_documents(lines)))

    def _example(self, where: str, row: Row, form: Form, found: Found) -> list[Piece]:
        """Return the pieces of a row with questions and answers; none if no answer is trained."""
        if found.count == 0 and (unused := _unused(row, form)):
            columns = " and ".join(form.columns)
            found.notes.append(
                f"{self.source} is read by its columns {columns}. Columns not used: "
                f"{', '.join(unused)}."
            )
        messages = _read_messages(where, row, form)
        pieces: list[Piece] = []
        answers = [message for message in messages if message["role"] == "assistant"]
        for message, (question, answer) in zip(answers, questions_and_answers(form.kind, messages)):
            trained = not message.get("ignored") and answer.strip() != ""
            before = "end" if pieces else ""
            pieces.append(Piece(question, before, trained=False, end=False))
            pieces.append(Piece(answer, "text", trained))
        if not any(piece.trained for piece in pieces):
            return []
        found.single_turn &= len(answers) == 1
        found.unanswered += messages[-1]["role"] == "user"
        if form.kind == "prompt":
            found.prompts.add(pieces[0].text[-ENDING_CHARACTERS:])
        first = messages[0]
        found.systems[first["content"].strip() if first["role"] == "system" else None] += 1
        return pieces

    # ----------------------------------------------------------------------------------------------
    # Files

    def _find_files(self) -> None:
        """Find the files to read, and note what a folder holds.

        Raises UserError if there is nothing to read.
        """
        try:
            if self.encoding != REPLACE:
                "?".encode(self.encoding)  # fails also for what encodes no text, like base64
                self.encoding = codecs.lookup(self.encoding).name
        except LookupError:
            raise UserError(f"There is no encoding {self.encoding!r}. utf-8 is one.") from None
        path = Path(self.source).expanduser()
        if not exists(path):
            raise UserError(f"There is no file or folder {str(path)[:200]!r}.")
        found = find_files(path)
        self.files = list(filter(is_text, found))
        if any(suffix_of(file) not in ("", *SUFFIXES) for file in self.files):  # source code
            self.files = list(filter(self._is_usable, self.files))
        if not self.files:
            raise UserError(
                f"{path} holds no text and no val shards. These files are read: "
                f"{', '.join(SUFFIXES)}, each also as .gz, and plain text with any other ending."
            )
        if path.is_dir():
            note = f"{self.source}: {len(self.files):,} files are read: {_count(self.files)}"
            if skipped := sorted(set(found).difference(self.files)):
                note += f"; {len(skipped):,} without a text are not: {_count(skipped)}"
            self.notes.append(f"{note}.")
            names = [file.name.lower() for file in self.files]
            splits = sorted({match[1] for name in names if (match := SPLIT_NAME.match(name))})
            if len(splits) > 1:
                self.notes.append(
                    f"The files named {' and '.join(splits)} are read as one data set, which is "
                    "split anew. Move those away that should not be trained on."
                )

    def _is_usable(self, file: Path) -> bool:
        """Tell whether a file is no table, or has a text. A package.json has none."""
        if suffix_of(file) not in TABLES:
            return True
        try:
            next(Documents(file, self.text_column, self.encoding)._rows(), None)
        except UserError:
            return False
        return True


def _count(files: Sequence[Path]) -> str:
    """Return how many files there are of the commonest endings."""
    counter = collections.Counter(suffix_of(file) or file.name for file in files)
    return ", ".join(f"{count:,} {ending}" for ending, count in counter.most_common(8))


# --------------------------------------------------------------------------------------------------
# The content of a row


def _given_messages(row: Row, form: Form) -> list[Any]:
    """Return the messages that a row holds; none if its form has a column for each text."""
    if len(form.columns) > 1:
        return []
    given = row[form.columns[0]]
    return given if isinstance(given, list) else [given]


def _unused(row: Row, form: Form) -> list[str]:
    """Return the columns of a row, and the keys of its messages, that mean nothing in its form."""
    used = {*form.columns, *form.optional, *REFUSED}
    unused = [repr(column) for column in row if column not in used]
    messages = [given for given in _given_messages(row, form) if isinstance(given, dict)]
    keys = {key for message in messages for key in message}
    return unused + [f"{key!r} of a message" for key in sorted(keys - MESSAGE_KEYS)]


def _read_messages(where: str, row: Row, form: Form) -> list[Message]:
    """Return a row's conversation."""
    _refuse(where, row)
    messages = [_read_message(where, message) for message in _given_messages(row, form)]
    if len(form.columns) > 1:
        question, answer = (_read_cell(where, row, column) for column in form.columns)
        if "input" in form.optional and row.get("input"):
            question += f"\n\n{_read_cell(where, row, 'input')}"
        messages = [
            Message(role="user", content=question),
            Message(role="assistant", content=_without_end(answer)),
        ]
    if "system" in form.optional and row.get("system"):
        messages.insert(0, Message(role="system", content=_read_cell(where, row, "system")))
    return messages


def _read_message(where: str, given: Any) -> Message:
    """Return a message with role, content and whether it may be trained."""
    message = given if isinstance(given, dict) else {}
    _refuse(where, message)
    role = ROLES.get(str(message.get("role", message.get("from"))))
    column = "content" if "content" in message else "value"
    if role is None or column not in message:
        raise UserError(
            f'{where}: a message should be {{"role": ..., "content": a text}}, where a role is '
            f"system, user or assistant, and is {given!r:.100}."
        )
    content = _without_end(_read_cell(where, message, column))
    ignored = message.get("weight") == 0 or message.get("train") is False
    return Message(role=role, content=content, ignored=ignored)


def _refuse(where: str, row: Row) -> None:
    for key in REFUSED:
        if row.get(key) and row[key] != "[]":
            raise UserError(f"{where} has {key!r}, which cannot be trained here.")


def _read_cell(where: str, row: Row, column: str) -> str:
    """Return a cell that should be a text; an empty one is a blank text."""
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {column!r} should be a text but is {text!r:.60}.")
    return replace_surrogates(text).replace("\r\n", "\n").replace("\r", "\n")


def _without_end(answer: str) -> str:
    """Return an answer without END_OF_TEXT at its end, which the tokenizer puts there."""
    while answer.rstrip().endswith(END_OF_TEXT):
        answer = answer.rstrip().removesuffix(END_OF_TEXT)
    return answer


def split_text(lines: Iterable[str]) -> Iterator[Piece]:
    """Yield a text, given in lines, in pieces that are tokenized as in the whole; a blank one not.

    Only the last piece has the end token.
    """
    text = ""
    after = ""
    for line in lines:
        text += line
        if len(text) > PIECE_CHARACTERS and CUT.search(line):
            yield Piece(text[:-1], after, end=False)
            text = "\n"
            after = "text"
    if after or text.strip():
        yield Piece(text, after)
