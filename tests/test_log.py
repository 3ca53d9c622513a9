"""gpt12/log.py: lines on the terminal, metrics.jsonl, loss.png, Weights & Biases, the clock."""

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
from gpt12.checkpoint import Progress, Saver
from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.log import Clock, RunLog, draw_losses, open_metrics
from gpt12.weights import save_pretrained
from model import GPT, GPTConfig, parameter_count
from tests.helpers import (
    CPU,
    built,
    built_from,
    losses,
    read_rows,
    resume,
    run,
    same_tensors,
    trainer,
    weights,
)
from train import Trainer, TrainStep

pytestmark = pytest.mark.usefixtures("no_picture")


def introduction(capsys, dataset, out_dir, *options: str) -> str:
    """Return what a run says before it trains."""
    found = built(dataset, out_dir, *options)
    capsys.readouterr()
    RunLog(found).introduce()
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The introduction


def test_the_model_the_data_and_the_tokens_of_a_step_are_told(
    dataset, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = introduction(capsys, dataset, tmp_path, "--max_iters=20")
    parameters = parameter_count(GPTConfig(16, 13, 1, 2, 16, bias=False))
    assert (
        f"model: {parameters:,} parameters (1 layer, 2 heads, 16 channels, context 16 tokens, "
        "vocabulary 13)"
    ) in said
    assert f"data: {dataset}, 1 document, 2,600 training and 400 validation tokens\n" in said
    assert "\nstep: 4 sequences x 16 tokens x 2 micro-batches on 2 processes = 128 tokens; " in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max_iters=1"], "; 1 step read 5% of the text"),  # 8 of its 161 windows
        (["--max_iters=20"], "; 20 steps read 99% of the text"),
        (["--max_iters=40"], "; 40 steps read the text 2.0 times"),
        (["--max_iters=100_000"], "; 100,000 steps read the text 4,968.9 times"),
        (
            "--max_iters=1 --batch_size=1 --gradient_accumulation_steps=1".split(),
            "1 sequence x 16 tokens x 1 micro-batch = 16 tokens; 1 step read less than 1% of the "
            "text",
        ),
    ],
)
def test_how_much_of_the_text_a_run_reads_is_told(dataset, tmp_path, capsys, options, told):
    assert f"{told}\n" in introduction(capsys, dataset, tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", []),
        ("--warmup_iters=50", []),
        ("--warmup_iters=51", ["takes 51 steps .* --warmup_iters=10 --lr_decay_iters=100$"]),
        ("--warmup_iters=51 --decay_lr=False", []),
        ("--warmup_iters=0 --lr_decay_iters=50", []),
        ("--warmup_iters=0 --lr_decay_iters=49", ["min_lr at step 49, .* --lr_decay_iters=100$"]),
        ("--max_iters=30", []),
        ("--max_iters=29", ["29 updates .* larger --max_iters or a smaller step, .* is 8 seq"]),
        ("--max_iters=1 --warmup_iters=0", ["1 update will hardly .* larger --max_iters or"]),
        ("--num_epochs=1", ["21 updates .* --num_epochs or"]),  # a step is 8 of 161 windows
        ("--max_iters=403", []),
        ("--max_iters=402 --n_embd=64 --n_layer=2", []),  # 38 parameters for each token
        ("--max_iters=412 --n_embd=64 --n_layer=2", ["2,600 training .* by heart.* --max_iters;"]),
        ("--num_epochs=25 --n_embd=64 --n_layer=2", ["is read 25 times.* --num_epochs;"]),
    ],
)
def test_what_is_likely_to_spoil_a_run_is_warned_of_with_what_to_change(
    dataset, tmp_path, capsys, options, told
):
    length = "" if "num_epochs" in options else "--max_iters=100 "
    said = introduction(capsys, dataset, tmp_path, *(length + options).split())
    found = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(found) == len(told), found
    for line, pattern in zip(found, told, strict=True):
        assert re.search(pattern, line), line


def test_other_ranks_than_0_say_nothing(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert introduction(capsys, dataset, tmp_path) == ""


def test_a_lora_run_says_how_many_parameters_it_trains(dataset, finished, tmp_path, capsys):
    options = [f"--init_from={finished}", "--lora_rank=2"]
    said = introduction(capsys, dataset, tmp_path, *options)
    trained = 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)  # A and B of the four matrices
    assert f"LoRA: {trained} parameters are trained, the others stay as they are" in said
    assert "LoRA" not in introduction(capsys, dataset, tmp_path)


