"""Write conversations as one text, in training and in sampling, by a model's chat template.

A chat template is a program in Jinja that lies beside a model's tokenizer, where transformers finds
it, too. {% generation %} and {% endgeneration %} stand around what is trained: the assistant's
answers and the end token after each. transformers uses these tags for return_assistant_tokens_mask,
and TRL for assistant_only_loss. They do not change the text.

Where the end token comes from: in sampling, and in transformers, a template writes `eos_token`. In
training that name is empty, because texts are tokenized without special tokens: data/prepare.py
puts the ids of Tokenizer.end after each answer. To the question that follows, Piece.after
(data/texts.py) says so: "end". A tokenizer without an end token has a line end in both cases.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypedDict

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpt12.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{{ message['content'].rstrip().lstrip('\n') }}{{ eos_token }}"  # code may begin with blanks
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
# Data whose conversations all have one question know no turns, so only the last question counts.
LAST_QUESTION = (
    "{% set last = namespace(question=0, known=0) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    "{% endfor %}"
)
SINGLE_TURN = LAST_QUESTION + (
    "{% set system = messages[:1] if messages[0]['role'] == 'system' else [] %}"
    "{% set messages = system + messages[last.question:] %}"
)
# How a question of prompt-completion data is written: with as much of the prompts' common ending as
# it lacks.
PROMPT_TEMPLATE = LAST_QUESTION + (
    "{% set ending = ENDING %}"
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
# Without a chat template a model continues what both have written.
PLAIN_TEMPLATE = (
    "{% for message in messages if message.role != 'system' %}"
    "{{ message.content }}{% if message.ended %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# Lone surrogates, which are in no text that was read from a file.
BEGIN_TRAINED = "\ud800"
END_TRAINED = "\ud801"
# Prompts as different as this share words at their ends by intention, and not by chance.
MANY_PROMPTS = 20
ENDING_CHARACTERS = 1000  # a prompt's common ending is looked for in so many at its end
MARKS = ".?!…。？！"  # end a sentence
# Letters of scripts without spaces: Thai and Lao, Burmese, Khmer, kana and Han.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"


class Message(TypedDict, total=False):
    """A message of a conversation: a dictionary, as chat templates expect it.

    role: "system", "user" or "assistant".
    ignored: the data say that this answer should not be trained.
    ended: the model ended this answer itself.
    """

    role: str
    content: str
    ignored: bool
    ended: bool


# --------------------------------------------------------------------------------------------------
# Training


def chat_template(
    kind: str,
    has_end_token: bool,
    ending: str = "",
    system: str | None = None,
    single_turn: bool = False,
) -> str:
    """Return the chat template for a model that is trained on conversations or prompts.

    kind: "messages" for conversations; "prompt" for prompts and completions.
    has_end_token: a character tokenizer has none. A line end stands in its place.
    ending: the common ending of all prompts. system: the commonest system message.
    single_turn: each conversation has one question.
    """
    if kind == "prompt":
        template = PROMPT_TEMPLATE.replace("ENDING", json.dumps(ending, ensure_ascii=False), 1)
    else:
        template = CHAT_TEMPLATE
        if system:
            text = json.dumps(system, ensure_ascii=False)
            template = DEFAULT_SYSTEM.replace("SYSTEM", text, 1) + template
        if single_turn:
            template = SINGLE_TURN + template
    return template if has_end_token else template.replace("{{ eos_token }}", r"{{ '\n' }}")


def questions_and_answers(kind: str, messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return each answer of a conversation, after the text that stands before it.

    The answers have no end token.
    """
    text = _training_template(kind).render(messages=messages)
    parts = re.split(f"[{BEGIN_TRAINED}{END_TRAINED}]", text)
    return list(zip(parts[0::2], parts[1::2]))


@functools.cache
def _training_template(kind: str) -> Any:
    names = {"eos_token": "", "begin_trained": BEGIN_TRAINED, "end_trained": END_TRAINED}
    return _environment(names).from_string(chat_template(kind, has_end_token=True))


