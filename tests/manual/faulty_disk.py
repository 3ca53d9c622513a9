"""Let each write, fsync and rename of a run fail once, in turn, and see that nothing is lost.

    python -m tests.manual.faulty_disk               # all calls: some minutes
    python -m tests.manual.faulty_disk --every=10    # every tenth

A tiny run of 20 steps on the CPU saves after 10 and after 20 of them. The calls to the kernel that
change something below out_dir are counted, and then the run is made again and again, and in each of
them another call fails: once, with the disk as before afterwards, and once with all later calls
failing, too. After that the newest checkpoint must load, and be the old one or the new one. The run
goes on from it with --init_from=resume, or from its beginning where nothing had been saved, and
must end with the losses, weights and moments of the run without a fault, bit for bit.

That is done with a run from its start, and up to the first step also with one that is resumed and
with one that is started in the folder of another run, which must still be there afterwards; with
AdamW and with LoRA.

tests/manual/faulty_disk.c makes the faults. It needs Linux on x86-64 and a C compiler.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads would not survive a fork

import safetensors
import torch._dynamo  # noqa: F401  # AdamW's constructor imports it, in each forked process
from matplotlib.figure import Figure

import gpt12.log
import train
from gpt12.errors import UserError
from gpt12.log import read_metrics
from tests.helpers import RESUME, losses, options_parser, trainer
from tests.manual.kill_loop import (
    log_of,
    memory_folder,
    newest,
    options_of_runs,
    run_process,
    tensors_of,
)

STEPS = 20
PRESETS = {"adamw": "", "lora": "config/finetune_gpt2_xl_lora.py"}
# Two checkpoints of each name, and the same learning rates if the run is made in two halves.
RUN = "--max_iters=20 --lr_decay_iters=20 --eval_interval=10 --save_interval_s=1e9".split()
RESUMED = [*RESUME, f"--max_iters={STEPS}"]
EARLIER_STEPS = 4  # of the run in whose folder another one is started


@dataclass(frozen=True)
class Start:
    """What a run starts from: its command line, and what lies in its folder before."""

    name: str
    argv: list[str]
    before: Path | None


def build_disk(folder: Path) -> Any:
    """Build the library of faulty_disk.c in a folder. Raises CalledProcessError."""
    file = folder / "faulty_disk.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", source, "-o", file], check=True)
    disk = ctypes.CDLL(str(file))
    disk.fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long]
    disk.failed.restype = ctypes.c_char_p
    disk.calls.restype = ctypes.c_long
    return disk


def run_on(
    disk: Any,
    start: Start,
    out_dir: Path,
    failing: tuple[int, int] = (0, 0),
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """Train with the calls from the first to the last of `failing` failing. Return the exit status.

    prepare: is called in the process before it trains.
    """
    shutil.rmtree(out_dir, ignore_errors=True)
    if start.before is not None:
        shutil.copytree(start.before, out_dir)

    def trap() -> None:
        prepare()
        if disk.trap() != 0:
            raise OSError("the kernel does not allow seccomp filters")

    disk.fail(str(out_dir).encode(), *failing)
    return run_process(start.argv, out_dir, trap)


def save_nothing(figure: Figure, file: IO[bytes], **options: object) -> None:
    """Write what is no picture, in place of matplotlib's."""
    file.write(b"a picture")


def make_repeatable() -> None:
    """Let the calls of all runs come in the same order: the thread that draws is waited for.

    No sample is written and nothing is drawn in loss.png, which would take most of the time.
    """
    gpt12.log.generate = lambda model, prompts, *_, **__: prompts
    Figure.savefig = save_nothing  # type: ignore[assignment,method-assign]
    start = threading.Thread.start

    def start_and_wait(self) -> None:
        start(self)
        if not self.daemon:
            self.join()

    threading.Thread.start = start_and_wait  # type: ignore[method-assign]


def end_at_first_step() -> None:
    """Let this process end where training begins."""
    train.TrainStep.__call__ = lambda *arguments: os._exit(0)  # type: ignore[method-assign]


def outcome(out_dir: Path) -> dict:
    """Return what a fault must not change. Rows of metrics.jsonl and best/ may be lost by one."""
    progress = {key: trainer(out_dir)[key] for key in ("step", "position", "tokens")}
    return progress | tensors_of(out_dir / "last")