CHARS = "\n abcdefghijklmnopqrstuvwxyz.,?"


@pytest.fixture
def chat_model(tmp_path_factory) -> Path:
    """A model with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(GPT(GPTConfig(32, len(CHARS), 1, 2, 16)), folder)
    CharTokenizer(CHARS).save(folder)
    return folder


@pytest.fixture
def questions(tmp_path) -> Path:
    file = tmp_path / "ask.jsonl"
    rows = [{"prompt": f"what is {a}?", "completion": f" {a} is {a}."} for a in CHARS[2:28]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.usefixtures("own_cache")
def test_instruction_data_say_that_only_the_answers_are_trained(
    chat_model, questions, tmp_path, capsys
):
    options = [f"--init_from={chat_model}", "--block_size=32"]
    said = introduction(capsys, questions, tmp_path / "out", *options)
    assert re.search(rf"\ndata: {questions}, 26 documents, .*; only the answers are trained", said)
    text = tmp_path / "plain.txt"
    text.write_text("only text. " * 200)
    said = introduction(capsys, text, tmp_path / "out", *options)
    assert re.search(rf"\ndata: {text}, 1 document, .*; plain text, every token is a target", said)


def test_the_notes_of_the_request_the_machine_and_the_data_come_first(dataset, tmp_path, capsys):
    found = built(dataset, tmp_path)
    found.machine.notes.append("of the machine")
    found.dataset.warnings.append("of the data")
    request = replace(found.request, notes=["of the request"])
    capsys.readouterr()
    RunLog(replace(found, request=request)).introduce()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "of the request"
    assert lines.index("of the machine") < lines.index("of the data")
    assert lines[lines.index("of the data") + 1].startswith("model: ")


def test_a_run_of_hours_on_a_cpu_is_warned_of(dataset, tmp_path, capsys):
    assert "warning: this run will take" not in introduction(capsys, dataset, tmp_path)
    said = introduction(capsys, dataset, tmp_path, "--max_iters=100000000000")
    assert "warning: this run will take about" in said
    assert "config/train_shakespeare_cpu.py" in said
    found = built(dataset, tmp_path, "--max_iters=100000000000")
    found.progress.step = found.config.max_iters - 1  # nearly over
    RunLog(found).introduce()
    assert "will take about" not in capsys.readouterr().out


def test_a_resumed_run_says_at_which_step_it_continues(finished, capsys):
    found = built_from(["--init_from=resume", f"--out_dir={finished}", "--max_iters=9"])
    capsys.readouterr()
    RunLog(found).introduce()
    assert "resuming at step 4" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# During training


def test_the_wait_before_the_first_step_is_explained_once(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path, "--max_iters=4", "--eval_interval=2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("evaluating before the first step") == 1
    following = lines[lines.index("evaluating before the first step") + 1]
    assert following.startswith("step 0: train loss")
    assert resume(tmp_path, "--max_iters=5") == 0
    assert "evaluating before" not in capsys.readouterr().out


def test_metrics_hold_the_promised_columns(dataset, tmp_path):
    assert run(dataset, tmp_path, "--max_iters=1") == 0
    evaluation, step, _ = read_rows(tmp_path)
    of_a_step = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
    assert set(step) == of_a_step
    assert set(evaluation) == {"step", "tokens", "train_loss", "val_loss", "elapsed_s"}


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("reentrant call")])
def test_a_line_that_cannot_be_written_costs_no_run(dataset, tmp_path, monkeypatch, error):
    """The log's disk is full, or a signal comes in the middle of a line."""

    def write(text):
        raise error

    monkeypatch.setattr(
        sys, "stdout", SimpleNamespace(write=write, flush=lambda: None, encoding="utf-8")
    )
    assert run(dataset, tmp_path, "--max_iters=2") == 0


@pytest.mark.usefixtures("own_cache")
def test_the_sample_of_instruction_data_is_a_question_and_its_answer(
    chat_model, questions, tmp_path, capsys
):
    options = [f"--init_from={chat_model}", "--block_size=32", "--max_iters=1"]
    assert run(questions, tmp_path / "out", *options) == 0
    assert len(re.findall(r"^    \| what is [a-z]\?", capsys.readouterr().out, re.M)) == 2


