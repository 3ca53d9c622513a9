"""gpt12/introduction.py and log.py: lines, metrics.jsonl, loss.png, Weights & Biases, the clock."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread

import train
from data.tokenizers import CharTokenizer
from data.windows import EvalWindows
from gpt12.checkpoint import Saver
from gpt12.folder import Progress
from gpt12.introduction import CPU_FLOPS_PER_CORE, introduction
from gpt12.log import Clock, RunLog, draw_losses, drop_later_rows
from gpt12.weights import save_pretrained
from model import GPT, GPTConfig, flops_per_token, parameter_count
from tests.helpers import (
    OUT,
    built,
    losses,
    read_rows,
    refused,
    resume,
    run,
    same_tensors,
    trainer,
    weights,
)
from train import Trainer, TrainStep

pytestmark = pytest.mark.usefixtures("own_folder")


# --------------------------------------------------------------------------------------------------
# The introduction


def test_notes_the_model_the_data_and_the_tokens_of_a_step_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = built("--max_iters=20")
    found.machine.notes[:] = ["of the machine"]
    found.dataset.notes.append("of the data")
    found = replace(found, request=replace(found.request, notes=["of the request"]))
    *notes, machine, data, model, tokens, step, _ = [
        line for line in introduction(found) if not line.startswith("warning")
    ]
    assert notes[0] == "of the request"
    assert (machine, data) == ("of the machine", "of the data")
    parameters = parameter_count(GPTConfig(16, 13, 1, 2, 16, bias=False))
    assert model == (
        f"model: {parameters:,} parameters (n_layer=1, n_head=2, n_embd=16, block_size=16, "
        "vocabulary 13)"
    )
    assert tokens == "data: letters, documents: 1, 2,600 training and 400 validation tokens"
    assert step == (
        "step: batch_size=4 x block_size=16 x gradient_accumulation_steps=2 = 128 tokens on 2 "
        "processes; 20 steps end after 0.994 epochs"  # 160 of 161 windows
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--max_iters=100 --warmup_iters=50", []),
        (
            "--max_iters=100 --warmup_iters=51",
            ["takes 51 steps .* --warmup_iters=10 --lr_decay_iters=100$"],
        ),
        ("--max_iters=100 --warmup_iters=51 --decay_lr=False", []),
        ("--max_iters=100 --warmup_iters=0 --lr_decay_iters=49", ["min_lr at step 49, .*=100$"]),
        ("--max_iters=30", []),
        ("--max_iters=29", ["29 updates .* larger --max_iters or fewer than 8 sequences"]),
        ("--num_epochs=1", ["21 updates .* --num_epochs or"]),  # a step is 8 of 161 windows
        ("--max_iters=403", []),
        ("--max_iters=402 --n_embd=32", []),  # 5.7 parameters for each token
        ("--max_iters=412 --n_embd=32", ["2,600 training .* by heart.* --max_iters;"]),
        ("--max_iters=412 --n_embd=28", []),  # 4.5
    ],
)
def test_what_is_likely_to_spoil_a_run_is_warned_of_with_what_to_change(options, told):
    said = introduction(built(*options.split()))
    found = [line for line in said if line.startswith("warning: ")]
    assert len(found) == len(told), found
    for line, pattern in zip(found, told, strict=True):
        assert re.search(pattern, line), line


def test_other_ranks_than_0_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = RunLog(built())
    capsys.readouterr()
    log.introduce(["a line"])
    assert capsys.readouterr().out == ""


def test_a_lora_run_says_how_many_parameters_it_trains(finished):
    found = built(f"--init_from={finished}", "--lora_rank=2")
    trained = 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)  # A and B of the four matrices
    line = f"LoRA: {trained} parameters are trained, the others stay as they are"
    assert line in introduction(found)


def test_a_run_of_hours_on_a_cpu_is_warned_of_until_it_is_nearly_over():
    found = built("--max_iters=100000000000")
    step_flops = flops_per_token(found.model.config) * found.config.tokens_per_step
    steps_in_an_hour = 3600 * torch.get_num_threads() * CPU_FLOPS_PER_CORE / step_flops
    warning = "warning: this run will take about 5 hours on this CPU. config/train_shakespeare_cpu"
    for hours, told in ((5, True), (1.9, False)):
        found.progress.step = found.config.max_iters - round(hours * steps_in_an_hour)
        said = "".join(introduction(found))
        assert ((warning if told else "will take about") in said) == told


def write_rows(file: str, rows: list[dict]) -> None:
    """Write a file of one JSON object a line."""
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


CHARS = "\n abcdefghijklmnopqrstuvwxyz.,?"


@pytest.mark.usefixtures("own_cache")
def test_instruction_data_are_told_and_sampled_as_questions_and_answers(tmp_path, capsys):
    save_pretrained(GPT(GPTConfig(32, len(CHARS), 1, 2, 16)), tmp_path / "model")
    CharTokenizer(CHARS).save(tmp_path / "model")
    options = ["--init_from=model", "--block_size=32", "--max_iters=1"]
    rows = [{"prompt": f"what is {a}?", "completion": f" {a} is {a}."} for a in CHARS[2:28]]
    write_rows("ask.jsonl", rows)
    run("--dataset=ask.jsonl", *options)
    said = capsys.readouterr().out
    pattern = "\ndata: ask.jsonl, documents: 26, .*; only the answers are trained on\n"
    assert re.search(pattern, said)
    assert len(re.findall(r"^    \| what is [a-z]\?", said, re.M)) == 2
    Path("plain.txt").write_text("only text. " * 200)
    said = "\n".join(introduction(built("--dataset=plain.txt", *options)))
    assert "tokens; plain text, every token is a target\n" in said


# --------------------------------------------------------------------------------------------------
# During training, and at the end


def test_what_a_run_tells_from_its_first_evaluation_to_its_end(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("gpt12.log.draw_losses", lambda out_dir, *best: drawn.append(best))
    run("--out_dir=my run", "--max_iters=2")
    said = capsys.readouterr().out
    assert re.search(r"\nevaluating before the first step\nstep 0: train loss .*\n    \| ", said)
    pattern = r"\nended at step 2.*, best val loss [\d.]+ at step 2; curves: my run/loss.png\n"
    assert re.search(pattern, said)
    assert said.endswith("\nread what it writes: python sample.py --out_dir='my run'\n")
    evaluation, step, *_ = read_rows("my run")
    assert {*step} == {*"step tokens loss lr grad_norm tokens_per_s elapsed_s".split()}
    assert {*evaluation} == {"step", "tokens", "train_loss", "val_loss", "elapsed_s"}
    assert drawn == [(None, 0), (trainer("my run", "best")["best_val_loss"], 2)]
    resume("--out_dir=my run", "--max_iters=3")
    said = capsys.readouterr().out
    assert "resuming at step 2\n" in said
    assert "evaluating before" not in said


def test_a_sample_compiles_nothing():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    found = built()
    for layer in found.model.transformer.h:
        layer.compile(backend=backend)
    log = RunLog(replace(found, machine=replace(found.machine, compiled=True)))
    log._show_sample()
    assert not compiled
    found.model(torch.zeros(1, 4, dtype=torch.int64))
    assert compiled  # as it is in training


def test_a_run_of_one_step_claims_no_time(capsys):
    """Its only step compiles, which does not count."""
    run("--max_iters=1")
    assert "\nended at step 1, best val" in capsys.readouterr().out


def test_a_run_that_improves_nothing_says_so(monkeypatch, capsys):
    values = iter([2.5, 2.0, 2.5, 2.1, 2.5, 2.2, 2.5, 2.0, 2.5, 1.9])  # training and validation
    monkeypatch.setattr("train.mean_loss", lambda *args, **options: next(values))
    run("--max_iters=2")
    assert "no better than at the start, val loss 2.0000" in capsys.readouterr().out
    resume("--max_iters=3")  # is not compared with its start
    run("--max_iters=2")
    assert "no better than" not in capsys.readouterr().out


def test_an_evaluation_alone_tells_loss_perplexity_and_warnings(capsys):
    run("--eval_only", "--learning_rate=1e-5")
    said = capsys.readouterr().out
    assert re.search("min_lr=.*, because it was not set", said)
    [values] = re.findall(r"val loss ([\d.]+), perplexity ([\d.]+) over (\d+)", said)
    loss, perplexity, windows = map(float, values)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert windows == 25
    assert not OUT.exists()


# --------------------------------------------------------------------------------------------------
# An exception in the loop

RARE_SAVES = ["--max_iters=8", "--eval_interval=2", "--dropout=0.1", "--save_interval_s=1e9"]
RARE_SAVES += ["--always_save_checkpoint=False"]


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of a run without an exception."""
    out_dir = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as m:
        m.setattr("gpt12.log.draw_losses", lambda *arguments: None)
        run(f"--dataset={dataset}", f"--out_dir={out_dir}", *RARE_SAVES)
    return weights(out_dir)


