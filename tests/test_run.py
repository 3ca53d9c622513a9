"""gpt12/run.py: what a run is built of, and when there is nothing left to do."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from data.shards import Tokens
from data.windows import TrainWindows
from gpt12.errors import UserError
from gpt12.run_log import RunLog
from tests.helpers import built, built_from, evaluations, losses, resume, run, trainer

pytestmark = pytest.mark.usefixtures("no_picture")


def test_the_seed_decides_the_weights_and_the_windows(dataset, tmp_path):
    runs = [built(dataset, tmp_path, f"--seed={seed}") for seed in (1, 1, 2)]
    starts = [r.train_windows.starts(np.arange(9)).tolist() for r in runs]
    assert starts[0] == starts[1] != starts[2]
    head, again, other = (r.model.lm_head.weight for r in runs)
    assert torch.equal(head, again)
    assert not torch.equal(head, other)


@pytest.mark.parametrize(("eval_iters", "windows"), [(2, 8), (6, 24), (7, 25), (0, 25)])
def test_eval_iters_counts_batches_and_an_evaluation_is_at_most_one_pass(
    dataset, tmp_path, eval_iters, windows
):
    assert built(dataset, tmp_path, f"--eval_iters={eval_iters}").eval_count == windows


def test_num_epochs_sets_the_number_of_steps(dataset, tmp_path):
    per_epoch = TrainWindows(Tokens.open(dataset, "train"), 16, 1337).per_epoch
    found = built(dataset, tmp_path, "--num_epochs=1.5")
    assert found.windows_per_step == 8
    assert found.config.max_iters == math.ceil(1.5 * per_epoch / 8)


def test_every_auto_is_decided_in_the_runs_configuration(dataset, tmp_path):
    options = ["--dtype=auto", "--recompute=auto", "--batch_size=auto", "--lora_rank=0"]
    found = built(dataset, tmp_path, *options, "--gradient_accumulation_steps=6").config
    assert (found.dtype, found.recompute, found.batch_size) == ("float32", "none", 6)


def test_a_loaded_model_brings_its_own_shape(dataset, finished, tmp_path):
    options = [f"--init_from={finished}", "--n_layer=7", "--n_embd=64", "--lora_rank=2"]
    found = built(dataset, tmp_path, *options)
    shape = found.model.config
    assert (found.config.n_layer, found.config.n_embd) == (shape.n_layer, shape.n_embd) == (1, 16)
    assert found.config.lora_alpha == 4.0  # twice the rank


def test_resuming_a_finished_run_says_that_it_is_complete_and_changes_nothing(
    finished, tmp_path, capsys
):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in out_dir.rglob("*")}
    capsys.readouterr()
    assert resume(out_dir) == 0
    told = "this run is complete (4 of 4 steps); go on with --max_iters=8\n"
    assert capsys.readouterr().out == told
    after = {file: file.stat().st_mtime_ns for file in out_dir.rglob("*")}
    assert after == before


def test_resuming_with_fewer_steps_than_are_finished_says_what_is_wrong(finished):
    message = "4 finished steps, more than max_iters=3: go on with a larger one.*--max_iters=8"
    with pytest.raises(UserError, match=message):
        resume(finished, "--max_iters=3")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_a_finished_run_with_more_steps_continues_it(dataset, tmp_path, optimizer):
    fixed = ["--decay_lr=False", f"--optimizer={optimizer}"]
    assert run(dataset, tmp_path / "a", *fixed, "--max_iters=6") == 0
    assert run(dataset, tmp_path / "b", *fixed, "--max_iters=4") == 0
    assert resume(tmp_path / "b", "--max_iters=6") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("stopped", [1, 2, 3, 5])
def test_a_run_resumes_exactly_before_and_after_its_rows_get_longer(
    dataset, tmp_path, monkeypatch, stopped
):
    options = ["--short_context_share=0.5", "--max_iters=6", "--save_interval_s=0"]

    def killed(self):
        raise SystemExit("killed")

    assert run(dataset, tmp_path / "a", *options) == 0
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr("train.Trainer.evaluation_is_due", lambda self: self.progress.step == stopped)
        m.setattr("train.Trainer.evaluate", killed)
        run(dataset, tmp_path / "b", *options)
    assert resume(tmp_path / "b") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert trainer(tmp_path / "a")["position"] == trainer(tmp_path / "b")["position"]


def test_a_run_with_a_short_context_first_is_another_run(dataset, tmp_path):
    assert run(dataset, tmp_path / "a", "--max_iters=4", "--short_context_share=0.5") == 0
    assert run(dataset, tmp_path / "b", "--max_iters=4") == 0
    assert losses(tmp_path / "a")[1] != losses(tmp_path / "b")[1]


def test_a_sequence_that_cannot_be_cut_into_rows_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="block_size=12 is not a multiple of 8: choose another"):
        run(dataset, tmp_path / "a", "--short_context_share=0.5", "--block_size=12")


def test_a_run_on_other_data_says_so_and_forgets_its_best(dataset, finished, tmp_path, capsys):
    """A loss on other text says nothing: best/ would never be written, and patience would end."""
    folder = shutil.copytree(dataset, tmp_path / "data")
    out_dir = shutil.copytree(finished, tmp_path / "out")
    argv = ["--init_from=resume", f"--out_dir={out_dir}", f"--dataset={folder}"]
    for digit, other in (("0", False), ("1", True)):
        meta = json.loads((folder / "meta.json").read_text()) | {"source_sha256": digit * 64}
        (folder / "meta.json").write_text(json.dumps(meta))
        capsys.readouterr()
        found = built_from([*argv, "--max_iters=9"])
        RunLog(found).introduce()
        said = capsys.readouterr().out
        assert ("the data are not those that this run began with" in said) == other
        assert (found.progress.best_val_loss is None) == other


def test_only_evaluating_a_run_on_other_data_replaces_nothing_and_says_nothing(
    dataset, finished, tmp_path, capsys
):
    folder = shutil.copytree(dataset, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text()) | {"source_sha256": "1" * 64}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert resume(finished, "--eval_only", f"--dataset={folder}") == 0
    said = capsys.readouterr().out
    assert "val loss" in said
    assert "no longer counts" not in said


def test_a_data_set_without_a_training_split_can_only_be_evaluated(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    for file in (tmp_path / "data").glob("train_*.bin"):
        file.unlink()
    with pytest.raises(UserError, match=r"no training shards .*only --eval_only works"):
        run(tmp_path / "data", tmp_path / "out", "--max_iters=1")
    assert run(tmp_path / "data", tmp_path / "out", "--eval_only") == 0
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped_before_its_last_evaluation_is_not_complete(
    dataset, tmp_path, monkeypatch
):
    def killed(self):
        raise SystemExit("killed")

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr("train.Trainer.evaluation_is_due", lambda self: self.progress.step == 3)
        m.setattr("train.Trainer.evaluate", killed)
        run(dataset, tmp_path, "--max_iters=3", "--save_interval_s=0")
    assert trainer(tmp_path)["step"] == 3
    assert resume(tmp_path) == 0
    assert evaluations(tmp_path) == [3]
