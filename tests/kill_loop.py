"""Kill a training run again and again, and see that nothing is lost: python -m tests.kill_loop --kills=200

A run on the CPU is killed by SIGKILL, half of the times at a random instant, half inside the write of a checkpoint: at a
random one of its steps, files half written included. After each kill the newest checkpoint must load, be no older than
the one before, and resume. When a run reaches its end, its weights, moments and losses must be, bit for bit, those of
an unbroken run; then the next one begins, until the kills are used up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: processes are forked, which threads would not survive

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import numpy as np
import safetensors.torch
import torch._dynamo  # noqa: F401 (the first optimizer imports it, which takes a second and more)

import data.tokenizers
import data.windows  # noqa: F401
import train
from data import run as run_folder
from data.shards import write_shard
from gpt12.errors import UserError

SHAPE = (
    "--block_size=16 --n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --gradient_accumulation_steps=1 --dropout=0.1"
)
PLAN = "--max_iters=16 --eval_interval=5 --eval_iters=1 --save_interval_s=0 --learning_rate=1e-2 --warmup_iters=2"
OPTIONS = f"--device=cpu --dtype=float32 --compile=False {SHAPE} {PLAN}".split()
SAVES = 16 + 8  # about as many checkpoints as a run writes
STEPS = 33  # and about as many pauses as each has


def make_dataset(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    tokens = (np.cumsum(generator.integers(1, 4, 3000)) % 13).astype(np.uint16)
    folder.mkdir()
    write_shard(folder / "train_000000.bin", tokens[:2600])
    write_shard(folder / "val_000000.bin", tokens[2600:])
    meta = {"tokenizer": "char", "vocab_size": 13, "chars": "\nabcdefghijkl", "documents": 1, "source_sha256": "0" * 64}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def pause_in_saves(pause: Callable[[], object]) -> None:
    """Call pause() before and after everything a checkpoint's writer does to the disk, and in the middle of its files."""
    saving = False

    def around(original: Callable) -> Callable:
        def call(*args, **kwargs):
            if saving:
                pause()
            result = original(*args, **kwargs)
            if saving:
                pause()
            return result

        return call

    def save_file(tensors, file, metadata=None):
        content = safetensors.torch.save(tensors, metadata)
        with open(file, "wb", buffering=0) as f:
            f.write(content[: len(content) // 2])
            pause()
            f.write(content[len(content) // 2 :])

    def save_checkpoint(*args):
        nonlocal saving
        saving = True
        original_save(*args)
        saving = False

    original_save, run_folder.save_checkpoint = run_folder.save_checkpoint, save_checkpoint
    safetensors.torch.save_file = save_file
    run_folder._sync = around(run_folder._sync)
    for name in ("mkdir", "rename", "write_text"):
        setattr(Path, name, around(getattr(Path, name)))
    shutil.rmtree = around(shutil.rmtree)  # type: ignore[assignment]


class Life:
    """One process of a run, from the start or from its checkpoint, forked so that nothing is imported again."""

    def __init__(self, argv: list[str], log: Path, paused: bool):
        told, tell = os.pipe()
        wait, go = os.pipe()
        self.told, self.go = told, go
        self.pid = os.fork()
        if self.pid:
            os.close(tell)
            os.close(wait)
            return
        status = 99
        try:
            os.close(told)
            os.close(go)
            sys.stdout = sys.stderr = open(log, "w")  # noqa: SIM115 (until the process ends)
            if paused:
                pause_in_saves(lambda: [os.write(tell, b"."), os.read(wait, 1)])
            status = train.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def end(self, kill: bool) -> int:
        """The exit status, or minus the signal."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.told)
        os.close(self.go)
        return status

    def until_time(self, seconds: float) -> int:
        """Let it live so long; the pipe becomes readable when the process ends by itself."""
        ended, _, _ = select.select([self.told], [], [], seconds)
        return self.end(kill=not ended)

    def until_step(self, count: int) -> int:
        """Let it take this many steps inside checkpoints."""
        for _ in range(count - 1):
            if not os.read(self.told, 1):
                return self.end(kill=False)
            os.write(self.go, b".")
        return self.end(kill=bool(os.read(self.told, 1)))


def newest(out_dir: Path) -> int | None:
    """The step of the checkpoint that resuming would take; UserError if there is one and it does not load."""
    if not any((out_dir / name).exists() for name in ("last", "last.prev")):
        return None
    return run_folder.find_checkpoint(out_dir, ("last",))[1]["step"]


def outcome(out_dir: Path) -> dict:
    """All that must not depend on how often a run was killed."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    result: dict = {"metrics": [{k: v for k, v in r.items() if k not in ("elapsed_s", "tokens_per_s")} for r in rows]}
    for name in ("best", "last"):
        folder, state = run_folder.find_checkpoint(out_dir, (name,))
        result[name] = {key: value for key, value in state.items() if key not in ("elapsed_s", "sha256")}
        for file in sorted(folder.glob("*.safetensors")):
            result[f"{name}/{file.name}"] = run_folder.sha256(file)
    return result


def live(argv: list[str], out_dir: Path, chance: random.Random, inside: bool, seconds: float) -> tuple[int, int | None]:
    """One life with its death: (exit status, step of the newest checkpoint). AssertionError says what was lost."""
    before = newest(out_dir)
    argv = argv if before is None else ["--init_from=resume", f"--out_dir={out_dir}"]
    life = Life(argv, out_dir.with_suffix(".log"), inside)
    left = (16 - (before or 0)) / 16
    status = (
        life.until_step(chance.randint(1, 1 + round(left * SAVES * STEPS)))
        if inside
        else life.until_time(chance.uniform(0, (0.4 + left) * seconds))  # 0.4: what starting takes
    )
    assert status in (0, -signal.SIGKILL), f"exit status {status}: {out_dir.with_suffix('.log').read_text()}"
    try:
        after = newest(out_dir)
    except UserError as error:
        raise AssertionError(f"the checkpoint does not load: {error}") from None
    assert (after or 0) >= (before or 0), f"step {before} was saved, {after} is left"
    return status, after


def kill_loop(kills: int, seed: int, folder: Path) -> tuple[int, int, int]:
    """(kills inside a checkpoint's write, finished runs, losses)"""
    dataset, chance = make_dataset(folder / "letters"), random.Random(seed)
    started = time.perf_counter()
    whole = folder / "whole"
    assert Life([*OPTIONS, f"--dataset={dataset}", f"--out_dir={whole}"], folder / "whole.log", False).end(False) == 0
    seconds, expected = time.perf_counter() - started, outcome(whole)
    done = inside = runs = losses = 0
    ended = True
    while done < kills or not ended:
        if ended:
            out_dir, ended = folder / f"run{runs}", False
        in_save = inside * 2 < done or done == 0
        options = [*OPTIONS, f"--dataset={dataset}", f"--out_dir={out_dir}"]
        peace = done >= kills  # the last run may come to its end
        try:
            status, _ = live(options, out_dir, chance, in_save and not peace, 1e6 if peace else seconds)
            ended = status == 0
            done += not ended
            inside += in_save and not ended
            assert not ended or outcome(out_dir) == expected, f"{out_dir} differs from the unbroken run"
        except AssertionError as error:
            print(f"LOST after kill {done}: {error}", file=sys.stderr)
            losses, ended = losses + 1, True
            done += 1
        if ended:
            runs += 1
            with contextlib.suppress(OSError):
                shutil.rmtree(out_dir)
    return inside, runs, losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        inside, runs, losses = kill_loop(options.kills, options.seed, Path(folder))
    print(
        f"kills {options.kills} ({inside} inside a checkpoint's write), runs finished {runs}, losses {losses}, "
        f"seconds {time.perf_counter() - started:.0f}, seed {options.seed}"
    )
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
