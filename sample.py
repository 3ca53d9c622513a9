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
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt12.errors import UserError, printable, require_packages, run_main

require_packages()

import torch

from data.texts import add_ending, chat_pieces, ending_of_template, is_our_chat_template
from data.tokenizers import END_OF_TEXT, from_meta, get_tokenizer, load_tokenizer
from gpt12.cards import CARDS
from gpt12.checkpoint import find_checkpoint
from gpt12.config import load_config
from gpt12.device import Machine, open_machine
from gpt12.generate import Sampling, TextStream, decode_bytes, store_by_columns, stream
from gpt12.run_folder import is_run
from gpt12.settings import SampleConfig
from gpt12.weights import find_pretrained, from_pretrained, read_nanogpt
from model import GPT

SEPARATOR = "---------------"  # between samples, as in nanoGPT
DATA = Path(__file__).parent / "data"


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
            print_samples(writer, as_message(writer.tokenizer, prompt))
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
    return Writer(model, tokenizer, machine, config)


def find_source(config: SampleConfig) -> Path:
    """Return the model's folder, or nanoGPT's ckpt.pt, that the configuration asks for."""
    source = Path(config.init_from)
    if config.init_from == "resume" or is_run(source):
        out_dir = Path(config.out_dir) if config.init_from == "resume" else source
        names = ("best", "last") if config.checkpoint == "auto" else (config.checkpoint,)
        source, state = find_checkpoint(out_dir, names)
        loss = state.get("best_val_loss")
        loss_text = f", best val loss {loss:.4f}" if loss is not None else ""
        say(f"loaded {source}, step {state['step']}{loss_text}")
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
    """Return the tokenizer of a model; UserError if there is none.

    A chat template that is not ours is removed, because we cannot format messages with it.
    """
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
    template = tokenizer.chat_template
    if template and not is_our_chat_template(template):
        say(f"{source}: its chat template is not one of train.py's: texts go in as they are")
        tokenizer.chat_template = None
    return tokenizer


def nanogpt_tokenizer(file: Path) -> Any:
    """Return the tokenizer of nanoGPT's ckpt.pt, which holds none itself.

    GPT-2's tokenizer is recognized by its vocabulary size. Any other is taken from the data set
    that the file names, if it is prepared in data/ with the same vocabulary size.
    """
    checkpoint = read_nanogpt(file)
    vocab_size = checkpoint.config.vocab_size
    if vocab_size == 50257:
        return get_tokenizer("gpt2")
    name = checkpoint.dataset
    advice = f"Put the tokenizer.json of its {vocab_size:,} tokens into {file.parent}"
    if name is None:
        raise UserError(f"{file} does not name the data set that its tokenizer is from. {advice}")
    folder = DATA / name
    # The name comes from the file, so it must not be allowed to lead out of data/.
    if folder.parent != DATA or not (folder / "meta.json").is_file():
        script = f": python data/{name}/prepare.py" if (folder / "prepare.py").is_file() else ""
        raise UserError(
            f"{file} was trained on the data set {name!r}, which is not prepared in {DATA}, so its "
            f"tokenizer is not known. Prepare it{script}. Or put the tokenizer.json of its "
            f"{vocab_size:,} tokens into {file.parent}"
        )
    tokenizer = dataset_tokenizer(folder)
    if tokenizer is None or tokenizer.vocab_size != vocab_size:
        found = "no known tokenizer" if tokenizer is None else f"{tokenizer.vocab_size:,} tokens"
        raise UserError(
            f"{file} has {vocab_size:,} tokens and was trained on the data set {name!r}, but "
            f"{folder / 'meta.json'} has {found}. {advice}"
        )
    say(f"tokenizer: that of {folder}")
    return tokenizer


def dataset_tokenizer(folder: Path) -> Any:
    """Return the tokenizer that a data set's meta.json describes, or None if it describes none."""
    file = folder / "meta.json"
    try:
        meta = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}). Prepare the data again") from None
    return from_meta(meta, folder)


# --------------------------------------------------------------------------------------------------
# Prompts


