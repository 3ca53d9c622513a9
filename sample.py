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
from pathlib import Path
from typing import Any

from gpt12.errors import UserError, print_line, printable, require_packages, run_main

require_packages()

from data.chat import ChatTemplate, Message
from data.dataset import DATA
from data.tokenizers import GPT2_VOCAB_SIZE, get_tokenizer, load_tokenizer
from gpt12.config import load_config, unescape
from gpt12.device import open_machine
from gpt12.folder import find_checkpoint, is_run
from gpt12.generate import TextStream, store_by_columns, stream
from gpt12.settings import SampleConfig
from gpt12.weights import find_pretrained, from_pretrained, read_nanogpt
from model import GPT

SEPARATOR = "---------------"  # between samples, as in nanoGPT
PASTE_SECONDS = 0.05  # a line that follows another one sooner was pasted


def main() -> None:
    loaded = load_config(SampleConfig, sys.argv[1:])
    config = loaded.config
    given = loaded.given
    if config.temperature == 0 and "num_samples" not in given:
        config = replace(config, num_samples=1)  # greedy samples are all the same
    prompt = ""
    if "start" in given or not config.interactive:
        prompt = read_prompt(config.start)
    writer = load(config)
    if config.interactive:
        converse(writer, first_message=prompt)
    else:
        print_samples(writer, prompt)


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
    source = Path(config.out_dir if config.init_from == "resume" else config.init_from)
    if config.init_from != "resume" and not is_run(source):
        return find_pretrained(config.init_from)
    names = ("best", "last") if config.checkpoint == "auto" else (config.checkpoint,)
    source, progress = find_checkpoint(source, names)
    loss = progress.best_val_loss
    loss_text = f", best val loss {loss:.4f}" if loss is not None else ""
    say(f"loading {source}, step {progress.step}{loss_text}")
    return source


def find_tokenizer(source: Path) -> Any:
    """Return the tokenizer of a model; UserError if there is none."""
    tokenizer = load_tokenizer(source)
    if tokenizer is None and source.suffix == ".pt":
        tokenizer = nanogpt_tokenizer(source)
    if tokenizer is None:
        raise UserError(
            f"{source} has no tokenizer, so its ids cannot be turned into text. Put the model's "
            "tokenizer.json, or its vocab.json and merges.txt, beside its weights"
        )
    return tokenizer


def nanogpt_tokenizer(file: Path) -> Any:
    """Return the tokenizer of nanoGPT's ckpt.pt, which holds none itself, or None.

    GPT-2's tokenizer is recognized by its vocabulary size. Any other is taken from the data set
    that the file names, if it is prepared in data/ with the same vocabulary size.
    """
    shape, _, dataset = read_nanogpt(file)
    if shape.vocab_size == GPT2_VOCAB_SIZE:
        return get_tokenizer("gpt2")
    folder = DATA / str(dataset)
    # The name comes from the file, so it must not be allowed to lead out of data/.
    if folder.parent != DATA:
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer is None or tokenizer.vocab_size != shape.vocab_size:
        return None
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Prompts


def read_prompt(start: str) -> str:
    r"""Return --start (\n is a new line), a file for FILE:path, or standard input for "-"."""
    try:
        if start == "-":
            text = sys.stdin.read()
        elif start.startswith("FILE:"):
            text = Path(start.removeprefix("FILE:")).expanduser().read_text("utf-8-sig")
        else:
            text = unescape(start)
        text.encode()  # outside of UTF-8 locales Python reads any byte
    except (OSError, ValueError) as error:
        raise UserError(f"--start={start} cannot be read as UTF-8 text: {error}") from None
    if not text:
        raise UserError(r"the prompt is empty: give at least one character, as in --start='\n'")
    return text


# --------------------------------------------------------------------------------------------------
# Writing