def common_ending(prompts: Collection[str]) -> str:
    """Return the text with which all prompts end, so that a question can be ended in the same way.

    It begins at the first line end that all prompts share, if they share one. Otherwise it is what
    follows the sentence: " ->", but not "?". Words before it belong to it only if many different
    prompts have them (" A:"); few may share a word by chance. In scripts without spaces, where the
    answer's sign is the next sentence ("？答："), the ending begins at the last sentence mark.

    prompts: their last ENDING_CHARACTERS are enough.
    """
    reversed_ones = [prompt[::-1] for prompt in prompts]
    shared = os.path.commonprefix(reversed_ones)[::-1]  # noqa: RUF071 (of characters, not folders)
    if "\n" in shared:
        return shared[shared.index("\n") :]
    first, between = rf"[^\w{MARKS}]", r"\W"
    if len(prompts) >= MANY_PROMPTS:
        first, between = rf"(?:{first}|[{UNSPACED}])", "."
    for begin in (rf"[{MARKS}][{UNSPACED}][^{MARKS}]", first + between):
        if found := re.search(rf"{begin}*(?<![\w{MARKS}])$", shared):
            return found[0]
    return ""


# --------------------------------------------------------------------------------------------------
# Sampling

MARK = "~~question~~"  # stands for a user's text, to see what a chat template makes of it
QUESTION = Message(role="user", content=MARK)


class ChatTemplate:
    """How a model's conversations are written as one text.

    The template is a program in Jinja and may be a stranger's: it runs in a sandbox. What it finds
    there is what `transformers` gives it.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        """source: without a template, the messages are written one after the other.

        special_tokens: the texts of eos_token and others.
        """
        self.source = source or PLAIN_TEMPLATE
        self.environment = _environment({"add_generation_prompt": True, **special_tokens})

    def write(self, messages: Sequence[Message]) -> str:
        """Return the prompt for the next answer; UserError if the template fails."""
        try:
            text = self.environment.from_string(self.source).render(messages=messages)
            if not text:
                raise ValueError("it writes nothing")
            return text
        except Exception as error:  # the template may do anything
            raise UserError(
                f"the model's chat template fails ({type(error).__name__}: {str(error)[:200]}). "
                "Repair chat_template in its tokenizer_config.json, or remove it to write plain "
                "text"
            ) from None

    def forgets(self) -> bool:
        """Tell whether it writes a question without those before it, as in single-turn data."""
        answer = Message(role="assistant", content="")
        return MARK not in self.write([QUESTION, answer, Message(role="user", content="?")])

    def complete(self, text: str) -> str | None:
        """Return the text, if it is written in the template already; else None.

        The white space that the template has at its end is added.
        """
        *openings, after = self.write([QUESTION]).split(MARK)
        with contextlib.suppress(UserError):  # a template may refuse a system message
            system = Message(role="system", content=MARK)
            openings += self.write([system, QUESTION]).split(MARK)[:-1]
        words = after.strip()  # the answer's heading
        begins = [opening.strip() for opening in openings]
        if words not in text or not text.lstrip().startswith(tuple(begins)):
            return None
        if words and text.rstrip().endswith(words):
            return text.rstrip() + after[len(after.rstrip()) :]
        return text if all(begins) else None


# --------------------------------------------------------------------------------------------------
# Jinja


def _environment(names: Mapping[str, Any]) -> ImmutableSandboxedEnvironment:
    """Return a sandbox for chat templates, which may be a stranger's, as transformers has it.

    names: what a template finds in it, such as eos_token.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime, **names)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment


class GenerationTag(Extension):
    """Write begin_trained and end_trained, if they are known, around {% generation %} blocks."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the tags, and the two names around it."""
        line = next(parser.stream).lineno
        begin, end = (
            nodes.Output([nodes.Name(name, "load")], lineno=line)
            for name in ("begin_trained", "end_trained")
        )
        return [begin, *parser.parse_statements(("name:endgeneration",), drop_needle=True), end]


def raise_exception(message: str) -> NoReturn:
    """Let a template refuse a conversation."""
    raise TemplateError(message)
