"""data/run.py: whatever fails, and whenever, a checkpoint that loads is left, and the message says what happened."""

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from safetensors.numpy import load_file

import train
from data import run as run_folder
from data.run import Metrics, draw_losses, find_checkpoint, lock, save_checkpoint, set_aside, write_json
from gpt12.errors import UserError, run_main
from tests.helpers import OPTIONS, ROOT, losses

needs_a_limit = pytest.mark.skipif(sys.platform == "win32", reason="a limit of a file's size is POSIX")


def save(out_dir: Path, version: int, name: str = "last") -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(range(version, version + 200)))
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_text(f"version {version}")

    save_checkpoint(out_dir / name, write, {"step": version, "best_val_loss": 1.25, "wandb_id": None}, 100)


def loaded(out_dir: Path) -> int:
    """The version of the checkpoint that is found; all of its files must be of it."""
    folder, state = find_checkpoint(out_dir, ("last",))
    version = state["step"]
    assert (folder / "model.safetensors").read_bytes() == bytes(range(version, version + 200))
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == f"version {version}"
    return version


# --------------------------------------------------------------------------------------------------------------------
# A save that fails, at each of its steps


class Killed(BaseException):
    """What no handler of ours catches, as nothing catches SIGKILL."""


def failing_at(monkeypatch, n: int, failure: BaseException) -> list[str]:
    """The n-th thing that is done to the disk fails; returns the names of all that was tried."""
    tried: list[str] = []

    def watch(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            tried.append(name)
            if len(tried) == n:
                raise failure
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, names in (
        (Path, ("mkdir", "write_bytes", "write_text", "rename")),
        (os, ("fsync",)),
        (shutil, ("rmtree", "disk_usage")),
        (run_folder, ("sha256",)),
    ):
        for name in names:
            watch(owner, name)
    return tried


def steps_of_a_save(out_dir, monkeypatch, first: bool) -> list[str]:
    out_dir.mkdir()
    if not first:
        save(out_dir, 1)
    with monkeypatch.context() as m:
        tried = failing_at(m, -1, Killed())
        save(out_dir, 2)
    return tried


@pytest.mark.parametrize("first", [True, False], ids=["first", "third"])
@pytest.mark.parametrize("failure", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"])
def test_a_save_that_fails_at_any_step_leaves_the_old_or_the_new(tmp_path, monkeypatch, failure, first):
    steps = steps_of_a_save(tmp_path / "count", monkeypatch, first)
    assert steps.count("rename") == (1 if first else 2)
    assert steps.count("fsync") == 6  # three files, adapter/, the checkpoint, what holds it
    outcomes = set()
    for n in range(1, len(steps) + 1):
        out_dir = tmp_path / str(n)
        out_dir.mkdir()
        if not first:
            save(out_dir, 1)
            save(out_dir, 2)
        with monkeypatch.context() as m, pytest.raises(type(failure)):
            failing_at(m, n, failure)
            save(out_dir, 3)
        found = loaded(out_dir) if not first or (out_dir / "last").exists() else None
        outcomes.add(found)
        assert found in ((3, None) if first else (3, 2))
        if isinstance(failure, OSError) and steps[n - 1] not in ("rename", "rmtree"):
            assert not (out_dir / "last.tmp").exists()  # it would take up the room that is wanting
        save(out_dir, 4)  # and the next one is as if nothing had happened
        assert loaded(out_dir) == 4
        assert not (out_dir / "last.tmp").exists()
    assert outcomes == ({3, None} if first else {3, 2})  # both happened, so the steps cover both sides


def test_the_previous_checkpoint_is_used_while_there_is_no_newer_one(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert loaded(tmp_path) == 2
    shutil.rmtree(tmp_path / "last")
    assert find_checkpoint(tmp_path, ("best", "last"))[0] == tmp_path / "last.prev"
    assert loaded(tmp_path) == 1
    save(tmp_path, 3, "best")
    assert find_checkpoint(tmp_path, ("best", "last"))[0] == tmp_path / "best"


def test_a_folder_without_a_checkpoint_is_refused_and_other_runs_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the message names the runs that lie here
    with pytest.raises(UserError, match=r"no checkpoint in .*best or .*last.*python train\.py"):
        find_checkpoint(tmp_path, ("best", "last"))
    (tmp_path / "out-other/best").mkdir(parents=True)
    (tmp_path / "out-other/best/trainer.json").write_text("{}")
    with pytest.raises(UserError, match="--out_dir=out-other"):
        find_checkpoint(tmp_path / "none", ("best", "last"))


# --------------------------------------------------------------------------------------------------------------------
# Damage

FILES = ("model.safetensors", "adapter/adapter_model.safetensors", "trainer.json")


def refused(out_dir: Path, file: str, forerunner: bool) -> None:
    with pytest.raises(UserError) as error:
        find_checkpoint(out_dir, ("last",))
    assert str(out_dir / "last" / file) in str(error.value)
    assert ("last.prev: rename it" in str(error.value)) == forerunner


@pytest.mark.parametrize("forerunner", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_damage_anywhere_in_a_checkpoint_is_refused_by_the_files_name(tmp_path, file, forerunner):
    """Every byte in turn, fifty lengths, and no file at all. A blank in trainer.json may change: the state does not."""
    if forerunner:
        save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "last" / file
    good, (_, state) = path.read_bytes(), find_checkpoint(tmp_path, ("last",))
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :])
        if file == "trainer.json" and good[i : i + 1].isspace():
            try:
                assert find_checkpoint(tmp_path, ("last",))[1] == state
                continue
            except UserError:
                pass
        refused(tmp_path, file, forerunner)
    for length in sorted({len(good) * i // 50 for i in range(50)}):
        path.write_bytes(good[:length])
        refused(tmp_path, file, forerunner)
    path.unlink()
    refused(tmp_path, file, forerunner)
    path.write_bytes(good)
    assert loaded(tmp_path) == 2


def test_the_previous_checkpoint_can_be_used_as_the_message_says(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "last" / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "model.safetensors", True)
    (tmp_path / "last").rename(tmp_path / "damaged")
    (tmp_path / "last.prev").rename(tmp_path / "last")
    assert loaded(tmp_path) == 1


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", '{"step": 1}', '{"sha256": 3, "step": 1}', "[" * 100_000, "{", ""]
)
def test_a_trainer_json_that_is_something_else_is_refused(tmp_path, content):
    save(tmp_path, 1)
    (tmp_path / "last" / "trainer.json").write_text(content)
    refused(tmp_path, "trainer.json", False)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "nul\0l"])
def test_a_checkpoint_does_not_make_us_read_outside_of_it(tmp_path, name, monkeypatch):
    save(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    file = tmp_path / "last" / "trainer.json"
    state = json.loads(file.read_text())
    del state["checksum"]
    state["sha256"] = {name: run_folder.sha256(tmp_path / "secret")}
    state["checksum"] = run_folder._checksum(state)
    file.write_text(json.dumps(state))
    read = []
    monkeypatch.setattr(run_folder, "sha256", read.append)
    with pytest.raises(UserError, match="damaged or missing"):
        find_checkpoint(tmp_path, ("last",))
    assert not read


# --------------------------------------------------------------------------------------------------------------------
# A disk that is full or cannot be written, under a real run


def run(dataset, out_dir, *options) -> int:
    return train.main([*OPTIONS, f"--dataset={dataset}", f"--out_dir={out_dir}", "--eval_interval=6", *options])


def steps(out_dir: Path) -> list[int]:
    return list(losses(out_dir))


class Disk:
    """Full from the n-th save on: no free space is reported, or the writer's own writes fail, short."""

    def __init__(self, monkeypatch, how: str, full_from: int):
        self.saves, self.full_from, self.how = 0, full_from, how
        original, usage = run_folder.save_checkpoint, shutil.disk_usage

        def save_checkpoint(*args):
            self.saves += 1
            if not self.full or how == "reported":
                return original(*args)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
                return original(*args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        monkeypatch.setattr(run_folder, "save_checkpoint", save_checkpoint)
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda path: usage(path)._replace(free=9) if self.full and how == "reported" else usage(path),
        )

    @property
    def full(self) -> bool:
        return self.saves >= self.full_from


@needs_a_limit
@pytest.mark.usefixtures("no_picture")  # which a thread draws beside the saves, under the same limit
@pytest.mark.parametrize(("how", "message"), [("reported", "0.00 GB are free"), ("short", "too large")])
def test_a_full_disk_costs_no_run_and_no_old_checkpoint(dataset, tmp_path, monkeypatch, capsys, how, message):
    with monkeypatch.context() as m:
        disk = Disk(m, how, full_from=5)
        assert run(dataset, tmp_path, "--max_iters=10") == 1
    assert disk.saves > 6
    out = capsys.readouterr().out
    assert out.count("could not save") == disk.saves - 4
    assert message in out
    assert "untouched" in out
    assert steps(tmp_path) == list(range(1, 11))  # it went on to its end
    assert find_checkpoint(tmp_path, ("last",))[1]["step"] == 4
    assert not list(tmp_path.glob("*.tmp"))
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}"]) == 0  # there is room again
    assert find_checkpoint(tmp_path, ("last",))[1]["step"] == 10
    assert run(dataset, tmp_path / "whole", "--max_iters=10") == 0
    ours, whole = (load_file(folder / "last" / "model.safetensors") for folder in (tmp_path, tmp_path / "whole"))
    assert all((ours[name] == whole[name]).all() for name in whole)


@needs_a_limit
def test_metrics_that_a_full_disk_refused_are_written_with_a_later_line(tmp_path, capsys):
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    metrics.append({"step": 1, "loss": 2.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 7, limits[1]))
        metrics.append({"step": 2, "loss": 1.5})
        metrics.append({"step": 3, "loss": 1.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err.count("metrics.jsonl: File too large. Make room") == 1
    metrics.append({"step": 4, "loss": 1.0})
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_disk_that_stays_full_ends_without_a_traceback(tmp_path, capsys):
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    metrics.file.close()
    metrics.file = open("/dev/full", "a")  # noqa: SIM115
    metrics.append({"step": 1, "loss": 2.0})
    metrics.close()
    assert "No space left" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_costs_no_run(tmp_path):
    draw_losses([], tmp_path / "none" / "loss.png")


def test_a_folder_that_cannot_be_written_is_told_before_any_work(dataset, tmp_path, capsys):
    """Root may write anywhere; not even root can make a folder below a file."""
    (tmp_path / "file").write_text("")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(SystemExit) as end:
            run_main(lambda out_dir=out_dir: run(dataset, out_dir))
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert f"out_dir={out_dir} cannot be written" in err
        assert "Traceback" not in err


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_run_that_cannot_write_its_first_files_says_so(dataset, tmp_path, name):
    (tmp_path / f"{name}.tmp").mkdir()  # stands for a disk that takes no file
    with pytest.raises(UserError, match=f"{name} cannot be written"):
        run(dataset, tmp_path)


def test_a_run_goes_on_when_its_disk_becomes_read_only(dataset, tmp_path, monkeypatch, capsys):
    mkdir = Path.mkdir

    def read_only(path, *args, **kwargs):
        if path.name == "last.tmp" and (tmp_path / "last").exists():
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert run(dataset, tmp_path, "--max_iters=4") == 1
    assert "Read-only file system" in capsys.readouterr().out
    assert find_checkpoint(tmp_path, ("last",))[1]["step"] == 1


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_file_honours_the_umask(dataset, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert run(dataset, tmp_path / "out", "--max_iters=6") == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"model.safetensors", "trainer.safetensors", "loss.png", "run.json"} <= {file.name for file in files}
    assert [file for file in files if file.stat().st_mode & 0o777 != 0o666 & ~umask] == []


# --------------------------------------------------------------------------------------------------------------------
# Kills


def test_a_lock_refuses_the_second_and_goes_with_its_process(tmp_path):
    hold = "import sys; from pathlib import Path; from data.run import lock\n"
    hold += "with lock(Path(sys.argv[1])): print(1, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match="another run is writing"), lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with lock(tmp_path):
        pass
    with lock(tmp_path):  # nor does one that ended well
        pass


def test_a_disk_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock(tmp_path):
        pass


def test_a_run_that_is_killed_four_times_ends_like_the_unbroken_run():
    """The short form of tests/manual/kill_loop.py: two kills at random calls, two inside a save, none at a time."""
    command = [sys.executable, "-m", "tests.manual.kill_loop", "--kills=4", "--seed=6", "--by_calls"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "kills 4 (2 inside" in result.stdout
    assert "losses 0" in result.stdout


# --------------------------------------------------------------------------------------------------------------------
# What a run tells


def test_metrics_are_read_up_to_a_torn_line_and_continued(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, None)
    for step in range(1, 6):
        metrics.append({"step": step, "tokens": 10 * step, "loss": 1 / step})
    metrics.close()
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[-1])):  # every way in which the last line can be torn
        file.write_bytes(whole[: len(whole) - cut])
        again = Metrics(file, 5)
        again.append({"step": 6, "tokens": 60, "loss": 0.1})
        again.close()
        assert steps(tmp_path) == ([1, 2, 3, 4, 6] if cut > 1 else [1, 2, 3, 4, 5, 6])
    file.write_bytes(whole + b'\x00\xff\n[1]\n{"step": "x"}\n"torn')
    Metrics(file, 3).close()
    assert file.read_bytes() == b"".join(lines[:3])  # and what is past the resumed step is dropped
    Metrics(file, None).close()
    assert file.read_bytes() == b""


def test_memory_holds_evaluations_and_evenly_thinned_steps_the_file_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "KEPT_ROWS", 40)
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    for step in range(1, 1001):
        metrics.append({"step": step, "loss": 1.0})
        if step % 100 == 0:
            metrics.append({"step": step, "val_loss": 1.0})
    metrics.close()
    assert steps(tmp_path) == [*range(1, 1001)]
    again = Metrics(tmp_path / "metrics.jsonl", 1000)
    again.close()
    for rows in (metrics.rows, again.rows):
        assert [row["step"] for row in rows if "val_loss" in row] == [*range(100, 1001, 100)]
        assert [row["step"] for row in rows if "loss" in row] == [*range(1, 1001, 32)]


def test_an_evaluation_made_again_after_a_kill_is_told_once(tmp_path):
    file = tmp_path / "metrics.jsonl"
    first = Metrics(file, None)
    first.append({"step": 5, "loss": 1.0})
    first.append({"step": 5, "train_loss": 1.0, "val_loss": 2.0})
    first.close()  # killed here, with a checkpoint of step 5 that was written before its evaluation
    again = Metrics(file, 5)
    again.append({"step": 5, "train_loss": 1.0, "val_loss": 2.0})
    again.append({"step": 6, "loss": 1.0})
    again.append({"step": 6, "train_loss": 1.0, "val_loss": 2.0})
    again.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], "val_loss" in row) for row in rows] == [(5, False), (5, True), (6, False), (6, True)]


