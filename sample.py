"""Write text with a trained model: input and output around GPT.stream.

    python sample.py --out_dir=out                                    # the best checkpoint of a run
    python sample.py --init_from=gpt2 --start="Once upon a time" --temperature=0
    python sample.py --out_dir=out --interactive                      # a prompt loop that keeps the context
    echo "To be" | python sample.py --out_dir=out --start=- --json    # for programs

Texts go to standard output as they come, everything else to standard error.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.machine import CARDS, Machine, open_machine
from data import run as run_folder
from data.texts import CHAT_TEMPLATE, chat_pieces
from data.tokenizers import END_OF_TEXT, load_tokenizer
from gpt12 import config_loader
from gpt12.errors import UserError, run_main
from gpt12.settings import SampleConfig
from model import GPT, Sampling, find_pretrained

# Compiling takes 10 to 20 seconds the first time and saves less than a millisecond a step: for very long texts only.
COMPILE_FROM_STEPS = 20_000
RULE = "---------------"  # nanoGPT's line between samples


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load(config: SampleConfig) -> tuple[GPT, Any, Machine]:
    """The model on its device, its tokenizer, and the machine. Says which checkpoint, step and loss it loaded."""
    source: str | Path = config.init_from
    if config.init_from == "resume" or (Path(source) / "run.json").exists():
        out_dir = Path(config.out_dir if config.init_from == "resume" else source)
        names = ("best", "last") if config.checkpoint == "auto" else (config.checkpoint,)
        source, state = run_folder.find_checkpoint(out_dir, names)
        loss = state.get("best_val_loss")
        say(f"loaded {source}, step {state['step']}" + (f", best val loss {loss:.4f}" if loss else ""))
    folder = Path(source) if Path(source).suffix == ".pt" else find_pretrained(source)
    files = [folder / "adapter_config.json", folder / "config.json", folder.parent / "config.json"]
    if [file.exists() for file in files] == [True, False, True]:
        raise UserError(f"{folder} holds no whole model: pass {folder.parent}, where the adapter is merged")
    model = GPT.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder.parent if folder.suffix == ".pt" else folder)
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer, so its ids cannot be turned into text. Put vocab.json and merges.txt beside it"
        )
    if tokenizer.chat_template and tokenizer.chat_template.strip() != CHAT_TEMPLATE.strip():
        say(f"{folder}: its chat template is not one of train.py's: texts go in as they are")
        tokenizer.chat_template = None
    machine = open_machine(config, long=config.max_new_tokens >= COMPILE_FROM_STEPS)
    for note in machine.notes:
        say(note)
    if config.quantize == "int8":
        model.quantize()
    model.to(machine.device, machine.dtype)
    if not machine.on_gpu:
        model.store_by_columns()
    return model, tokenizer, machine


def read_prompt(start: str) -> str:
    """--start as it is, FILE:path, or - for standard input."""
    if start == "-":
        try:
            start = sys.stdin.read()
        except ValueError as e:
            raise UserError(f"standard input is not UTF-8 text: {e}") from None
    elif start.startswith("FILE:"):
        file = Path(start.removeprefix("FILE:"))
        try:
            start = file.read_text("utf-8")
        except (OSError, ValueError) as e:
            raise UserError(f"the prompt's file {file} cannot be read as UTF-8 text: {e}") from None
    if not start:
        raise UserError("the prompt is empty: give at least one character with --start, for example --start=$'\\n'")
    return start


@dataclass
class Text:
    """One text in the making: bytes become whole characters, and the first stop string ends it.

    What might be the beginning of a stop string is held back until it is known not to be.
    """

    tokenizer: Any
    stops: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    shown: str = ""
    held: str = ""
    reason: str | None = None  # why it ended: "stop", "end" (the end-of-text token) or "length"

    def __post_init__(self) -> None:
        # Half a character at the end of a token waits for its other half.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Take one more token; returns what can be shown now."""
        if self.reason:
            return ""
        if token == self.tokenizer.eot:
            return self.finish("end")
        self.ids.append(token)
        self.held += self.decoder.decode(self.tokenizer.token_bytes(token))
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.held = self.held[: min(found)]
            return self.finish("stop")
        keep = max((n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])), default=0)
        return self._show(len(self.held) - keep)

    def finish(self, reason: str) -> str:
        self.reason = self.reason or reason
        if reason != "stop":
            self.held += self.decoder.decode(b"", final=True)
        return self._show(len(self.held))

    def _show(self, length: int) -> str:
        new, self.held = self.held[:length], self.held[length:]
        self.shown += new
        return new


@dataclass
class Timing:
    """Seconds to the first token and tokens a second after it, and what the memory's speed would allow."""

    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    counted_from: float = 0.0
    tokens: int = 0
    before: int = 0

    def tick(self, tokens: int) -> None:
        self.tokens += tokens
        if not self.first:
            self.counted_from, self.before = time.perf_counter(), self.tokens
            self.first = self.counted_from - self.started

    def tell(self, bound: float | None) -> str:
        """bound: the tokens a second that the memory's speed would allow, where it is known."""
        if not self.first:
            return "no token"
        seconds = time.perf_counter() - self.counted_from
        rate = (self.tokens - self.before) / seconds if seconds else 0.0
        told = f"{self.tokens} tokens, first after {self.first:.2f} s, then {rate:,.0f} tokens/s"
        return told + (
            f", {rate / bound:.0%} of what the memory's speed allows ({bound:,.0f})" if rate and bound else ""
        )