@pytest.mark.parametrize(
    ("owner", "name", "best_step"),
    [
        (RunLog, "log_step", 2),
        (RunLog, "_draw", 4),
        (EvalWindows, "batch", 2),
        (TrainStep, "load", 2),
        (Trainer, "save_best", 2),
    ],
)
def test_an_exception_in_the_loop_leaves_a_last_from_which_the_run_goes_on(
    monkeypatch, capsys, unbroken, owner, name, best_step
):
    """It passes through with its traceback; what was trained up to then is saved."""
    original = getattr(owner, name)

    def failing(*args, **options):
        if loop.progress.step >= 4:
            raise ZeroDivisionError
        return original(*args, **options)

    loop = Trainer(built(*RARE_SAVES))
    with monkeypatch.context() as m:
        m.setattr(owner, name, failing)
        with pytest.raises(ZeroDivisionError):
            loop.train()
    said = capsys.readouterr().out
    assert re.search(r"failed at step 4.*\ngo on with: python train.py --init_from=resume", said)
    assert (trainer()["step"], trainer()["best_step"]) == (4, best_step)
    assert trainer(name="best")["step"] == best_step
    resume()
    assert same_tensors(weights(), unbroken)


def test_an_update_that_fails_half_way_leaves_the_older_last(monkeypatch):
    update = TrainStep.update_weights
    count = itertools.count(1)

    def failing(self, *args):
        update(self, *args)
        if next(count) == 5:
            raise ZeroDivisionError

    monkeypatch.setattr("train.TrainStep.update_weights", failing)
    options = ["--max_iters=8", "--eval_interval=3", "--save_interval_s=1e9"]
    with pytest.raises(ZeroDivisionError):
        run(*options)
    assert trainer()["step"] == 3