def starts(options: list[str], folder: Path) -> list[Start]:
    """Make the folders that runs start from."""
    half = folder / "half"
    earlier = folder / "earlier"
    for out_dir, steps in ((half, STEPS // 2), (earlier, EARLIER_STEPS)):
        argv = [*options, *RUN, f"--max_iters={steps}"]
        assert run_process(argv, out_dir) == 0, log_of(out_dir).read_text()
    return [
        Start("from its start", [*options, *RUN], None),
        Start("resumed", RESUMED, half),
        Start("over another run", [*options, *RUN], earlier),
    ]


def earlier_run_is_there(out_dir: Path) -> bool:
    """Tell whether the run that another was started over can still be found."""
    for name in ("previous", "previous.tmp", "."):
        folder = out_dir / name
        if (folder / "last").exists() and newest(folder) == EARLIER_STEPS:
            return True
    return False


def check(start: Start, out_dir: Path, status: int, whole: dict) -> None:
    """See that nothing was lost by the fault, and that the run goes on to the same end.

    Raises AssertionError that says what was lost.
    """
    said = log_of(out_dir).read_text()
    assert status >= 0, f"signal {-status}: {said}"
    told = "could not save" in said or "gpt12.errors.UserError: " in said
    assert status == 0 or told, f"it does not say what is wrong: {said}"
    try:
        step = newest(out_dir)
        if start.name == "over another run":
            assert earlier_run_is_there(out_dir), "the earlier run is lost"
            if step == EARLIER_STEPS:
                step = None  # the new run has not begun
    except (UserError, safetensors.SafetensorError) as error:
        raise AssertionError(f"the checkpoint does not load: {error}") from None
    assert step in (None, STEPS // 2, STEPS), f"step {step} was never saved"
    assert step is not None or start.name != "resumed", "the checkpoint is lost"
    assert step == STEPS or status != 0, f"it ended well, but saved only step {step}"
    argv = start.argv
    # Started anew, a run that has a best/ already takes the place of the earlier one in previous/.
    takes_place = step is None and (out_dir / "best").exists() and (out_dir / "previous").exists()
    if step is not None:
        argv = RESUMED
    if status != 0 or step != STEPS:
        status = run_process(argv, out_dir)
    assert status == 0, f"it cannot go on: {log_of(out_dir).read_text()}\nbefore: {said}"
    assert outcome(out_dir) == whole["outcome"], "other weights or moments"
    # The row of a step may have been lost to the fault; if it is there, it is right.
    for row in read_metrics(out_dir / "metrics.jsonl"):
        for key in ("loss", "val_loss"):
            step = row["step"]
            assert row.get(key) in (None, whole[key].get(step)), f"another {key} in step {step}"
    if start.name == "over another run" and not takes_place:
        assert earlier_run_is_there(out_dir), "the earlier run is lost after going on"


def try_faults(disk: Any, folder: Path, preset: str, every: int) -> Counter:
    """Let every so many calls of all runs of one preset fail. Return what happened."""
    tally: Counter[str] = Counter()
    whole: dict = {}
    out_dir = folder / "out"
    for start in starts(options_of_runs(folder, preset), folder):
        assert run_on(disk, start, out_dir) == 0, log_of(out_dir).read_text()
        if not whole:
            whole = {key: losses(out_dir, key) for key in ("loss", "val_loss")}
            whole["outcome"] = outcome(out_dir)
        assert outcome(out_dir) == whole["outcome"], "two runs differ without a fault"
        if start.before is not None:
            run_on(disk, start, out_dir, prepare=end_at_first_step)
        calls = disk.calls()
        print(f"{folder.name}, {start.name}: {calls} calls", flush=True)
        for first in range(1, calls + 1, every):
            for last in (first, sys.maxsize):
                status = run_on(disk, start, out_dir, (first, last))
                where = disk.failed().decode()  # "write /path"
                assert where, f"call {first} was not made again"
                tally["failed"] += 1
                try:
                    check(start, out_dir, status, whole)
                except AssertionError as error:
                    also = "" if last == first else " and all that follow"
                    print(f"LOST at call {first}{also}, {where}: {error}", flush=True)
                    tally["lost"] += 1
    return tally


def main() -> int:
    options = options_parser(__doc__, every=1, only=("", *PRESETS)).parse_args()
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which("cc"):
        print("skipped: the faults need Linux on x86-64 and a C compiler")
        return 0
    began = time.perf_counter()
    tally: Counter[str] = Counter()
    make_repeatable()
    with memory_folder() as name:
        disk = build_disk(Path(name))
        for method in [options.only] if options.only else PRESETS:
            folder = Path(name) / method
            folder.mkdir()
            tally += try_faults(disk, folder, PRESETS[method], options.every)
    seconds = time.perf_counter() - began
    print(f"calls failed {tally['failed']}, runs lost {tally['lost']}, seconds {seconds:.0f}")
    return 1 if tally["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
