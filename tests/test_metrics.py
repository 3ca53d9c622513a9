"""gpt12/metrics.py: metrics.jsonl, loss.png, Weights & Biases."""

import json
import math
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from gpt12.errors import UserError
from gpt12.metrics import Metrics, Picture, draw_losses
from tests.helpers import losses, read_rows, resume, run, trainer

# --------------------------------------------------------------------------------------------------
# metrics.jsonl


def steps(out_dir: Path) -> list[int]:
    return list(losses(out_dir))


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
    assert file.read_bytes() == b"".join(lines[:3])  # what is past the resumed step is dropped
    Metrics(file, None).close()
    assert file.read_bytes() == b""


def test_memory_holds_all_evaluations_and_evenly_thinned_steps_and_the_file_holds_all(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("gpt12.metrics.MAX_STEPS_DRAWN", 40)
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    for step in range(1, 1001):
        metrics.append({"step": step, "loss": 1.0})
        if step % 100 == 0:
            metrics.append({"step": step, "val_loss": 1.0})
    metrics.close()
    assert steps(tmp_path) == [*range(1, 1001)]
    again = Metrics(tmp_path / "metrics.jsonl", 1000)
    again.close()
    for kept in (metrics, again):
        assert [row["step"] for row in kept.evaluations] == [*range(100, 1001, 100)]
        assert [row["step"] for row in kept.steps] == [*range(1, 1001, 32)]


def test_an_evaluation_made_again_after_a_kill_is_written_once(tmp_path):
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
    found = [(row["step"], "val_loss" in row) for row in read_rows(tmp_path)]
    assert found == [(5, False), (5, True), (6, False), (6, True)]


def test_a_metric_that_is_not_finite_is_written_as_null(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    values = {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "tokens_per_s": None}
    metrics.append({"step": 1, **values})
    metrics.close()
    row = json.loads(
        (tmp_path / "metrics.jsonl").read_text(),
        parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"),
    )
    assert row == {"step": 1, **dict.fromkeys(values)}


def test_a_full_disk_costs_rows_of_metrics_and_neither_the_run_nor_later_rows(tmp_path, capsys):
    resource = pytest.importorskip("resource")  # a limit of a file's size is POSIX
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, None)
    metrics.append({"step": 1, "loss": 2.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 7, limits[1]))
        metrics.append({"step": 2, "loss": 1.5})
        metrics.append({"step": 3, "loss": 1.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err.count("metrics.jsonl: File too large") == 1
    metrics.append({"step": 4, "loss": 1.0})
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_disk_that_stays_full_ends_without_a_traceback(tmp_path, capsys):
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")
    metrics.append({"step": 1, "loss": 2.0})
    metrics.close()
    assert "No space left" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# loss.png


def step_row(step: int, loss: float | None) -> dict:
    return {"step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-3 / step}


def evaluation_row(step: int, loss: float | None) -> dict:
    return {"step": step, "tokens": 100 * step, "train_loss": loss, "val_loss": loss}


def coloured_pixels(file: Path) -> int:
    """Count the pixels of the curves."""
    pixels = imread(file)[..., :3]
    return int((pixels.max(2) - pixels.min(2) > 0.2).sum())


def test_the_picture_can_be_drawn_from_none_one_and_many_rows(tmp_path):
    numbers = range(1, 300)
    cases = {
        "nothing": ([], []),
        "one step": ([step_row(1, 2.0)], []),
        "one evaluation": ([], [evaluation_row(0, 4.0)]),
        "not finite": ([step_row(1, None)], [evaluation_row(1, None)]),
        "many": (
            [step_row(i, 4 / i) for i in numbers],
            [evaluation_row(i, 4 / i) for i in numbers],
        ),
        # A stranger's file may lack anything.
        "lacking": ([{"step": 1, "loss": 2.0}], [{"step": 2, "val_loss": 3}]),
    }
    drawn = {}
    for name, (of_steps, of_evaluations) in cases.items():
        draw_losses(of_steps, of_evaluations, tmp_path / "loss.png")
        assert imread(tmp_path / "loss.png").shape == (550, 770, 4)
        drawn[name] = coloured_pixels(tmp_path / "loss.png")
    assert drawn["nothing"] == drawn["not finite"] < drawn["one evaluation"] < drawn["many"]
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_the_line_of_the_evaluations_begins_after_step_0_if_there_are_others(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("gpt12.metrics._save_figure", lambda figure, file: figures.append(figure))
    rows = [evaluation_row(step, 4.0 - step) for step in range(3)]
    for evaluations in (rows, rows[:1]):
        draw_losses([step_row(1, 3.5)], evaluations, tmp_path / "loss.png", best=(2.5, 1))
    drawn = []
    for figure in figures:
        lines = {line.get_label(): line for line in figure.axes[0].lines}
        assert "loss of each step" in lines
        assert set(lines["best 2.5000 at step 1"].get_ydata()) == {2.5}
        drawn.append([list(lines[name].get_ydata()) for name in ("train", "validation")])
    assert drawn == [[[3.0, 2.0]] * 2, [[4.0]] * 2]


def test_a_picture_that_cannot_be_written_costs_no_run(tmp_path):
    draw_losses([], [], tmp_path / "none" / "loss.png")


def test_pictures_are_drawn_one_after_the_other_from_the_rows_of_their_time(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "gpt12.metrics.draw_losses",
        lambda steps, evaluations, file, best: drawn.append((len(steps), len(evaluations), best)),
    )
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    picture = Picture(tmp_path / "loss.png")
    picture.draw(metrics, None)
    metrics.append({"step": 1, "loss": 1.0})
    picture.draw(metrics, (2.5, 1))
    metrics.append({"step": 1, "val_loss": 1.0})
    picture.wait()
    metrics.close()
    assert drawn == [(0, 0, None), (1, 0, (2.5, 1))]


# --------------------------------------------------------------------------------------------------
# Weights & Biases


class FakeWandbRun:
    """Stands for a run of Weights & Biases: remembers what it was given."""

    def __init__(self, wandb, run_id):
        self.wandb = wandb
        self.id = run_id

    def log(self, values, step):
        self.wandb.logged.append((step, values))

    def finish(self, exit_code):
        self.wandb.ended.append(exit_code)


class FakeWandb:
    """Stands for the package."""

    def __init__(self):
        self.started = []
        self.logged = []
        self.ended = []

    def init(self, **options):
        self.started.append(options)
        return FakeWandbRun(self, options["id"] or "new-id")


@pytest.mark.usefixtures("no_picture")
def test_wandb_gets_the_rows_of_metrics_jsonl_and_a_resumed_run_keeps_its_id(
    dataset, tmp_path, monkeypatch
):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = ["--wandb_log", "--wandb_project=test", "--wandb_run_name=mine"]
    assert run(dataset, tmp_path, "--max_iters=2", *options) == 0
    assert trainer(tmp_path)["wandb_id"] == "new-id"
    assert resume(tmp_path, "--max_iters=4") == 0
    assert [start["id"] for start in wandb.started] == [None, "new-id"]
    assert wandb.started[0]["project"] == "test"
    assert wandb.started[0]["name"] == "mine"
    assert wandb.started[0]["config"]["config"]["max_iters"] == 2
    assert [{"step": step, **values} for step, values in wandb.logged] == read_rows(tmp_path)
    assert wandb.ended == [0, 0]


@pytest.mark.usefixtures("no_picture")
def test_the_real_wandb_continues_a_run_offline(dataset, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run(dataset, tmp_path, "--max_iters=2", "--wandb_log", "--wandb_project=test") == 0
    first = trainer(tmp_path)["wandb_id"]
    assert first
    assert resume(tmp_path, "--max_iters=4") == 0
    assert trainer(tmp_path)["wandb_id"] == first
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first}"))) >= 1


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("two\nlines")])
@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_wandb_that_fails_is_told_once_and_costs_nothing(
    dataset, tmp_path, monkeypatch, capsys, method, error
):
    wandb = FakeWandb()

    def fail(self, *args, **options):
        wandb.ended.append("asked")
        raise error

    monkeypatch.setattr(FakeWandbRun, method, fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run(dataset, tmp_path, "--max_iters=3", "--wandb_log") == 0
    assert wandb.ended == ["asked"]  # and then nothing more
    line = f"warning: wandb has failed ({type(error).__name__}: {str(error).splitlines()[0]})"
    assert capsys.readouterr().out.count(line) == 1
    assert steps(tmp_path) == [1, 2, 3]
    assert trainer(tmp_path)["step"] == 3


def test_a_wandb_that_does_not_start_ends_with_a_message(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    with pytest.raises(UserError, match=r"wandb_log=True, but wandb does not start.*WANDB_MODE"):
        run(dataset, tmp_path, "--max_iters=1", "--wandb_log")