# --------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_metrics_are_read_up_to_a_torn_line_and_continued():
    OUT.mkdir()
    file = OUT / "metrics.jsonl"
    row = '{"step": %d, "tokens": %d, "loss": %r}\n'
    rows = [row % (step, 8 * step, 1 / step) for step in range(1, 6)]
    whole = "".join(rows)
    for cut in range(len(rows[-1])):  # every way in which the last line can be torn
        file.write_text(whole[: len(whole) - cut])
        drop_later_rows(file, Progress(step=5))
        assert list(losses()) == [1, 2, 3, 4, 5][: 4 if cut > 1 else 5]
    # A disk that lost its power may keep parts of the last rows, with zeros between them.
    file.write_bytes(whole.encode() + b'\x00\xff\n{"st\x00\x00": 3.25}\n{"step": 6, "lo')
    drop_later_rows(file, Progress(step=3))
    assert file.read_text() == "".join(rows[:3])  # what is past the resumed step is dropped
    file.write_text(rows[4] + rows[4].replace("loss", "val_loss"))
    drop_later_rows(file, Progress(step=5, evaluated_step=0))  # that evaluation is made again
    assert file.read_text() == rows[4]


@pytest.mark.parametrize(
    "line", ["5", "null", '{"note": "slow"}', '{"step": "one", "tokens": 8}', '{"step": 1}']
)
def test_a_line_of_another_kind_in_the_metrics_is_left_out(line):
    OUT.mkdir()
    row = '{"step": 1, "tokens": 8, "loss": 1.0}\n'
    file = OUT / "metrics.jsonl"
    file.write_text(f"{row}{line}\n")
    drop_later_rows(file, Progress(step=5))
    assert file.read_text() == row


def test_a_metric_that_is_not_finite_is_written_as_null():
    log = RunLog(built())
    log.open()
    log.log_step(lr=0.1, loss=math.nan, grad_norm=math.inf, bad=0.0, skipped=0.0)
    [row] = read_rows()
    assert [row[key] for key in ("loss", "grad_norm", "tokens_per_s", "lr")] == [None] * 3 + [0.1]


