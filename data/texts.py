"""Turn rows into documents, and documents into the pieces that are tokenized.

A document is a text, a prompt with its completion, or a conversation.
"""

from __future__ import annotations

import codecs
import collections
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.readers import (
    END_OF_TEXT,
    REPLACE,
    ROW_SUFFIXES,
    START_OF_TEXT,
    SUFFIXES,
    Row,
    Rows,
    file_rows,
    find_files,
    hub_rows,
    is_utf8,
    replace_surrogates,
    suffix_of,
)
from gpt12.errors import UserError

# A longer text is tokenized in pieces of about this size, on all cores and in constant memory.
PIECE_CHARACTERS = 500_000
# GPT-2's tokenizer never joins a space or line end to a non-white character before it. A text that
# is cut between the two has the same ids as the uncut text. This finds the last such place.
# (Python counts the separators U+001C to U+001F to white space; GPT-2's pattern does not.)
LAST_CUT = re.compile(r"(?s).*[\S\x1c-\x1f](?=[ \n])")

# The forms of a row: the columns that it must have, and what they are. The first form whose columns
# are there counts; a column with a text (--text_column) is the last one.
FORMS = {
    ("messages",): "messages",  # role and content
    ("conversations",): "messages",  # ShareGPT's: from and value
    ("instruction", "output"): "messages",  # Alpaca's, with an optional input
    ("question", "answer"): "messages",
    ("prompt", "response"): "messages",
    ("prompt", "completion"): "prompt",  # joined as they are
}
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",  # ShareGPT's names
    "gpt": "assistant",
}
# Columns, and keys of a message, that change what is to be learned.
REFUSED = ("tool_calls", "function_call", "tools", "history")
# How a conversation is written. The {% generation %} tags stand around what is trained, the
# assistant's answers and the end token after each. transformers, which knows these tags, uses them
# for return_assistant_tokens_mask, and TRL for assistant_only_loss. They do not change the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{{ message['content'].rstrip().lstrip('\n') }}{{ eos_token }}"
    "{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] | trim + '\n\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{{ '### Assistant:\n' if add_generation_prompt else '' }}"
)
# A conversation without a system message gets the one that most conversations of the data have.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '### System:\n' + SYSTEM + '\n\n' }}{% endif %}"
)
# How a question of prompt-completion data is written: with as much of the prompts' common ending as
# it lacks. Such data know no turns, so only the last question counts.
PROMPT_TEMPLATE = (
    "{% set ending = ENDING %}"
    "{% set last = namespace(question=0, known=0) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages[last.question:] %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{% for length in range(ending | length + 1) %}"
    "{% if message['content'].endswith(ending[:length]) %}"
    "{% set last.known = length %}"
    "{% endif %}"
    "{% endfor %}"
    "{{ message['content'] + ending[last.known:] }}"
    "{% endif %}"
    "{% endfor %}"
)
# Prompts as different as this share words at their ends by intention, and not by chance.
MANY_PROMPTS = 20
ENDING_CHARACTERS = 1000  # a prompt's common ending is looked for in so many at its end
MARKS = ".?!…。？！"  # end a sentence
# Letters of scripts without spaces: Thai and Lao, Burmese, Khmer, kana and Han.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
FILES_NAMED = 8  # in a note
FEW_DOCUMENTS = 20  # fewer texts are split by tokens: one of them may be most of the data


class Piece(NamedTuple):
    """A part of a document that is tokenized by itself."""

    text: str
    trained: bool = True  # its tokens, and the end token after it, are targets
    end: bool = True  # the end token follows
    last: bool = True  # it is the document's last piece


# --------------------------------------------------------------------------------------------------
# How conversations and questions are written


