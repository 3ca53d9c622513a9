"""The small runs that tests/manual/interop.py opens in other programs, and ours to compare with."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.chat import Message, questions_and_answers
from data.tokenizers import load_tokenizer
from gpt12.loss import IGNORE_INDEX
from gpt12.weights import from_pretrained

ROOT = Path(__file__).parents[2]
TRAIN = (
    "--device=cpu --dtype=float32 --compile=False --block_size=64 --batch_size=4 --max_iters=60 "
    "--gradient_accumulation_steps=1 --eval_iters=4 --eval_interval=30 --warmup_iters=5 "
    "--learning_rate=1e-2"
).split()
SHAPE = "--n_layer=2 --n_head=2 --n_embd=64".split()
NAMES = ("ada", "bob", "cleo", "dan", "eve")
PROMPT = "ada asks"
MESSAGES: list[Message] = [
    {"role": "system", "content": " Be kind.\n"},
    {"role": "user", "content": "  say ada"},
    {"role": "assistant", "content": "ada, ada\n\nand ada. "},
    {"role": "user", "content": "say bob"},
    {"role": "assistant", "content": "bob"},
]
NEW_TOKENS = 20


@dataclass
class Runs:
    """The best/ folders of the runs, and a folder for what the checks write.

    text: GPT-2's tokenizer, no biases. char: a character tokenizer, biases. lora: adapters on top
    of `text`. chat: conversations, on top of `text`.
    """

    text: Path
    char: Path
    lora: Path
    chat: Path
    work: Path


def train_runs(work: Path) -> Runs:
    """Train the runs in the folder `work`. Runs that are already there are taken as they are."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "sentences.txt").write_text(sentences(400, "\n"), "utf-8")
    (work / "chat.jsonl").write_text(conversations(200), "utf-8")
    texts = "--dataset=sentences.txt"
    run_train(work, "text", texts, "--tokenizer=gpt2", "--bias=False", *SHAPE)
    run_train(work, "char", texts, "--tokenizer=char", "--bias=True", *SHAPE)
    # By a relative path, which must not keep PEFT from finding the base from elsewhere.
    run_train(work, "lora", texts, "--init_from=text/best", "--lora_rank=4")
    run_train(work, "chat", "--dataset=chat.jsonl", "--init_from=text")
    best = {name: work / name / "best" for name in ("text", "char", "lora", "chat")}
    return Runs(**best, work=work)


def run_train(work: Path, name: str, *options: str) -> None:
    if not (work / name / "best").exists():
        run_script("train.py", *TRAIN, f"--out_dir={name}", *options, folder=work)


def sentences(count: int, separator: str) -> str:
    """Return sentences with changing words: easy to learn, but not by heart."""
    chance = random.Random(0)
    lines = [f"{chance.choice(NAMES)} asks {chance.choice(NAMES)} again." for _ in range(count)]
    return separator.join(lines)


def conversations(count: int) -> str:
    """Return conversations of two answers as JSON lines."""
    chance = random.Random(0)
    lines = []
    for _ in range(count):
        first, second = chance.choices(NAMES, k=2)
        said = (f"say {first}", f"{first} and {first}", f"say {second}", second)
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": content} for role, content in zip(roles, said)]
        lines.append(json.dumps({"messages": messages}) + "\n")
    return "".join(lines)


def run_script(script: str, *options: str, folder: Path) -> str:
    """Run one of our scripts in a folder; return its standard output."""
    return run_command([sys.executable, str(ROOT / script), *options], folder)


def run_command(command: list[str], folder: Path) -> str:
    """Run a command without network; return its standard output. RuntimeError if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(f"{' '.join(command[:4])} ...: {' / '.join(said[-3:])}")
    return done.stdout


# --------------------------------------------------------------------------------------------------
# What our side says


def our_logits(folder: Path, ids: Tensor) -> Tensor:
    """Return the logits (B, T, V) of our model for ids (B, T)."""
    with torch.no_grad():
        return from_pretrained(folder).eval()(ids)[0]


def our_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder as sample.py reads it."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None, f"{folder} has no tokenizer"
    return tokenizer


def our_answer(folder: Path, prompt: str = PROMPT) -> dict[str, Any]:
    """Return sample.py's greedy continuation of a prompt as its --json: `text` and `finish`."""
    options = ["--temperature=0", f"--start={prompt}", f"--max_new_tokens={NEW_TOKENS}", "--json"]
    options += ["--device=cpu", "--dtype=float32", f"--init_from={folder}"]
    return json.loads(run_script("sample.py", *options, folder=ROOT))


def our_loss(folder: Path, messages: list[Message]) -> float:
    """Return our model's mean loss on the answers of a conversation."""
    tokenizer = our_tokenizer(folder)
    ids: list[int] = []
    trained: list[int] = []  # the ids, IGNORE_INDEX for those of questions
    for question, answer in questions_and_answers("messages", messages):
        asked = tokenizer.encode(question).tolist()
        answered = [*tokenizer.encode(answer).tolist(), tokenizer.eot]
        ids += asked + answered
        trained += [IGNORE_INDEX] * len(asked) + answered
    with torch.no_grad():
        model = from_pretrained(folder).eval()
        return model(torch.tensor([ids[:-1]]), torch.tensor([trained[1:]]))[1].item()


def batch(folder: Path) -> Tensor:
    """Return ids (2, 24) of the training text."""
    ids = our_tokenizer(folder).encode(sentences(40, "\n"))
    return torch.tensor(ids[:48].astype("int64")).view(2, 24)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs.detach()).abs().max().item()
