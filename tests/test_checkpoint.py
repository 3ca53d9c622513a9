"""gpt12/checkpoint.py: whatever fails, and whenever, a checkpoint that loads is left."""

import errno
import importlib.util
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from gpt12.checkpoint import (
    load_trainer_state,
    save_checkpoint,
    trainer_tensors,
)
from gpt12.folder import (
    TRAINER_FORMAT,
    Progress,
    find_checkpoint,
    lock_run,
    read_run,
    set_aside,
    write_json,
)
from tests.helpers import (
    CPU,
    OUT,
    RESUME,
    built,
    built_from,
    edit_json,
    losses,
    read_json,
    refused,
    resume,
    run,
    same_tensors,
    same_weights,
    small_step,
    train_on,
    trainer,
    weights,
)
from train import Trainer, TrainStep

pytestmark = pytest.mark.usefixtures("own_folder")
FULL = OSError(errno.ENOSPC, "No space left on device")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is optional and not installed"
)


class Killed(BaseException):
    """No handler of ours catches it, as nothing catches SIGKILL."""


# --------------------------------------------------------------------------------------------------
# A save that fails, at each of its steps


def write_files(folder: Path, version: int) -> None:
    """Write the files of a checkpoint: one beside trainer.json, and one in a subfolder."""
    (folder / "model.safetensors").write_text(f"version {version}")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text(f"version {version}")


def save(out_dir: Path, version: int, name: str = "last") -> None:
    """Save a checkpoint whose step and whose files are of this version."""
    progress = Progress(step=version, best_val_loss=1.25)
    save_checkpoint(out_dir / name, lambda folder: write_files(folder, version), progress)


def loaded(out_dir: Path) -> int:
    """Return the version of last/, after checking that all of its files are of that version."""
    folder, progress = find_checkpoint(out_dir, ("last",))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_text() == f"version {progress.step}"
    return progress.step


OPERATIONS = ["mkdir", "write_bytes", "write_text", "rename", "fsync", "rmtree"]


def fail_at(monkeypatch, n: int, failure: BaseException, names: list[str]) -> list[str]:
    """Let the n-th of these operations on the disk fail. Return the names of all that were tried.

    names: of methods of Path, and of functions of os and shutil.
    """
    tried: list[str] = []

    def watch(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            tried.append(name)
            if len(tried) == n:
                raise failure
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in names:
        watch({"fsync": os, "rmtree": shutil}.get(name, Path), name)
    return tried


@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
@pytest.mark.parametrize("failure", [Killed(), FULL], ids=["killed", "disk full"])
def test_a_save_that_fails_at_any_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path, monkeypatch, failure, first
):
    def start(name: str) -> Path:
        out_dir = tmp_path / name
        out_dir.mkdir()
        if not first:
            save(out_dir, 2)
        return out_dir

    out_dir = start("count")
    with monkeypatch.context() as m:
        operations = fail_at(m, -1, Killed(), OPERATIONS)
        save(out_dir, 3)
    assert operations.count("rename") == (1 if first else 2)
    assert operations.count("fsync") == 6  # three files, adapter/, the checkpoint, its parent
    outcomes = set()
    for n in range(1, len(operations) + 1):
        out_dir = start(str(n))
        with monkeypatch.context() as m, pytest.raises(type(failure)):
            fail_at(m, n, failure, OPERATIONS)
            save(out_dir, 3)
        nothing_yet = first and not (out_dir / "last").exists()
        outcomes.add(None if nothing_yet else loaded(out_dir))
        if failure is FULL and operations[n - 1] not in ("rename", "rmtree"):
            assert not (out_dir / "last.tmp").exists()  # it would take the space that is missing
        save(out_dir, 4)  # the next save is as if nothing had happened
        assert loaded(out_dir) == 4
        assert sorted(path.name for path in out_dir.iterdir()) == ["last"]
    assert outcomes == {3, None if first else 2}  # both happened: the operations cover both sides


