"""Write text with a trained model. This is the command line around gpt12/generate.py.

    python sample.py --out_dir=out                                    # the best checkpoint of a run
    python sample.py --init_from=gpt2 --start="Once upon a time" --temperature=0
    python sample.py --out_dir=out --interactive                      # a conversation
    echo "To be" | python sample.py --out_dir=out --start=- --json    # for programs

Texts go to standard output as they are written, everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import select
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from gpt12.errors import UserError, printable, require_packages, run_main

require_packages()

import torch
from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.tokenizers import GPT2_VOCAB_SIZE, from_meta, get_tokenizer, load_tokenizer
from gpt12.checkpoint import find_checkpoint, is_run
from gpt12.config import load_config, unescape
from gpt12.device import open_machine
from gpt12.generate import Sampling, TextStream, store_by_columns, stream
from gpt12.settings import SampleConfig
from gpt12.weights import find_pretrained, from_pretrained, read_nanogpt
from model import GPT

SEPARATOR = "---------------"  # between samples, as in nanoGPT
DATA = Path(__file__).parent / "data"
# Without a chat template the model continues what both have written.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.content }}{% if message.ended %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
TEMPLATE_SECONDS = 5
TEMPLATE_CHARACTERS = 1_000_000
MARK = "~~question~~"  # stands for a user's text, to see what a chat template makes of it
PASTE_SECONDS = 0.05


def main() -> None:
    config, given = load_config(SampleConfig, sys.argv[1:])
    if config.temperature == 0 and "num_samples" not in given:
        config = replace(config, num_samples=1)  # greedy samples are all the same
    prompt = ""
    if "start" in given or not config.interactive:
        prompt = read_prompt(config.start)
    try:
        writer = load(config)
        if config.interactive:
            converse(writer, first_message=prompt)
        else:
            print_samples(writer, prompt)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: ask for fewer --num_samples or fewer --max_new_tokens"
        ) from None


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch or Python could not allocate memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU and on a Mac torch has no class of its own for it.
    return "DefaultCPUAllocator" in str(error) or "MPS backend out of memory" in str(error)


# --------------------------------------------------------------------------------------------------
# Loading


def load(config: SampleConfig) -> Writer:
    """Load the model and its tokenizer, and say which checkpoint it is."""
    source = find_source(config)
    model = from_pretrained(source).eval()
    tokenizer = find_tokenizer(source)
    machine = open_machine(config.device, config.dtype, compile=False)
    if config.compile is True:
        say("compile: has no effect here; text is written without torch.compile")
    for note in machine.notes:
        say(note)
    model.to(machine.device, machine.dtype)
    if not machine.on_gpu:
        store_by_columns(model)
    return Writer(model, tokenizer, config)


def find_source(config: SampleConfig) -> Path:
    """Return the model's folder, or nanoGPT's ckpt.pt, that the configuration asks for."""
    source = Path(config.init_from)
    if config.init_from == "resume" or is_run(source):
        out_dir = Path(config.out_dir) if config.init_from == "resume" else source
        names = ("best", "last") if config.checkpoint == "auto" else (config.checkpoint,)
        source, progress = find_checkpoint(out_dir, names)
        loss = progress.best_val_loss
        loss_text = f", best val loss {loss:.4f}" if loss is not None else ""
        say(f"loaded {source}, step {progress.step}{loss_text}")
        return source
    if source.suffix == ".pt":
        return source
    folder = find_pretrained(config.init_from)
    is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    if is_adapter and (folder.parent / "config.json").exists():
        raise UserError(
            f"{folder} holds only an adapter: pass {folder.parent}, the model it is merged into"
        )
    return folder


def find_tokenizer(source: Path) -> Any:
    """Return the tokenizer of a model; UserError if there is none."""
    if source.suffix == ".pt":
        tokenizer = load_tokenizer(source.parent)
        if tokenizer is None:
            tokenizer = nanogpt_tokenizer(source)
    else:
        tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise UserError(
            f"{source} has no tokenizer, so its ids cannot be turned into text. Put the model's "
            "tokenizer.json, or its vocab.json and merges.txt, into that folder"
        )
    return tokenizer


def nanogpt_tokenizer(file: Path) -> Any:
    """Return the tokenizer of nanoGPT's ckpt.pt, which holds none itself.

    GPT-2's tokenizer is recognized by its vocabulary size. Any other is taken from the data set
    that the file names, if it is prepared in data/ with the same vocabulary size.
    """
    checkpoint = read_nanogpt(file)
    vocab_size = checkpoint.config.vocab_size
    if vocab_size == GPT2_VOCAB_SIZE:
        return get_tokenizer("gpt2")
    folder = DATA / str(checkpoint.dataset)
    meta = folder / "meta.json"
    # The name comes from the file, so it must not be allowed to lead out of data/.
    if folder.parent == DATA and meta.is_file():
        tokenizer = from_meta(json.loads(meta.read_bytes()), folder)
        if tokenizer is not None and tokenizer.vocab_size == vocab_size:
            say(f"tokenizer: that of {folder}")
            return tokenizer
    raise UserError(
        f"{file} was trained on the data set {checkpoint.dataset!r}, which is not prepared in "
        f"{DATA} with its {vocab_size:,} tokens. Prepare it there, or put the tokenizer.json of "
        f"these tokens into {file.parent}"
    )


# --------------------------------------------------------------------------------------------------
# Prompts


def read_prompt(start: str) -> str:
    r"""Return --start (\n is a new line), a file for FILE:path, or standard input for "-"."""
    if start == "-":
        check_standard_input()
        try:
            text = sys.stdin.read()
        except ValueError as error:
            raise UserError(f"standard input is not UTF-8 text: {error}") from None
    elif start.startswith("FILE:"):
        file = Path(start.removeprefix("FILE:")).expanduser()
        try:
            text = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"the prompt file {file} cannot be read as UTF-8 text: {error}"
            ) from None
    else:
        text = unescape(start)
    if not text:
        raise UserError(r"the prompt is empty: give at least one character, as in --start='\n'")
    return text


def check_standard_input() -> None:
    """Raise UserError if the program was started without a standard input."""
    if sys.stdin is None:
        raise UserError("there is no standard input to read from")


class GenerationTag(Extension):
    """Let {% generation %} and {% endgeneration %} pass, which mark what is trained."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> Any:
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    """Let a template refuse a conversation."""
    raise TemplateError(message)