def test_a_metric_that_is_not_finite_is_written_as_null(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    metrics.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "tokens_per_s": None})
    metrics.close()

    def strict(constant):
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=strict)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "lr": None, "tokens_per_s": None}


def training_row(step: int, loss: float | None) -> dict:
    return {"step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-3 / step}


def evaluation_row(step: int, loss: float | None) -> dict:
    return {"step": step, "tokens": 100 * step, "train_loss": loss, "val_loss": loss}


def ink(file: Path) -> int:
    """Coloured pixels: those of the curves."""
    pixels = imread(file)[..., :3]
    return int((pixels.max(2) - pixels.min(2) > 0.2).sum())


def test_the_loss_picture_can_be_drawn_from_none_one_and_many_rows(tmp_path):
    drawn = []
    for rows in (
        [],
        [training_row(1, 2.0)],
        [evaluation_row(0, 4.0)],
        [training_row(1, None), evaluation_row(1, None)],
        [row(i, 4 / i) for i in range(1, 300) for row in (training_row, evaluation_row)],
        [{"step": 1, "loss": 2.0}, {"step": 2, "val_loss": 3}],  # a stranger's file may lack anything
    ):
        draw_losses(rows, tmp_path / "loss.png")
        assert imread(tmp_path / "loss.png").shape == (550, 770, 4)
        drawn.append(ink(tmp_path / "loss.png"))
    assert drawn[0] == drawn[3] < drawn[2] < drawn[4]
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_runs_files_hold_no_secret(dataset, tmp_path, monkeypatch, capsys):
    secrets = {name: f"s3cret-{name}-abcdef" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "FREE")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--password=s3cret-argv"])
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    told = "".join(path.read_text("utf-8", errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "s3cret" not in told + "".join(capsys.readouterr())
    facts = json.loads((tmp_path / "run.json").read_text())
    assert set(facts) == {
        "config", "commit", "versions", "platform", "device", "dtype", "compile", "world_size", "data",
    }  # fmt: skip
    assert facts["data"] == {"name": facts["data"]["name"], "sha256": "0" * 64, "tokens": 2600}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"config": 3}', b'{"config": {}}', b"\xff", b"[" * 100_000])
def test_a_damaged_run_json_is_refused(tmp_path, damage):
    (tmp_path / "run.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        run_folder.read_run(tmp_path)


def earlier_run(out_dir: Path, version: int) -> None:
    config = {"init_from": "scratch", "batch_size": 1, "gradient_accumulation_steps": 1}
    write_json(out_dir / "run.json", {"config": config, "version": version})
    (out_dir / "metrics.jsonl").write_text(str(version))
    save(out_dir, version)
    save(out_dir, version)


def test_an_earlier_run_is_set_aside_whole(tmp_path):
    earlier_run(tmp_path, 1)
    for name in ("best", "best.prev"):  # else readers would take the old run's for the new one's
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous"]
    assert loaded(tmp_path / "previous") == 1
    assert run_folder.read_run(tmp_path / "previous")["version"] == 1
    set_aside(tmp_path)  # nothing new: the old one stays
    assert loaded(tmp_path / "previous") == 1


def test_no_earlier_run_is_lost(tmp_path):
    for number in (1, 2, 3):
        earlier_run(tmp_path, number)
        assert set_aside(tmp_path) == tmp_path / "previous"
    assert [loaded(tmp_path / name) for name in ("previous", "previous-2", "previous-3")] == [3, 1, 2]
    assert set_aside(tmp_path) is None


def test_a_run_without_a_checkpoint_does_not_push_out_the_one_set_aside(tmp_path):
    earlier_run(tmp_path, 1)
    set_aside(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    set_aside(tmp_path)
    assert loaded(tmp_path / "previous") == 1


@pytest.mark.parametrize("kill_at", range(1, 7))
def test_a_kill_while_setting_aside_loses_nothing(tmp_path, monkeypatch, kill_at):
    earlier_run(tmp_path, 1)
    rename, count = Path.rename, iter(range(1, 100))

    def dying(path, target):
        if next(count) == kill_at:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as m:
        m.setattr(Path, "rename", dying)
        if kill_at <= 5:  # four files and folders, then the whole
            with pytest.raises(Killed):
                set_aside(tmp_path)
        else:
            set_aside(tmp_path)
    set_aside(tmp_path)
    assert loaded(tmp_path / "previous") == 1
    assert run_folder.read_run(tmp_path / "previous")["version"] == 1
    assert (tmp_path / "previous" / "metrics.jsonl").read_text() == "1"
