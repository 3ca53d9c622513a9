"""gpt12/run_folder.py: one run in a folder, run.json, and an earlier run's files set aside."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt12.errors import UserError, run_main
from gpt12.run_folder import lock_run, read_run, set_aside, write_json
from tests.helpers import ROOT, read_rows, resume, run

pytestmark = pytest.mark.usefixtures("no_picture")


# --------------------------------------------------------------------------------------------------
# The lock

HOLD = """
import sys
from pathlib import Path
from gpt12.run_folder import lock_run
with lock_run(Path(sys.argv[1])):
    print(1, flush=True)
    input()
"""


def test_a_folder_is_locked_for_a_second_run_until_the_first_process_has_ended(tmp_path):
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match=f"another run is writing to out_dir={tmp_path}"):
            with lock_run(tmp_path):
                pass
        process.kill()
    for _ in range(2):  # neither a killed run nor one that ended well keeps the lock
        with lock_run(tmp_path):
            pass


def test_a_second_training_run_in_the_same_folder_is_refused(dataset, tmp_path):
    with lock_run(tmp_path), pytest.raises(UserError, match="another run"):
        run(dataset, tmp_path, "--max_iters=1")
    assert run(dataset, tmp_path, "--max_iters=1") == 0


def test_a_disk_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_run(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_told_before_any_work(dataset, tmp_path, capsys):
    """Root may write anywhere, but not even root can make a folder below a file."""
    (tmp_path / "file").write_text("")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(SystemExit) as end:
            run_main(lambda out_dir=out_dir: run(dataset, out_dir))
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert f"out_dir={out_dir} cannot be written" in err
        assert "Traceback" not in err


# --------------------------------------------------------------------------------------------------
# run.json


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_run_that_cannot_write_its_first_files_says_so(dataset, tmp_path, name):
    (tmp_path / f"{name}.tmp").mkdir()  # stands for a disk that takes no file
    with pytest.raises(UserError, match=f"{name} cannot be written"):
        run(dataset, tmp_path)


def test_run_json_holds_what_explains_the_run_and_no_file_holds_a_secret(
    dataset, tmp_path, monkeypatch, capsys
):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "FREE"):
        monkeypatch.setenv(name, f"s3cret-{name}-abcdef")
    monkeypatch.setattr(sys, "argv", ["train.py", "--password=s3cret-argv"])
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    told = "".join(capsys.readouterr())
    for path in tmp_path.rglob("*"):
        if path.is_file():
            told += path.read_text("utf-8", errors="replace")
    assert "s3cret" not in told
    facts = json.loads((tmp_path / "run.json").read_text())
    assert set(facts) == {
        "config", "requested", "commit", "versions", "platform", "device", "device_memory_gib",
        "dtype", "compile", "world_size", "data",
    }  # fmt: skip
    assert facts["config"]["learning_rate"] == 1e-2
    assert facts["versions"]["torch"]
    assert facts["data"] == {"name": str(dataset), "sha256": "0" * 64, "tokens": 2600}


def test_run_json_keeps_what_auto_was_asked_for_beside_what_it_became(dataset, tmp_path):
    """Also after resuming, where the values begin as those that were decided."""
    options = ["--dtype=auto", "--batch_size=auto", "--gradient_accumulation_steps=6"]
    assert run(dataset, tmp_path, *options, "--max_iters=1") == 0
    for max_iters in (2, 3):
        facts = read_run(tmp_path)
        asked = facts["requested"]
        assert (asked["dtype"], asked["recompute"], asked["batch_size"]) == ("auto",) * 3
        became = facts["config"]
        assert (became["dtype"], became["recompute"]) == ("float32", "none")
        assert became["batch_size"] * became["gradient_accumulation_steps"] == 6
        assert resume(tmp_path, f"--max_iters={max_iters}", "--log_interval=7") == 0
        assert read_run(tmp_path)["requested"]["log_interval"] == 7


DAMAGE = [b"", b"{", b"[]", b'{"config": 3}', b'{"config": {}}', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: str(damage[:20]))
def test_a_damaged_run_json_is_refused(tmp_path, damage):
    (tmp_path / "run.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        read_run(tmp_path)


def test_resuming_in_a_folder_without_a_run_names_those_that_there_are(
    finished, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"nothing to resume in none: none/run.json does not exist$"
    ):
        resume(Path("none"))
    shutil.copytree(finished, "out-other")
    with pytest.raises(UserError, match=r"can be resumed: out-other\. Try --out_dir=out-other$"):
        resume(Path("none"))


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.picture
def test_every_file_of_a_run_honours_the_umask(dataset, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert run(dataset, tmp_path / "out", "--max_iters=2") == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {file.name for file in files}
    assert {"model.safetensors", "trainer.safetensors", "loss.png", "run.json"} <= names
    for file in files:
        if file.name != ".lock":  # filelock's own file, which holds nothing
            assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file


# --------------------------------------------------------------------------------------------------
# An earlier run


def make_earlier_run(out_dir: Path, version: int) -> None:
    """Write the files of a run. version: tells it from others."""
    config = {"init_from": "scratch", "batch_size": 1, "gradient_accumulation_steps": 1}
    write_json(out_dir / "run.json", {"config": config, "version": version})
    (out_dir / "metrics.jsonl").write_text(str(version))
    for name in ("best", "last", "best.prev", "last.prev"):
        (out_dir / name).mkdir()
        (out_dir / name / "model.safetensors").write_text(str(version))


def version_of(folder: Path) -> int:
    """Return the version of a run's files, after checking that all are of that version."""
    version = read_run(folder)["version"]
    assert (folder / "metrics.jsonl").read_text() == str(version)
    for name in ("best", "last", "best.prev", "last.prev"):
        assert (folder / name / "model.safetensors").read_text() == str(version)
    return version