class ChatTemplate:
    """How a model's conversations are written as one text.

    The template is a program in Jinja and may be a stranger's: it runs in a sandbox, and its time
    and its length are limited. What it finds there is what `transformers` gives it.
    """

    def __init__(self, tokenizer: Any):
        """A model without a template gets one that writes the messages one after the other."""
        self.is_plain = not tokenizer.chat_template
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
        )
        end = "" if tokenizer.eot is None else tokenizer.token_bytes(tokenizer.eot).decode()
        environment.globals.update(
            raise_exception=raise_exception,
            strftime_now=time.strftime,
            add_generation_prompt=True,
            **({"eos_token": end} | tokenizer.special_tokens),
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        try:
            self.template = environment.from_string(tokenizer.chat_template or PLAIN_TEMPLATE)
        except TemplateError as error:
            raise broken_template(error) from None

    def write(self, messages: Sequence[Message]) -> str:
        """Return the prompt for the next answer; UserError if the template fails."""
        deadline = time.monotonic() + TEMPLATE_SECONDS

        def check_time(*event: Any) -> Any:  # Python calls it before each line of the template
            if time.monotonic() > deadline:
                raise TimeoutError(f"it takes longer than {TEMPLATE_SECONDS} s")
            return check_time

        pieces: list[str] = []
        length = 0
        tracer = sys.gettrace()
        sys.settrace(check_time)
        try:
            for piece in self.template.generate(messages=messages):
                pieces.append(piece)
                length += len(piece)
                if length > TEMPLATE_CHARACTERS:
                    raise ValueError(f"it writes more than {TEMPLATE_CHARACTERS:,} characters")
        except Exception as error:  # the template may do anything
            raise broken_template(error) from None
        finally:
            sys.settrace(tracer)
        return "".join(pieces)

    def forgets(self) -> bool:
        """Tell whether it writes a question without those before it, as in single-turn data."""
        messages = [user_message(MARK), Message(role="assistant", content=""), user_message("?")]
        return MARK not in self.write(messages)

    def complete(self, text: str) -> str | None:
        """Return a prompt that is in the template already, with the white space that it lacks.

        None if it is not in the template.
        """
        head, _, tail = self.write([user_message(MARK)]).partition(MARK)
        before, after = head.strip(), tail.strip()
        if after and text.rstrip().endswith(after):
            for known in range(len(tail), len(tail.rstrip()) - 1, -1):
                if text.endswith(tail[:known]):
                    return text + tail[known:]
            return text
        begins = text.lstrip().startswith(before)
        if before and (begins or (before in text and after in text)):
            return text
        return None


def broken_template(error: Exception) -> UserError:
    """Return the error for a template that cannot be used."""
    return UserError(
        f"the model's chat template fails ({type(error).__name__}: {str(error)[:200]}). Repair "
        "chat_template in its tokenizer_config.json, or remove it to write plain text"
    )


class Message(TypedDict, total=False):
    """A message as chat templates expect it."""

    role: str
    content: str
    ended: bool  # the model has ended it by itself


def user_message(text: str) -> Message:
    return Message(role="user", content=text)


# --------------------------------------------------------------------------------------------------
# Writing


class Writer:
    """A loaded model and everything that is needed to write with it."""

    def __init__(self, model: GPT, tokenizer: Any, config: SampleConfig):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.template = ChatTemplate(tokenizer)
        self.system: list[Message] = []
        if config.system is not None:
            self.system = [Message(role="system", content=config.system)]
            written = self.template.write([*self.system, user_message("?")])
            if self.template.is_plain or config.system.strip() not in written:
                raise UserError("--system: the model's chat template has no place for it")

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, in which `<|endoftext|>` is that token, as in nanoGPT."""
        return self.tokenizer.encode_prompt(prompt)

    def ids_of(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the prompt for the next answer."""
        return self.encode(self.template.write([*self.system, *messages]))

    def check_length(self, ids: list[int]) -> list[int]:
        """Return the ids of a prompt; UserError if it is longer than the model's context."""
        room = self.model.config.block_size
        if len(ids) > room:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's context only {room}: shorten it"
            )
        return ids

    def new_text(self) -> TextStream:
        """Return an empty text, which ends as the configuration says."""
        return TextStream(self.tokenizer, self.config.stop)

    def write(
        self, prompt: list[int], texts: list[TextStream], speed: Speed
    ) -> Iterator[tuple[int, str]]:
        """Continue the prompt once for each text; yield (index of the text, new characters)."""
        config = self.config
        sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k or 0,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
        )
        # Far apart, so that no two samples of different --seed share their random numbers.
        seeds = [config.seed * 1_000_003 + i for i in range(len(texts))]
        prompts = [prompt] * len(texts)
        for tokens in stream(self.model, prompts, config.max_new_tokens, sampling, seeds=seeds):
            speed.count(sum(text.finish_reason is None for text in texts))
            for i, token in enumerate(tokens):
                new = texts[i].add(token)
                if new:
                    yield i, new
            if all(text.finish_reason is not None for text in texts):
                break


