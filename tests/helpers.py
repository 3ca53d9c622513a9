"""What several test files share: a tiny data set, tiny runs, and what a run leaves on the disk."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from data.tokenizers import CharTokenizer
from gpt12.config import load_config
from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.settings import TrainConfig
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
CPU = Machine(torch.device("cpu"), torch.float32, compiled=False)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")]

# A model that takes milliseconds a step: one layer, 16 channels, two micro-batches of four rows.
# Its data are where the fixture own_folder puts them.
TINY = (
    "--device=cpu --dtype=float32 --compile=False --block_size=16 --n_layer=1 --n_head=2 "
    "--n_embd=16 --batch_size=4 --gradient_accumulation_steps=2 --eval_iters=2 "
    "--learning_rate=1e-2 --warmup_iters=2 --eval_interval=10 --dataset=letters"
).split()
RESUME = ["--init_from=resume"]
PathText = Path | str
OUT = Path("out")  # a run's folder where a test names no other

# A run of 10 steps with a checkpoint after every step.
OPTIONS = [
    *TINY,
    *"--gradient_accumulation_steps=1 --dropout=0.1 --eval_iters=1 --max_iters=10".split(),
    *"--eval_interval=5 --save_interval_s=0".split(),
]

# For a run that a test interrupts: it cannot end by itself first.
ENDLESS = ["--max_iters=1000000000"]


def write(file: PathText, content: str | bytes | list) -> str:
    """Write a text, bytes, or rows as lines of JSON, into a new folder too. Returns the path."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_shard(path: PathText, tokens: np.ndarray) -> None:
    """Write one shard of llm.c's layout: uint16, uint32 or, for a mask, uint8."""
    form = (20240801, 7) if tokens.dtype == np.uint32 else (20240520, 1)
    header = struct.pack("<256i", *form, len(tokens), *[0] * 253)
    write(path, header + tokens.tobytes())


def make_dataset(folder: Path) -> Path:
    """Write two training shards and a validation shard over 13 letters.

    One of three letters follows each letter. 2,600 tokens to train on, 400 to validate.
    """
    generator = np.random.default_rng(0)
    tokens = (np.cumsum(generator.integers(1, 4, 3000)) % 13).astype(np.uint16)
    folder.mkdir()
    write_shard(folder / "train_000000.bin", tokens[:1500])
    write_shard(folder / "train_000001.bin", tokens[1500:2600])
    write_shard(folder / "val_000000.bin", tokens[2600:])
    CharTokenizer("\nabcdefghijkl").save(folder)
    meta = {"documents": 1, "val_sha256": "0" * 64}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def make_answers(folder: Path) -> Path:
    """Write shards of 40 rows of which few tokens are answers; some rows have none."""
    from data.shards import EXAMPLE_START

    folder.mkdir()
    generator = np.random.default_rng(8)
    tokens = (np.cumsum(generator.integers(1, 4, 40 * 16 + 1)) % 13).astype(np.uint16)
    shares = generator.choice([0, 0, 0, 0.2, 1], (40, 1))
    mask = np.append(generator.random((40, 16)) < shares, False).astype(np.uint8)
    mask[generator.random(len(mask)) < 0.2] = EXAMPLE_START
    for split in ("train", "val"):
        write_shard(folder / f"{split}_000000.bin", tokens)
        write_shard(folder / f"{split}_mask_000000.bin", mask)
    meta = {"vocab_size": 13, "kind": "prompt", "row": 16}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


CHANGES = ROOT / "docs" / "changes"


def changed_copy(folder: Path, change: str | None) -> Path:
    """Copy the code into a new folder and apply one of docs/changes to it."""
    no_caches = shutil.ignore_patterns("__pycache__", "cache", "*.bin")
    for part in ("gpt12", "data", "tests", "config"):
        shutil.copytree(ROOT / part, folder / part, ignore=no_caches)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    if change is not None:
        # Outside of a repository git takes the paths of a diff as they are.
        outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        command = ["git", "apply", str(CHANGES / f"{change}.diff")]
        subprocess.run(command, cwd=folder, env=outside, check=True)
    return folder


# --------------------------------------------------------------------------------------------------
# Running


def run(*options: str, status: int = 0) -> None:
    """Train a tiny model in this process, into out/, and see with which exit status it ends."""
    import train

    assert train.main([*TINY, *options]) == status


def resume(*options: str) -> None:
    """Resume the run in out/ in this process, and see that it ends well."""
    import train

    assert train.main([*RESUME, *options]) == 0


def check_resuming(*options: str, steps: int) -> tuple[dict, dict]:
    """See that a run in parts/ resumed after half its steps is the unbroken one in whole/.

    Returns the weights after half the steps and after all.
    """
    options = (*options, "--decay_lr=False", f"--eval_interval={steps // 2}")
    run("--out_dir=whole", *options, f"--max_iters={steps}")
    run("--out_dir=parts", *options, f"--max_iters={steps // 2}")
    before = weights("parts")
    resume("--out_dir=parts", f"--max_iters={steps}")
    after = weights("parts")
    for key in ("loss", "val_loss"):
        assert losses("parts", key) == losses("whole", key)
    assert same_tensors(after, weights("whole"))
    return before, after


