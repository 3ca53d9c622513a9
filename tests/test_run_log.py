"""gpt12/run_log.py: what a run tells on the terminal."""

import io
import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.dataset import open_dataset
from data.tokenizers import CharTokenizer
from data.windows import EvalWindows
from gpt12.run_log import RunLog, say
from gpt12.weights import save_pretrained
from model import GPT, GPTConfig, parameter_count
from tests.helpers import (
    built,
    built_from,
    read_rows,
    resume,
    run,
    same_tensors,
    trainer,
    weights,
)
from train import Trainer

pytestmark = pytest.mark.usefixtures("no_picture")


def introduction(capsys, dataset, out_dir, *options: str) -> str:
    """Return what a run says before it trains."""
    found = built(dataset, out_dir, *options)
    capsys.readouterr()
    RunLog(found).introduce()
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The introduction


def test_the_model_the_data_and_the_tokens_of_a_step_are_told(dataset, tmp_path, capsys):
    said = introduction(capsys, dataset, tmp_path, "--max_iters=20")
    parameters = parameter_count(GPTConfig(16, 13, 1, 2, 16, bias=False))
    assert (
        f"model: {parameters:,} parameters (1 layer, 2 heads, 16 channels, context 16 tokens, "
        "vocabulary 13)"
    ) in said
    assert f"data: {dataset}, 1 document, 2,600 training and 400 validation tokens\n" in said
    assert "\nstep: 4 sequences x 16 tokens x 2 micro-batches = 128 tokens; 20 steps read" in said


@pytest.mark.parametrize(
    ("max_iters", "told"),
    [
        (1, "; 1 step read 5% of the text"),  # 8 of its 161 windows
        (20, "; 20 steps read 99% of the text"),
        (40, "; 40 steps read the text 2.0 times"),
        (100_000, "; 100,000 steps read the text 4,968.9 times"),
    ],
)
def test_how_much_of_the_text_a_run_reads_is_told(dataset, tmp_path, capsys, max_iters, told):
    assert f"{told}\n" in introduction(capsys, dataset, tmp_path, f"--max_iters={max_iters}")


def test_one_sequence_and_a_run_that_reads_very_little_are_told(dataset, tmp_path, capsys):
    options = ["--max_iters=1", "--batch_size=1", "--gradient_accumulation_steps=1"]
    said = introduction(capsys, dataset, tmp_path, *options)
    assert "step: 1 sequence x 16 tokens x 1 micro-batch = 16 tokens; 1 step read less than" in said


MANY_PARAMETERS = ["--n_embd=64", "--n_layer=2"]  # 38 for each of the text's 2,600 tokens


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], []),
        (["--warmup_iters=50"], []),
        (["--warmup_iters=51"], ["51 steps takes more than half .* --warmup_iters=10$"]),
        (["--warmup_iters=51", "--decay_lr=False"], []),
        (["--lr_decay_iters=50"], []),
        (["--lr_decay_iters=49"], ["after step 49 of 100 .* --lr_decay_iters=100$"]),
        (["--max_iters=30"], []),
        (["--max_iters=29"], ["29 updates will hardly .* --max_iters=58$"]),
        (["--max_iters=1", "--warmup_iters=0"], ["1 update will hardly .* --max_iters=30$"]),
        # A step of 8 of the 161 windows.
        (["--num_epochs=1"], ["21 updates .* --gradient_accumulation_steps=1 or --num_epochs=2$"]),
        (
            ["--num_epochs=1", "--gradient_accumulation_steps=1", "--batch_size=8"],
            ["21 updates .* --batch_size=4 or --num_epochs=2$"],
        ),
        # An epoch of a text is 20 steps.
        (["--max_iters=403"], []),
        ([*MANY_PARAMETERS, "--max_iters=402"], []),
        (
            [*MANY_PARAMETERS, "--max_iters=412"],
            ["2,600 training tokens and is read 20 times: .* by heart. Try a smaller --max_iters"],
        ),
        ([*MANY_PARAMETERS, "--num_epochs=25"], ["by heart. Try a smaller --num_epochs"]),
    ],
)
def test_what_is_likely_to_spoil_a_run_is_warned_of_with_what_to_change(
    dataset, tmp_path, capsys, options, told
):
    length = [] if "--num_epochs" in str(options) else ["--max_iters=100"]
    said = introduction(capsys, dataset, tmp_path, *length, *options)
    found = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(found) == len(told), found
    for line, pattern in zip(found, told, strict=True):
        assert re.search(pattern, line), line