class Writer:
    """A loaded model and everything that is needed to write with it."""

    def __init__(self, model: GPT, tokenizer: Any, config: SampleConfig):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        self.system: list[Message] = []
        if config.system is not None:
            self.system = [Message(role="system", content=config.system)]
            if config.system.strip() not in self.prompt([Message(role="user", content="?")]):
                raise UserError("--system: the model's chat template has no place for it")

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return what the model continues to answer the last of the messages.

        If that is in the chat template already, it is taken as it is.
        """
        complete = self.template.complete(messages[-1]["content"])
        if complete is not None:
            return complete
        return self.template.write([*self.system, *messages])

    def shorten(self, messages: Sequence[Message]) -> tuple[Sequence[Message], str, list[int]]:
        """Return the messages, their prompt and its ids; UserError if it exceeds the context.

        If it does, the oldest messages go first, until half of the context is free.
        """
        room = self.model.config.block_size
        # transformers gives a text its first token; a chat template writes it itself.
        begin = [] if self.tokenizer.chat_template else self.tokenizer.begin
        longest = room
        while True:
            prompt = self.prompt(messages)
            ids = begin + self.tokenizer.encode_prompt(prompt)
            if len(ids) <= longest or len(messages) == 1:
                break
            longest = room // 2
            messages = messages[2:]
        if len(ids) > room:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's context only {room}: shorten it"
            )
        return messages, prompt, ids

    def new_text(self) -> TextStream:
        """Return an empty text, which ends as the configuration says."""
        return TextStream(self.tokenizer, self.config.stop)

    def write(self, prompt: list[int], texts: list[TextStream]) -> Iterator[tuple[int, str]]:
        """Continue the prompt once for each text; yield (index of the text, new characters)."""
        for tokens in stream(self.model, [prompt] * len(texts), self.config):
            for i, token in enumerate(tokens):
                new = texts[i].add(token)
                if new:
                    yield i, new
            if all(text.finish_reason is not None for text in texts):
                break


def pace(texts: list[TextStream], began: float) -> str:
    """Tell how many tokens were written, and how fast. began: as time.perf_counter() says it."""
    tokens = sum(len(text.ids) for text in texts)
    return f"{tokens} tokens, {tokens / (time.perf_counter() - began):,.1f} tokens/s"


def print_samples(writer: Writer, start: str) -> None:
    """Write all samples as one batch: the first one as it grows, the others after it.

    With --json it is one line of JSON for each sample.
    """
    as_json = writer.config.json
    _, prompt, ids = writer.shorten([Message(role="user", content=start)])
    texts = [writer.new_text() for _ in range(writer.config.num_samples)]
    began = time.perf_counter()
    if not as_json:
        show(prompt)
    for i, new in writer.write(ids, texts):
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
    say(pace(texts, began))


# --------------------------------------------------------------------------------------------------
# Talking


def converse(writer: Writer, first_message: str = "") -> None:
    """Answer messages from the keyboard. An empty line begins a new conversation.

    first_message: answered before anything is read from the keyboard.
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (gives input() its line editing)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    memory = "reads each text together with all before it; an empty line starts over"
    if writer.template.forgets():
        memory = "answers each question without those before it, as it has learned from its data"
    say(
        f"type a text and press Enter, and the model answers. The model {memory}. "
        "Ctrl-C stops a text; Ctrl-C or Ctrl-D at the > prompt quits"
    )
    messages: Sequence[Message] = []
    if first_message:
        say(f"> {first_message}")
        messages = answer(writer, messages, first_message)
    while True:
        try:
            text = read_message()
        except (EOFError, KeyboardInterrupt):
            return
        if text:
            messages = answer(writer, messages, text)
        elif messages:
            messages = []
            say("a new conversation")


def answer(writer: Writer, messages: Sequence[Message], question: str) -> Sequence[Message]:
    """Show the model's answer to a question, and return the conversation with both.

    The conversation is empty afterwards if the template forgets, or if the question was written in
    the template already.
    """
    try:
        asked, _, ids = writer.shorten([*messages, Message(role="user", content=question)])
    except UserError as error:
        say(f"error: {error}")
        return messages
    text = writer.new_text()
    began = time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the text, not the program
        for _, new in writer.write(ids, [text]):
            show(new)
    show(text.finish("length") + "\n")
    say(pace([text], began))
    if writer.template.forgets():
        return []
    if writer.template.complete(question) is not None:
        say("that text was in the model's template already: the conversation begins anew")
        return []
    said = writer.tokenizer.decode(text.ids)  # with the stop string, which is not shown
    ended = text.finish_reason == "end"
    return [*asked, Message(role="assistant", content=said, ended=ended)]


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
    print_line(text, sys.stderr)


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
    run_main(main, out_of_memory="ask for fewer --num_samples or fewer --max_new_tokens")
