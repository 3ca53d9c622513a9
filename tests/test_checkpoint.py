"""gpt12/checkpoint.py: whatever fails, and whenever, a checkpoint that loads is left."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from gpt12 import checkpoint
from gpt12.checkpoint import FORMAT, Progress, find_checkpoint, save_checkpoint
from gpt12.errors import UserError


def write_files(folder: Path, version: int) -> None:
    """Write the files of a checkpoint: one beside trainer.json, and one in a subfolder."""
    (folder / "model.safetensors").write_bytes(bytes(range(version, version + 200)))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text(f"version {version}")


def save(out_dir: Path, version: int, name: str = "last") -> None:
    """Save a checkpoint whose step and whose files are of this version."""
    progress = Progress(step=version, best_val_loss=1.25)
    save_checkpoint(out_dir / name, lambda folder: write_files(folder, version), progress, size=100)


def loaded(out_dir: Path) -> int:
    """Return the version of last/, after checking that all of its files are of that version."""
    folder, content = find_checkpoint(out_dir, ("last",))
    version = content["step"]
    assert (folder / "model.safetensors").read_bytes() == bytes(range(version, version + 200))
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == f"version {version}"
    return version


def save_previous(out_dir: Path, version: int) -> None:
    """Leave last.prev/, as a kill between the two renames of a save does."""
    save(out_dir, version)
    (out_dir / "last").rename(out_dir / "last.prev")


def sign(content: dict) -> str:
    """Return a trainer.json with this content and the checksum that belongs to it."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return json.dumps(content | {"checksum": checkpoint._checksum(content)})


# --------------------------------------------------------------------------------------------------
# A save that fails, at each of its steps


class Killed(BaseException):
    """No handler of ours catches it, as nothing catches SIGKILL."""


def fail_at(monkeypatch, n: int, failure: BaseException) -> list[str]:
    """Let the n-th operation on the disk fail. Return the names of all that were tried."""
    tried: list[str] = []

    def watch(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            tried.append(name)
            if len(tried) == n:
                raise failure
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("mkdir", "write_bytes", "write_text", "rename"):
        watch(Path, name)
    watch(os, "fsync")
    watch(shutil, "rmtree")
    watch(shutil, "disk_usage")
    watch(checkpoint, "sha256")
    return tried


def operations_of_a_save(out_dir, monkeypatch, first: bool) -> list[str]:
    out_dir.mkdir()
    if not first:
        save(out_dir, 1)
    with monkeypatch.context() as m:
        tried = fail_at(m, -1, Killed())
        save(out_dir, 2)
    return tried


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
@pytest.mark.parametrize("failure", [Killed(), FULL], ids=["killed", "disk full"])
def test_a_save_that_fails_at_any_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path, monkeypatch, failure, first
):
    operations = operations_of_a_save(tmp_path / "count", monkeypatch, first)
    assert operations.count("rename") == (1 if first else 2)
    assert operations.count("fsync") == 6  # three files, adapter/, the checkpoint, its parent
    outcomes = set()
    for n in range(1, len(operations) + 1):
        out_dir = tmp_path / str(n)
        out_dir.mkdir()
        if not first:
            save(out_dir, 2)
        with monkeypatch.context() as m, pytest.raises(type(failure)):
            fail_at(m, n, failure)
            save(out_dir, 3)
        nothing_yet = first and not (out_dir / "last").exists()
        found = None if nothing_yet else loaded(out_dir)
        outcomes.add(found)
        if failure is FULL and operations[n - 1] not in ("rename", "rmtree"):
            assert not (out_dir / "last.tmp").exists()  # it would take the space that is missing
        save(out_dir, 4)  # the next save is as if nothing had happened
        assert loaded(out_dir) == 4
        assert sorted(path.name for path in out_dir.iterdir()) == ["last"]
    assert outcomes == {3, None if first else 2}  # both happened: the operations cover both sides


def test_a_successful_save_leaves_only_the_new_checkpoint(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert loaded(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_disk_with_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=99))
    with pytest.raises(OSError, match=r"0\.00 GB are needed for .*last, 0\.00 GB are free"):
        save_checkpoint(tmp_path / "last", pytest.fail, Progress(), size=100)
    assert loaded(tmp_path) == 1


def test_the_previous_checkpoint_is_used_while_there_is_no_newer_one(tmp_path):
    save_previous(tmp_path, 1)
    assert loaded(tmp_path) == 1
    save(tmp_path, 2)
    assert loaded(tmp_path) == 2
    shutil.rmtree(tmp_path / "last")
    save_previous(tmp_path, 3)
    assert find_checkpoint(tmp_path, ("best", "last"))[0] == tmp_path / "last.prev"
    save(tmp_path, 4, "best")
    assert find_checkpoint(tmp_path, ("best", "last"))[0] == tmp_path / "best"


# --------------------------------------------------------------------------------------------------
# Nothing to resume


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint in .*best or .*last.*python train\.py"):
        find_checkpoint(tmp_path, ("best", "last"))