def test_a_sample_compiles_nothing(dataset, tmp_path):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    found = built(dataset, tmp_path)
    for layer in found.model.transformer.h:
        layer.compile(backend=backend)
    log = RunLog(replace(found, machine=replace(found.machine, compiled=True)))
    log._show_sample()
    assert not compiled
    found.model(torch.zeros(1, 4, dtype=torch.int64))
    assert compiled  # as it is in training


def test_the_picture_names_the_model_in_best(dataset, tmp_path, monkeypatch):
    bests = []
    monkeypatch.setattr("gpt12.log.draw_losses", lambda out_dir, best: bests.append(best))
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    assert bests == [None, (trainer(tmp_path, "best")["best_val_loss"], 2)]


# --------------------------------------------------------------------------------------------------
# The end


def test_a_finished_run_tells_where_its_curves_are_and_how_to_sample(dataset, tmp_path, capsys):
    out_dir = tmp_path / "my run"
    assert run(dataset, out_dir, "--max_iters=2") == 0
    said = capsys.readouterr().out
    told = r"\n2 steps.*, best val loss [\d.]+ at step 2; curves: "
    assert re.search(told + f"{out_dir}/loss.png\n", said)
    assert said.endswith(f"\nread what it writes: python sample.py --out_dir='{out_dir}'\n")


@pytest.mark.usefixtures("time")
def test_a_run_of_one_step_claims_no_time_and_slow_saving_is_told(
    dataset, tmp_path, capsys, monkeypatch, time
):
    """Its only step compiles, which does not count."""
    monkeypatch.setattr(Saver, "_save", time.taking(7, Saver._save))
    assert run(dataset, tmp_path, "--max_iters=1", "--always_save_checkpoint=False") == 0
    assert "\n1 step, 14.0 s of saving, best val" in capsys.readouterr().out  # best/ and last/


@pytest.mark.parametrize(("after", "told"), [(1.9, False), (2.1, True)])
def test_a_run_that_improves_nothing_says_so(dataset, tmp_path, monkeypatch, capsys, after, told):
    values = iter((2.5, 2.0, 2.5, after))  # training and validation, before and after
    monkeypatch.setattr("train.mean_loss", lambda *args, **options: next(values))
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    said = capsys.readouterr().out
    assert ("no better than at the start, val loss 2.0000" in said) == told
    values = iter((9.0, 9.0))
    assert resume(tmp_path, "--max_iters=3") == 0  # is not compared with its start
    assert "no better than" not in capsys.readouterr().out


def test_an_evaluation_alone_tells_loss_perplexity_and_warnings(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path / "none", "--eval_only", "--learning_rate=1e-5") == 0
    said = capsys.readouterr().out
    assert re.search("min_lr=.*, because it was not set", said)
    found = re.findall(r"val loss ([\d.]+), perplexity ([\d.]+) over (\d+)", said)
    [(loss, perplexity, windows)] = found
    assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)
    assert windows == "25"
    assert not (tmp_path / "none").exists()


# --------------------------------------------------------------------------------------------------
# An exception in the loop

RARE_SAVES = ["--max_iters=8", "--eval_interval=2", "--dropout=0.1", "--save_interval_s=1e9"]
RARE_SAVES += ["--always_save_checkpoint=False"]


def fail_at_step(monkeypatch, name: str, step: int) -> None:
    """Let a function raise as soon as `step` updates are finished. name: for monkeypatch."""
    module_name, class_name, method = name.rsplit(".", 2)
    owner = getattr(sys.modules[module_name], class_name)
    found = getattr(owner, method)
    trainers = []
    begin = Trainer.__init__

    def remember(self, *args, **options):
        begin(self, *args, **options)
        trainers.append(self)

    def failing(*args, **options):
        if trainers and trainers[-1].progress.step >= step:
            raise ZeroDivisionError
        return found(*args, **options)

    monkeypatch.setattr(Trainer, "__init__", remember)
    monkeypatch.setattr(owner, method, failing)


