"""Kill a training run again and again, and see that nothing is lost: python -m tests.manual.kill_loop --kills=200

A run on the CPU is killed by SIGKILL, half of the times at a random instant, half inside the write of a checkpoint: at a
random one of its steps, files half written included. After each kill the newest checkpoint must load, be no older than
the one before, and resume. When a run reaches its end, its weights, moments and losses must be, bit for bit, those of
an unbroken run; then the next one begins, until the kills are used up.

With --by_calls a random instant is a random call of a function, counted by Python, and not a random time. Then the same
seed kills at the same places on any machine, however busy it is. The test suite runs this form.
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
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: processes are forked, which threads would not survive

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import safetensors.torch

import data.tokenizers
import data.windows  # noqa: F401
import train
from data import run as run_folder
from gpt12.errors import UserError
from tests.helpers import OPTIONS, make_dataset

SAVES = 16 + 8  # about as many checkpoints as a run writes
STEPS = 33  # and about as many pauses as each has


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


class CallCounter:
    """Counts the calls of functions in this process, Python's and C's, and kills it just before one of them."""

    def __init__(self, fatal: int | None):
        self.calls, self.fatal = 0, fatal

    def __call__(self, frame: object, event: str, argument: object) -> None:
        if event not in ("call", "c_call"):
            return
        self.calls += 1
        if self.calls == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class Life:
    """One process of a run, from the start or from its checkpoint, forked so that nothing is imported again.

    paused: it waits at each step inside a checkpoint. counter: it counts its calls, and dies at the fatal one; one that
    comes to its end leaves their number in a file beside the log.
    """

    def __init__(self, argv: list[str], log: Path, paused: bool = False, counter: CallCounter | None = None):
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
            if counter is not None:
                sys.setprofile(counter)
            status = train.main(argv)
            if counter is not None:
                sys.setprofile(None)
                log.with_suffix(".calls").write_text(str(counter.calls))
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


@dataclass
class Whole:
    """The unbroken run: what it leaves, and how long it is, in seconds or in calls."""

    outcome: dict
    length: float


def run_whole(argv: list[str], out_dir: Path, by_calls: bool) -> Whole:
    started = time.perf_counter()
    counter = CallCounter(None) if by_calls else None
    assert Life(argv, out_dir.with_suffix(".log"), counter=counter).end(kill=False) == 0
    length = time.perf_counter() - started
    if by_calls:
        length = int(out_dir.with_suffix(".calls").read_text())
    return Whole(outcome(out_dir), length)


def live(argv: list[str], out_dir: Path, chance: random.Random, how: str, whole: Whole) -> int:
    """One life with its death, and its exit status. AssertionError says what was lost.

    how: it is killed 'inside' a save, after a random 'time', at a random 'call', or is left in 'peace'.
    """
    before = newest(out_dir)
    argv = argv if before is None else ["--init_from=resume", f"--out_dir={out_dir}"]
    log = out_dir.with_suffix(".log")
    left = (16 - (before or 0)) / 16
    share = chance.uniform(0, 0.4 + left)  # of the whole run; 0.4: what starting takes
    if how == "inside":
        status = Life(argv, log, paused=True).until_step(chance.randint(1, 1 + round(left * SAVES * STEPS)))
    elif how == "time":
        status = Life(argv, log).until_time(share * whole.length)
    elif how == "call":
        status = Life(argv, log, counter=CallCounter(1 + round(share * whole.length))).end(kill=False)
    else:
        status = Life(argv, log).end(kill=False)
    assert status in (0, -signal.SIGKILL), f"exit status {status}: {log.read_text()}"
    try:
        after = newest(out_dir)
    except UserError as error:
        raise AssertionError(f"the checkpoint does not load: {error}") from None
    assert (after or 0) >= (before or 0), f"step {before} was saved, {after} is left"
    return status


def kill_loop(kills: int, seed: int, folder: Path, by_calls: bool) -> tuple[int, int, int]:
    """(kills inside a checkpoint's write, finished runs, losses)"""
    dataset, chance = make_dataset(folder / "letters"), random.Random(seed)
    places = [f"--dataset={dataset}", f"--out_dir={folder / 'whole'}"]
    whole = run_whole([*OPTIONS, *places], folder / "whole", by_calls)
    done = inside = runs = losses = 0
    ended = True
    while done < kills or not ended:
        if ended:
            out_dir, ended = folder / f"run{runs}", False
        how = "call" if by_calls else "time"
        if inside * 2 < done or done == 0:
            how = "inside"
        if done >= kills:
            how = "peace"  # the last run may come to its end
        options = [*OPTIONS, f"--dataset={dataset}", f"--out_dir={out_dir}"]
        try:
            ended = live(options, out_dir, chance, how, whole) == 0
            done += not ended
            inside += how == "inside" and not ended
            assert not ended or outcome(out_dir) == whole.outcome, f"{out_dir} differs from the unbroken run"
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
    parser.add_argument("--by_calls", action="store_true", help="a random call in place of a random time")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        inside, runs, losses = kill_loop(options.kills, options.seed, Path(folder), options.by_calls)
    print(
        f"kills {options.kills} ({inside} inside a checkpoint's write), runs finished {runs}, losses {losses}, "
        f"seconds {time.perf_counter() - started:.0f}, seed {options.seed}"
    )
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
