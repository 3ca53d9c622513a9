"""Kill training runs again and again, and see that nothing is lost.

    python -m tests.manual.kill_loop --kills=200

A tiny run on the CPU is killed by SIGKILL: half of the times at a random call of a function, half
inside the write of a checkpoint, at a random one of its operations and also with half a file
written. Calls are counted by Python, so that the same seed kills at the same places on any machine,
however busy it is. After each kill the newest checkpoint must load, be no older than the one
before, and resume. When a run reaches its end, its weights, moments and losses must equal those of
an unbroken run bit for bit. Then the next run begins, until the kills are used up.

Then a shipped preset, config/train_shakespeare_cpu.py, runs as it is, and is killed by SIGKILL
every time that it has saved: it must resume, and end like the unbroken run. Leave it out with
--presets=0.

With --preset=config/NAME.py the tiny runs have the other keys of a shipped preset: its optimizer,
schedule, adapters. One that starts from GPT-2 starts from a tiny model instead, and one for
questions and answers trains on those.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from gpt12.checkpoint import find_checkpoint
from gpt12.errors import UserError
from tests.helpers import OPTIONS, ROOT, command, make_answers, make_dataset

PRESET = "config/train_shakespeare_cpu.py"


def pause_in_saves(pause: Callable[[], object]) -> None:
    """Call pause() around each operation on the disk in a save, and in the middle of its files."""
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

    save = checkpoint.save_checkpoint

    def save_checkpoint(*args):
        nonlocal saving
        saving = True
        save(*args)
        saving = False

    checkpoint.save_checkpoint = save_checkpoint
    safetensors.torch.save_file = save_file
    checkpoint.sync = around(checkpoint.sync)
    for name in ("mkdir", "rename", "write_text", "write_bytes"):
        setattr(Path, name, around(getattr(Path, name)))
    shutil.rmtree = around(shutil.rmtree)  # type: ignore[assignment]


class CallCounter:
    """Counts the calls of functions in this process, and kills it just before one of them."""

    def __init__(self, fatal: int | None):
        self.calls = 0
        self.fatal = fatal

    def __call__(self, frame: object, event: str, argument: object) -> None:
        if event not in ("call", "c_call"):
            return
        self.calls += 1
        if self.calls == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class Life:
    """One process of a run, from its start or from its checkpoint. It is forked.

    paused: it waits at each operation inside a save. counter: counts its calls, and kills it at the
    fatal one; a process that ends by itself leaves the number of calls in a file beside the log.
    prepare: is called in the process before it trains.
    """

    def __init__(
        self,
        argv: list[str],
        log: Path,
        paused: bool = False,
        counter: CallCounter | None = None,
        prepare: Callable[[], object] = lambda: None,
    ):
        self.operations = 0  # that until_operation has seen
        self.told, tell = os.pipe()
        wait, self.go = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(tell)
            os.close(wait)
            return
        status = 99
        try:
            os.close(self.told)
            os.close(self.go)
            sys.stdout = sys.stderr = open(log, "w")
            prepare()
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
        """Wait for the end. Return the exit status, or minus the signal."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.told)
        os.close(self.go)
        return status

    def until_operation(self, count: int) -> int:
        """Let it make this many operations inside saves."""
        for _ in range(count - 1):
            if not os.read(self.told, 1):
                return self.end(kill=False)
            self.operations += 1
            os.write(self.go, b".")
        return self.end(kill=bool(os.read(self.told, 1)))


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
    result: dict = {"metrics": []}
    for line in (out_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        result["metrics"].append(without(row, "elapsed_s", "tokens_per_s"))
    for name in ("best", "last"):
        folder, progress = find_checkpoint(out_dir, (name,))
        result[name] = without(asdict(progress), "elapsed_s")
        for file in sorted(folder.rglob("*.safetensors")):
            # The order of a file's metadata is random: compare what it holds.
            content = safetensors.torch.save(safetensors.torch.load_file(file))
            result[f"{name}/{file.name}"] = hashlib.sha256(content).hexdigest()
    return result


def without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


@dataclass
class Whole:
    """The unbroken run: what it leaves, its calls, and its operations inside saves."""

    outcome: dict
    calls: int
    operations: int


def run_whole(argv: list[str], out_dir: Path) -> Whole:
    log = out_dir.with_suffix(".log")
    assert Life(argv, log).end(kill=False) == 0, log.read_text()
    expected = outcome(out_dir)
    assert Life(argv, log, counter=CallCounter(None)).end(kill=False) == 0
    assert outcome(out_dir) == expected, "two unbroken runs differ"
    paused = Life(argv, log, paused=True)
    assert paused.until_operation(sys.maxsize) == 0
    return Whole(expected, int(log.with_suffix(".calls").read_text()), paused.operations)


def live(argv: list[str], out_dir: Path, chance: random.Random, how: str, whole: Whole) -> int:
    """Let a run live once until it is killed. Return the exit status.

    how: it is killed "inside" a save, at a random "call", or not ("peace").
    Raises AssertionError that says what was lost.
    """
    before = newest(out_dir)
    if before is not None:
        argv = ["--init_from=resume", f"--out_dir={out_dir}"]
    log = out_dir.with_suffix(".log")
    if how == "inside":  # so early that a run takes some lives
        count = chance.randint(1, whole.operations // 3)
        status = Life(argv, log, paused=True).until_operation(count)
    elif how == "call":
        counter = CallCounter(chance.randint(1, whole.calls))
        status = Life(argv, log, counter=counter).end(kill=False)
    else:
        status = Life(argv, log).end(kill=False)
    assert status in (0, -signal.SIGKILL), f"exit status {status}: {log.read_text()}"
    try:
        after = newest(out_dir)
    except (UserError, safetensors.SafetensorError) as error:
        raise AssertionError(f"the checkpoint does not load: {error}") from None
    assert (after or 0) >= (before or 0), f"step {before} was saved, {after} is left"
    return status


@dataclass
class Tally:
    """What happened in all."""

    kills: int = 0
    inside: int = 0  # kills inside the write of a checkpoint
    runs: int = 0  # that came to their end
    losses: int = 0


def options_of_runs(folder: Path, preset: str | None) -> list[str]:
    """Return the options of a tiny run, with those of a preset that are not the run's size."""
    if preset is None:
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
    log = folder / "base.log"
    argv = [*OPTIONS, f"--dataset={dataset}", "--max_iters=4", f"--out_dir={base}"]
    assert Life(argv, log).end(kill=False) == 0, log.read_text()
    return [*options, f"--init_from={base}"]


def kill_loop(options: list[str], kills: int, seed: int, folder: Path) -> Tally:
    """Kill runs with these options so many times."""
    chance = random.Random(seed)
    whole = run_whole([*options, f"--out_dir={folder / 'whole'}"], folder / "whole")
    tally = Tally()
    ended = True
    while tally.kills < kills or not ended:
        if ended:
            out_dir = folder / f"run{tally.runs}"
            ended = False
        if tally.kills >= kills:
            how = "peace"  # the last run may come to its end
        elif tally.inside * 2 < tally.kills or tally.kills == 0:
            how = "inside"
        else:
            how = "call"
        try:
            ended = live([*options, f"--out_dir={out_dir}"], out_dir, chance, how, whole) == 0
            if not ended:
                tally.kills += 1
                if how == "inside":
                    tally.inside += 1
            elif outcome(out_dir) != whole.outcome:
                raise AssertionError(f"{out_dir} differs from the unbroken run")
        except AssertionError as error:
            print(f"LOST after kill {tally.kills}: {error}", file=sys.stderr)
            tally.losses += 1
            tally.kills += 1
            ended = True
        if ended:
            tally.runs += 1
            with contextlib.suppress(OSError):
                shutil.rmtree(out_dir)
    return tally


def start_train(*options: str) -> subprocess.Popen:
    """Start train.py as a user types it, with one line a logged step."""
    pipe = subprocess.PIPE
    argv = command("train.py", *options)
    return subprocess.Popen(argv, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def kill_preset(folder: Path, chance: random.Random) -> int:
    """Run a shipped preset as it is and kill it after each of its saves. Return the kills.

    Raises AssertionError that says what was lost.
    """
    process = start_train(PRESET, f"--out_dir={folder / 'whole'}")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    out_dir = folder / "killed"
    options = [PRESET, f"--out_dir={out_dir}"]
    kills = 0
    saved = 0
    while True:
        process = start_train(*options)
        lines = []
        patience = chance.randint(0, 2)  # logged steps between the save and the kill
        for line in process.stdout or ():
            lines.append(line)
            if newest(out_dir) not in (None, saved) and line.startswith("step "):
                if patience == 0:
                    process.kill()
                    break
                patience -= 1
        text = "".join(lines)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, text
        kills += 1
        if saved:
            assert f"resuming at step {saved:,}" in text, text
        saved = newest(out_dir) or 0
        print(f"{PRESET}: kill {kills}, step {saved} is saved", flush=True)
        options = ["--init_from=resume", f"--out_dir={out_dir}"]
    assert kills > 0, "it ended before it had saved"
    assert outcome(out_dir) == outcome(folder / "whole"), "it differs from the unbroken run"
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--presets", type=int, default=1, help="times to kill a shipped preset")
    parser.add_argument("--preset", help="a shipped preset, whose keys the tiny runs have")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = options_of_runs(folder, options.preset)
        tally = kill_loop(runs, options.kills, options.seed, folder)
        for number in range(options.presets):
            place = folder / f"preset{number}"
            place.mkdir()
            try:
                tally.kills += kill_preset(place, random.Random(options.seed + number))
                tally.runs += 1
            except AssertionError as error:
                print(f"LOST: {error}", file=sys.stderr)
                tally.losses += 1
    print(
        f"kills {tally.kills} ({tally.inside} inside a checkpoint's write), runs finished "
        f"{tally.runs}, losses {tally.losses}, seconds {time.perf_counter() - started:.0f}, "
        f"seed {options.seed}"
    )
    return 1 if tally.losses else 0


if __name__ == "__main__":
    sys.exit(main())