@pytest.mark.parametrize(
    ("name", "best_step"),
    [
        ("gpt12.log.RunLog.log_step", 2),
        ("gpt12.log.RunLog._draw", 4),
        ("data.windows.EvalWindows.batch", 2),
        ("gpt12.loader.Loader.load", 2),
        ("gpt12.checkpoint.Saver._write_best", 2),
    ],
)
def test_an_exception_in_the_loop_leaves_a_last_from_which_the_run_goes_on(
    dataset, tmp_path, monkeypatch, capsys, name, best_step
):
    """It passes through with its traceback; what was trained up to then is saved."""
    with monkeypatch.context() as m:
        fail_at_step(m, name, 4)
        with pytest.raises(ZeroDivisionError):
            run(dataset, tmp_path / "out", *RARE_SAVES)
    said = capsys.readouterr().out
    assert re.search(r"failed at step 4.*\ngo on with: python train.py --init_from=resume", said)
    assert trainer(tmp_path / "out")["step"] == 4
    assert trainer(tmp_path / "out")["best_step"] == best_step
    assert trainer(tmp_path / "out", "best")["step"] == best_step
    assert resume(tmp_path / "out") == 0
    assert run(dataset, tmp_path / "whole", *RARE_SAVES) == 0
    assert same_tensors(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_an_update_that_fails_half_way_leaves_the_older_last(dataset, tmp_path, monkeypatch):
    update = TrainStep.update_weights
    count = itertools.count(1)

    def failing(self, *args):
        update(self, *args)
        if next(count) == 5:
            raise ZeroDivisionError

    monkeypatch.setattr(TrainStep, "update_weights", failing)
    options = ["--max_iters=8", "--eval_interval=3", "--save_interval_s=1e9"]
    with pytest.raises(ZeroDivisionError):
        run(dataset, tmp_path, *options)
    assert trainer(tmp_path)["step"] == 3


# --------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_metrics_are_read_up_to_a_torn_line_and_continued(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6)]
    whole = "".join(rows)
    for cut in range(len(rows[-1])):  # every way in which the last line can be torn
        file.write_text(whole[: len(whole) - cut])
        with open_metrics(file, Progress(step=5)) as again:
            again.write('{"step": 6, "loss": 0.1}\n')
        assert list(losses(tmp_path)) == ([1, 2, 3, 4, 6] if cut > 1 else [1, 2, 3, 4, 5, 6])
    file.write_bytes(whole.encode() + b'\x00\xff\n[1]\n{"step": "x"}\n{}\n"torn')
    open_metrics(file, Progress(step=3)).close()
    assert file.read_text() == "".join(rows[:3])  # what is past the resumed step is dropped


def test_an_evaluation_made_again_after_a_kill_is_written_once(tmp_path):
    """The checkpoint of step 5 was written before that step's evaluation."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 5, "loss": 1.0}\n{"step": 5, "val_loss": 2.0}\n')
    open_metrics(file, Progress(step=5, evaluated_step=0)).close()
    assert file.read_text() == '{"step": 5, "loss": 1.0}\n'


def test_a_metric_that_is_not_finite_is_written_as_null(dataset, tmp_path, monkeypatch):
    bad = [math.nan, math.inf, 0.0, 0.0]
    results = SimpleNamespace(tolist=lambda: bad)
    begin = Trainer.__init__

    def with_bad_results(self, *args, **options):
        begin(self, *args, **options)
        self.train_step.results = results

    monkeypatch.setattr(Trainer, "__init__", with_bad_results)
    assert run(dataset, tmp_path, "--max_iters=1") == 0
    _, row, _ = read_rows(tmp_path)
    assert [row[key] for key in ("loss", "grad_norm", "tokens_per_s")] == [None] * 3


def test_a_full_disk_costs_rows_of_metrics_and_neither_the_run_nor_later_rows(
    dataset, tmp_path, capsys, monkeypatch
):
    resource = pytest.importorskip("resource")  # a limit of a file's size is POSIX
    file = tmp_path / "metrics.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    record = RunLog._record

    def on_a_small_disk(self, **values):
        step = self.progress.step
        size = file.stat().st_size + 7 if step in (2, 3) else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        record(self, **values)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(RunLog, "_record", on_a_small_disk)
    assert run(dataset, tmp_path, "--max_iters=4") == 0
    assert capsys.readouterr().out.count(f"could not write {file}: File too large") == 1
    assert list(losses(tmp_path)) == [1, 2, 3, 4]


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


def draw(folder: Path, rows: list[dict], best: tuple[float, int] | None = None) -> None:
    """Draw loss.png from a metrics.jsonl with these rows."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_losses(folder, best)


@pytest.mark.picture
def test_the_picture_can_be_drawn_from_none_one_and_many_rows(tmp_path):
    numbers = range(1, 300)
    cases = {
        "nothing": [],
        "one step": [step_row(1, 2.0)],
        "one evaluation": [evaluation_row(0, 4.0)],
        "not finite": [step_row(1, None), evaluation_row(1, None)],
        "many": [step_row(i, 4 / i) for i in numbers] + [evaluation_row(i, 4 / i) for i in numbers],
    }
    drawn = {}
    for name, rows in cases.items():
        draw(tmp_path, rows)
        assert imread(tmp_path / "loss.png").shape == (550, 770, 4)
        drawn[name] = coloured_pixels(tmp_path / "loss.png")
    assert drawn["nothing"] == drawn["not finite"] < drawn["one evaluation"] < drawn["many"]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


@pytest.mark.picture
def test_the_lines_of_a_picture(tmp_path, monkeypatch):
    """Evaluations begin after step 0 if there are others; of the steps some are left out."""
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *args, **options: figures.append(figure)
    )
    monkeypatch.setattr("gpt12.log.MAX_DRAWN", 40)
    rows = [evaluation_row(step, 4.0 - step) for step in range(3)]
    of_steps = [step_row(step, 3.5) for step in range(1, 100)]
    for evaluations in (rows, rows[:1]):
        draw(tmp_path, of_steps + evaluations, best=(2.5, 1))
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
    assert list(losses(tmp_path)) == [1, 2, 3]
    assert trainer(tmp_path)["step"] == 3