def read_prompt(start: str) -> str:
    """Return --start itself, the content of a file for FILE:path, or standard input for "-"."""
    if start == "-":
        check_standard_input()
        try:
            start = sys.stdin.read()
        except ValueError as error:
            raise UserError(f"standard input is not UTF-8 text: {error}") from None
    elif start.startswith("FILE:"):
        file = Path(start.removeprefix("FILE:"))
        try:
            start = file.read_text("utf-8")
        except FileNotFoundError:
            raise UserError(f"the prompt file {file} does not exist") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"the prompt file {file} cannot be read as UTF-8 text: {error}"
            ) from None
    if not start:
        raise UserError(
            "the prompt is empty: give at least one character with --start, "
            "for example --start=$'\\n'"
        )
    return start


def check_standard_input() -> None:
    """Raise UserError if the program was started without a standard input."""
    if sys.stdin is None:
        raise UserError("there is no standard input to read from")


def as_message(tokenizer: Any, text: str) -> str:
    """Put a user's message into the chat template, if the model was trained with one."""
    if not tokenizer.chat_template:
        return text
    ending = ending_of_template(tokenizer.chat_template)
    if ending is not None:
        return add_ending(text, ending)
    pieces = chat_pieces([{"role": "user", "content": text}])
    return "".join(piece.text for piece in pieces)


def encode(tokenizer: Any, prompt: str, block_size: int) -> list[int]:
    """Return the ids of a prompt; UserError if it is longer than the model's context.

    `<|endoftext|>` in it becomes the end-of-text token, as in nanoGPT, if the tokenizer has one.
    """
    parts = [prompt]
    if tokenizer.eot is not None:
        parts = prompt.split(END_OF_TEXT)
    ids: list[int] = []
    for i, part in enumerate(parts):
        if i > 0:
            ids.append(tokenizer.eot)
        ids.extend(int(token) for token in tokenizer.encode(part))
    if len(ids) > block_size:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context only {block_size}: shorten it"
        )
    return ids


# --------------------------------------------------------------------------------------------------
# Writing


@dataclass
class Writer:
    """A loaded model and everything that is needed to write with it."""

    model: GPT
    tokenizer: Any
    machine: Machine
    config: SampleConfig

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt; UserError if it is too long."""
        return encode(self.tokenizer, prompt, self.model.config.block_size)

    def write(
        self, prompt: list[int], texts: list[TextStream], speed: Speed
    ) -> Iterator[tuple[int, str]]:
        """Continue the prompt once for each of `texts`; yield (index of the text, new characters).

        In a conversation Ctrl-C ends the texts, not the program.
        """
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
        steps = stream(
            self.model,
            [prompt] * len(texts),
            config.max_new_tokens,
            sampling,
            seeds=seeds,
        )
        try:
            for tokens in steps:
                speed.count(sum(text.finish_reason is None for text in texts))
                for i, token in enumerate(tokens):
                    new = texts[i].add(token)
                    if new:
                        yield i, new
                if all(text.finish_reason is not None for text in texts):
                    break
        except KeyboardInterrupt:
            if not config.interactive:
                raise
        for i, text in enumerate(texts):
            if text.finish_reason is None:
                new = text.finish("length")
                if new:
                    yield i, new

    def tokens_per_second_bound(self, count: int) -> float | None:
        """Return the tokens/s at which `count` texts would use the GPU's whole memory bandwidth.

        Each decoding step reads all weights once. None for a device that is not in CARDS.
        """
        card = CARDS.get(self.machine.name)
        if card is None:
            return None
        return card.bandwidth_gbs * 1e9 / decode_bytes(self.model) * count


class Speed:
    """Measure the time to the first token, and the tokens per second after it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None  # when the first token came
        self.last = self.started
        self.tokens = 0
        self.tokens_at_first = 0

    def count(self, tokens: int) -> None:
        """Count the tokens of one decoding step, which have just arrived."""
        self.last = time.perf_counter()
        self.tokens += tokens
        if self.first is None:
            self.first = self.last
            self.tokens_at_first = self.tokens

    def summary(self, bound: float | None) -> str:
        """Describe the speed. bound: the tokens/s that memory bandwidth allows, if it is known."""
        if self.first is None:
            return "no token"
        unit = "token" if self.tokens == 1 else "tokens"
        text = f"{self.tokens} {unit}, first after {self.first - self.started:.2f} s"
        tokens = self.tokens - self.tokens_at_first
        seconds = self.last - self.first
        if tokens == 0 or seconds == 0:
            return text
        rate = tokens / seconds
        text += f", then {rate:,.0f} tokens/s" if rate >= 1 else f", then {rate:.2f} tokens/s"
        if bound is not None:
            text += f", {rate / bound:.0%} of what the memory's speed allows ({bound:,.0f})"
        return text


