"""gpt12/fit.py: what is tried, what a trial leaves behind, and runs that did not fit at first."""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import train
from gpt12 import fit
from gpt12.checkpoint import trainer_tensors
from gpt12.errors import UserError
from gpt12.optimizer import OPTIMIZERS, Entry
from gpt12.run import Run
from model import GPT
from tests.helpers import (
    CPU,
    DEVICES,
    OUT,
    config,
    losses,
    plain_step,
    read_json,
    refused,
    resume,
    run,
    same_tensors,
    same_weights,
    small_gpt,
    train_on,
    weights,
)

pytestmark = pytest.mark.usefixtures("own_folder")


def attempts(**changes):
    """Return what is tried as (recompute, micro-batch, micro-batches)."""
    found = []
    for attempt in fit.list_attempts(config(**changes)):
        assert replace(attempt, recompute="none", batch_size=1, gradient_accumulation_steps=1) == (
            config(**changes | {"recompute": "none", "batch_size": 1} | ONE)
        )
        found.append((attempt.recompute, attempt.batch_size, attempt.gradient_accumulation_steps))
    return found


ONE = {"gradient_accumulation_steps": 1}


def test_attempts_recompute_first_then_cut_the_micro_batch_by_its_smallest_factor():
    assert attempts(batch_size=12, block_size=1024, gradient_accumulation_steps=40) == [
        ("none", 12, 40),
        ("pointwise", 12, 40),
        ("pointwise", 6, 80),  # 6,144 tokens; half of it would be less than 4,096
        ("block", 6, 80),
        ("block", 3, 160),
        ("block", 1, 480),
    ]
    assert attempts(batch_size=64, block_size=256, recompute="pointwise") == [
        ("pointwise", 64, 1),
        ("pointwise", 32, 2),
        ("pointwise", 16, 4),
        ("block", 16, 4),
        ("block", 8, 8),
        ("block", 4, 16),
        ("block", 2, 32),
        ("block", 1, 64),
    ]
    assert attempts(batch_size=35, block_size=1024, recompute="block") == [
        ("block", 35, 1),
        ("block", 7, 5),
        ("block", 1, 35),
    ]
    assert attempts(batch_size=1, recompute="block") == [("block", 1, 1)]


# --------------------------------------------------------------------------------------------------
# Trials. A GPU is acted: its memory ends at a number of sequences.


@pytest.fixture
def acted_gpu(monkeypatch):
    """Return a machine that tries, whose forward pass takes at most 3 sequences, or 6 with block.

    An evaluation's batch is twice as large and never too large.
    """
    forward = GPT.forward

    def limited(self, idx, *args, **options):
        limit = {"none": 2, "pointwise": 3, "block": 6}[self.transformer.h[0].recompute]
        if len(idx) > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, *args, **options)

    monkeypatch.setattr("model.GPT.forward", limited)
    monkeypatch.setattr("gpt12.device.Machine.on_gpu", property(lambda self: True))
    monkeypatch.setattr("gpt12.fit.cap_memory", Mock())
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", Mock())
    monkeypatch.setattr("torch.cuda.empty_cache", Mock())
    fork_rng = torch.random.fork_rng
    monkeypatch.setattr("torch.random.fork_rng", lambda devices, **more: fork_rng([], **more))


def small_run(model=None, resumed=False, packed=False, **changes) -> Run:
    """Return a run of the small model with what fit() asks of it."""
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Run))
    parts["request"] = SimpleNamespace(resumed=resumed)
    parts["config"] = config(**changes)
    parts["machine"] = replace(CPU, rank=1, world=2)
    parts["model"] = model or small_gpt()
    parts["packed"] = packed
    return Run(**parts)


def fit_small(model=None, **changes):
    """Return the settings that fit() finds for a rank of two, which tries alone."""

    def make_step(model, config, machine, packed, cuda_graph):
        assert (machine.rank, machine.world) == (0, 1)
        assert not cuda_graph
        return train.TrainStep(model, config, machine, packed, cuda_graph)

    return fit.fit(small_run(model, **changes), make_step).config


@pytest.mark.parametrize(
    ("batch_size", "recompute", "expected"),
    [
        (2, "none", ("none", 2, 4)),
        (3, "none", ("pointwise", 3, 4)),
        (12, "none", ("block", 6, 8)),
        (14, "pointwise", ("block", 1, 56)),
    ],
)
@pytest.mark.usefixtures("acted_gpu")
def test_the_first_attempt_that_fits_is_taken_and_the_lines_say_so(
    capsys, batch_size, recompute, expected
):
    model = small_gpt()
    asked = {"batch_size": batch_size, "recompute": recompute, "gradient_accumulation_steps": 4}
    found = fit_small(model, **asked)
    assert (found.recompute, found.batch_size, found.gradient_accumulation_steps) == expected
    assert model.transformer.h[0].recompute == found.recompute
    said = capsys.readouterr().out.splitlines()
    assert len(said) == fit.list_attempts(config(**asked)).index(found)
    if said:
        assert said[-1].endswith(f": trying {fit.words(found)}")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.usefixtures("acted_gpu")
def test_a_step_that_never_fits_is_a_users_mistake(monkeypatch, keep):
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr("train.TrainStep.accumulate_gradients", full)
    last = "none, batch_size=2.*deterministic=True keeps" if keep else "block, batch_size=1"
    message = f"out of memory with recompute={last}.*--lora_rank=16"
    with pytest.raises(UserError, match=message):
        fit_small(resumed=keep, deterministic=True)