class Speed:
    """Measure the time to the first token, and the tokens per second after it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []  # when the tokens of each step came
        self.tokens: list[int] = []  # of each step

    def count(self, tokens: int) -> None:
        """Count the tokens of one decoding step, which have just arrived."""
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)

    def summary(self) -> str:
        """Describe the speed."""
        if not self.times:
            return "no token"
        first = self.times[0]
        count = sum(self.tokens)
        unit = "token" if count == 1 else "tokens"
        text = f"{count} {unit}, first after {first - self.started:.2f} s"
        seconds = self.times[-1] - first
        if seconds > 0:
            text += f", then {sum(self.tokens[1:]) / seconds:,.1f} tokens/s"
        return text


def print_samples(writer: Writer, start: str) -> None:
    """Write all samples as one batch: the first one as it grows, the others after it.

    With --json it is one line of JSON for each sample.
    """
    as_json = writer.config.json
    prompt = writer.template.complete(start)
    if prompt is None:
        prompt = writer.template.write([*writer.system, user_message(start)])
    ids = writer.check_length(writer.encode(prompt))
    texts = [writer.new_text() for _ in range(writer.config.num_samples)]
    speed = Speed()
    if not as_json:
        show(prompt)
    for i, new in writer.write(ids, texts, speed):
        if i == 0 and not as_json:
            show(new)
    for i, text in enumerate(texts):
        rest = text.finish("length")
        if as_json:
            row = {"sample": i, "prompt": prompt, "text": text.shown}
            row |= {"tokens": len(text.ids), "finish": text.finish_reason}
            show(json.dumps(row) + "\n")
        elif i == 0:
            show(f"{rest}\n{SEPARATOR}\n")
        else:
            show(f"{prompt}{text.shown}\n{SEPARATOR}\n")
    together = f"{len(texts)} texts in one batch: " if len(texts) > 1 else ""
    say(together + speed.summary())


# --------------------------------------------------------------------------------------------------
# Talking


class Conversation:
    """The messages so far and the model that answers them."""

    def __init__(self, writer: Writer):
        self.writer = writer
        self.messages: list[Message] = []
        self.forgets = writer.template.forgets()

    def prompt(self, text: str) -> list[int]:
        """Add a user's message and return the ids that the model continues.

        If they do not fit into the context, the oldest messages go, until half of it is free. A
        text that is in the chat template already is taken as it is and remembered no longer.
        """
        writer = self.writer
        complete = writer.template.complete(text)
        if complete is not None:
            self.messages = []
            return writer.check_length(writer.encode(complete))
        messages = [] if self.forgets else self.messages
        messages = [*messages, user_message(text)]
        room = writer.model.config.block_size
        ids = writer.ids_of(messages)
        if writer.template.is_plain and len(ids) > room:
            last = writer.check_length(writer.encode(text))
            ids = ids[-max(len(last), room // 2) :]
        elif len(ids) > room:
            while len(ids) > room // 2 and len(messages) > 1:
                messages = messages[2:]
                ids = writer.ids_of(messages)
        self.messages = messages
        return writer.check_length(ids)

    def answer(self, message: str) -> None:
        """Show the model's answer to a message."""
        writer = self.writer
        before = self.messages
        try:
            prompt = self.prompt(message)
        except UserError as error:
            self.messages = before
            say(f"error: {error}")
            return
        text = writer.new_text()
        speed = Speed()
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the text, not the program
            for _, new in writer.write(prompt, [text], speed):
                show(new)
        show(text.finish("length") + "\n")
        say(speed.summary())
        if self.messages:
            said = writer.tokenizer.decode(text.ids)  # with the stop string, which is not shown
            ended = text.finish_reason == "end"
            self.messages.append(Message(role="assistant", content=said, ended=ended))