def test_the_previous_checkpoint_is_used_while_there_is_no_newer_one(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "last").rename(tmp_path / "last.prev")  # a kill between the renames of a save
    assert loaded(tmp_path) == 1
    assert find_checkpoint(tmp_path, ("best", "last"))[0] == tmp_path / "last.prev"
    save(tmp_path, 2)
    assert loaded(tmp_path) == 2
    save(tmp_path, 3, "best")
    assert find_checkpoint(tmp_path, ("best", "last"))[0] == tmp_path / "best"


# --------------------------------------------------------------------------------------------------
# Nothing to resume, or nothing that can be read


def test_what_to_do_where_there_is_no_checkpoint_is_said():
    message = "no checkpoint in out/best or out/last: train a model first"
    refused(message, find_checkpoint, OUT, ("best", "last"))
    refused("no run in out: name the folder of one", resume)


@pytest.mark.parametrize("file", ["run.json", "last/trainer.json"])
def test_damaged_json_is_refused_by_name(finished_copy, file):
    for damage in (b"", b"{", b"3", b"\xff"):
        (OUT / file).write_bytes(damage)
        refused(f"{file} is damaged", resume, "--max_iters=6")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "trainer.safetensors"])
def test_a_checkpoint_with_half_a_file_is_refused_by_its_name(finished_copy, file):
    path = OUT / "last" / file
    os.truncate(path, path.stat().st_size // 2)
    refused(f"last/{file}", resume, "--max_iters=6")


def test_trainer_json_gives_back_the_progress_and_newer_formats_are_refused(tmp_path):
    values = {field.name: number for number, field in enumerate(fields(Progress), start=3)}
    progress = Progress(**values | {"format": TRAINER_FORMAT, "wandb_id": "abc"})
    save_checkpoint(tmp_path / "last", lambda folder: None, progress)
    assert find_checkpoint(tmp_path, ("last",))[1] == progress
    edit_json("last/trainer.json", format=TRAINER_FORMAT + 1)
    message = rf"format {TRAINER_FORMAT + 1}, written by a newer version.*update"
    refused(message, find_checkpoint, tmp_path, ("last",))


# --------------------------------------------------------------------------------------------------
# The lock, and what a run writes first


def test_a_folder_is_locked_for_a_second_run_until_the_first_has_ended():
    with lock_run(OUT):
        refused("another run is writing to out_dir=out", run)
    with lock_run(OUT):
        pass


def test_a_disk_without_locks_is_not_taken_for_another_run(monkeypatch):
    pytest.importorskip("fcntl")
    error = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=error))
    with lock_run(OUT):
        pass


def test_a_folder_that_cannot_be_written_is_told_before_any_work():
    """Root may write anywhere, but not even root can make a folder below a file."""
    Path("file").touch()
    refused("^file/out cannot be written", run, "--out_dir=file/out")


def test_a_file_that_the_disk_does_not_take_leaves_no_half_of_it(monkeypatch):
    OUT.mkdir()
    (OUT / "a.json").write_text("old")
    monkeypatch.setattr("os.fsync", Mock(side_effect=FULL))
    with pytest.raises(OSError, match="No space left"):
        write_json(OUT / "a.json", {})
    [left] = OUT.iterdir()
    assert left.read_text() == "old"


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_run_that_cannot_write_its_first_files_says_so(name):
    Path(f"out/{name}.tmp").mkdir(parents=True)  # stands for a disk that takes no file
    refused(f"{name} cannot be written", run)


def test_run_json_explains_the_run_and_no_file_holds_a_secret(monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "FREE"):
        monkeypatch.setenv(name, f"s3cret-{name}-abcdef")
    monkeypatch.setattr("sys.argv", ["train.py", "--password=s3cret-argv"])
    run("--max_iters=2")
    told = "".join(capsys.readouterr())
    for path in OUT.rglob("*.*"):
        told += path.read_text("utf-8", errors="replace")
    assert "s3cret" not in told
    facts = read_json("out/run.json")
    assert {"config", "requested", "commit", "versions", "platform", "device"} < set(facts)
    assert facts["data"] == {
        "name": "letters",
        "folder": "letters",
        "val_sha256": "0" * 64,
        "tokens": 2600,
        "val_tokens": 400,
    }


