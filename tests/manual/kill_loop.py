"""Kill training runs again and again, and see that nothing is lost.

    python -m tests.manual.kill_loop --kills=200

A tiny run on the CPU is killed by SIGKILL at a random call of a function: half of the times inside
the write of a checkpoint, also with half a file written, and else before or after one. Calls are
counted by Python, so that the same seed kills at the same places on any machine, however busy it
is. After each kill the newest checkpoint must load, be no older than the one before, and resume.
When a run reaches its end, its weights, moments and losses must equal those of an unbroken run bit
for bit. Then the next run begins, until the kills are used up.

Then a shipped preset, config/train_shakespeare_cpu.py, runs as it is, and is killed after it has
saved: it must resume, and end like the unbroken run. --presets says how often.

With --preset=config/NAME.py the tiny runs have the other keys of a shipped preset: its optimizer,
schedule, adapters. One that starts from GPT-2 starts from a tiny model instead, and one for
questions and answers trains on those.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads would not survive a fork

# Imported here so that a forked process need not import them again.
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import safetensors.torch
import torch._dynamo  # noqa: F401

import data.tokenizers
import data.windows  # noqa: F401
import train
from gpt12 import checkpoint
from gpt12.errors import UserError
from gpt12.folder import Progress, find_checkpoint
from tests.helpers import (
    OPTIONS,
    RESUME,
    ROOT,
    make_answers,
    make_dataset,
    options_parser,
    read_rows,
)

PRESET = "config/train_shakespeare_cpu.py"
NO_CLOCK = {"elapsed_s": None, "tokens_per_s": None}
BEFORE, INSIDE, AFTER = range(3)  # the parts of a process: before its first save, in one, after one


class CallCounter:
    """Counts the calls of functions in each part of a process, and kills it before one of them."""

    def __init__(self, part: int = BEFORE, fatal: int = 0):
        """fatal: the number of the call in this part that it does not live to make, from 1."""
        self.fatal = (part, fatal)
        self.part = BEFORE  # where the process is
        # Seen by the parent process, too:
        self.calls = multiprocessing.RawArray("q", 3)  # by part
        self.saved = multiprocessing.RawValue("q", 0)  # the step of the newest last/

    def start(self) -> None:
        """Start to count in this process."""
        save = checkpoint.save_checkpoint

        def save_checkpoint(folder: Path, write: Callable, progress: Progress) -> None:
            self.part = INSIDE
            save(folder, write, progress)
            self.part = AFTER
            if folder.name == "last":
                self.saved.value = progress.step

        checkpoint.save_checkpoint = save_checkpoint
        safetensors.torch.save_file = save_by_halves  # type: ignore[assignment]
        sys.setprofile(self.count)

    def count(self, frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            self.calls[self.part] += 1
            if (self.part, self.calls[self.part]) == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def save_by_halves(tensors: dict, file: Path, metadata: dict | None = None) -> None:
    """Save as safetensors does, but so that a kill may leave half a file."""
    content = safetensors.torch.save(tensors, metadata)
    with open(file, "wb", buffering=0) as f:
        f.write(content[: len(content) // 2])
        f.write(content[len(content) // 2 :])


def memory_folder() -> tempfile.TemporaryDirectory:
    """Return a temporary folder, in memory if it can be: no real fsync is needed."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.exists() else None)


def log_of(out_dir: Path) -> Path:
    return out_dir.with_suffix(".log")


