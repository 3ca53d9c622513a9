"""gpt12/saver.py: when last/ is due, how much it takes, and what a full disk costs."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt12 import checkpoint
from gpt12.checkpoint import find_checkpoint
from gpt12.errors import UserError
from gpt12.saver import Saver, SaveTimer
from tests.helpers import (
    ROOT,
    built,
    losses,
    read_rows,
    resume,
    run,
    same_tensors,
    trainer,
    weights,
)
from train import Trainer

pytestmark = pytest.mark.usefixtures("no_picture")


# --------------------------------------------------------------------------------------------------
# save_interval_s. The clock of these tests moves when they say so.


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    found = SimpleNamespace(now=1000.0)
    module = SimpleNamespace(monotonic=lambda: found.now, perf_counter=lambda: found.now)
    monkeypatch.setattr("gpt12.saver.time", module)
    return found


def seconds_to_the_next_save(timer: SaveTimer, clock: SimpleNamespace) -> float:
    """Move the clock in steps of half a second until a save is due; return how long that took."""
    began = clock.now
    while not timer.is_due():
        clock.now += 0.5
    return clock.now - began


@pytest.mark.parametrize(
    ("cost", "interval"),
    [
        (0.001, 5.0),  # never more often than every 5 seconds
        (0.05, 5.0),
        (0.2, 20.0),  # 1% of the time
        (0.5, 50.0),
        (3.0, 60.0),  # once a minute in the first ten minutes, though it costs more
    ],
)
def test_auto_saves_at_1_percent_of_the_time_and_once_a_minute_in_the_first_ten_minutes(
    clock, cost, interval
):
    timer = SaveTimer("auto", size=0)
    timer.saved(cost)
    assert seconds_to_the_next_save(timer, clock) == interval


@pytest.mark.parametrize(("cost", "interval"), [(0.2, 20), (3, 300), (30, 600)])
def test_auto_saves_at_least_every_ten_minutes_later(clock, cost, interval):
    timer = SaveTimer("auto", size=0)
    clock.now += 601
    timer.saved(cost)
    assert seconds_to_the_next_save(timer, clock) == interval


def test_until_a_save_was_measured_auto_guesses_its_cost_from_the_size(clock):
    assert seconds_to_the_next_save(SaveTimer("auto", size=10**6), clock) == 5
    assert seconds_to_the_next_save(SaveTimer("auto", size=3 * 10**8), clock) == 30
    assert seconds_to_the_next_save(SaveTimer("auto", size=10**10), clock) == 60


def test_a_large_run_of_hours_spends_about_1_percent_of_its_time_on_saving(clock):
    cost = 4.0
    timer = SaveTimer("auto", size=int(cost * 1e9))
    began = clock.now
    saves = 0
    while clock.now - began < 10 * 3600:
        seconds_to_the_next_save(timer, clock)
        clock.now += cost
        timer.saved(cost)
        saves += 1
    share = saves * cost / (clock.now - began)
    assert 0.009 < share < 0.011


def test_a_number_of_seconds_is_kept_whatever_a_save_costs(clock):
    timer = SaveTimer(30.0, size=10**12)
    assert seconds_to_the_next_save(timer, clock) == 30
    timer.saved(100.0)
    assert seconds_to_the_next_save(timer, clock) == 30
    assert SaveTimer(0.0, size=0).is_due()


@pytest.mark.parametrize("preset", sorted((ROOT / "config").glob("train_*.py")))
def test_a_preset_that_is_killed_after_a_minute_can_be_resumed(preset, clock):
    """Presets save by time, not at evaluations only: kill -9 costs a minute at most."""
    from gpt12.config import load_config
    from gpt12.settings import TrainConfig

    config, _ = load_config(TrainConfig, [str(preset)])
    timer = SaveTimer(config.save_interval_s, size=10**9)
    assert seconds_to_the_next_save(timer, clock) <= 60


def test_a_run_that_evaluates_rarely_has_a_last_after_the_first_interval(
    dataset, tmp_path, monkeypatch, clock
):
    """save_interval_s=auto with always_save_checkpoint=False, as the presets have it."""
    saved = []
    save = Saver.save

    def noted(self, name):
        saved.append((name, self.run.progress.step))
        return save(self, name)

    monkeypatch.setattr(Saver, "save", noted)
    make_step = Trainer.log_step

    def a_second_later(self, lr):
        clock.now += 1
        return make_step(self, lr)

    monkeypatch.setattr(Trainer, "log_step", a_second_later)
    options = ["--max_iters=12", "--always_save_checkpoint=False", "--eval_interval=100"]
    assert run(dataset, tmp_path, *options) == 0
    assert [step for name, step in saved if name == "last"] == [5, 10, 12]


# --------------------------------------------------------------------------------------------------
# How much a checkpoint takes


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


WIDE = ["--n_embd=128", "--n_layer=2", "--max_iters=2", "--dropout=0"]


@pytest.fixture(scope="module")
def base(dataset, tmp_path_factory) -> Path:
    """A run whose weights are large beside the headers of its files."""
    out_dir = tmp_path_factory.mktemp("base") / "out"
    assert run(dataset, out_dir, *WIDE) == 0
    return out_dir


@pytest.mark.parametrize("how", ["adamw", "muon", "lora"])
def test_the_space_that_a_save_asks_for_is_what_it_writes(
    dataset, base, tmp_path, monkeypatch, how
):
    options = [f"--optimizer={how}"]
    if how == "lora":
        options = [f"--init_from={base}", "--lora_rank=2"]
    asked = {}
    save = checkpoint.save_checkpoint

    def noted(folder, write, progress, size):
        asked[folder.name] = size
        save(folder, write, progress, size)

    monkeypatch.setattr("gpt12.saver.save_checkpoint", noted)
    assert run(dataset, tmp_path, *WIDE, *options) == 0
    for name in ("best", "last"):
        assert asked[name] == pytest.approx(bytes_in(tmp_path / name), rel=0.1)
    assert set(asked) == {"best", "last"}


def test_a_lora_run_is_saved_where_12_bytes_a_parameter_would_not_fit(
    dataset, base, tmp_path, monkeypatch
):
    parameters = sum(t.numel() for t in weights(base).values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6 * parameters))
    options = [*WIDE, f"--init_from={base}"]
    assert run(dataset, tmp_path / "lora", *options, "--lora_rank=2") == 0
    assert trainer(tmp_path / "lora")["step"] == 2
    assert run(dataset, tmp_path / "full", *options) == 1  # which writes 12


# --------------------------------------------------------------------------------------------------
# What is saved


def test_weights_that_are_not_finite_are_never_saved(dataset, tmp_path, capsys):
    """At such a rate finite gradients make infinite weights. The exit status says so."""
    options = ["--max_iters=10", "--learning_rate=1e38", "--warmup_iters=0", "--eval_interval=5"]
    assert run(dataset, tmp_path, *options) == 1
    out = capsys.readouterr().out
    assert "weights are not finite" in out
    assert "go on with" not in out
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "last").exists()


def test_the_last_evaluation_is_in_last_though_its_step_was_saved_before_it(dataset, tmp_path):
    options = ["--always_save_checkpoint=False", "--save_interval_s=0", "--eval_interval=4"]
    assert run(dataset, tmp_path, *options, "--max_iters=4") == 0
    saved = trainer(tmp_path)
    assert (saved["step"], saved["evaluated_step"]) == (4, 4)
    assert saved["best_val_loss"] == trainer(tmp_path, "best")["best_val_loss"]


def test_only_rank_0_writes(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    trainer_of_rank_1 = Trainer(built(dataset, tmp_path))
    assert trainer_of_rank_1.saver.save("last")
    assert not (tmp_path / "last").exists()


def test_the_adapter_names_the_checkpoint_that_the_weights_came_from(dataset, base, tmp_path):
    """init_from=RUN reads RUN/best, so the adapter says RUN/best: PEFT cannot open RUN."""
    options = [*WIDE, f"--init_from={base}", "--lora_rank=2"]
    assert run(dataset, tmp_path, *options) == 0
    adapter = json.loads((tmp_path / "best/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base / "best")


def test_a_base_that_peft_cannot_open_is_said_once(dataset, base, tmp_path, capsys):
    model = {}
    for name, tensor in weights(base, "best").items():
        # nanoGPT keeps nn.Linear's layout, (out, in).
        turned = tensor.ndim == 2 and ".h." in name
        model[name] = tensor.t().contiguous() if turned else tensor
    model["lm_head.weight"] = model["transformer.wte.weight"]
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 16, "vocab_size": 13}
    torch.save({"model": model, "model_args": shape | {"bias": True}}, tmp_path / "ckpt.pt")
    options = [*WIDE, f"--init_from={tmp_path / 'ckpt.pt'}", "--lora_rank=2", "--eval_interval=1"]
    assert run(dataset, tmp_path / "out", *options) == 0
    assert capsys.readouterr().out.count("which PEFT cannot open") == 1


# --------------------------------------------------------------------------------------------------
# A disk that is full or cannot be written


class FullDisk:
    """Lets saves fail from the n-th on: no free space is told, or a write ends within a file."""

    def __init__(self, monkeypatch, how: str, full_from: int):
        self.saves = 0
        self.full_from = full_from
        self.reported = how == "reported"
        self.save_checkpoint = checkpoint.save_checkpoint
        self.usage = shutil.disk_usage
        monkeypatch.setattr("gpt12.saver.save_checkpoint", self.save)
        monkeypatch.setattr(shutil, "disk_usage", self.disk_usage)

    @property
    def full(self) -> bool:
        return self.saves >= self.full_from

    def disk_usage(self, path):
        usage = self.usage(path)
        return usage._replace(free=9) if self.full and self.reported else usage

    def save(self, *args):
        self.saves += 1
        if not self.full or self.reported:
            self.save_checkpoint(*args)
            return
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            self.save_checkpoint(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("how", "message"), [("reported", "0.00 GB are free"), ("short", "too large")]
)
def test_a_full_disk_costs_neither_the_run_nor_the_old_checkpoint(
    dataset, tmp_path, monkeypatch, capsys, how, message
):
    pytest.importorskip("resource")
    options = ["--max_iters=10", "--save_interval_s=0", "--eval_interval=6"]
    with monkeypatch.context() as m:
        disk = FullDisk(m, how, full_from=5)
        assert run(dataset, tmp_path / "out", *options) == 1
    assert disk.saves > 6
    out = capsys.readouterr().out
    assert out.count("could not save") == disk.saves - 4
    assert message in out
    assert "untouched" in out
    assert list(losses(tmp_path / "out")) == list(range(1, 11))  # it went on to its end
    assert find_checkpoint(tmp_path / "out", ("last",))[1]["step"] == 4
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert resume(tmp_path / "out") == 0  # there is space again
    assert trainer(tmp_path / "out")["step"] == 10
    assert run(dataset, tmp_path / "whole", *options) == 0
    assert same_tensors(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_run_goes_on_when_its_disk_becomes_read_only(dataset, tmp_path, monkeypatch, capsys):
    mkdir = Path.mkdir

    def read_only(path, *args, **kwargs):
        if path.name == "last.tmp" and (tmp_path / "last").exists():
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert run(dataset, tmp_path, "--max_iters=4", "--save_interval_s=0") == 1
    assert "Read-only file system" in capsys.readouterr().out
    assert trainer(tmp_path)["step"] == 1


def test_a_best_that_could_not_be_saved_does_not_count_as_the_best(
    dataset, tmp_path, monkeypatch, capsys
):
    """best/ still holds the older model, so the older loss goes on counting."""
    write = Saver._write

    def failing(self, name):
        if name == "best" and self.run.progress.step == 4:
            return False
        return write(self, name)

    monkeypatch.setattr(Saver, "_write", failing)
    assert run(dataset, tmp_path, "--max_iters=4", "--eval_interval=2") == 0
    values = {row["step"]: row["val_loss"] for row in read_rows(tmp_path) if "val_loss" in row}
    assert values[4] < values[2]
    assert trainer(tmp_path)["best_step"] == 2
    assert trainer(tmp_path)["best_val_loss"] == values[2]
    assert f"best val loss {values[2]:.4f} at step 2" in capsys.readouterr().out


def test_a_signal_whose_save_fails_prints_no_line_to_resume_with(
    dataset, tmp_path, monkeypatch, capsys
):
    import signal

    log_step = Trainer.log_step

    def interrupted(self, lr):
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return log_step(self, lr)

    monkeypatch.setattr(Trainer, "log_step", interrupted)
    for works in (True, False):
        with monkeypatch.context() as m:
            if not works:
                m.setattr("gpt12.saver.save_checkpoint", fail_to_save)
            assert run(dataset, tmp_path / str(works), "--max_iters=9") == 143
        out = capsys.readouterr().out
        assert "stopped at step 2" in out
        assert ("--init_from=resume" in out) == works


def fail_to_save(folder, write, progress, size):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_without_a_last_is_told_what_to_do_with_its_best(finished, tmp_path, monkeypatch):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out_dir / "last")
    with pytest.raises(UserError, match=r"the optimizer's state is lost.*--init_from=.*best"):
        resume(out_dir)