def refused(message: str, call: Callable, *arguments: Any, **options: Any) -> str:
    """See that a call ends with a user's mistake whose message matches a pattern, and return it."""
    with pytest.raises(UserError, match=message) as caught:
        call(*arguments, **options)
    return str(caught.value)


def built(*options: str) -> Any:
    """Return the Run of a tiny model, built but not trained."""
    return built_from([*TINY, *options])


def built_from(argv: list[str]) -> Any:
    """Return the Run that a command line asks for, built but not trained."""
    from gpt12.run import build_run, read_request

    return build_run(read_request(argv))


def let_answer(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]) -> None:
    """Let functions, by their full names, return these values whatever they are asked."""
    for name, value in answers.items():
        monkeypatch.setattr(name, Mock(return_value=value))


# --------------------------------------------------------------------------------------------------
# Parts of a run


def config(*options: str, **changes: Any) -> TrainConfig:
    """Return the configuration of a tiny step: two rows of eight tokens, nothing "auto".

    options: as on the command line. changes: values by key.
    """
    tiny = "--batch_size=2 --block_size=8 --gradient_accumulation_steps=1 --recompute=none"
    argv = [*tiny.split(), "--learning_rate=1e-2", "--dtype=float32", *options]
    return replace(load_config(TrainConfig, argv).config, **changes)


def set_weights(model: GPT) -> GPT:
    """Set all weights by a formula: golden values must not depend on a version's random numbers."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            values = 0.3 * torch.sin(torch.arange(p.numel()) * (i + 1.7)).view_as(p)
            if p.ndim == 1 and i % 2:
                values = values + 1
            p.copy_(values)
    return model


def small_gpt(**changes: Any) -> GPT:
    """Return a model of two layers, 8 channels and 13 tokens, with weights set by a formula."""
    shape = {"block_size": 8, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 8}
    return set_weights(GPT(GPTConfig(**shape | {"bias": True} | changes)))


def small_step(machine: Machine = CPU, model: GPT | None = None, **changes: Any) -> Any:
    """Return a TrainStep of the small model. changes: keys of the configuration."""
    import train

    return train.TrainStep(model or small_gpt(), config(**changes), machine)


def plain_step(device: str, **changes: Any) -> Any:
    """Return a TrainStep of the small model on a device, not recorded. changes: as small_step."""
    import train

    machine = replace(CPU, device=torch.device(device))
    return train.TrainStep(small_gpt().to(device), config(**changes), machine, cuda_graph=False)


def random_rows(rows: int = 2, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets for small_step, (rows, 8) each."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 13, (2, rows, 8), generator=generator)
    return x, y


def fill(step: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """Put a batch into a step's buffers."""
    from gpt12.loss import IGNORE_INDEX

    step.x.copy_(x.view_as(step.x))
    step.y.copy_(y.view_as(step.y))
    step.targets_per_batch = (step.y != IGNORE_INDEX).sum((1, 2)).tolist()


def train_on(step: Any, *seeds: int, lr: float = 1e-2) -> None:
    """Update the weights once for the batch of each of these seeds."""
    for seed in seeds:
        fill(step, *random_rows(seed=seed))
        step(lr)


# --------------------------------------------------------------------------------------------------
# Programs of tests/manual/


def options_parser(doc: str, **keys: Any) -> argparse.ArgumentParser:
    """Return a parser of --key=value whose --help prints a program's doc.

    keys: the defaults, which tell the types. A type alone: the key has to be given. A tuple: the
    choices, the default first. False: a flag.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for key, value in keys.items():
        settings: dict[str, Any] = {"type": type(value), "default": value}
        if value is False:
            settings = {"action": "store_true"}
        elif isinstance(value, tuple):
            settings = {"choices": value, "default": value[0]}
        elif isinstance(value, type):
            settings = {"type": value, "required": True}
        parser.add_argument(f"--{key}", **settings)
    return parser


# --------------------------------------------------------------------------------------------------
# What a run leaves


def read_json(file: PathText) -> dict:
    """Return what a file of JSON holds."""
    return json.loads(Path(file).read_text())


def edit_json(file: PathText, **changes: Any) -> None:
    """Change values of a file of JSON."""
    Path(file).write_text(json.dumps(read_json(file) | changes))


def read_rows(out_dir: PathText = OUT) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def losses(out_dir: PathText = OUT, key: str = "loss") -> dict[int, float]:
    """Return one column of metrics.jsonl by step. Rows that lack it are left out."""
    return {row["step"]: row[key] for row in read_rows(out_dir) if key in row}


def evaluations(out_dir: PathText = OUT) -> list[int]:
    """Return the steps at which a run was evaluated."""
    return [row["step"] for row in read_rows(out_dir) if "val_loss" in row]


def trainer(out_dir: PathText = OUT, name: str = "last") -> dict:
    """Return a checkpoint's trainer.json."""
    return read_json(Path(out_dir, name, "trainer.json"))


def weights(
    out_dir: PathText = OUT, name: str = "last", file: str = "model"
) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint: its model's, or with file="trainer" the trainer's."""
    from safetensors.torch import load_file

    return load_file(Path(out_dir, name, f"{file}.safetensors"))


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Tell whether two dictionaries hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_weights(a: torch.nn.Module, b: list[torch.Tensor]) -> bool:
    """Tell whether a model's parameters equal a list of tensors, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b, strict=True))