@pytest.mark.parametrize("world", [1, 2])
def test_the_advised_accumulation_can_be_shared_by_the_ranks(
    dataset, tmp_path, capsys, monkeypatch, world
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    options = ["--num_epochs=1", "--batch_size=1", "--gradient_accumulation_steps=24"]
    said = introduction(capsys, dataset, tmp_path, *options)
    assert f"try --gradient_accumulation_steps={24 // 5 // world * world} or" in said


def test_several_processes_are_told(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = introduction(capsys, dataset, tmp_path)
    assert "x 2 micro-batches on 2 processes = 128 tokens" in said


def test_other_ranks_than_0_say_nothing(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert introduction(capsys, dataset, tmp_path) == ""


def test_a_lora_run_says_how_many_parameters_it_trains(dataset, finished, tmp_path, capsys):
    options = [f"--init_from={finished}", "--lora_rank=2", "--lora_targets=c_fc"]
    said = introduction(capsys, dataset, tmp_path, *options)
    trained = 2 * (16 + 64)  # A and B of one layer's (16, 64) matrix
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
    [line] = [line for line in said.splitlines() if line.startswith("data: ")]
    assert line.startswith(f"data: {questions}, 26 documents, ")
    assert line.endswith("; only the answers are trained on")
    text = tmp_path / "plain.txt"
    text.write_text("only text. " * 200)
    said = introduction(capsys, text, tmp_path / "out", *options)
    assert f"data: {text}, 1 document, " in said
    assert "only the answers" not in said
    assert "; plain text, every token is a target" in said


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


def test_a_long_run_that_is_nearly_over_is_not_warned_of(dataset, tmp_path, capsys):
    found = built(dataset, tmp_path, "--max_iters=100000000000")
    found.progress.step = found.config.max_iters - 1
    capsys.readouterr()
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


@pytest.mark.parametrize(
    ("max_iters", "told"), [(101, []), (100 + 60 * 100, ["1 h 40 min"]), (220, ["2 min"])]
)
def test_without_a_progress_bar_the_time_to_go_is_told_once(
    dataset, tmp_path, capsys, max_iters, told
):
    found = built(dataset, tmp_path, f"--max_iters={max_iters}")
    found.progress.step = 100
    log = RunLog(found)
    log.bar = SimpleNamespace(disable=True, set_postfix_str=lambda *args, **options: None)
    log._record = lambda **values: None
    for steps_per_s in (None, 1.0, 1.0):  # no speed is known at the first step
        log.log_step(2.0, 0.1, 1.0, bad=0, skipped=0, steps_per_s=steps_per_s)
    assert re.findall(", about (.*) to go", capsys.readouterr().out) == told


def test_metrics_hold_the_promised_columns(dataset, tmp_path):
    assert run(dataset, tmp_path, "--max_iters=1") == 0
    evaluation, step, _ = read_rows(tmp_path)
    of_a_step = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
    assert set(step) == of_a_step
    assert set(evaluation) == {"step", "tokens", "train_loss", "val_loss", "elapsed_s"}


def test_an_evaluation_tells_the_perplexity_which_is_e_to_the_loss(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path, "--max_iters=4", "--eval_interval=2") == 0
    said = re.findall(r"val loss ([\d.]+) \(perplexity ([\d.]+)\)", capsys.readouterr().out)
    assert len(said) == 3
    for loss, perplexity in said:
        assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("reentrant call")])
def test_a_line_that_cannot_be_written_costs_no_run(dataset, tmp_path, monkeypatch, error):
    """The log's disk is full, or a signal comes in the middle of a line."""

    def write(text):
        raise error

    monkeypatch.setattr(
        sys, "stdout", SimpleNamespace(write=write, flush=lambda: None, encoding="utf-8")
    )
    assert run(dataset, tmp_path, "--max_iters=2") == 0


def test_a_console_in_cp1252_does_not_end_a_run(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    say("a text with \u6f22")
    assert console.buffer.getvalue().split() == b"a text with ?".split()


def exhausted(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_little_memory_for_a_sample_does_not_end_the_run(
    dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("gpt12.run_log.generate", exhausted)
    assert run(dataset, tmp_path, "--max_iters=3") == 0
    assert capsys.readouterr().out.count("too little memory beside the training step") == 2


@pytest.mark.usefixtures("own_cache")
def test_a_sample_of_text_without_a_line_end_begins_with_the_texts_first_character(tmp_path):
    (tmp_path / "one.txt").write_text("abcabc abdbca " * 200)
    options = ["--tokenizer=char", "--max_iters=2"]
    assert run(tmp_path / "one.txt", tmp_path / "out", *options) == 0


@pytest.mark.usefixtures("own_cache")
def test_the_sample_of_instruction_data_is_a_question_and_its_answer(
    chat_model, questions, tmp_path, capsys
):
    dataset = open_dataset(str(questions), tokenizer=CharTokenizer(CHARS), block_size=32)
    x, y, _ = EvalWindows(dataset.val, 32).batch(np.array([0]))
    first_target = int(np.flatnonzero(y[0] >= 0)[0])
    question = dataset.tokenizer.decode(x[0][: 1 + first_target])
    options = [f"--init_from={chat_model}", "--block_size=32", "--max_iters=1"]
    assert run(questions, tmp_path / "out", *options) == 0
    assert capsys.readouterr().out.count(f"    | {question.splitlines()[0]}") == 2


@pytest.mark.usefixtures("fresh_compiler")
def test_what_training_has_compiled_runs_eagerly_while_a_sample_is_written(dataset, tmp_path):
    """Otherwise it would be compiled again for each length of a text."""
    trainer = Trainer(built(dataset, tmp_path))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    for block in trainer.model.transformer.h:
        block.compile(backend=backend, dynamic=False)
    trainer.log.run = replace(
        trainer.log.run, machine=replace(trainer.log.run.machine, compiled=True)
    )
    trainer.log.show_sample()
    assert not compiled
    trainer.model(torch.zeros(1, 4, dtype=torch.int64))
    assert compiled


def test_training_goes_on_in_training_mode_after_a_sample(dataset, tmp_path, monkeypatch):
    trainer = Trainer(built(dataset, tmp_path))
    trainer.model.train()
    trainer.log.show_sample()
    assert trainer.model.training


def test_the_picture_names_the_model_in_best_and_not_one_of_other_data(
    dataset, finished, tmp_path, monkeypatch
):
    bests = []
    monkeypatch.setattr(
        "gpt12.metrics.Picture.draw", lambda self, metrics, best: bests.append(best)
    )
    folder = shutil.copytree(dataset, tmp_path / "data")
    out_dir = shutil.copytree(finished, tmp_path / "out")
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row.get("val_loss") is not None:
            row["val_loss"] /= 100  # far below what any model reaches on the other data
    (out_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = json.loads((folder / "meta.json").read_text()) | {"source_sha256": "1" * 64}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert resume(out_dir, "--max_iters=6", f"--dataset={folder}") == 0
    saved = trainer(out_dir, "best")
    assert saved["step"] == 6
    assert bests[-1] == (saved["best_val_loss"], 6)


# --------------------------------------------------------------------------------------------------
# The end


def test_a_finished_run_tells_where_its_curves_are_and_how_to_sample(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    said = capsys.readouterr().out
    assert f"; curves: {tmp_path}/loss.png\nread what it writes: python sample.py --out" in said
    assert re.search(r"2 steps in [\d.]+ s of training, best val loss [\d.]+ at step 2", said)
    assert run(dataset, tmp_path, "--max_iters=1") == 0
    assert "\n1 step in " in capsys.readouterr().out


def test_the_commands_to_type_next_quote_a_folder_with_a_blank(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path / "my run", "--max_iters=1") == 0
    assert f"python sample.py --out_dir='{tmp_path}/my run'\n" in capsys.readouterr().out


def test_a_run_whose_loss_was_lost_does_not_invite_to_sample(
    dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Trainer, "log_step", lambda self, lr: 2.0)  # bad steps in a row
    assert run(dataset, tmp_path, "--max_iters=2", "--max_bad_steps=2") == 1
    said = capsys.readouterr().out
    assert "stopping at step 1: the last 2 updates had a loss or gradient that is not fin" in said
    assert "sample.py" not in said


@pytest.mark.parametrize(("after", "told"), [(1.9, False), (2.1, True)])
def test_a_run_that_improves_nothing_says_so(dataset, tmp_path, monkeypatch, capsys, after, told):
    values = iter((2.5, 2.0, 2.5, after))  # training and validation, before and after
    monkeypatch.setattr("train.mean_loss", lambda *args, **options: next(values))
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    said = capsys.readouterr().out
    assert ("no better than at the start, val loss 2.0000" in said) == told


def test_an_evaluation_alone_tells_loss_perplexity_and_warnings(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path / "none", "--eval_only") == 0
    said = re.findall(r"val loss ([\d.]+), perplexity ([\d.]+) over (\d+)", capsys.readouterr().out)
    [(loss, perplexity, windows)] = said
    assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)
    assert windows == "25"
    assert not (tmp_path / "none").exists()


def test_an_evaluation_alone_says_what_makes_its_figure_doubtful(dataset, tmp_path, capsys):
    (tmp_path / "val.bin").write_bytes((dataset / "val_000000.bin").read_bytes()[1024:])
    (tmp_path / "meta.pkl").touch()
    assert run(tmp_path, tmp_path / "none", "--eval_only") == 0
    said = capsys.readouterr().out
    assert "The vocabulary is assumed to have 13 ids, the largest one plus one" in said


def test_a_resumed_run_is_not_compared_with_its_start(finished, tmp_path, capsys, monkeypatch):
    import shutil

    out_dir = shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr("train.mean_loss", lambda *args, **options: 9.0)
    assert resume(out_dir, "--max_iters=5") == 0
    assert "no better than at the start" not in capsys.readouterr().out


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

    def remember(self, run):
        begin(self, run)
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
        ("gpt12.metrics.Metrics.append", 2),
        ("gpt12.metrics.Picture.draw", 4),
        ("gpt12.run_log.RunLog.show_sample", 4),
        ("data.windows.EvalWindows.batch", 2),
        ("gpt12.loader.Loader.load", 2),
        ("gpt12.saver.Saver._write_best", 2),
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
    assert "failed at step 4\ngo on with: python train.py --init_from=resume --out_dir=" in said
    assert trainer(tmp_path / "out")["step"] == 4
    assert trainer(tmp_path / "out")["best_step"] == best_step
    assert trainer(tmp_path / "out", "best")["step"] == best_step
    assert resume(tmp_path / "out") == 0
    assert run(dataset, tmp_path / "whole", *RARE_SAVES) == 0
    assert same_tensors(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_an_update_that_fails_half_way_leaves_the_older_last(dataset, tmp_path, monkeypatch):
    options = [*RARE_SAVES, "--always_save_checkpoint=True", "--eval_interval=3"]
    monkeypatch.setattr(torch.optim.AdamW, "step", failing_step(5))
    with pytest.raises(ZeroDivisionError):
        run(dataset, tmp_path, *options)
    assert trainer(tmp_path)["step"] == 3


def failing_step(updates: int):
    """Return an optimizer's step that succeeds so often and then raises."""
    step = torch.optim.AdamW.step
    count = itertools.count(1)

    def call(self, *args):
        if next(count) > updates:
            raise ZeroDivisionError
        step(self, *args)

    return call