def test_starting_anew_sets_the_earlier_run_aside_and_says_so(dataset, finished, tmp_path, capsys):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    before = (out_dir / "last" / "model.safetensors").read_bytes()
    assert run(dataset, out_dir, "--max_iters=2", "--seed=7") == 0
    assert f"was moved to {out_dir / 'previous'}" in capsys.readouterr().out
    assert (out_dir / "previous" / "last" / "model.safetensors").read_bytes() == before
    assert len(read_rows(out_dir / "previous")) > len(read_rows(out_dir))


def test_an_earlier_run_is_set_aside_whole_and_the_users_files_stay(tmp_path):
    make_earlier_run(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("the user's own")
    assert set_aside(tmp_path) == tmp_path / "previous"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous"]
    assert version_of(tmp_path / "previous") == 1
    assert set_aside(tmp_path) is None  # nothing new, so the old one stays
    assert version_of(tmp_path / "previous") == 1


def test_no_earlier_run_is_lost(tmp_path):
    for number in (1, 2, 3):
        make_earlier_run(tmp_path, number)
        assert set_aside(tmp_path) == tmp_path / "previous"
    folders = ("previous", "previous-2", "previous-3")
    assert [version_of(tmp_path / name) for name in folders] == [3, 1, 2]


def test_a_run_without_a_checkpoint_does_not_push_out_the_one_set_aside(tmp_path):
    make_earlier_run(tmp_path, 1)
    set_aside(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    set_aside(tmp_path)
    assert version_of(tmp_path / "previous") == 1


class Killed(BaseException):
    """No handler of ours catches it."""


@pytest.mark.parametrize("kill_at", range(1, 9))
def test_a_kill_while_setting_aside_loses_nothing(tmp_path, monkeypatch, kill_at):
    make_earlier_run(tmp_path, 1)
    rename = Path.rename
    count = iter(range(1, 100))

    def dying(path, target):
        if next(count) == kill_at:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as m:
        m.setattr(Path, "rename", dying)
        if kill_at <= 7:  # six files and folders, then the whole
            with pytest.raises(Killed):
                set_aside(tmp_path)
        else:
            set_aside(tmp_path)
    set_aside(tmp_path)
    assert version_of(tmp_path / "previous") == 1