def run_process(
    argv: list[str], out_dir: Path, prepare: Callable[[], object] = lambda: None
) -> int:
    """Run train.py in a forked process. Return its exit status, or minus the signal.

    prepare: is called in the process before it trains.
    """
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            sys.stdout = sys.stderr = open(log_of(out_dir), "w")
            prepare()
            status = train.main([*argv, f"--out_dir={out_dir}"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def newest(out_dir: Path) -> int | None:
    """Return the step of the checkpoint that resuming would take, None if there is none.

    Raises UserError or SafetensorError if it does not load.
    """
    if not any((out_dir / name).exists() for name in ("last", "last.prev")):
        return None
    folder, progress = find_checkpoint(out_dir, ("last",))
    for file in folder.glob("*.safetensors"):
        safetensors.torch.load_file(file)
    return progress.step


def outcome(out_dir: Path) -> dict:
    """Return all that must not depend on how often a run was killed."""
    result: dict = {"metrics": [row | NO_CLOCK for row in read_rows(out_dir)]}
    for name in ("best", "last"):
        folder, progress = find_checkpoint(out_dir, (name,))
        result[name] = (replace(progress, elapsed_s=0.0), tensors_of(folder))
    return result


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Return the tensors in a checkpoint's files. The order of a file's metadata is random."""
    files = folder.rglob("*.safetensors")
    return {file.name: safetensors.torch.save(safetensors.torch.load_file(file)) for file in files}


def live(argv: list[str], out_dir: Path, counter: CallCounter) -> int:
    """Let a run live once, from its start or its checkpoint. Return the exit status.

    Raises AssertionError that says what was lost.
    """
    before = newest(out_dir)
    if before is not None:
        argv = RESUME
    status = run_process(argv, out_dir, counter.start)
    assert status in (0, -signal.SIGKILL), f"exit status {status}: {log_of(out_dir).read_text()}"
    try:
        after = newest(out_dir)
    except (UserError, safetensors.SafetensorError) as error:
        raise AssertionError(f"the checkpoint does not load: {error}") from None
    saved = max(before or 0, counter.saved.value)
    assert (after or 0) >= saved, f"step {saved} was saved, {after} is left"
    return status


def options_of_runs(folder: Path, preset: str) -> list[str]:
    """Return the options of a tiny run, with those of a preset that are not the run's size."""
    if not preset:
        return [*OPTIONS, f"--dataset={make_dataset(folder / 'letters')}"]
    keys = runpy.run_path(str(ROOT / preset))
    if keys["dataset"].endswith(".jsonl"):
        dataset = make_answers(folder / "answers")
    else:
        dataset = make_dataset(folder / "letters")
    options = [preset, *OPTIONS, f"--dataset={dataset}", "--num_epochs=0", "--log_interval=1"]
    options = [key for key in options if not key.startswith("--learning_rate")]
    if keys.get("init_from", "scratch") == "scratch":
        return options
    base = folder / "base"
    argv = [*OPTIONS, f"--dataset={dataset}", "--max_iters=4"]
    assert run_process(argv, base) == 0, log_of(base).read_text()
    return [*options, f"--init_from={base}"]


def kill_loop(
    options: list[str], parts: Sequence[int], kills: int, seed: int, folder: Path
) -> Counter:
    """Kill runs with these options so many times, in these parts in turn. Return what happened."""
    chance = random.Random(seed)
    unbroken = CallCounter()
    whole = folder / "whole"
    assert live(options, whole, unbroken) == 0
    expected = outcome(whole)
    calls = list(unbroken.calls)
    calls[INSIDE] //= 3  # so early that a run takes some lives
    out_dir = folder / "run"
    tally: Counter[str] = Counter()
    ended = True
    while tally["kills"] < kills or not ended:
        part = parts[tally["kills"] % len(parts)]
        fatal = chance.randint(1, calls[part])
        # The last run may come to its end.
        counter = CallCounter(part, fatal if tally["kills"] < kills else 0)
        try:
            ended = live(options, out_dir, counter) == 0
            assert not ended or outcome(out_dir) == expected, "it differs from the unbroken run"
        except AssertionError as error:
            print(f"LOST after kill {tally['kills']}: {error}", file=sys.stderr)
            tally["losses"] += 1
            tally["kills"] += 1
            ended = True
        if ended:
            tally["runs"] += 1
            shutil.rmtree(out_dir, ignore_errors=True)
        else:
            tally["kills"] += 1
            tally["inside"] += part == INSIDE
    return tally


def main() -> int:
    keys = {"kills": 200, "seed": random.randrange(10**6), "presets": 1, "preset": ""}
    options = options_parser(__doc__, **keys).parse_args()
    started = time.perf_counter()
    with memory_folder() as folder:  # a killed process loses nothing that fsync would save
        tiny, shipped = Path(folder, "tiny"), Path(folder, "shipped")
        tiny.mkdir()
        shipped.mkdir()
        runs = options_of_runs(tiny, options.preset)
        tally = kill_loop(runs, (INSIDE, BEFORE, INSIDE, AFTER), options.kills, options.seed, tiny)
        if options.presets:
            tally += kill_loop([PRESET], (AFTER,), options.presets, options.seed, shipped)
    print(
        f"kills {tally['kills']} ({tally['inside']} inside a checkpoint's write), runs finished "
        f"{tally['runs']}, losses {tally['losses']}, seconds {time.perf_counter() - started:.0f}, "
        f"seed {options.seed}"
    )
    return 1 if tally["losses"] else 0


if __name__ == "__main__":
    sys.exit(main())