def test_a_full_disk_costs_rows_of_metrics_and_neither_the_run_nor_later_rows(capsys, monkeypatch):
    resource = pytest.importorskip("resource")  # a limit of a file's size is POSIX
    file = OUT / "metrics.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    record = RunLog._record

    def on_a_small_disk(self, **values):
        step = self.progress.step
        size = file.stat().st_size + 7 if step in (2, 3) else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        record(self, **values)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr("gpt12.log.RunLog._record", on_a_small_disk)
    run("--max_iters=4")
    assert capsys.readouterr().out.count(f"could not write {file}: File too large") == 1
    assert list(losses()) == [1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------
# loss.png


def step_row(step: int, loss: float | None) -> dict:
    return {"step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-3 / step}


def evaluation_row(step: int, loss: float | None) -> dict:
    return {"step": step, "tokens": 100 * step, "train_loss": loss, "val_loss": loss}


def draw(rows: list[dict], best_val_loss: float | None = None) -> None:
    """Draw out/loss.png from a metrics.jsonl with these rows."""
    OUT.mkdir(exist_ok=True)
    write_rows("out/metrics.jsonl", rows)
    draw_losses(OUT, best_val_loss, best_step=1)


@pytest.mark.picture
def test_the_picture_is_drawn_without_rows_and_without_finite_ones():
    for rows in ([], [step_row(1, None), evaluation_row(1, None)]):
        draw(rows)
        assert imread("out/loss.png").shape == (550, 770, 4)
        assert {path.name for path in OUT.iterdir()} == {"metrics.jsonl", "loss.png"}


@pytest.mark.picture
def test_the_lines_of_a_picture(monkeypatch):
    """Evaluations begin after step 0 if there are others; of the steps some are left out."""
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *args, **options: figures.append(figure)
    )
    monkeypatch.setattr("gpt12.log.MAX_DRAWN", 40)
    rows = [evaluation_row(step, 4.0 - step) for step in range(3)]
    of_steps = [step_row(step, 3.5) for step in range(1, 100)]
    for evaluations in (rows, rows[:1]):
        draw(of_steps + evaluations, best_val_loss=2.5)
    drawn = []
    for figure in figures:
        lines = {line.get_label(): line for line in figure.axes[0].lines}
        assert list(lines["loss of each step"].get_xdata()) == [*range(100, 10_000, 300)]
        assert set(lines["best 2.5000 at step 1"].get_ydata()) == {2.5}
        drawn.append([list(lines[name].get_ydata()) for name in ("train", "validation")])
    assert drawn == [[[3.0, 2.0]] * 2, [[4.0]] * 2]


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


def test_wandb_gets_the_rows_of_metrics_jsonl_and_a_resumed_run_keeps_its_id(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = ["--wandb_log", "--wandb_project=test", "--wandb_run_name=mine"]
    run("--max_iters=2", *options)
    assert trainer()["wandb_id"] == "new-id"
    resume("--max_iters=4")
    assert [start["id"] for start in wandb.started] == [None, "new-id"]
    first = wandb.started[0]
    assert (first["project"], first["name"], first["config"]["max_iters"]) == ("test", "mine", 2)
    assert [{"step": step, **values} for step, values in wandb.logged] == read_rows()
    assert wandb.ended == [0, 0]


def test_the_real_wandb_gets_a_run_offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("--max_iters=1", "--wandb_log", "--wandb_project=test")
    assert list((OUT / "wandb").glob(f"offline-run-*-{trainer()['wandb_id']}"))


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_wandb_that_fails_is_told_once_and_costs_nothing(monkeypatch, capsys, method):
    wandb = FakeWandb()

    def fail(self, *args, **options):
        wandb.ended.append("asked")
        raise ValueError("two\nlines")

    monkeypatch.setattr(FakeWandbRun, method, fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run("--max_iters=3", "--wandb_log")
    assert wandb.ended == ["asked"]  # and then nothing more
    line = "warning: wandb has failed (ValueError: two)"
    assert capsys.readouterr().out.count(line) == 1
    assert list(losses()) == [1, 2, 3]
    assert trainer()["step"] == 3


def test_a_wandb_that_does_not_start_ends_with_a_message_and_displaces_no_run(
    finished_copy, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    refused("wandb_log=True, but wandb does not start.*WANDB_MODE", run, "--wandb_log")
    assert trainer()["step"] == 4


# --------------------------------------------------------------------------------------------------
# The clock


class Time:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 100.0

    def read(self) -> float:
        return self.now

    def taking(self, seconds, function):
        """Return a function that does the same and takes so long."""

        def call(*args, **options):
            self.now += seconds
            return function(*args, **options)

        return call


@pytest.fixture
def time(monkeypatch) -> Time:
    found = Time()
    module = SimpleNamespace(perf_counter=found.read, monotonic=found.read)
    monkeypatch.setattr("gpt12.log.time", module)
    monkeypatch.setattr("gpt12.checkpoint.time", module)
    return found


def test_starting_and_stopping_wait_for_the_device():
    waited = []
    machine = SimpleNamespace(synchronize=lambda: waited.append(clock.running))
    clock = Clock(SimpleNamespace(machine=machine, progress=Progress()))
    clock.start()
    clock.stop()
    clock.stop()
    assert waited == [False, True]


def test_a_run_counts_neither_compiling_nor_evaluations_nor_saves(monkeypatch, time):
    """A step takes a second, an evaluation 100, a checkpoint 1,000. The first step compiles."""
    monkeypatch.setattr("train.TrainStep.__call__", time.taking(1, TrainStep.__call__))
    monkeypatch.setattr("train.mean_loss", time.taking(100, train.mean_loss))
    monkeypatch.setattr("gpt12.checkpoint.Saver._save", time.taking(1000, Saver._save))
    options = ["--max_iters=6", "--eval_interval=3", "--save_interval_s=2"]
    run(*options, "--always_save_checkpoint=False")
    assert losses(key="elapsed_s") == {0: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    speed = 2 * 4 * 16  # tokens in a step
    assert losses(key="tokens_per_s") == {1: None} | dict.fromkeys(range(2, 7), speed)