@pytest.mark.picture
def test_every_file_of_a_run_honours_the_umask():
    before = os.umask(0o027)
    try:
        run("--max_iters=2")
    finally:
        os.umask(before)
    modes = {str(path): path.stat().st_mode & 0o777 for path in OUT.rglob("*.*")}
    for name in ("best/model.safetensors", "last/trainer.safetensors", "loss.png", "run.json"):
        assert f"out/{name}" in modes
    modes.pop("out/.lock")  # filelock's own file, which holds nothing
    assert set(modes.values()) == {0o640}, modes


# --------------------------------------------------------------------------------------------------
# An earlier run

FOLDERS = ("best", "last", "best.prev", "last.prev")


def make_run(out_dir: Path, version: int) -> None:
    """Write the files of a run. version: tells it from others."""
    write_json(out_dir / "run.json", {"config": {"seed": version}})
    (out_dir / "metrics.jsonl").write_text(str(version))
    for name in FOLDERS:
        (out_dir / name).mkdir()
        (out_dir / name / "model.safetensors").write_text(str(version))


def version_of(folder: Path) -> int:
    """Return the version of a run's files, after checking that all are of that version."""
    version = read_run(folder).config["seed"]
    for name in ("metrics.jsonl", *(f"{name}/model.safetensors" for name in FOLDERS)):
        assert (folder / name).read_text() == str(version)
    return version


def test_an_earlier_run_replaces_the_one_before_it_and_the_users_files_stay():
    OUT.mkdir()
    (OUT / "notes.txt").touch()  # the user's own
    for version, more in ((1, ""), (2, ", in place of a still earlier run")):
        make_run(OUT, version)
        told = f"the earlier run in out was moved to out/previous (0.0 MB){more}"
        assert set_aside(OUT) == told
        assert sorted(path.name for path in OUT.iterdir()) == ["notes.txt", "previous"]
        assert version_of(OUT / "previous") == version
    (OUT / "run.json").write_text("{}")  # a run without a checkpoint
    assert set_aside(OUT) is None
    assert version_of(OUT / "previous") == 2


def test_a_run_without_a_step_displaces_no_trained_one(monkeypatch, capsys):
    run("--max_iters=2")
    monkeypatch.setattr("train.Trainer.loop", lambda trainer: 130)
    for _ in range(2):
        run("--max_iters=2", status=130)
    assert "go on with" not in capsys.readouterr().out.split("stopped at step 0")[1]
    assert trainer("out/previous")["step"] == 2
    assert not (OUT / "last").exists()


def test_a_kill_while_setting_aside_loses_nothing(tmp_path, monkeypatch):
    for kill_at in range(1, 8):  # the earlier previous/ is deleted, six files and folders move
        out_dir = tmp_path / str(kill_at)
        out_dir.mkdir()
        make_run(out_dir, 1)
        set_aside(out_dir)
        make_run(out_dir, 2)
        with monkeypatch.context() as m, pytest.raises(Killed):
            fail_at(m, kill_at, Killed(), ["rename", "rmtree"])
            set_aside(out_dir)
        set_aside(out_dir)
        assert version_of(out_dir / "previous") == 2


# --------------------------------------------------------------------------------------------------
# run.json of a resumed run


def test_run_json_of_a_resumed_run_follows_its_first_checkpoint():
    """A run that is killed before it has saved again must not make other data look like its own."""
    run("--max_iters=2")
    Path("letters").rename("other")
    edit_json("other/meta.json", val_sha256="1" * 64)
    argv = [*RESUME, "--dataset=other", "--max_iters=4"]
    for _ in range(2):  # the first is killed at once
        killed = Trainer(built_from(argv))
        killed.saver.open()
        assert killed.progress.best_val_loss is None
        assert "the data are not those that this run began with" in "".join(killed.run.notes)
    killed.progress.step += 1
    assert killed.saver.save("last")
    assert read_run(OUT).config["dataset"] == "other"
    assert "the data are not" not in "".join(built_from(argv).notes)


