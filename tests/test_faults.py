"""Faults from end to end: forged files, a disk without rights, kills, numbers not finite."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt12.checkpoint import save_checkpoint
from gpt12.errors import UserError
from gpt12.folder import Progress, find_checkpoint
from gpt12.twin import VOCAB_SIZE
from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import ROOT, resume, run, trainer

pytestmark = pytest.mark.usefixtures("no_picture")


# --------------------------------------------------------------------------------------------------
# Forgeries


TINY_SHAPE = GPTConfig(8, 11, 1, 2, 8)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_pretrained(GPT(TINY_SHAPE), folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 1000}, "asks for more than its tensors hold"),
        ({"vocab_size": 2**62}, "impossible shape"),
        ({"n_head": 0}, "impossible shape"),
    ],
)
def test_a_config_that_lies_is_refused_before_memory_is_asked_for(
    tiny_model, tmp_path, monkeypatch, change, message
):
    shutil.copytree(tiny_model, tmp_path / "m")
    known = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(known | change))
    monkeypatch.setattr("gpt12.weights.meta_model", pytest.fail)
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        *(("run.json", "max_iters", 10**400), ("run.json", "seed", 10**30)),
        *(("last/trainer.json", "step", -5), ("last/trainer.json", "position", 10**30)),
    ],
    ids=["max_iters", "seed", "step", "position"],
)
def test_a_number_that_no_run_has_is_refused_by_its_name(finished, tmp_path, file, key, value):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    content = json.loads((out_dir / file).read_text())
    content.get("config", content)[key] = value
    (out_dir / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=file):
        resume(out_dir, "--eval_interval=3")


def test_a_row_or_a_checkpoint_that_is_none_ends_in_no_traceback(finished, tmp_path):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    with (out_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1e400}\n')
    assert resume(out_dir, "--max_iters=5") == 0
    for name in ("last", "last.prev"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
        (out_dir / name).write_text("a file")
    with pytest.raises(UserError, match="no checkpoint in"):
        resume(out_dir, "--max_iters=9")
    save_checkpoint(out_dir / "last", lambda folder: None, Progress(step=7))
    assert find_checkpoint(out_dir, ("last",))[1].step == 7


@pytest.mark.parametrize("hard", [False, True])
def test_links_in_a_strangers_run_are_not_written_through(finished, dataset, tmp_path, hard):
    """Any name that we write, also the temporary ones, may be a link out of the folder."""
    out_dir = tmp_path / "out"
    outside = tmp_path / "outside"
    shutil.copytree(finished, out_dir)
    (outside / "folder").mkdir(parents=True)
    names = [".lock", *(f"{name}.tmp" for name in ("run.json", "metrics.jsonl", "loss.png"))]
    for name in names:
        (out_dir / name).unlink(missing_ok=True)
        if hard:
            (outside / f"made-{name}").write_text("theirs")
            (out_dir / name).hardlink_to(outside / f"made-{name}")
        else:
            (out_dir / name).symlink_to(outside / f"made-{name}")
    for name in ("last.tmp", "last.prev", "best.tmp", "previous.tmp", "previous"):
        (out_dir / name).symlink_to(outside / "folder")
    assert resume(out_dir, "--max_iters=6") == 0
    (out_dir / "previous").unlink()  # it would be refused
    assert run(dataset, out_dir, "--max_iters=2") == 0
    left = [path.read_text() for path in outside.rglob("*") if path.is_file()]
    assert left == ["theirs"] * 4 * hard
    assert not list((outside / "folder").iterdir())


# --------------------------------------------------------------------------------------------------
# A disk that really cannot be written


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MB of its own; root may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place]).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_run_on_a_read_only_file_system_is_refused(dataset, disk):
    assert run(dataset, disk / "out", "--max_iters=2") == 0
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    message = "cannot be written: Read-only file system"
    with pytest.raises(UserError, match=message):
        resume(disk / "out", "--max_iters=4")
    with pytest.raises(UserError, match=message):
        run(dataset, disk / "new")
    assert trainer(disk / "out")["step"] == 2


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

SAVE_ONCE = ["--eval_interval=12", "--save_interval_s=1e9", "--gradient_accumulation_steps=1"]


def poison_loss(monkeypatch, steps: tuple[int, ...]) -> None:
    """Let the training loss of these steps, counted from 1, be NaN."""
    forward = GPT.forward
    count = itertools.count(1)

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        is_twin = self.config.vocab_size == VOCAB_SIZE  # tried before the first step
        if self.training and not is_twin and next(count) in steps:
            loss = loss * math.nan
        return logits, loss

    monkeypatch.setattr(GPT, "forward", poisoned)


def test_updates_skipped_between_two_logs_are_reported(dataset, tmp_path, monkeypatch, capsys):
    poison_loss(monkeypatch, (2, 3))
    assert run(dataset, tmp_path, "--max_iters=12", "--log_interval=4", *SAVE_ONCE) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(told) == 1
    assert told[0].startswith("step 4: loss or gradient not finite; skipped 2 update(s)")
