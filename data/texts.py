"""Turn files and hub data sets into documents, and documents into the pieces that are tokenized.

A document is a text, a prompt with its completion, or a conversation.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.readers import TEXT_SUFFIXES, Row, file_rows, find_files, hub_rows
from gpt12.errors import UserError

# Characters tokenized at once: few enough for constant memory, and enough to keep all cores busy.
PIECE_CHARACTERS = 500_000
# GPT-2's tokenizer never joins a space or line end to a non-white character before it. A text that
# is cut between the two has the same ids as the uncut text. This finds the last such place.
# (Python counts the separators U+001C to U+001F to white space; GPT-2's pattern does not.)
LAST_CUT = re.compile(r"(?s).*[\S\x1c-\x1f](?=[ \n])")

# How a conversation is written. The {% generation %} tags stand around what is trained, the
# assistant's answers and the end token after each. transformers, which knows these tags, uses them
# for return_assistant_tokens_mask, and TRL for assistant_only_loss. They do not change the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] | trim + '\n\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{{ '### Assistant:\n' if add_generation_prompt else '' }}"
)
# A character tokenizer has no end token. A line end stands in its place.
CHAT_TEMPLATE_OF_CHARACTERS = CHAT_TEMPLATE.replace("{{ eos_token }}", r"{{ '\n' }}")
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
ROLES = ("system", "user", "assistant")
# Prompts as different as this share words at their ends by intention, and not by chance.
MANY_PROMPTS = 20


class Piece(NamedTuple):
    """A part of a document that is tokenized by itself."""

    text: str
    trained: bool = True  # its tokens, and the end token after it, are targets
    end: bool = True  # the end token follows
    last: bool = True  # it is the document's last piece


def chat_pieces(messages: Sequence[Mapping[str, str]]) -> list[Piece]:
    """Return the pieces of a conversation, as CHAT_TEMPLATE writes it.

    If its last message is not the assistant's, the last piece is a prompt for the answer.
    """
    pieces = []
    prompt = ""
    for message in messages:
        content = message["content"].strip()
        prompt += f"### {message['role'].capitalize()}:\n"
        if message["role"] == "assistant":
            pieces.append(Piece(prompt, trained=False, end=False, last=False))
            pieces.append(Piece(content, last=False))
            prompt = ""
        else:
            prompt += f"{content}\n\n"
    if prompt:
        pieces.append(Piece(f"{prompt}### Assistant:\n", trained=False, end=False))
    elif pieces:
        pieces[-1] = pieces[-1]._replace(last=True)
    return pieces


def prompt_template(ending: str, has_end_token: bool) -> str:
    """Return the chat template of prompt-completion data whose prompts have this ending."""
    template = PROMPT_TEMPLATE.replace("ENDING", json.dumps(ending, ensure_ascii=False), 1)
    return template if has_end_token else template.replace("{{ eos_token }}", r"{{ '\n' }}")


class CommonEnding:
    """Find the text with which all prompts end, so that a question can be ended in the same way.

    It begins at the first line end that all prompts share, if they share one. Otherwise it is what
    follows the sentence: " ->", but not "?". Words before it belong to it only if many different
    prompts have them (" A:"); few may share a word by chance.
    """

    def __init__(self) -> None:
        self._longest: str | None = None
        self._different: set[str] = set()  # at most MANY_PROMPTS

    def add(self, prompt: str) -> None:
        """Take a prompt into account."""
        if self._longest is None:
            self._longest = prompt
        shared = 0
        for known, new in zip(reversed(self._longest), reversed(prompt)):
            if known != new:
                break
            shared += 1
        self._longest = prompt[len(prompt) - shared :]
        if len(self._different) < MANY_PROMPTS:
            self._different.add(prompt)

    def text(self) -> str:
        """Return the ending, which is empty if there is none."""
        longest = self._longest or ""
        if "\n" in longest:
            return longest[longest.index("\n") :]
        between = "." if len(self._different) >= MANY_PROMPTS else r"\W"
        found = re.search(rf"(?s)[^\w.?!…。？！]{between}*(?<![\w.?!…。？！])$", longest)
        return found[0] if found else ""


class Documents:
    """The documents of a file, a folder or a hub data set, as a stream of pieces.

    Each iteration starts at the beginning. Reading a file or folder raises UserError, with file and
    line, for what cannot be read.

    source: a path, or "hf:owner/name", or "hf:owner/name:config".
    text_column: the column with the text in .csv, .jsonl and on the hub. "line" makes each line of
        a text file a document.
    kind: "text"; "prompt" for rows with a prompt and a completion, which are taken as they are;
        "messages" for conversations.
    files: the files that are read, in this order; none for the hub.
    skipped: the files of a folder that are not read because their endings are not known.
    is_one_text: whether all is a single document, a text file.
    """

    def __init__(self, source: str | Path, text_column: str = "text") -> None:
        self.source = str(source)
        self.text_column = text_column
        self.files: list[Path] = []
        self.skipped: list[Path] = []
        if not self.source.startswith("hf:"):
            self.files, self.skipped = find_files(Path(source))
        suffixes = [file.suffix.lower() for file in self.files]
        is_one_file = len(suffixes) == 1 and suffixes[0] in TEXT_SUFFIXES
        self.is_one_text = is_one_file and text_column != "line"
        self._skip = 0
        self.kind = "text"
        for where, row in self._rows():
            self.kind = self._kind_of(where, row)
            break

    def skip(self, count: int) -> Documents:
        """Return these documents without the first `count`."""
        rest = copy.copy(self)
        rest._skip += count
        return rest

    def __iter__(self) -> Iterator[Piece]:
        for where, row in self._rows():
            kind = self._kind_of(where, row)
            if kind != self.kind:
                raise UserError(
                    f"{where} is of kind {kind!r}, and the rows before are of kind {self.kind!r}. "
                    "Put them into separate data sets."
                )
            if kind == "messages":
                yield from _conversation(where, row["messages"])
            elif kind == "prompt":
                _check_is_text(where, row, "prompt")
                _check_is_text(where, row, "completion")
                yield Piece(row["prompt"], trained=False, end=False, last=False)
                yield Piece(row["completion"])
            else:
                _check_is_text(where, row, self.text_column)
                yield from split_document(row[self.text_column])

    def _rows(self) -> Iterator[tuple[str, Row]]:
        """Yield the place and the content of each document."""
        if self.source.startswith("hf:"):
            return hub_rows(self.source, self._skip)
        rows = (file_rows(file, self.text_column) for file in self.files)
        return itertools.islice(itertools.chain.from_iterable(rows), self._skip, None)

    def _kind_of(self, where: str, row: Row) -> str:
        if self.text_column in row:
            return "text"
        if "prompt" in row and "completion" in row:
            return "prompt"
        if "messages" in row:
            return "messages"
        found = ", ".join(repr(key) for key in row)
        raise UserError(
            f"{where} has no {self.text_column!r}, only {found}. A row should have "
            f'"{self.text_column}" (or another column with the text, named by --text_column=), '
            'or "prompt" and "completion", or "messages".'
        )


def _check_is_text(where: str, row: Row, column: str) -> None:
    if not isinstance(row[column], str | Iterator):
        raise UserError(f"{where}: {column!r} should be a text but is {row[column]!r:.60}.")


def _conversation(where: str, messages: Any) -> list[Piece]:
    """Return the pieces of a row's conversation up to its last answer."""
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UserError(
            f'{where}: "messages" should be a list of {{"role": ..., "content": a text}}, where a '
            f"role is one of {', '.join(ROLES)}, and is {messages!r:.100}."
        )
    end = len(messages)
    while end > 0 and messages[end - 1]["role"] != "assistant":
        end -= 1
    if end == 0:
        raise UserError(
            f"{where} has no message of the assistant, so there is nothing to train on."
        )
    return chat_pieces(messages[:end])


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
    )


def split_document(text: str | Iterator[str]) -> Iterator[Piece]:
    """Yield a text, given whole or in blocks, in pieces of at most PIECE_CHARACTERS."""
    blocks = iter([text]) if isinstance(text, str) else text
    held: list[str] = []
    held_characters = 0
    for block in blocks:
        held.append(block)
        held_characters += len(block)
        if held_characters <= PIECE_CHARACTERS:
            continue
        joined = "".join(held)
        start = 0
        while len(joined) - start > PIECE_CHARACTERS:
            end = _cut_place(joined, start)
            yield Piece(joined[start:end], end=False, last=False)
            start = end
        held = [joined[start:]]
        held_characters = len(held[0])
    yield Piece("".join(held))


def _cut_place(text: str, start: int) -> int:
    """Return where the piece that begins at `start` ends."""
    limit = start + PIECE_CHARACTERS
    match = LAST_CUT.match(text, start, limit)
    return match.end() if match else limit  # a text without a space must be cut somewhere