# --------------------------------------------------------------------------------------------------
# What resuming needs besides the weights


def save_state(folder: Path, step: TrainStep) -> None:
    """Write trainer.safetensors."""
    save_file(trainer_tensors(step), folder / "trainer.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_saved_state_continues_as_the_unbroken_step_does(tmp_path, optimizer):
    whole, first, second = (small_step(optimizer=optimizer) for _ in range(3))
    train_on(whole, 0, 1, 2, 3)
    train_on(first, 0, 1)
    save_state(tmp_path, first)
    second.model.load_state_dict(first.model.state_dict())
    load_trainer_state(tmp_path, second)
    train_on(second, 2, 3)
    assert same_weights(second.model, [*whole.model.parameters()])


HALF = replace(CPU, dtype=torch.float16)
WPE = "optimizer.transformer.wpe.weight"


@pytest.mark.parametrize(
    ("optimizer", "name", "tensor"),
    [
        ("adamw", f"{WPE}.exp_avg", torch.zeros(())),
        ("adamw", f"{WPE}.exp_avg", None),
        ("adamw", f"{WPE}.step", torch.zeros(2)),
        ("adamw", f"{WPE}.exp_average", torch.zeros(8, 8)),
        ("adamw", "optimizer.transformer.wqe.weight.exp_avg", torch.zeros(8, 8)),
        ("muon", "optimizer.transformer.h.0.mlp.c_fc.weight.momentum", torch.zeros(1, 32, 8)),
        ("muon", "optimizer.transformer.h.1.mlp.c_fc.weight.momentum", torch.zeros(2, 32, 8)),
        ("adamw", "rng.cpu", torch.zeros(3)),
    ],
)
def test_a_state_that_the_optimizer_cannot_have_is_refused(tmp_path, optimizer, name, tensor):
    """torch's fused AdamW reads and writes past the end of a moment that is too small."""
    step = small_step(optimizer=optimizer)
    train_on(step, 0)
    tensors = trainer_tensors(step) | {name: tensor}
    if tensor is None:
        del tensors[name]
    save_file(tensors, "trainer.safetensors")
    fresh = small_step(optimizer=optimizer)
    refused(r"trainer\.safetensors is damaged", load_trainer_state, tmp_path, fresh)


def test_a_parameter_that_was_never_updated_has_no_state_after_resuming_either(tmp_path):
    save_state(tmp_path, small_step())
    step = small_step()
    before = [p.detach().clone() for p in step.model.parameters()]
    load_trainer_state(tmp_path, step)
    assert not step.optimizers[0].state
    assert same_weights(step.model, before)


def test_the_names_of_the_tensors_are_those_that_the_format_says():
    step = small_step(HALF)
    train_on(step, 0)
    expected = {"rng.cpu", "scaler"}
    for name, _ in step.model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            expected.add(f"optimizer.{name}.{key}")
    assert trainer_tensors(step).keys() == expected


def test_resuming_restores_the_loss_scale(tmp_path):
    first = small_step(HALF)
    second = small_step(HALF)
    first.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    train_on(first, 0)
    train_on(second, 0)
    save_state(tmp_path, first)
    load_trainer_state(tmp_path, second)
    state = second.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (256.0, 1)
    assert state == first.scaler.state_dict()


def test_a_smaller_context_crops_the_moments_of_the_positions_too(finished_copy):
    for steps in (6, 8):
        resume(f"--max_iters={steps}", "--block_size=8")
    moments = weights(file="trainer")
    assert moments["optimizer.transformer.wpe.weight.exp_avg"].shape == (8, 16)


@needs_torchao
def test_8_bit_moments_resume_bit_for_bit_but_not_with_a_smaller_context():
    parts = ["--out_dir=parts", "--max_iters=6"]
    fixed = ["--optimizer=adamw8bit", "--dtype=bfloat16", "--decay_lr=False"]
    run("--out_dir=whole", *fixed, "--max_iters=6")
    run(*parts, *fixed, "--max_iters=3")
    message = r"block_size=8, but the run in parts has 16: leave"
    refused(message, resume, *parts, "--block_size=8")
    resume(*parts, "--block_size=16")
    assert same_tensors(weights("parts"), weights("whole"))


# --------------------------------------------------------------------------------------------------
# What is saved, and when


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that moves when a test says so."""
    found = SimpleNamespace(now=1000.0)
    module = SimpleNamespace(monotonic=lambda: found.now)
    monkeypatch.setattr("gpt12.checkpoint.time", module)
    return found


@pytest.mark.parametrize(
    ("interval", "typed", "cost", "expected"),
    [
        (60, False, 0.1, 60),
        (60, False, 3.0, 150),  # at most 2% of the time
        (60, True, 3.0, 60),  # as typed
        (0, True, 3.0, 0),
    ],
)
def test_last_is_due_at_the_interval_or_later_if_saving_takes_long(
    monkeypatch, clock, interval, typed, cost, expected
):
    options = [f"--save_interval_s={interval}"] if typed else []
    saver = Trainer(built(*options)).saver

    def slow(*args):
        clock.now += cost

    monkeypatch.setattr("gpt12.checkpoint.save_checkpoint", slow)
    clock.now += 100
    assert saver.is_due()
    saver.save("last")
    for waited in range(expected):
        assert not saver.is_due(), waited
        clock.now += 1
    assert saver.is_due()


def test_weights_that_are_not_finite_are_never_saved(capsys):
    """At such a rate finite gradients make infinite weights. The exit status says so."""
    options = ["--max_iters=10", "--learning_rate=1e38", "--warmup_iters=0", "--eval_interval=5"]
    run(*options, status=1)
    out = capsys.readouterr().out
    assert "weights are not finite" in out
    assert "go on with" not in out
    assert not (OUT / "best").exists()
    assert not (OUT / "last").exists()


def test_the_last_evaluation_is_in_last_though_its_step_was_saved_before_it():
    options = ["--always_save_checkpoint=False", "--save_interval_s=0", "--eval_interval=4"]
    run(*options, "--max_iters=4")
    saved = trainer()
    assert (saved["step"], saved["evaluated_step"]) == (4, 4)
    assert saved["best_val_loss"] == trainer(name="best")["best_val_loss"]


def test_only_rank_0_writes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert Trainer(built()).saver.save("last")
    assert not (OUT / "last").exists()


# --------------------------------------------------------------------------------------------------
# A disk that is full or cannot be written


def test_a_full_disk_costs_neither_the_run_nor_the_old_checkpoint(monkeypatch, capsys):
    """From the fifth save on a write ends within a file."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saves = []

    def short_of_space(*args):
        saves.append(args)
        if len(saves) >= 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            save_checkpoint(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    options = ["--max_iters=10", "--save_interval_s=0", "--eval_interval=6"]
    with monkeypatch.context() as m:
        m.setattr("gpt12.checkpoint.save_checkpoint", short_of_space)
        run(*options, status=1)
    out = capsys.readouterr().out
    assert out.count("could not save") == len(saves) - 4 > 2
    assert "too large" in out
    assert list(losses()) == list(range(1, 11))  # it went on to its end
    assert trainer()["step"] == 4
    assert not list(OUT.glob("*.tmp"))
    resume()  # there is space again
    assert trainer()["step"] == 10


def test_a_best_that_could_not_be_saved_does_not_count_as_the_best(monkeypatch, capsys):
    """best/ still holds the older model, so the older loss goes on counting."""

    def failing(folder, write, progress):
        if folder.name == "best" and progress.step == 4:
            raise FULL
        save_checkpoint(folder, write, progress)

    monkeypatch.setattr("gpt12.checkpoint.save_checkpoint", failing)
    run("--max_iters=4", "--eval_interval=2")
    values = losses(key="val_loss")
    assert values[4] < values[2]
    assert trainer()["best_step"] == 2
    assert trainer()["best_val_loss"] == values[2]
    assert f"best val loss {values[2]:.4f} at step 2" in capsys.readouterr().out