@pytest.mark.usefixtures("acted_gpu")
def test_another_error_is_no_lack_of_memory(monkeypatch):
    broken = Mock(side_effect=RuntimeError("a bug about memory"))
    monkeypatch.setattr("train.TrainStep.accumulate_gradients", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        fit_small()


@pytest.mark.usefixtures("acted_gpu")
def test_ranks_take_the_latest_attempt_of_all(monkeypatch, capsys):
    monkeypatch.setattr("gpt12.fit.least_of_ranks", lambda value, device: min(value, -3))
    found = fit_small(batch_size=14)  # this one's own attempt is the last
    assert (found.recompute, found.batch_size) == ("block", 1)
    assert "another rank" not in capsys.readouterr().out
    model = small_gpt()
    found = fit_small(model, batch_size=2)  # the first
    assert (found.recompute, found.batch_size) == ("block", 1)
    assert model.transformer.h[0].recompute == "block"
    assert "another rank has less memory: recompute=block, batch_size=1" in capsys.readouterr().out


@pytest.mark.usefixtures("acted_gpu")
@pytest.mark.parametrize(
    ("optimizer", "fitting", "packed"),
    [("adamw", True, False), ("muon", False, True), ("rmsprop", True, True)],
)
def test_a_trial_changes_nothing(monkeypatch, optimizer, fitting, packed):
    """Weights, random numbers, gradients; and it makes the optimizer's state before the step."""
    other = Entry(lambda groups, lr, betas: [torch.optim.RMSprop(groups, lr)])
    monkeypatch.setitem(OPTIMIZERS, "rmsprop", other)
    model = small_gpt(dropout=0.3)
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    made = []
    accumulate = train.TrainStep.accumulate_gradients

    def noted(self):
        held = sum(len(optimizer.state) for optimizer in self.optimizers)
        made.append((self.micro_steps, held > 0, self.targets_per_batch))
        accumulate(self)
        if not fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("train.TrainStep.accumulate_gradients", noted)
    asked = {"optimizer": optimizer, "gradient_accumulation_steps": 8, "dropout": 0.3}
    run = small_run(model, packed=packed, **asked)
    assert fit.fits_in_a_trial(run.config, run, train.TrainStep) == fitting
    assert made == [(2, True, [15, 15] if packed else [16, 16])]
    assert same_weights(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_trial_makes_the_state_that_training_makes_and_moves_no_weight(optimizer, device):
    trained, tried = (plain_step(device, optimizer=optimizer) for _ in range(2))
    train_on(trained, 3)
    before = [p.clone() for p in tried.model.parameters()]
    fit.try_step(tried)
    assert same_weights(tried.model, before)
    shapes = [{name: t.shape for name, t in trainer_tensors(s).items()} for s in (trained, tried)]
    assert shapes[0] == shapes[1]


# --------------------------------------------------------------------------------------------------
# Whole runs, on a CPU: an estimate in place of the trial


def need_gib_per_row(monkeypatch, free: float) -> None:
    """Let a sequence need 3 GiB with recompute=none, 2 with pointwise, 1 with block."""
    sizes = {"none": 3, "pointwise": 2, "block": 1}
    monkeypatch.setattr(
        "gpt12.fit.step_memory", lambda shape, asked, _: asked.batch_size * sizes[asked.recompute]
    )
    monkeypatch.setattr("gpt12.fit.available_memory", lambda machine: free)


def kept_memory_keys(key: str) -> list:
    """Return what run.json says of the keys of memory. key: "config" or "requested"."""
    keys = ("recompute", "batch_size", "gradient_accumulation_steps")
    return [*map(read_json("fallen/run.json")[key].get, keys)]


def test_a_run_that_took_a_later_attempt_trains_as_the_one_that_fitted(monkeypatch, capsys):
    fixed = ["--max_iters=6", "--eval_interval=3"]
    typed = "recompute=block, batch_size=2, gradient_accumulation_steps=4"
    run("--out_dir=typed", *fixed, *(f"--{pair}" for pair in typed.split(", ")))
    need_gib_per_row(monkeypatch, free=2)
    run("--out_dir=fallen", *fixed)
    assert f"trying {typed}" in capsys.readouterr().out
    assert losses("fallen") == losses("typed")
    assert same_tensors(weights("fallen"), weights("typed"))
    assert kept_memory_keys("config") == ["block", 2, 4]
    assert kept_memory_keys("requested") == ["none", 4, 2]
    # It goes on as it is, also where there is more memory now; a typed key begins anew.
    need_gib_per_row(monkeypatch, free=100)
    resume("--out_dir=fallen", "--max_iters=8")
    assert kept_memory_keys("config") == ["block", 2, 4]
    resume("--out_dir=fallen", "--max_iters=9", "--recompute=none")
    assert kept_memory_keys("config") == ["none", 4, 2]
    assert losses("fallen", "tokens")[9] == 9 * 2 * 4 * 16


def test_a_deterministic_run_is_not_resumed_in_less_memory(monkeypatch):
    need_gib_per_row(monkeypatch, free=12)
    options = ["--deterministic", "--max_iters=2"]
    try:
        run(*options)
        need_gib_per_row(monkeypatch, free=11)
        refused("deterministic=True keeps a resumed run as it is", resume, "--max_iters=4")
        resume("--max_iters=4", "--deterministic=False")
    finally:
        torch.use_deterministic_algorithms(False)


def test_on_a_cpu_a_run_that_needs_more_than_there_is_ends_before_it_begins(monkeypatch):
    need_gib_per_row(monkeypatch, free=0.5)
    refused("out of memory with recompute=block, batch_size=1,", run)
    assert not (OUT / "run.json").exists()