def converse(writer: Writer, first_message: str = "") -> None:
    """Answer messages from the keyboard. An empty line begins a new conversation.

    first_message: answered before anything is read from the keyboard.
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (gives input() its line editing)
    check_standard_input()
    # Otherwise an incomplete character at the end of the input would be read again and again.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    conversation = Conversation(writer)
    verb = "continues it" if writer.template.is_plain else "answers"
    memory = "reads each text together with all before it; an empty line starts over"
    if conversation.forgets:
        memory = "answers each question without those before it, as it has learned from its data"
    say(
        f"type a text and press Enter, and the model {verb}. The model {memory}. "
        "Ctrl-C stops a text; Ctrl-C or Ctrl-D at the > prompt quits"
    )
    if first_message:
        say(f"> {first_message}")
        conversation.answer(first_message)
    while True:
        try:
            message = read_message()
            message.encode()
        except (EOFError, KeyboardInterrupt):
            return
        except ValueError as error:
            say(f"error: that was not UTF-8 text: {error}")
            continue
        if message:
            conversation.answer(message)
        elif conversation.messages:
            conversation.messages = []
            say("a new conversation")


def read_message() -> str:
    """Read a line from the keyboard, with the lines that were pasted together with it."""
    if not sys.stdin.isatty():
        return input()
    lines = [input("> ")]
    while lines[0] and is_pasted():
        lines.append(input())
    return "\n".join(lines)


def is_pasted() -> bool:
    """Tell whether another line is there already: nobody types that fast."""
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
    except (OSError, ValueError):  # Windows cannot tell
        return False


def say(text: str) -> None:
    """Print a message for the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a part of a text at once, on standard output."""
    if sys.stdout is None:
        raise UserError("there is no standard output to write to")
    try:
        sys.stdout.write(printable(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"the text cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    run_main(main)