def chat_pieces(messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """Return the pieces of a conversation that ends with an answer, as CHAT_TEMPLATE writes it."""
    pieces = []
    prompt = ""
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "assistant":
            content = message["content"].rstrip().lstrip("\n")  # code may begin with blanks
        prompt += f"### {message['role'].capitalize()}:\n"
        if message["role"] == "assistant":
            trained = message.get("weight") != 0 and content != ""
            pieces.append(Piece(prompt, trained=False, end=False, last=False))
            pieces.append(Piece(content, trained=trained, last=message is messages[-1]))
            prompt = ""
        else:
            prompt += f"{content}\n\n"
    return pieces


def chat_template(
    kind: str, has_end_token: bool, ending: str = "", system: str | None = None
) -> str:
    """Return the chat template for a model that is trained on conversations or prompts.

    kind: "messages" or "prompt".
    has_end_token: a character tokenizer has none. A line end stands in its place.
    ending: the common ending of all prompts. system: the commonest system message.
    """
    if kind == "messages":
        template = CHAT_TEMPLATE
        if system:
            text = json.dumps(system, ensure_ascii=False)
            template = DEFAULT_SYSTEM.replace("SYSTEM", text, 1) + template
    else:
        template = PROMPT_TEMPLATE.replace("ENDING", json.dumps(ending, ensure_ascii=False), 1)
    return template if has_end_token else template.replace("{{ eos_token }}", r"{{ '\n' }}")


class CommonEnding:
    """Find the text with which all prompts end, so that a question can be ended in the same way.

    It begins at the first line end that all prompts share, if they share one. Otherwise it is what
    follows the sentence: " ->", but not "?". Words before it belong to it only if many different
    prompts have them (" A:"); few may share a word by chance. In scripts without spaces, where the
    answer's sign is the next sentence ("？答："), the ending begins at the last sentence mark.
    """

    def __init__(self) -> None:
        self._longest: str | None = None
        self._different: set[str] = set()  # at most MANY_PROMPTS

    def add(self, prompt: str) -> None:
        """Take a prompt into account."""
        if self._longest is None:
            self._longest = prompt[-ENDING_CHARACTERS:]
        while not prompt.endswith(self._longest):
            self._longest = self._longest[1:]
        if len(self._different) < MANY_PROMPTS:
            self._different.add(prompt)

    def text(self) -> str:
        """Return the ending, which is empty if there is none."""
        longest = self._longest or ""
        if "\n" in longest:
            return longest[longest.index("\n") :]
        first, between = rf"[^\w{MARKS}]", r"\W"
        if len(self._different) >= MANY_PROMPTS:
            first, between = rf"(?:{first}|[{UNSPACED}])", "."
        for begin in (rf"[{MARKS}][{UNSPACED}][^{MARKS}]", first + between):
            if found := re.search(rf"{begin}*(?<![\w{MARKS}])$", longest):
                return found[0]
        return ""


# --------------------------------------------------------------------------------------------------
# Rows to documents


class Documents:
    """The documents of a file, a folder or a hub data set, as a stream of pieces.

    Each iteration starts at the beginning and yields a document's index with each of its pieces.
    Blank texts and examples with a blank answer are left out; they have an index all the same.
    Reading raises UserError, with file and line, for what cannot be read.

    source: a path, or "hf:owner/name", "hf:owner/name:config", "hf:owner/name:config:split".
    text_column: the column with the text. "line" makes each line of a text file a document.
    encoding: that of the files; REPLACE is UTF-8 whose bad bytes become U+FFFD.
    kind: "text"; "prompt" for prompts and completions, which are taken as they are; "messages" for
        conversations.
    files: the files that are read, in this order; none for the hub.
    utf8: those of them that are UTF-8 and are read as such, although another encoding is given.
    notes: what the user should know about the files and their form.
    skip: leave out this many documents at the beginning.
    rows: how many documents the iteration has read so far, with those that it leaves out.
    systems: how often each system message has come, None for none.
    """

    def __init__(
        self, source: str | Path, text_column: str = "text", encoding: str = "utf-8"
    ) -> None:
        self.source = str(source)
        self.text_column = text_column
        self.encoding = encoding
        self.files: list[Path] = []
        self.utf8: set[Path] = set()
        self.notes: list[str] = []
        self.skip = 0
        self.rows = 0
        self.systems: collections.Counter[str | None] = collections.Counter()
        if not self.source.startswith("hf:"):
            self._find_files()
        self.kind = "text"
        for where, row in itertools.islice(self._rows(), 1):
            forms = self._forms(where, row)
            self.kind = forms[0][1]
            if len(forms) > 1:
                names = [" and ".join(columns) for columns, _ in forms]
                self.notes.append(f"{self.source}: of {', or '.join(names)} the first is used.")
            known = {*REFUSED, *itertools.chain.from_iterable(columns for columns, _ in forms)}
            if self.kind == "messages":
                known.add("system")
            if forms[0][0] == ("instruction", "output"):
                known.add("input")
            unused = [repr(column) for column in row if column not in known]
            if self.kind != "text" and unused:
                self.notes.append(f"{self.source}: columns not used: {', '.join(unused)}.")

    def _find_files(self) -> None:
        try:
            if self.encoding != REPLACE:
                "?".encode(self.encoding)  # fails also for what encodes no text, like base64
                self.encoding = codecs.lookup(self.encoding).name
        except LookupError:
            raise UserError(f"There is no encoding {self.encoding!r}. utf-8 is one.") from None
        path = Path(self.source).expanduser()
        self.files, skipped = find_files(path, self.encoding)
        if self.encoding not in ("utf-8", REPLACE):
            self.utf8 = set(filter(is_utf8, self.files))
            self._note("read as utf-8, which they are", self.utf8)
        if any(suffix_of(file) not in ("", *SUFFIXES) for file in self.files):
            self._leave_out_tables()
        if path.is_dir():
            note = (
                f"{self.source}: {len(self.files):,} files are read, {_count_endings(self.files)}"
            )
            if skipped:
                note += f"; {len(skipped):,} that are no text are not, {_count_endings(skipped)}"
            self.notes.append(f"{note}.")

    def _leave_out_tables(self) -> None:
        """Leave out what lies beside source code and has no text, such as a package.json."""
        left_out = set()
        for file in self.files:
            try:
                if suffix_of(file) in ROW_SUFFIXES:
                    for where, row in itertools.islice(self._file_rows(file), 1):
                        self._forms(where, row)
            except UserError:
                left_out.add(file)
        self.files = [file for file in self.files if file not in left_out]
        self._note("not read, because their first row cannot be used", left_out)

    def _note(self, what: str, files: set[Path]) -> None:
        """Note what is done with some files."""
        if files:
            names = ", ".join(map(str, sorted(files)[:FILES_NAMED]))
            self.notes.append(f"{what}: {names}{', ...' if len(files) > FILES_NAMED else ''}.")

    @functools.cached_property
    def first(self) -> list[int]:
        """The indices of the first FEW_DOCUMENTS documents, or of all if they are fewer."""
        ends = (document for document, piece in self if piece.last)
        return list(itertools.islice(ends, FEW_DOCUMENTS))

    def commonest_system(self) -> str | None:
        """Return the system message that most conversations have, or None if most have none."""
        ranking = self.systems.most_common(1)
        return ranking[0][0] if ranking else None

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        self.rows = self.skip
        self.systems.clear()
        for index, (where, row) in enumerate(self._rows(), self.skip):
            self.rows += 1
            columns, kind = self._forms(where, row)[0]
            if kind != self.kind:
                raise UserError(
                    f"{where} is of kind {kind!r}, and the rows before are of kind {self.kind!r}. "
                    "Put them into separate data sets."
                )
            if kind == "text":
                text = row[self.text_column]
                if isinstance(text, Iterator):
                    pieces = split_document(text)
                else:
                    pieces = _split_cell(_text(where, row, self.text_column))
            else:
                pieces = iter(self._example(where, row, columns))
            first = next(pieces, None)
            if first is None or (first.last and not first.text.strip()):
                continue
            yield index, first
            for piece in pieces:
                yield index, piece

    def _rows(self) -> Iterator[tuple[str, Row]]:
        """Yield the place and the content of each document."""
        if self.source.startswith("hf:"):
            return hub_rows(self.source, self.skip)
        rows = itertools.chain.from_iterable(map(self._file_rows, self.files))
        return itertools.islice(rows, self.skip, None)

    def _file_rows(self, file: Path) -> Rows:
        encoding = "utf-8" if file in self.utf8 else self.encoding
        return file_rows(file, self.text_column, encoding)

    def _forms(self, where: str, row: Row) -> list[tuple[tuple[str, ...], str]]:
        """Return the forms that a row has, each with its kind; the first one is used."""
        if not isinstance(row, dict):
            raise UserError(
                f'{where} should be an object like {{"text": "..."}} but is {row!r:.60}.'
            )
        forms = [form for form in FORMS.items() if all(column in row for column in form[0])]
        if self.text_column in row:
            place = len(forms) if self.text_column == "text" else 0
            forms.insert(place, ((self.text_column,), "text"))
        if not forms:
            known = ", ".join(" with ".join(columns) for columns in FORMS)
            raise UserError(
                f"{where} has no {self.text_column!r}, only {', '.join(map(repr, row))}. Name the "
                f"column with the text (--text_column=), or give questions and answers: {known}."
            )
        return forms

    def _example(self, where: str, row: Row, columns: Sequence[str]) -> list[Piece]:
        """Return the pieces of a row with questions and answers; none if no answer is trained."""
        _refuse(where, row)
        if len(columns) == 1:
            messages = _read_messages(where, row[columns[0]])
        else:
            question, answer = (_text(where, row, column) for column in columns)
            answer = _without_end(answer)
            if self.kind == "prompt":
                if not answer.strip():
                    return []
                return [Piece(question, trained=False, end=False, last=False), Piece(answer)]
            if row.get("input") and columns[0] == "instruction":
                question += f"\n\n{_text(where, row, 'input')}"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": _text(where, row, "system")})
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise UserError(
                f"{where} has no message of the assistant, so there is nothing to train on."
            )
        pieces = chat_pieces(messages)
        if not any(piece.trained for piece in pieces):
            return []
        first = messages[0]
        self.systems[first["content"].strip() if first["role"] == "system" else None] += 1
        return pieces


def _count_endings(files: Sequence[Path]) -> str:
    counter = collections.Counter(suffix_of(file) or file.name for file in files)
    return ", ".join(f"{count:,} {ending}" for ending, count in counter.most_common(8))


def _refuse(where: str, row: Row) -> None:
    for key in REFUSED:
        if row.get(key):
            raise UserError(f"{where} has {key!r}, which cannot be trained here.")


def _text(where: str, row: Row, column: str) -> str:
    """Return a cell that should be a text; an empty one is a blank text."""
    text = row.get(column)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {column!r} should be a text but is {text!r:.60}.")
    if not text.isascii():
        text = replace_surrogates(text)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_messages(where: str, given: Any) -> list[dict[str, Any]]:
    """Return a list of messages with role and content, from which "weight" may stay."""
    messages = []
    for message in given if isinstance(given, list) else [given]:
        if not isinstance(message, dict):
            message = {}
        _refuse(where, message)
        role = ROLES.get(str(message.get("role", message.get("from"))))
        content = message.get("content", message.get("value"))
        if role is None or not isinstance(content, str):
            raise UserError(
                f'{where}: a message should be {{"role": ..., "content": a text}}, where a role is '
                f"system, user or assistant, and is {message or given!r:.100}."
            )
        text = _without_end(_text(where, {"content": content}, "content"))
        messages.append({"role": role, "content": text, "weight": message.get("weight")})
    return messages


def _without_end(answer: str) -> str:
    """Return an answer without END_OF_TEXT at its end, which the tokenizer puts there."""
    while answer.rstrip().endswith(END_OF_TEXT):
        answer = answer.rstrip().removesuffix(END_OF_TEXT)
    return answer


def _split_cell(text: str) -> Iterator[Piece]:
    """Yield the pieces of a row's text, in which END_OF_TEXT stands as in a text file.

    What it separates stays one document, because rows are counted and split as they are.
    """
    parts = re.split(re.escape(END_OF_TEXT) + "\n?", text.replace(START_OF_TEXT, ""))
    parts = [part for part in parts if part.strip()]
    for number, part in enumerate(parts, 1):
        for piece in split_document(iter([part])):
            yield piece._replace(last=piece.last and number == len(parts))


def split_document(blocks: Iterator[str]) -> Iterator[Piece]:
    """Yield a text, given in blocks, in pieces that are tokenized as in the whole."""
    held: list[str] = []
    length = 0
    before = ""  # the character before the block, because a cut may lie between them
    for block in blocks:
        length += len(block)
        if length > PIECE_CHARACTERS and (match := LAST_CUT.match(before + block)):
            cut = match.end() - len(before)
            yield Piece("".join([*held, block[:cut]]), end=False, last=False)
            held = []
            block = block[cut:]
            length = len(block)
        held.append(block)
        before = block[-1:] or before
    yield Piece("".join(held))