def test_a_wandb_that_does_not_start_ends_with_a_message(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    with pytest.raises(UserError, match=r"wandb_log=True, but wandb does not start.*WANDB_MODE"):
        run(dataset, tmp_path, "--max_iters=1", "--wandb_log")


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


def test_seconds_count_only_while_the_clock_runs(time):
    progress = Progress(elapsed_s=5.0)
    clock = Clock(CPU, progress)

    def make_a_step(seconds):
        time.now += seconds
        progress.step += 1

    make_a_step(1)
    assert clock.steps_per_second() is None
    clock.start()
    for _ in range(3):
        make_a_step(2)
    assert clock.steps_per_second() == 0.5
    make_a_step(1)
    with clock.stopped():
        time.now += 100
    assert clock.running
    make_a_step(1)
    assert clock.steps_per_second() == 1.0  # the 100 seconds in between do not count
    clock.stop()
    make_a_step(10)
    with clock.stopped():
        time.now += 100
    assert not clock.running
    assert progress.elapsed_s == 13.0


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_starting_and_stopping_wait_for_the_device(time, monkeypatch, kind):
    waited = []
    monkeypatch.setattr(f"torch.{kind}.synchronize", lambda: waited.append(kind))
    clock = Clock(Machine(torch.device(kind), torch.float32, compiled=False), Progress())
    clock.start()
    clock.stop()
    assert waited == [kind, kind]


def test_a_run_counts_neither_compiling_nor_evaluations_nor_saves(
    dataset, tmp_path, monkeypatch, time
):
    """A step takes a second, an evaluation 100, a checkpoint 1,000. The first step compiles."""
    monkeypatch.setattr(TrainStep, "__call__", time.taking(1, TrainStep.__call__))
    monkeypatch.setattr(train, "mean_loss", time.taking(100, train.mean_loss))
    monkeypatch.setattr(Saver, "_save", time.taking(1000, Saver._save))
    options = ["--max_iters=6", "--eval_interval=3", "--save_interval_s=2"]
    assert run(dataset, tmp_path, *options, "--always_save_checkpoint=False") == 0
    assert losses(tmp_path, "elapsed_s") == {0: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    speed = 2 * 4 * 16  # tokens in a step
    assert losses(tmp_path, "tokens_per_s") == {1: None} | dict.fromkeys(range(2, 7), speed)