def write(
    model: GPT, prompt: list[int], config: SampleConfig, machine: Machine, texts: list[Text]
) -> Iterator[tuple[int, str]]:
    """Fill `texts`, yielding (index, new characters) as they come. In a prompt loop Ctrl-C ends the texts, not the loop."""
    count, length = len(texts), config.max_new_tokens
    how = Sampling(config.temperature, config.top_k or 0, config.top_p, config.min_p, config.repetition_penalty)
    # Far apart, so that no two samples of different seeds share their random numbers.
    seeds = [config.seed * 1_000_003 + i for i in range(count)]
    timing = Timing()
    try:
        for tokens in model.stream([prompt] * count, length, how, seeds=seeds, compiled=machine.compiled):
            timing.tick(sum(text.reason is None for text in texts))
            for i, (text, token) in enumerate(zip(texts, tokens, strict=True)):
                if not text.reason and (new := text.add(token)):
                    yield i, new
            if all(text.reason for text in texts):
                break
    except KeyboardInterrupt:
        if not config.interactive:
            raise
    for i, text in enumerate(texts):
        if not text.reason and (new := text.finish("length")):
            yield i, new
    # Decoding has to read every weight once a step.
    card = CARDS.get(machine.name)
    summary = timing.tell(card and card.bandwidth_gbs * 1e9 / model.decode_bytes() * count)
    say(f"\n{summary}" if count == 1 else f"\n{count} texts in one batch: {summary}")


def print_samples(model: GPT, tokenizer: Any, prompt: str, config: SampleConfig, machine: Machine) -> None:
    """All samples as one batch: the first as it grows, the others after it; or a line of JSON for each."""
    ids = encode(tokenizer, prompt, model)
    texts = [Text(tokenizer, config.stop) for _ in range(config.num_samples)]
    if not config.json:
        show(prompt)
    for i, new in write(model, ids, config, machine, texts):
        if i == 0 and not config.json:
            show(new)
    for i, text in enumerate(texts):
        if config.json:
            row = {"sample": i, "prompt": prompt, "text": text.shown, "tokens": len(text.ids), "finish": text.reason}
            show(json.dumps(row) + "\n")
        else:
            show((prompt + text.shown if i else "") + f"\n{RULE}\n")


def show(text: str) -> None:
    # A terminal in another encoding (cp1252 on Windows) gets a question mark, not a traceback.
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f"the text cannot be written: {e.strerror or e}") from None


def encode(tokenizer: Any, prompt: str, model: GPT) -> list[int]:
    """The ids of a prompt. `<|endoftext|>` in it is the token, as in nanoGPT, where the tokenizer has one."""
    first, *rest = [prompt] if tokenizer.eot is None else prompt.split(END_OF_TEXT)
    ids = [int(token) for token in tokenizer.encode(first)]
    for part in rest:
        ids += [tokenizer.eot, *map(int, tokenizer.encode(part))]
    if len(ids) > model.config.block_size:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context only {model.config.block_size}: shorten it"
        )
    return ids


def as_message(tokenizer: Any, text: str) -> str:
    """A user's message by the model's chat template, where it was trained with one."""
    if not tokenizer.chat_template:
        return text
    return "".join(piece.text for piece in chat_pieces([{"role": "user", "content": text}]))


def converse(model: GPT, tokenizer: Any, config: SampleConfig, machine: Machine) -> None:
    """A prompt loop. The context is kept; when it is full, its older half is forgotten."""
    with contextlib.suppress(ImportError):  # native Windows has none
        import readline  # noqa: F401 (gives input() its line editing)
    verb = "answers" if tokenizer.chat_template else "continues it"
    say(f"type a text and press Enter, and the model {verb}. Ctrl-C stops a text, Ctrl-C or Ctrl-D at the > quits")
    context: list[int] = []
    # Else half a character at the end of the input would be met again and again.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
            prompt.encode()
        except (EOFError, KeyboardInterrupt):
            return
        except ValueError as error:
            say(f"error: that was not UTF-8 text: {error}")
            continue
        if not prompt:
            continue
        try:
            new = encode(tokenizer, as_message(tokenizer, prompt), model)
        except UserError as error:
            say(f"error: {error}")
            continue
        context += new
        if len(context) > model.config.block_size:
            context = context[-max(len(new), model.config.block_size // 2) :]
        text = Text(tokenizer, config.stop)
        with contextlib.suppress(KeyboardInterrupt):  # it may come while the text is being shown, too
            for _, piece in write(model, context, config, machine, [text]):
                show(piece)
        show("\n")
        # An answer that was cut off ends, too: the model has seen no question in the midst of one.
        ends = text.reason == "end" or (tokenizer.chat_template and tokenizer.eot is not None)
        context += text.ids + ([tokenizer.eot] if ends else [])


def main() -> None:
    config, given = config_loader.load(SampleConfig, sys.argv[1:])
    if config.temperature == 0 and "num_samples" not in given:
        config.num_samples = 1  # greedy texts are all the same
    prompt = "" if config.interactive else read_prompt(config.start)
    model, tokenizer, machine = load(config)
    try:
        if config.interactive:
            converse(model, tokenizer, config, machine)
        else:
            print_samples(model, tokenizer, as_message(tokenizer, prompt), config, machine)
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own on a GPU, and none on a CPU
        if "memory" not in str(error):
            raise
        raise UserError(
            "out of memory: ask for fewer --num_samples, fewer --max_new_tokens, or --quantize=int8"
        ) from None


if __name__ == "__main__":
    run_main(main)