def print_samples(writer: Writer, prompt: str) -> None:
    """Write all samples as one batch: the first one as it grows, the others after it.

    With --json it is one line of JSON for each sample.
    """
    config = writer.config
    ids = writer.encode(prompt)
    texts = [TextStream(writer.tokenizer, config.stop) for _ in range(config.num_samples)]
    speed = Speed()
    if not config.json:
        show(prompt)
    for i, new in writer.write(ids, texts, speed):
        if i == 0 and not config.json:
            show(new)
    for i, text in enumerate(texts):
        if config.json:
            show(json.dumps(describe_sample(i, prompt, text)) + "\n")
        elif i == 0:
            show(f"\n{SEPARATOR}\n")
        else:
            show(f"{prompt}{text.shown}\n{SEPARATOR}\n")
    summary = speed.summary(writer.tokens_per_second_bound(len(texts)))
    if len(texts) > 1:
        summary = f"{len(texts)} texts in one batch: {summary}"
    say(summary)


def describe_sample(index: int, prompt: str, text: TextStream) -> dict[str, Any]:
    """Return what --json prints of a sample."""
    return {
        "sample": index,
        "prompt": prompt,
        "text": text.shown,
        "tokens": len(text.ids),
        "finish": text.finish_reason,
    }


def converse(writer: Writer, first_message: str = "") -> None:
    """Answer messages from the keyboard. The context is kept; if it is full, its older half goes.

    An empty line begins a new conversation.
    first_message: answered before anything is read from the keyboard.
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (gives input() its line editing)
    check_standard_input()
    # Otherwise an incomplete character at the end of the input would be read again and again.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    verb = "answers" if writer.tokenizer.chat_template else "continues it"
    say(
        f"type a text and press Enter, and the model {verb}. "
        "The model reads each text together with all before it; an empty line starts over. "
        "Ctrl-C stops a text; Ctrl-C or Ctrl-D at the > prompt quits"
    )
    context: list[int] = []
    if first_message:
        say(f"> {first_message}")
        context = answer(writer, context, first_message)
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "")
            message.encode()
        except (EOFError, KeyboardInterrupt):
            return
        except ValueError as error:
            say(f"error: that was not UTF-8 text: {error}")
            continue
        if message:
            context = answer(writer, context, message)
        elif context:
            context = []
            say("a new conversation")


def answer(writer: Writer, context: list[int], message: str) -> list[int]:
    """Show the model's answer to a message; return the context with the message and the answer."""
    tokenizer = writer.tokenizer
    block_size = writer.model.config.block_size
    try:
        new = writer.encode(as_message(tokenizer, message))
    except UserError as error:
        say(f"error: {error}")
        return context
    if tokenizer.chat_template and ending_of_template(tokenizer.chat_template) is not None:
        context = []  # such a model was trained on single questions
    context = context + new
    if len(context) > block_size:
        kept = max(len(new), block_size // 2)
        context = context[-kept:]
    text = TextStream(tokenizer, writer.config.stop)
    speed = Speed()
    with contextlib.suppress(KeyboardInterrupt):  # it may also come while the text is shown
        for _, piece in writer.write(context, [text], speed):
            show(piece)
    show("\n")
    say(speed.summary(writer.tokens_per_second_bound(1)))
    context = context + text.ids
    # In training every answer had an end: end-of-text, or a line end where a tokenizer has no such
    # token. An answer that was cut off gets it, too.
    if tokenizer.eot is not None:
        if text.finish_reason == "end" or tokenizer.chat_template:
            context.append(tokenizer.eot)
    elif tokenizer.chat_template and not text.shown.endswith("\n"):
        context += writer.encode("\n")
    return context


def say(text: str) -> None:
    """Print a message for the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a part of a text at once, on standard output."""
    try:
        sys.stdout.write(printable(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"the text cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    run_main(main)
