"""What several test files share: a tiny data set, a tiny run, and reading what a run has left on the disk."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from data.shards import write_shard

ROOT = Path(__file__).parents[1]

# A run that ends in a second: 16 steps of a model of one layer, with a checkpoint after every step.
SHAPE = (
    "--block_size=16 --n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --gradient_accumulation_steps=1 --dropout=0.1"
)
PLAN = "--max_iters=16 --eval_interval=5 --eval_iters=1 --save_interval_s=0 --learning_rate=1e-2 --warmup_iters=2"
OPTIONS = f"--device=cpu --dtype=float32 --compile=False {SHAPE} {PLAN}".split()

# For a run that a test interrupts. Even the fastest machine needs days for so many steps, so the run cannot end by itself
# first. By its length alone it would be compiled.
ENDLESS = ["--max_iters=1000000000", "--compile=False"]


def make_dataset(folder: Path) -> Path:
    """Two training shards and one validation shard over 13 letters: one of three letters follows each letter."""
    generator = np.random.default_rng(0)
    tokens = (np.cumsum(generator.integers(1, 4, 3000)) % 13).astype(np.uint16)
    folder.mkdir()
    write_shard(folder / "train_000000.bin", tokens[:1500])
    write_shard(folder / "train_000001.bin", tokens[1500:2600])
    write_shard(folder / "val_000000.bin", tokens[2600:])
    meta = {"tokenizer": "char", "vocab_size": 13, "chars": "\nabcdefghijkl", "documents": 1, "source_sha256": "0" * 64}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def command(script: str, *options: str) -> list[str]:
    """The command line that starts one of our scripts; its working directory has to be ROOT."""
    return [sys.executable, script, *options]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that a test starts: one thread, which is the fastest for a tiny model."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def read_rows(out_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(out_dir: Path, key: str = "loss") -> dict[int, float]:
    """One column of metrics.jsonl by step; the lines that lack it are left out."""
    return {row["step"]: row[key] for row in read_rows(out_dir) if key in row}


def evaluations(out_dir: Path) -> list[int]:
    """The steps at which a run was evaluated."""
    return [row["step"] for row in read_rows(out_dir) if "val_loss" in row]


def trainer(out_dir: Path, name: str = "last") -> dict:
    """The state beside a checkpoint's tensors: its step, its position in the data, its best loss."""
    return json.loads((Path(out_dir) / name / "trainer.json").read_text())
