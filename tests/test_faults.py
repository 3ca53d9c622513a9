"""Faults from end to end: forged files, a disk without rights, kills, numbers not finite."""

import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt12.checkpoint import save_checkpoint
from gpt12.folder import Progress, find_checkpoint
from gpt12.twin import VOCAB_SIZE
from model import GPT
from tests.helpers import OUT, ROOT, refused, resume, run, trainer

pytestmark = pytest.mark.usefixtures("own_folder")


# --------------------------------------------------------------------------------------------------
# Forgeries


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("run.json", "max_iters", "1" + "0" * 400),
        ("run.json", "seed", "1" + "0" * 30),
        ("last/trainer.json", "step", "-5"),
        ("last/trainer.json", "position", "1" + "0" * 30),
    ],
    ids=["max_iters", "seed", "step", "position"],
)
def test_a_number_that_no_run_has_is_refused_by_its_name(finished_copy, file, key, value):
    text = (OUT / file).read_text()
    (OUT / file).write_text(re.sub(rf'"{key}": \d+', f'"{key}": {value}', text))
    refused(file, resume, "--eval_interval=3")


def test_a_row_or_a_checkpoint_that_is_none_ends_in_no_traceback(finished_copy):
    with (OUT / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1e400}\n')
    resume("--max_iters=5")
    for name in ("last", "last.prev"):
        shutil.rmtree(OUT / name, ignore_errors=True)
        (OUT / name).write_text("a file")
    refused("no checkpoint in", resume, "--max_iters=9")
    save_checkpoint(OUT / "last", lambda folder: None, Progress(step=7))
    assert find_checkpoint(OUT, ("last",))[1].step == 7


@pytest.mark.parametrize("hard", [False, True])
def test_links_in_a_strangers_run_are_not_written_through(finished_copy, hard):
    """Any name that we write, also the temporary ones, may be a link out of the folder."""
    outside = Path("outside").absolute()
    (outside / "folder").mkdir(parents=True)
    for name in (".lock", "run.json.tmp", "metrics.jsonl.tmp", "loss.png.tmp"):
        (OUT / name).unlink(missing_ok=True)
        made = outside / f"made-{name}"
        if hard:
            made.write_text("theirs")
            (OUT / name).hardlink_to(made)
        else:
            (OUT / name).symlink_to(made)
    for name in ("last.tmp", "last.prev", "best.tmp", "previous.tmp", "previous"):
        (OUT / name).symlink_to(outside / "folder")
    resume("--max_iters=6")
    (OUT / "previous").unlink()  # it would be refused
    run("--max_iters=2")
    left = [path.read_text() for path in outside.rglob("*") if path.is_file()]
    assert left == ["theirs"] * 4 * hard
    assert not list((outside / "folder").iterdir())


# --------------------------------------------------------------------------------------------------
# A disk that really cannot be written


@pytest.fixture
def disk(own_folder, tmp_path):
    """Let out/ be a file system of 2 MB of its own; root may make one."""
    OUT.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run("mount -t tmpfs -o size=2m tmpfs out".split()).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield
    subprocess.run(["umount", "-l", tmp_path / "out"], check=True)


@pytest.mark.usefixtures("disk")
def test_a_run_on_a_read_only_file_system_is_refused():
    run("--max_iters=2")
    subprocess.run("mount -o remount,ro out".split(), check=True)
    message = "cannot be written: Read-only file system"
    refused(message, resume, "--max_iters=4")
    refused(message, run, "--out_dir=out/new")
    assert trainer()["step"] == 2


# --------------------------------------------------------------------------------------------------
# Kills


def test_a_run_that_is_killed_four_times_ends_like_the_unbroken_run():
    """The short form of tests/manual/kill_loop.py: two kills at random calls, two inside a save."""
    argv = [sys.executable, "-m", "tests.manual.kill_loop", "--kills=4", "--seed=6"]
    result = subprocess.run([*argv, "--presets=0"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "kills 4 (2 inside" in result.stdout
    assert "losses 0" in result.stdout


# --------------------------------------------------------------------------------------------------
# Numbers that are not finite


def test_updates_skipped_between_two_logs_are_reported(monkeypatch, capsys):
    """Of a run whose loss is NaN in its second and third step."""
    forward = GPT.forward
    count = itertools.count(1)

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        is_twin = self.config.vocab_size == VOCAB_SIZE  # tried before the first step
        if self.training and not is_twin and next(count) in (2, 3):
            loss = loss * math.nan
        return logits, loss

    monkeypatch.setattr("model.GPT.forward", poisoned)
    run("--max_iters=12", "--log_interval=4", "--gradient_accumulation_steps=1")
    [told] = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert told.startswith("step 4: loss or gradient not finite; skipped 2 update(s)")