def test_a_run_that_was_killed_before_its_first_save_is_not_sent_to_other_runs(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("other", "killed"):
        (tmp_path / name).mkdir()
    save(tmp_path / "other", 1)
    (tmp_path / "killed" / "run.json").write_text("{}")
    message = "the run in .*killed has not saved a checkpoint.* start it again$"
    with pytest.raises(UserError, match=message):
        find_checkpoint(tmp_path / "killed", ("last",))


def test_runs_that_can_be_resumed_are_named_newest_first_and_at_most_three(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the message names the runs in the working directory
    for age, name in enumerate(("newest", "second", "third", "oldest")):
        (tmp_path / name).mkdir()
        save(tmp_path / name, 1)
        os.utime(tmp_path / name / "last" / "trainer.json", (1e9 - age, 1e9 - age))
    (tmp_path / "only-best").mkdir()
    save(tmp_path / "only-best", 1, "best")  # cannot be resumed, so it is not named
    with pytest.raises(UserError) as error:
        find_checkpoint(tmp_path / "none", ("last",))
    assert str(error.value).endswith("There are some in newest, second, third: --out_dir=newest")


def test_where_there_is_no_last_the_weights_of_best_are_offered_and_what_is_lost(tmp_path):
    save(tmp_path, 7, "best")
    with pytest.raises(UserError) as error:
        find_checkpoint(tmp_path, ("last",))
    message = str(error.value)
    assert "cannot be resumed exactly" in message
    assert "weights of step 7; the optimizer's state is lost" in message
    assert message.endswith(
        f"python train.py --init_from={tmp_path / 'best'} --out_dir={tmp_path}-2"
    )


# --------------------------------------------------------------------------------------------------
# Damage

FILES = ("model.safetensors", "adapter/adapter_model.safetensors", "trainer.json")


def check_refused(out_dir: Path, file: str, previous: bool = False) -> None:
    """Check that last/ is refused by the file's name; previous: and last.prev/ is offered."""
    with pytest.raises(UserError) as error:
        find_checkpoint(out_dir, ("last",))
    assert str(out_dir / "last" / file) in str(error.value)
    assert ("to use the one before it" in str(error.value)) == previous


@pytest.mark.parametrize("previous", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_damage_anywhere_in_a_checkpoint_is_refused_by_the_files_name(tmp_path, file, previous):
    """Every byte in turn, fifty lengths, and no file at all.

    White space in trainer.json may change, because its values do not.
    """
    if previous:
        save_previous(tmp_path, 1)
        (tmp_path / "last.prev").rename(tmp_path / "kept")
    save(tmp_path, 2)
    if previous:
        (tmp_path / "kept").rename(tmp_path / "last.prev")
    path = tmp_path / "last" / file
    good = path.read_bytes()
    _, content = find_checkpoint(tmp_path, ("last",))
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :])
        if file == "trainer.json" and good[i : i + 1].isspace():
            try:
                assert find_checkpoint(tmp_path, ("last",))[1] == content
                continue
            except UserError:
                pass
        check_refused(tmp_path, file, previous)
    for length in sorted({len(good) * i // 50 for i in range(50)}):
        path.write_bytes(good[:length])
        check_refused(tmp_path, file, previous)
    path.unlink()
    check_refused(tmp_path, file, previous)
    path.write_bytes(good)
    assert loaded(tmp_path) == 2


def test_the_previous_checkpoint_can_be_used_as_the_message_says(tmp_path):
    save_previous(tmp_path, 1)
    shutil.copytree(tmp_path / "last.prev", tmp_path / "last")
    (tmp_path / "last" / "model.safetensors").write_bytes(b"")
    check_refused(tmp_path, "model.safetensors", previous=True)
    shutil.rmtree(tmp_path / "last")
    assert loaded(tmp_path) == 1


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "3", '{"step": 1}', '{"sha256": 3, "step": 1}', "[" * 100_000, "{", ""],
    ids=lambda content: content[:20],
)
def test_a_trainer_json_that_is_something_else_is_refused(tmp_path, content):
    save(tmp_path, 1)
    (tmp_path / "last" / "trainer.json").write_text(content)
    check_refused(tmp_path, "trainer.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "nul\0l"])
def test_a_checkpoint_does_not_make_us_read_a_file_outside_of_it(tmp_path, name, monkeypatch):
    save(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    file = tmp_path / "last" / "trainer.json"
    content = json.loads(file.read_text())
    content["sha256"] = {name: checkpoint.sha256(tmp_path / "secret")}
    file.write_text(sign(content))
    read = []
    monkeypatch.setattr(checkpoint, "sha256", read.append)
    with pytest.raises(UserError, match="damaged or missing"):
        find_checkpoint(tmp_path, ("last",))
    assert not read


# --------------------------------------------------------------------------------------------------
# trainer.json


def test_trainer_json_has_a_format_number_and_gives_back_the_progress(tmp_path):
    progress = Progress(
        step=3, position=24, tokens=384, elapsed_s=1.5, best_val_loss=2.5, best_step=2,
        worse_evaluations=1, evaluated_step=3, wandb_id="abc",
    )  # fmt: skip
    save_checkpoint(tmp_path / "last", lambda folder: None, progress, size=0)
    content = json.loads((tmp_path / "last" / "trainer.json").read_text())
    assert content["format"] == 1
    assert Progress.from_trainer_json(find_checkpoint(tmp_path, ("last",))[1]) == progress


def test_a_checkpoint_without_a_format_number_is_older_and_read_the_same_way(tmp_path):
    save(tmp_path, 5)
    file = tmp_path / "last" / "trainer.json"
    content = json.loads(file.read_text())
    del content["format"]
    del content["evaluated_step"]  # what the older file lacks keeps its default
    file.write_text(sign(content))
    assert loaded(tmp_path) == 5
    progress = Progress.from_trainer_json(find_checkpoint(tmp_path, ("last",))[1])
    assert (progress.best_val_loss, progress.evaluated_step) == (1.25, -1)


def test_a_checkpoint_of_a_newer_format_is_refused_with_the_reason(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "last" / "trainer.json"
    file.write_text(sign(json.loads(file.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match=r"format 2, written by a newer version.*update"):
        find_checkpoint(tmp_path, ("last",))
