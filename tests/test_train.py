"""train.py: a run is exact, resumes exactly, and ends clearly when it cannot go on."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from config import machine
from config.machine import Machine
from data.run import read_checkpoint
from data.shards import Tokens, write_shard
from data.windows import EvalWindows, TrainWindows
from gpt12.errors import UserError, run_main
from model import GPT, MASKED, GPTConfig

from tests.helpers import ENDLESS, ROOT, command, environment, evaluations, losses, read_rows, trainer
from train import AdamW

pytestmark = pytest.mark.usefixtures("no_picture")

CPU = Machine(torch.device("cpu"), torch.float32, compiled=False)
TINY = "--block_size=16 --n_layer=2 --n_head=2 --n_embd=16 --batch_size=4 --gradient_accumulation_steps=2"
QUICK = f"--device=cpu --dtype=float32 {TINY} --eval_interval=10 --eval_iters=2 --learning_rate=1e-2 --warmup_iters=2".split()


def run(dataset, out_dir, *options) -> int:
    return train.main([*QUICK, f"--dataset={dataset}", f"--out_dir={out_dir}", *options])


def perplexities(said: str) -> list[float]:
    """Those that are told, each e to the loss before it."""
    pairs = [(float(a), float(b)) for a, b in re.findall(r"val loss ([\d.]+),? \(?perplexity ([\d.]+)", said)]
    assert [b for _, b in pairs] == pytest.approx([math.exp(a) for a, _ in pairs], abs=0.01)
    return [b for _, b in pairs]


def weights(out_dir, name="last"):
    return load_file(Path(out_dir) / name / "model.safetensors")


def kill_after(monkeypatch, steps):
    """The process dies in the middle of update steps + 1, as by SIGKILL: nothing of ours runs afterwards."""
    original, count = train.Step.__call__, iter(range(10**6))

    def call(self, *args):
        if next(count) == steps:
            raise SystemExit("killed")
        original(self, *args)

    monkeypatch.setattr(train.Step, "__call__", call)


def test_a_killed_run_that_is_resumed_equals_the_unbroken_run_bit_for_bit(dataset, tmp_path, monkeypatch):
    options = ["--max_iters=20", "--dropout=0.2"]
    tick = itertools.count().__next__  # a clock that a second passes on whenever it is read
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=tick, monotonic=tick))
    assert run(dataset, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        kill_after(m, 7)
        run(dataset, tmp_path / "broken", *options, "--save_interval_s=0")
    state = trainer(tmp_path / "broken")
    assert (state["step"], state["position"]) == (7, 7 * 8)
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'broken'}"]) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert losses(tmp_path / "broken", "tokens") == {step: step * 2 * 4 * 16 for step in range(21)}
    for step, lr in losses(tmp_path / "whole", "lr").items():  # of 20 steps two are warm-up
        cosine = 6e-5 + (1e-2 - 6e-5) * (1 + math.cos(math.pi * (step - 3) / 18)) / 2
        assert lr == pytest.approx(1e-2 * step / 3 if step <= 2 else cosine), step
    elapsed = losses(tmp_path / "broken", "elapsed_s")
    assert list(elapsed.values()) == sorted(elapsed.values())
    assert 0 < elapsed[6] <= elapsed[8]  # of the first life and of the second: the clock goes on, too
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    trainers = [load_file(tmp_path / out / "last/trainer.safetensors") for out in ("whole", "broken")]
    assert all(torch.equal(trainers[0][name], trainers[1][name]) for name in trainers[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_a_finished_run_with_more_steps_goes_on(dataset, tmp_path, optimizer):
    fixed = ["--decay_lr=False", f"--optimizer={optimizer}"]
    assert run(dataset, tmp_path / "a", *fixed, "--max_iters=6") == 0
    assert run(dataset, tmp_path / "b", *fixed, "--max_iters=4") == 0
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'b'}", "--max_iters=6"]) == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values(), strict=True)
    )


def test_each_rank_draws_its_own_dropout_numbers_and_none_twice(dataset, tmp_path, monkeypatch):
    """Random numbers of rank 0 alone are saved; another rank takes new ones when it is resumed."""
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    fresh, drawn = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}"], set()
    for rank, argv in (("0", fresh), ("1", fresh), ("1", ["--init_from=resume", f"--out_dir={tmp_path}"])):
        monkeypatch.setenv("RANK", rank)
        train.Run(*train.load_config(argv))
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 3


def test_resuming_a_finished_run_says_that_it_is_complete(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path, "--max_iters=4") == 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    capsys.readouterr()
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out == "this run is complete (4 of 4 steps); go on with --max_iters=8\n"
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(("max_iters", "told"), [(101, []), (100 + 60 * 100, ["1 h 40 min"]), (220, ["2 min"])])
def test_a_run_without_a_progress_bar_says_once_how_long_it_will_take(
    dataset, tmp_path, capsys, monkeypatch, max_iters, told
):
    monkeypatch.setattr(train.Clock, "lap", lambda self: 1.0 if self.steps else None)
    run = train.Run(*train.load_config([*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}"]))
    run.config.max_iters, run.progress.step, run.clock.steps = max_iters, 100, 0
    run.record, bar = lambda **row: None, SimpleNamespace(disable=True, set_postfix_str=lambda *args, **options: None)
    for run.clock.steps in range(3):
        run.log_step(bar, 0.1)
    assert re.findall(", about (.*) to go", capsys.readouterr().out) == told


def test_evaluating_more_often_does_not_move_training(dataset, tmp_path):
    for name, options in (("rare", ["--eval_interval=50"]), ("often", ["--eval_interval=3", "--eval_iters=0"])):
        assert run(dataset, tmp_path / name, "--max_iters=10", "--dropout=0.1", *options) == 0
    assert losses(tmp_path / "rare") == losses(tmp_path / "often")
    rows = read_rows(tmp_path / "often")
    assert evaluations(tmp_path / "often") == [0, 3, 6, 9, 10]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"} == set(rows[1])
    assert {"step", "tokens", "train_loss", "val_loss", "elapsed_s"} == set(rows[0])


def test_an_evaluation_is_the_mean_over_every_target_once(dataset):
    """Of 400 tokens: 50 windows, the last one short, in batches of 6, the last one short too."""
    model, tokens = set_weights(GPT(GPTConfig(8, 13, 2, 2, 8, dropout=0.5))), Tokens.open(dataset, "val")
    ids = torch.from_numpy(tokens.gather(np.array([0]), 400)[0].astype(np.int64))
    model.eval()
    with torch.no_grad():
        log_probs = torch.cat([model(ids[None, i : i + 8])[0][0].log_softmax(1) for i in range(0, 399, 8)])[:399]
    model.train()
    expected = -log_probs.gather(1, ids[1:, None]).double().mean().item()
    assert train.evaluate(model, EvalWindows(tokens, 8), 0, 3, CPU) == pytest.approx(expected, rel=1e-5)
    assert model.training


@pytest.mark.picture
def test_a_run_learns_and_leaves_what_it_promises(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path, "--max_iters=60", "--eval_interval=20") == 0
    curve = losses(tmp_path)
    assert curve[60] < math.log(3) + 0.4 < curve[1]  # each letter is followed by one of three
    for name in (
        "run.json",
        "metrics.jsonl",
        "loss.png",
        "best/model.safetensors",
        "best/config.json",
        "last/trainer.json",
    ):
        assert (tmp_path / name).stat().st_size > 0, name
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["config"]["learning_rate"] == 1e-2
    assert facts["versions"]["torch"]
    said = capsys.readouterr().out
    assert len(perplexities(said)) == 4
    assert re.search(r"memory: about [1-9]\d MiB at the peak", said)  # not 0.0 GiB
    assert f"; curves: {tmp_path / 'loss.png'}\nread what it writes:" in said


def test_the_clock_counts_steps_and_neither_evaluations_nor_saves(dataset, tmp_path, monkeypatch):
    """A step takes a second by this clock, an evaluation 100, a checkpoint 1,000; the first step compiles."""
    now = [0.0]

    def taking(seconds, function):
        def call(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return call

    read = lambda: now[0]  # noqa: E731
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=read, monotonic=read, sleep=None))
    for owner, name, seconds in ((train.Step, "__call__", 1), (train, "evaluate", 100), (train.Run, "write", 1000)):
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))
    options = ["--max_iters=6", "--eval_interval=3", "--save_interval_s=2", "--always_save_checkpoint=False"]
    assert run(dataset, tmp_path, *options) == 0
    assert losses(tmp_path, "elapsed_s") == {0: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    assert losses(tmp_path, "tokens_per_s") == {1: None} | dict.fromkeys(range(2, 7), 2 * 4 * 16)


def test_the_seed_decides_the_weights_and_the_windows(dataset, tmp_path):
    argv = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    runs = [train.Run(*train.load_config([*argv, f"--seed={seed}"])) for seed in (1, 1, 2)]
    starts = [r.windows.starts(np.arange(9)).tolist() for r in runs]
    assert starts[0] == starts[1] != starts[2]
    head, again, other = (r.model.lm_head.weight for r in runs)
    assert torch.equal(head, again) and not torch.equal(head, other)


@pytest.mark.parametrize(("always", "steps"), [(True, [2, 4, 5]), (False, [5])])
def test_a_run_logs_and_saves_at_its_intervals_and_at_its_end(dataset, tmp_path, monkeypatch, always, steps):
    save, saved = train.Run.save, []
    record = lambda self, name: (saved.append((name, self.progress.step)), save(self, name))[1]  # noqa: E731
    monkeypatch.setattr(train.Run, "save", record)
    options = ["--max_iters=5", "--eval_interval=2", "--log_interval=3", f"--always_save_checkpoint={always}"]
    assert run(dataset, tmp_path, *options, "--save_interval_s=1e9") == 0
    assert list(losses(tmp_path)) == [3, 5]
    assert [step for name, step in saved if name == "last"] == steps


@pytest.mark.parametrize(("eval_iters", "windows"), [(2, 8), (6, 24), (7, 25), (0, 25)])
def test_eval_iters_counts_batches_and_ends_after_one_pass(dataset, tmp_path, eval_iters, windows):
    argv = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}", f"--eval_iters={eval_iters}"]
    assert train.Run(*train.load_config(argv)).eval_count == windows


def test_starting_anew_sets_the_old_run_aside(dataset, tmp_path):
    assert run(dataset, tmp_path, "--max_iters=3") == 0
    before = weights(tmp_path)
    assert run(dataset, tmp_path, "--max_iters=2", "--seed=7") == 0
    after = load_file(tmp_path / "previous/last/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def step_config(**changes) -> SimpleNamespace:
    values = {
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
    }
    values |= {
        "gradient_accumulation_steps": 1,
        "batch_size": 2,
        "block_size": 8,
        "cuda_graph": "auto",
        "recompute": "none",
    }
    return SimpleNamespace(**values | changes)


def set_weights(model: GPT) -> GPT:
    """Weights out of a formula: golden values must not depend on a version's random numbers."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.3 * torch.sin(torch.arange(p.numel()) * (i + 1.7)).view_as(p) + (p.ndim == 1 and i % 2))
    return model


def make_step(vocab=13, **changes) -> train.Step:
    model = set_weights(GPT(GPTConfig(8, vocab, 2, 2, 8, bias=True)))
    return train.Step(model, step_config(**changes), CPU)


def fill(step: train.Step, x: torch.Tensor, y: torch.Tensor) -> list[int]:
    step.x.copy_(x.view_as(step.x))
    step.y.copy_(y.view_as(step.y))
    return (step.y != MASKED).sum((1, 2)).tolist()


def test_accumulated_micro_batches_give_the_mean_over_all_targets():
    """One micro-batch of 8 rows equals four of 2, although one of the four has a single target and one none."""
    x, y = torch.randint(0, 13, (2, 8, 8), generator=torch.Generator().manual_seed(3))
    y[0:2], y[2, :], y[3, 1:] = MASKED, MASKED, MASKED
    whole, parts = make_step(batch_size=8), make_step(gradient_accumulation_steps=4)
    scores = whole.model(x)[0].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(scores, y.flatten(), ignore_index=MASKED).item()
    for step in (whole, parts):
        step(1e-2, fill(step, x, y))
    assert whole.loss.item() == pytest.approx(expected, rel=1e-5)
    assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max(), name


# Renew only when the model or the optimizer is meant to change: print(curve) below. The reference must agree before.
GOLDEN = Path(__file__).parent / "golden_losses.json"


def test_ten_training_steps_give_the_golden_losses_and_those_of_the_reference():
    ids = (np.cumsum(np.arange(200) % 7) % 13).astype(np.int64)
    batches = [torch.from_numpy(np.stack([ids[i : i + 9], ids[i + 50 : i + 59]])) for i in range(0, 50, 5)]
    step, curve = make_step(), []
    w = {name: p.detach().double() for name, p in step.model.transformer.named_parameters()}
    for name in w:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w[name] = w[name].t()
    w["wte.weight"] = w["wte.weight"][:13]
    w = {name: p.clone().requires_grad_() for name, p in w.items()}
    oracle, expected = reference.AdamW(w, (0.9, 0.95), 0.1, 1.0), []
    for batch in batches:
        x, y = batch[:, :-1], batch[:, 1:]
        step(1e-2, fill(step, x, y))
        curve.append(step.loss.item())
        loss = reference.loss(x, y, w, 2, 2)
        loss.backward()
        oracle.step(1e-2)
        expected.append(loss.item())
    assert curve == pytest.approx(expected, abs=1e-4)
    assert curve == pytest.approx(json.loads(GOLDEN.read_text()), abs=1e-4), f"renew {GOLDEN.name} with {curve}?"


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped(value, optimizer, accumulation):
    step = make_step(optimizer=optimizer, gradient_accumulation_steps=accumulation)
    x, y = torch.randint(0, 13, (2, accumulation * 2, 8), generator=torch.Generator().manual_seed(3))
    step(1e-2, fill(step, x, y))
    before = [p.clone() for p in step.model.parameters()]
    moments = {name: t.clone() for name, t in train.trainer_tensors(step).items()}
    hook = step.model.transformer["ln_f"].weight.register_hook(lambda g: torch.full_like(g, value))
    for bad in (1, 2):
        step(1e-2)
        assert step.bad.item() == bad
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    assert all(torch.equal(t, moments[name]) for name, t in train.trainer_tensors(step).items())
    hook.remove()
    step(1e-2)
    assert step.bad.item() == 0
    assert all(torch.isfinite(p).all() for p in step.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_without_a_target_changes_nothing_and_tells_no_old_norm(dtype):
    """With float16 the loss scale has nothing to go by then, in the first step least of all."""
    model = set_weights(GPT(GPTConfig(8, 13, 2, 2, 8, bias=True)))
    step = train.Step(model, step_config(), Machine(CPU.device, dtype, compiled=False))
    x, y = torch.randint(0, 13, (2, 2, 8), generator=torch.Generator().manual_seed(3))
    for targets in (torch.full_like(y, MASKED), y, torch.full_like(y, MASKED), torch.full_like(y, MASKED), y):
        before = [p.clone() for p in model.parameters()]
        step(1e-2, fill(step, x, targets))
        trained = bool((targets != MASKED).any())
        assert (step.grad_norm.item() > 0, step.loss.item() > 0, step.bad.item()) == (trained, trained, 0)
        assert trained != all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_resuming_restores_the_loss_scale(tmp_path):
    x, y = torch.randint(0, 13, (2, 2, 8), generator=torch.Generator().manual_seed(3))
    half = Machine(CPU.device, torch.float16, compiled=False)
    first, second = (train.Step(GPT(GPTConfig(8, 13, 2, 2, 8)), step_config(), half) for _ in range(2))
    first.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    first(1e-2, fill(first, x, y))
    train.save_trainer(tmp_path, first)
    train.load_trainer(tmp_path, second)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    second(1e-2, fill(second, x, y))
    assert (second.scaler.get_scale(), second.scaler.state_dict()["_growth_tracker"]) == (256.0, 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
def test_all_parameters_read_one_learning_rate(optimizer):
    """A recorded step has no other way to a new one."""
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
    step = make_step(optimizer=optimizer)
    assert torch.is_tensor(step.lr)
    assert all(group["lr"] is step.lr for o in step.optimizers for group in o.param_groups)


def test_a_skipped_update_of_8_bit_moments_leaves_the_weights():
    pytest.importorskip("torchao")
    model = set_weights(GPT(GPTConfig(8, 13, 2, 2, 8, bias=True))).bfloat16()
    step = train.Step(model, step_config(optimizer="adamw8bit"), CPU)
    x, y = torch.randint(0, 13, (2, 2, 8), generator=torch.Generator().manual_seed(3))
    step(1e-2, fill(step, x, y))
    before = [p.clone() for p in model.parameters()]
    hook = model.transformer["ln_f"].weight.register_hook(lambda g: g * math.nan)
    step(1e-2)
    assert step.bad.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    hook.remove()
    step(1e-2)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_too_many_bad_updates_stop_the_run_and_last_stays_finite(dataset, tmp_path, monkeypatch, capsys):
    original, count = train.Step.run, iter(range(10**6))

    def poisoned(self, rows=None):
        if next(count) == 5:
            self.model.transformer["ln_f"].weight.register_hook(lambda g: g * math.nan)
        original(self, rows)

    monkeypatch.setattr(train.Step, "run", poisoned)
    assert run(dataset, tmp_path, "--max_iters=30", "--max_bad_steps=3", "--eval_interval=100") == 1
    out = capsys.readouterr().out
    assert "stopping at step 8" in out
    assert "window 64" in out
    assert all(torch.isfinite(t).all() for t in weights(tmp_path).values())
    assert trainer(tmp_path)["step"] == 8


def test_clipping_scales_the_gradient_to_the_bound():
    x, y = torch.randint(0, 13, (2, 2, 8), generator=torch.Generator().manual_seed(3))
    free, clipped = make_step(grad_clip=0.0), make_step(grad_clip=0.01)
    for step in (free, clipped):
        step(1e-2, fill(step, x, y))
    assert free.grad_norm.item() == pytest.approx(clipped.grad_norm.item())
    mean = {n: t for n, t in train.trainer_tensors(free).items() if n.endswith("exp_avg")}
    scale = 0.01 / free.grad_norm.item()
    for name, t in train.trainer_tensors(clipped).items():
        if name.endswith("exp_avg"):
            assert torch.allclose(t, mean[name] * scale, rtol=1e-4, atol=1e-12), name


class NoFloat64(TorchDispatchMode):
    """Metal has no such numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        assert getattr(result, "dtype", None) != torch.float64, func
        return result


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_device_without_fused_kernels_and_float64_trains_the_same(dataset, monkeypatch, optimizer):
    """As a Mac's: the same steps, clipped and skipped, the same evaluation; there is none here, so its lacks are acted."""
    x, y = torch.randint(0, 13, (2, 2, 8), generator=torch.Generator().manual_seed(3))
    steps = [make_step(grad_clip=0.1, optimizer=optimizer)]
    windows = EvalWindows(Tokens.open(dataset, "val"), 8)
    expected = train.evaluate(steps[0].model, windows, 5, 2, CPU)
    with monkeypatch.context() as m:
        tensor = torch.tensor
        m.setattr(torch, "tensor", lambda *args, device, **options: tensor(*args, device="cpu", **options))
        mac = Machine(torch.device("mps"), torch.float32, compiled=False)
        optimizers = train.build_optimizers(set_weights(steps[0].model), step_config(optimizer=optimizer), mac)
    # Metal's fused kernel takes the factor and the flag of Step.update and makes nothing of them.
    assert not optimizers[0].param_groups[0]["fused"]
    monkeypatch.setattr(train, "AdamW", lambda *args, fused, **options: AdamW(*args, fused=False, **options))
    for module in ("torch.nn.utils.clip_grad", "torch.utils._foreach_utils"):
        monkeypatch.setattr(f"{module}._device_has_foreach_support", lambda device: False)
    steps.append(make_step(grad_clip=0.1, optimizer=optimizer))
    with NoFloat64():
        assert train.evaluate(steps[1].model, windows, 5, 2, CPU) == pytest.approx(expected, rel=1e-6)
    for step in steps:
        step(1e-2, fill(step, x, y))
    fused, apart = ({n: t for n, t in train.trainer_tensors(s).items() if "rng" not in n} for s in steps)
    assert all(torch.allclose(t, apart[name], rtol=1e-3, atol=1e-7) for name, t in fused.items())
    apart_model = steps[1].model
    before = [p.clone() for p in apart_model.parameters()]
    hook = apart_model.transformer["ln_f"].weight.register_hook(lambda g: g * math.nan)
    steps[1](1e-2)
    assert steps[1].bad.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, apart_model.parameters(), strict=True))
    hook.remove()
    steps[1](1e-2)
    assert not any(torch.equal(a, b) for a, b in zip(before, apart_model.parameters(), strict=True))


def schedule(**changes) -> SimpleNamespace:
    values = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110, "lr_decay_iters": None}
    return SimpleNamespace(**values | {"decay_lr": True, "schedule": "cosine", "decay_fraction": 0.4} | changes)


def test_learning_rate_follows_its_closed_form():
    cosine = schedule()
    assert train.learning_rate(0, cosine) == pytest.approx(1 / 11)
    assert train.learning_rate(10, cosine) == 1.0
    assert train.learning_rate(60, cosine) == pytest.approx(0.55)
    assert train.learning_rate(110, cosine) == 0.1
    wsd = schedule(schedule="wsd", min_lr=0.0)
    assert [train.learning_rate(s, wsd) for s in (10, 40, 69)] == [1.0, 1.0, 1.0]
    assert train.learning_rate(90, wsd) == pytest.approx(0.5)
    assert train.learning_rate(110, wsd) == 0.0
    assert train.learning_rate(5, schedule(decay_lr=False)) == 1.0
    assert train.learning_rate(30, schedule(lr_decay_iters=30)) == 0.1


@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_the_wsd_schedule_is_the_lowest_of_its_three_lines(fraction):
    """Over every step: the warm-up's, the plateau's and the decay's line, whichever is lowest; then min_lr."""
    wsd = schedule(schedule="wsd", decay_fraction=fraction, learning_rate=2.0)
    for step in range(120):
        decay = 0.1 + (2.0 - 0.1) * (110 - step) / (fraction * 100)
        expected = max(0.1, min(2.0 * (step + 1) / 11, 2.0, decay))
        assert train.learning_rate(step, wsd) == pytest.approx(expected), step


def test_parameters_are_counted_without_building_the_model():
    for shape in (GPTConfig(64, 65, 2, 4, 128, bias=True), GPTConfig(1024, 50257, 12, 12, 768, bias=False)):
        with torch.device("meta"):
            assert train.parameter_count(shape) == sum(p.numel() for p in GPT(shape).parameters())


@pytest.mark.parametrize(("free", "chosen"), [(12, "none"), (5, "pointwise"), (3, "block")])
def test_the_cheapest_recomputation_that_fits_is_chosen(monkeypatch, free, chosen):
    """124M with 12 rows of 1,024: with none it needs over 5 GiB, with pointwise 4.3 (measured, see the README)."""
    monkeypatch.setattr(train, "device_memory", lambda machine: free * 2**30)
    model = GPT(GPTConfig(8, 13, 1, 1, 8))
    model.config = GPTConfig()
    config = step_config(batch_size=12, block_size=1024, dtype="bfloat16")
    gpu = Machine(torch.device("cuda"), torch.bfloat16, compiled=True)
    assert train.choose_recompute(model, config, gpu) == chosen
    assert train.choose_recompute(model, config, CPU) == "none"


@pytest.mark.parametrize("world", [1, 2])
def test_the_smallest_batch_within_2_percent_of_the_fastest_row_is_taken(monkeypatch, world):
    seconds = {1: 1.5, 2: 2.0, 3: 2.97, 6: 5.94}  # a row takes 1.5, 1.0, 0.99, 0.99
    monkeypatch.setattr(train, "Step", lambda model, config, machine: config.batch_size)
    monkeypatch.setattr(train, "_time_step", seconds.__getitem__)
    monkeypatch.setattr(train.dist, "all_gather_object", lambda everyone, mine: None)
    config = step_config(batch_size="auto", gradient_accumulation_steps=6 * world, eval_only=False)
    machine = Machine(CPU.device, CPU.dtype, compiled=False, world=world)
    assert train.settle_batch_size(GPT(GPTConfig(8, 13, 1, 1, 8)), config, machine) == config.batch_size == 2
    assert config.gradient_accumulation_steps == 3 * world  # as many rows as before


def test_only_a_step_that_asks_the_host_nothing_is_recorded():
    gpu, model = torch.device("cuda"), GPT(GPTConfig(8, 13, 2, 2, 8))
    plain, half = Machine(gpu, torch.bfloat16, compiled=False), Machine(gpu, torch.float16, compiled=False)
    dropped = GPT(GPTConfig(8, 13, 2, 2, 8, dropout=0.1))
    many = {"gradient_accumulation_steps": train.GRAPH_UP_TO_LAYERS // 2}
    for expected, model_, changes, machine_ in (
        (True, model, {}, plain),
        (True, model, many, plain),
        (False, model, {"gradient_accumulation_steps": train.GRAPH_UP_TO_LAYERS // 2 + 1}, plain),
        (False, model, {}, CPU),
        (False, model, {}, half),
        (False, model, {}, Machine(gpu, torch.bfloat16, compiled=False, world=2)),
        (False, model, {"optimizer": "adamw8bit"}, plain),
        (True, dropped, {}, plain),
        (False, dropped, {"recompute": "block"}, plain),
        (True, dropped, {"recompute": "block"}, Machine(gpu, torch.bfloat16, compiled=True)),
    ):
        assert train.wants_graph(model_, step_config(**changes), machine_) == expected, (changes, machine_)


def test_a_run_is_compiled_from_a_number_of_operations_on():
    model = GPT(GPTConfig(8, 13, 1, 1, 8))
    steps = math.ceil(6e15 / (model.flops_per_token() * 3 * 2 * 8))
    for max_iters, worth in ((steps, True), (steps - 1, False)):
        config = step_config(gradient_accumulation_steps=3, max_iters=max_iters, eval_only=False, num_epochs=0)
        assert train.worth_compiling(model, config) == worth


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(dataset, tmp_path):
    """It is 1 to 3 seconds of a newcomer's first run."""
    code = "import sys, train; status = train.main(sys.argv[1:]); sys.exit(status or 'torch._dynamo' in sys.modules)"
    options = [f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=2", "--optimizer=muon"]
    subprocess.run([sys.executable, "-c", code, *QUICK, *options], cwd=ROOT, check=True)


def test_orthogonalize_brings_all_singular_values_near_one():
    g = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for x in (g, g.mT.contiguous()):
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        out = train.orthogonalize(x)
        values = torch.linalg.svdvals(out)
        assert values.min() > 0.5
        assert values.max() < 1.3
        # The singular vectors stay: what is left in the input's own basis is diagonal.
        inner = u.mT @ out @ vh.mT
        assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), atol=1e-4)


def test_muon_makes_the_step_of_torchs_muon_on_every_matrix():
    """Our stacked step equals torch.optim.Muon on q, k, v and every other matrix one at a time."""
    step = make_step(optimizer="muon", weight_decay=0.1, grad_clip=0.0)
    muon = step.optimizers[1]
    ours = [p for group in muon.param_groups for p in group["params"]]
    assert sorted({tuple(p.shape) for p in ours}) == [(8, 8), (8, 32), (24, 8), (32, 8)]
    parts = [part.detach().clone() for p in ours for part in (p.chunk(3) if p.size(0) == 24 else [p])]
    theirs = torch.optim.Muon(
        [torch.nn.Parameter(p) for p in parts],
        lr=1e-2,
        weight_decay=0.1,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
        eps=1e-7,
    )
    muon.param_groups[0]["lr"].fill_(1e-2)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for p in ours:  # far from singular, where torch's bf16 would amplify its rounding
            parts = p.chunk(3) if len(p) == 24 else [p]  # q, k, v of unlike sizes: each counts as much as the others
            p.grad = torch.cat(
                [torch.nn.init.orthogonal_(torch.empty_like(part)) * 9.0**i for i, part in enumerate(parts)]
            )
        grads = [g for p in ours for g in (p.grad.chunk(3) if len(p) == 24 else [p.grad])]
        for p, g in zip(theirs.param_groups[0]["params"], grads, strict=True):
            p.grad = g.clone()
        muon.step()
        theirs.step()
    mine = [part for p in ours for part in (p.chunk(3) if p.size(0) == 24 else [p])]
    for a, b in zip(mine, theirs.param_groups[0]["params"], strict=True):
        assert (a - b).abs().max() < 4e-4  # torch's works in bf16; the two steps moved each by up to 2e-2


def test_muon_leaves_adapters_to_adamw():
    model = GPT(GPTConfig(8, 13, 2, 2, 8))
    model.add_lora(2, 4.0)
    (adamw,) = train.Step(model, step_config(optimizer="muon"), CPU).optimizers
    assert isinstance(adamw, AdamW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat=1"], "learning_rate"),
        (["--max_iters=many"], "max_iters"),
        (["--n_embd=100", "--n_head=7"], "n_head"),
        (["config/none.py"], "config/none.py"),
        (["--dataset=/nowhere/at_all.txt"], "at_all.txt"),
        (["--device=cuda"], "GPU"),
        (["--device=mps"], "this torch has no MPS, which needs a Mac with an Apple GPU. Or pass --device=cpu"),
        (["--out_dir=/proc/nothing"], "cannot be written"),
        (["--init_from=resume", "--out_dir=/nowhere"], "nothing to resume"),
        (["--init_from=/nowhere"], "could not be fetched"),
        (["--init_from=gpt2", "--dataset=/nowhere/my.txt"], "There is no data set '/nowhere/my.txt'"),
        (["--init_from=gpt2", f"--dataset={'x' * 300}"], "There is no data set"),
        (["--block_size=5000"], "block_size"),
        (["--lora_rank=99", "--init_from=CHECKPOINT"], "lora_rank=99"),
    ],
)
def test_a_users_mistake_ends_with_a_message_and_status_2(dataset, tmp_path, capsys, monkeypatch, options, message):
    if options[0] == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if options[0] == "--device=mps" and torch.backends.mps.is_available():
        pytest.skip("there is MPS")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "--init_from=CHECKPOINT" in options:
        GPT(GPTConfig(16, 13, 2, 2, 16)).save_pretrained(tmp_path / "model")
        options = [options[0], f"--init_from={tmp_path / 'model'}"]
    out_dir = tmp_path / "out"
    argv = [*QUICK, f"--dataset={dataset}", f"--out_dir={out_dir}", *options]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: train.main(argv))
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not out_dir.exists()


def test_micro_batches_that_the_ranks_cannot_share_are_refused(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for micro_steps, near in ((1, 2), (3, 4)):
        said = f"={micro_steps} is not a multiple of 2 ranks: pass --gradient_accumulation_steps={near}$"
        with pytest.raises(UserError, match=said):
            run(dataset, tmp_path, f"--gradient_accumulation_steps={micro_steps}")


def test_data_of_another_tokenizer_are_refused(dataset, tmp_path):
    GPT(GPTConfig(16, 9, 2, 2, 16)).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="another tokenizer"):
        run(dataset, tmp_path / "out", f"--init_from={tmp_path / 'model'}")


def test_a_second_run_in_the_same_folder_is_refused(dataset, tmp_path):
    from data.run import lock

    with lock(tmp_path), pytest.raises(UserError, match="another run"):
        run(dataset, tmp_path, "--max_iters=1")
    assert run(dataset, tmp_path, "--max_iters=1") == 0


def test_weights_that_are_not_finite_are_never_saved(dataset, tmp_path, capsys):
    """A rate so high that finite gradients make infinite weights: no best, no last, and the exit status says so."""
    assert (
        run(dataset, tmp_path, "--max_iters=10", "--learning_rate=1e38", "--warmup_iters=0", "--eval_interval=5") == 1
    )
    assert "weights are not finite" in capsys.readouterr().out
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "last").exists()


def test_options_given_on_resuming_are_checked_against_the_saved_run(dataset, tmp_path):
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=4", "--min_lr=5e-3"]) == 0
    for option in ("--optimizer=muon", "--n_layer=3", "--min_lr=5e-2", "--val_fraction=0.3"):
        with pytest.raises(UserError, match=option.split("=")[0].strip("-")):
            train.main(["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=5", option])


@pytest.mark.parametrize(("bf16", "trained"), [(True, " autocast over fp32"), (False, " with loss scaling")])
def test_only_training_speaks_of_autocast_and_loss_scaling(monkeypatch, bf16, trained):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    notes: list[str] = []
    for layer in (torch.nn.Linear(2, 2), None):  # train.py passes one, sample.py converts the weights themselves
        machine.choose_dtype("auto", torch.device("cuda"), layer, notes)
    assert trained in notes[0]
    assert trained not in notes[1]


def test_a_run_that_is_resumed_on_other_data_says_so(dataset, tmp_path, capsys):
    folder = shutil.copytree(dataset, tmp_path / "data")
    resume = ["--init_from=resume", f"--out_dir={tmp_path / 'out'}"]
    assert run(folder, tmp_path / "out", "--max_iters=1", "--eval_interval=99") == 0
    for digit, told in (("0", False), ("1", True)):
        meta = json.loads((folder / "meta.json").read_text()) | {"source_sha256": digit * 64}
        (folder / "meta.json").write_text(json.dumps(meta))
        capsys.readouterr()
        train.Run(*train.load_config(resume)).introduce()
        assert ("the data are not those that this run began with" in capsys.readouterr().out) == told


def test_a_resumed_run_keeps_the_precision_that_was_found(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "step_memory", lambda shape, config, *rest: asked.append(config.dtype) or {})
    asked: list[str] = []
    assert run(dataset, tmp_path, "--max_iters=2", "--dtype=auto") == 0
    facts = json.loads((tmp_path / "run.json").read_text())
    assert {*asked, facts["config"]["dtype"]} == {facts["dtype"]} <= {"float32", "bfloat16"}
    monkeypatch.setattr(machine, "_time_layer", lambda *args: pytest.fail("measured anew"))
    resume = ["--init_from=resume", f"--out_dir={tmp_path}"]
    assert train.main([*resume, "--max_iters=3"]) == 0
    for dtype in ("load", ["float32"]):
        (tmp_path / "run.json").write_text(json.dumps(facts | {"dtype": dtype}))
        with pytest.raises(UserError, match="dtype"):
            train.main([*resume, "--max_iters=4"])


@pytest.mark.parametrize(
    ("bf16", "chosen", "why"),
    [(0.5, "bfloat16", "best here"), (0.95, "float32", "gains too little"), (2.0, "float32", "best here")],
)
def test_a_cpu_takes_bfloat16_where_it_gains_a_tenth(monkeypatch, bf16, chosen, why):
    monkeypatch.setattr(machine, "_time_layer", lambda layer, dtype: bf16 if dtype == torch.bfloat16 else 1.0)
    notes: list[str] = []
    found = machine.choose_dtype("auto", torch.device("cpu"), torch.nn.Linear(1, 1), notes)
    assert found == getattr(torch, chosen) and why in notes[0]


def test_all_ranks_take_the_precision_that_the_first_one_found(monkeypatch):
    def broadcast(mine, source):
        assert mine == [{torch.float32: 1.0, torch.bfloat16: 0.5}] and source == 0
        mine[0] = {torch.float32: 1.0, torch.bfloat16: 2.0}

    monkeypatch.setattr(machine, "_time_layer", lambda layer, dtype: 0.5 if dtype == torch.bfloat16 else 1.0)
    monkeypatch.setattr(machine.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(machine.dist, "broadcast_object_list", broadcast)
    assert machine.choose_dtype("auto", torch.device("cpu"), torch.nn.Linear(1, 1), []) == torch.float32


@pytest.mark.parametrize(("supported", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_takes_bfloat16_where_it_has_it(monkeypatch, supported, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert machine.choose_dtype("auto", torch.device("cuda"), None, []) == chosen


def test_a_run_can_train_on_text_without_a_line_end(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATA", tmp_path / "data")  # where the text is prepared
    (tmp_path / "one.txt").write_text("abcabc abdbca " * 200)
    argv = [
        *QUICK,
        f"--dataset={tmp_path / 'one.txt'}",
        "--tokenizer=char",
        f"--out_dir={tmp_path / 'out'}",
        "--max_iters=2",
    ]
    assert train.main(argv) == 0


def test_quantized_evaluation_is_near_the_exact_one(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path, "--max_iters=30") == 0
    values = []
    for quantize in ("none", "int8"):
        argv = ["--eval_only", f"--init_from={tmp_path}", f"--dataset={dataset}", f"--quantize={quantize}", *QUICK[:2]]
        capsys.readouterr()
        assert train.main(argv) == 0
        values.append(float(capsys.readouterr().out.split("val loss ")[1].split(",")[0]))
    assert values[0] == pytest.approx(values[1], abs=0.02)


def test_resuming_with_a_smaller_context_crops_the_moments_too(dataset, tmp_path):
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    for steps in (4, 5):
        assert (
            train.main(["--init_from=resume", f"--out_dir={tmp_path}", f"--max_iters={steps}", "--block_size=8"]) == 0
        )
    moments = load_file(tmp_path / "last/trainer.safetensors")
    assert moments["optimizer.transformer.wpe.weight.exp_avg"].shape == (8, 16)


def test_patience_ends_the_run_and_best_is_kept(dataset, tmp_path, capsys):
    assert (
        run(
            dataset, tmp_path, "--max_iters=500", "--eval_interval=5", "--patience=2", "--learning_rate=0", "--min_lr=0"
        )
        == 0
    )
    assert "no better validation loss in 2 evaluations" in capsys.readouterr().out
    assert trainer(tmp_path, "best")["step"] == 5


def test_patience_counts_the_evaluations_since_the_best(dataset, tmp_path, monkeypatch):
    values = {0: 9.0, 5: 4.0, 10: 5.0, 15: 3.0, 20: 4.0, 25: 3.5, 30: 3.4}
    told, splits = iter(values.values()), {2600: "training", 400: "validation"}
    loss_of = {"training": lambda: 0.0, "validation": lambda: next(told)}
    monkeypatch.setattr(train, "evaluate", lambda model, windows, *rest: loss_of[splits[len(windows.tokens)]]())
    assert run(dataset, tmp_path, "--max_iters=30", "--eval_interval=5", "--patience=2") == 0
    assert evaluations(tmp_path) == [0, 5, 10, 15, 20, 25]
    assert set(losses(tmp_path, "train_loss").values()) == {0.0}
    assert trainer(tmp_path, "best")["step"] == 15
    config, given, _ = train.load_config([*QUICK, f"--init_from={tmp_path}"])
    start, _ = train.load_start(config, given, None)  # what another run starts from
    assert torch.equal(start.transformer["wpe"].weight, weights(tmp_path, "best")["transformer.wpe.weight"])
    assert not torch.equal(start.transformer["wpe"].weight, weights(tmp_path, "last")["transformer.wpe.weight"])


def test_num_epochs_sets_the_number_of_steps(dataset, tmp_path):
    assert run(dataset, tmp_path, "--num_epochs=1.5", "--eval_interval=500") == 0
    windows = (2600 - 16) // 16
    assert trainer(tmp_path)["step"] == math.ceil(1.5 * windows / 8)


def test_eval_only_evaluates_and_writes_nothing(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path / "none", "--eval_only") == 0
    assert len(perplexities(capsys.readouterr().out)) == 1
    assert not (tmp_path / "none").exists()


def test_eval_only_says_what_makes_its_figure_doubtful(dataset, tmp_path, capsys):
    shutil.copy(dataset / "val_000000.bin", tmp_path)
    (tmp_path / "meta.pkl").touch()
    assert run(tmp_path, tmp_path / "none", "--eval_only") == 0
    assert "Its vocabulary is taken to be 13, the largest id plus one" in capsys.readouterr().out


def endless_run(dataset, out_dir, **streams):
    """train.py as typed, in a process of its own that a test has to end."""
    argv = command("train.py", *QUICK, *ENDLESS, f"--dataset={dataset}", f"--out_dir={out_dir}")
    return subprocess.Popen(argv, **{"cwd": ROOT, "text": True, "env": environment()} | streams)


def wait_for_line(process, beginning):
    """Read what a process prints up to a line that begins so."""
    assert any(line.startswith(beginning) for line in process.stdout), "it ended before"


def test_a_run_that_gets_sigterm_saves_and_ends_with_143(dataset, tmp_path):
    with endless_run(dataset, tmp_path, stdout=subprocess.PIPE) as process:
        wait_for_line(process, "step 12:")
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait() == 143
    assert "--init_from=resume" in rest
    step = trainer(tmp_path)["step"]
    assert step >= 12
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}", f"--max_iters={step + 2}"]) == 0


@pytest.mark.parametrize(("after", "told"), [(1.9, False), (2.1, True)])
def test_a_run_that_improves_nothing_says_so(dataset, tmp_path, monkeypatch, capsys, after, told):
    losses = iter((2.5, 2.0, 2.5, after))  # training and validation, before and after
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    assert ("no better than what it began with, val loss 2.0" in capsys.readouterr().out) == told


# train.py in a terminal, whose every step first waits for a byte of a pipe, or for the pipe's end.
GATED = """
import fcntl
import os
import signal
import sys
import termios

import config
import train
from model import WeightsError

gate = int(sys.argv.pop(1))
if sys.argv.pop(1) == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # closing the window sends SIGHUP here
make_step = train.Step.__call__


def wait_and_step(self, *args):
    os.read(gate, 1)
    make_step(self, *args)


train.Step.__call__ = wait_and_step
config.run_main(train.main, WeightsError)
"""


@pytest.mark.parametrize("nohup", [False, True])
def test_a_run_whose_terminal_is_closed_saves_and_ends_but_goes_on_under_nohup(dataset, tmp_path, nohup):
    """The window is closed before the first step. The gate holds that step back until then."""
    pytest.importorskip("termios")
    window, theirs = os.openpty()
    gate, opened = os.pipe()
    argv = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=3"]
    start = [sys.executable, "-c", GATED, str(gate), "nohup" if nohup else "plain", *argv]
    ways = {"cwd": ROOT, "env": environment(), "start_new_session": True, "pass_fds": [gate]}
    with subprocess.Popen(start, stdin=theirs, stdout=theirs, stderr=theirs, **ways) as process:
        os.close(theirs)
        os.close(gate)
        shown = b""
        while b"step 0: train loss" not in shown:
            shown += os.read(window, 4096)
        os.close(window)  # sends SIGHUP
        os.close(opened)
        assert process.wait() == (0 if nohup else 129)
    assert trainer(tmp_path)["step"] == (3 if nohup else 1)


def test_a_run_saves_when_ctrl_c_ends_the_reader_of_its_log_too(dataset, tmp_path):
    """`python train.py | tee log`: the terminal interrupts both, and what train.py still has to say, nobody reads."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = {
        mode: endless_run(dataset, tmp_path / f"out{mode}", env=environment(PYTHONUNBUFFERED=mode), **pipes)
        for mode in ("", "1")
    }
    for mode, process in processes.items():
        with process:
            wait_for_line(process, "step 12:")
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            assert (process.stderr.read(), process.wait()) == ("", 130)
        assert trainer(tmp_path / f"out{mode}")["step"] >= 12


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("reentrant call")])
def test_a_line_that_cannot_be_written_costs_no_run(dataset, tmp_path, monkeypatch, error):
    """The log's disk is full, or a signal comes amid the writing of a line."""

    def write(text):
        raise error

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
    assert run(dataset, tmp_path, "--max_iters=2") == 0


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_is_reported_after_all_is_saved(dataset, tmp_path):
    argv = command("train.py", *QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=2")
    env = environment(PYTHONUNBUFFERED="")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(argv, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    told = "error: not all of the output could be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (2, told)
    assert trainer(tmp_path)["step"] == 2


def test_a_signal_that_arrives_twice_at_once_still_lets_the_run_save(dataset, tmp_path, monkeypatch):
    """`timeout` signals the process and then its whole group; a second wish, by hand, comes later."""
    run = train.Run(*train.load_config([*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}"]))
    now = 5.0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    run.on_signal(signal.SIGTERM, None)
    run.on_signal(signal.SIGTERM, None)
    assert run.stop_signal == signal.SIGTERM
    now += 0.5
    with pytest.raises(KeyboardInterrupt):
        run.on_signal(signal.SIGINT, None)


@pytest.mark.parametrize("step", [0, 20, 30])
def test_a_signal_ends_a_long_evaluation_early(dataset, tmp_path, monkeypatch, step):
    """At the beginning, on the way and at the end: no figure of half a split is kept, and resuming makes it anew."""
    batch, began = EvalWindows.batch, []

    def interrupted(self, indices):
        if losses(tmp_path).get(step) or step == 0:
            began.append(signal.raise_signal(signal.SIGINT) if not began else None)
        return batch(self, indices)

    options = ["--max_iters=30", "--eval_iters=0", "--always_save_checkpoint=False"]
    with monkeypatch.context() as m:
        m.setattr(EvalWindows, "batch", interrupted)
        assert run(dataset, tmp_path, *options) == 130
    assert len(began) == 1
    evaluated = [*range(0, step, 10)]
    assert evaluations(tmp_path) == evaluated
    state = trainer(tmp_path)
    assert (state["step"], state["evaluated_step"]) == (step, evaluated[-1] if evaluated else -1)
    assert state["best_step"] < max(step, 1)
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}"]) == 0
    assert evaluations(tmp_path) == [0, 10, 20, 30]


def test_resuming_reads_each_file_of_the_checkpoint_once_to_verify_it(dataset, tmp_path, monkeypatch):
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    read = []
    monkeypatch.setattr(
        train.run_folder, "read_checkpoint", lambda folder, f=read_checkpoint: read.append(folder) or f(folder)
    )
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=2"]) == 0
    assert read == [tmp_path / "last"]


def test_a_resumed_run_goes_on_with_the_same_wandb_run(dataset, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run(dataset, tmp_path, "--max_iters=2", "--wandb_log", "--wandb_project=test") == 0
    first = trainer(tmp_path)["wandb_id"]
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=4"]) == 0
    assert first
    assert trainer(tmp_path)["wandb_id"] == first
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first}"))) >= 1


def exhausted(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("options", [[], ["--batch_size=auto"]])
def test_a_model_that_does_not_fit_into_memory_ends_with_a_message(dataset, tmp_path, monkeypatch, options):
    """Memory that ends before recompute=auto and batch_size=auto have become something."""
    monkeypatch.setattr(train, "prepare_model", exhausted)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (2**30, 12 * 2**30))
    with pytest.raises(UserError, match="--optimizer=adamw8bit"):
        run(dataset, tmp_path, "--max_iters=1", *options)


def settle(machine: Machine) -> SimpleNamespace:
    config = step_config(batch_size="auto", gradient_accumulation_steps=6 * machine.world, eval_only=False)
    model = GPT(GPTConfig(8, 13, 1, 2, 8))
    if machine.compiled:
        model.compile_parts()
    train.settle_batch_size(model, config, machine)
    return config


def test_the_rank_on_which_the_fewest_batch_sizes_fit_decides(monkeypatch):
    """Each measures by itself: here is no other that its gradients could be sent to."""
    other, two = {(1, "none"): 2.0, (2, "none"): 1.0}, Machine(CPU.device, CPU.dtype, compiled=False, world=2)

    def gather(ranks, mine):
        ranks[:] = [mine, other]

    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    config = settle(two)
    assert (config.batch_size, config.gradient_accumulation_steps) == (2, 6)
    other.clear()
    with pytest.raises(torch.OutOfMemoryError):
        settle(two)


@pytest.mark.parametrize(
    ("recompute", "dropout", "lora_dropout"),
    [("none", 0, None), ("none", 0.1, None), ("pointwise", 0, None), ("pointwise", 0.1, None), ("none", 0, 0.1)],
)
def test_the_memory_formula_counts_what_a_layer_keeps(recompute, dropout, lora_dropout):
    """Against the tensors that the compiler's own partition of a layer saves for the backward pass."""
    B, T, C = 3, 33, 64
    model, kept = GPT(GPTConfig(T, 13, 1, 2, C, dropout)).train(), {}
    if lora_dropout is not None:
        model.bfloat16().add_lora(2, 4.0, lora_dropout)
    model.set_recompute(recompute)
    [block] = model.blocks
    block.attn.dropout = 0.0  # a GPU's kernels draw it again, a CPU's formula keeps a whole matrix
    block.compile(backend="aot_eager_decomp_partition")

    def note(t):
        if t.numel() >= B * T * C and t.numel() % (B * T) == 0:  # no weight, no row's mean or variance
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(B, T, C, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        block(x)
    config = step_config(batch_size=B, block_size=T, dtype="bfloat16", lora_dropout=lora_dropout)
    trained = None if lora_dropout is None else 1
    one, two = (
        train.step_memory(replace(model.config, n_layer=n), config, recompute, trained)["activations"] for n in (1, 2)
    )
    assert two - one == sum(kept.values())


def test_batch_sizes_are_measured_with_the_graph_that_the_run_would_have(monkeypatch):
    asked, measured = {}, {}
    monkeypatch.setattr(
        train,
        "wants_graph",
        lambda model, c, machine: asked.setdefault(c.batch_size, c.gradient_accumulation_steps) < 3,
    )
    monkeypatch.setattr(train, "Step", lambda model, c, machine: measured.setdefault(c.batch_size, c.cuda_graph) or 1)
    monkeypatch.setattr(train, "_time_step", lambda step: 1.0)
    settle(Machine(CPU.device, CPU.dtype, compiled=False))
    assert asked == {1: 6, 2: 3, 3: 2, 6: 1}
    assert measured == {1: False, 2: False, 3: True, 6: True}


def test_every_batch_size_is_measured_compiled(monkeypatch):
    """torch compiles a function for a few shapes, then runs it as it is: the sizes tried last must not meet that."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # which nn.Module.compile calls
    torch.compiler.reset()  # what other tests have compiled counts, too
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        settle(Machine(CPU.device, CPU.dtype, compiled=True))


def test_timing_waits_for_a_macs_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(True))
    step = make_step()
    step.machine = Machine(torch.device("mps"), torch.float32, compiled=False)
    train._time_step(step)
    assert len(waited) == 10  # before and after each of five steps


def test_too_little_memory_to_show_a_text_does_not_end_the_run(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GPT, "generate", exhausted)
    assert run(dataset, tmp_path, "--max_iters=3") == 0
    assert capsys.readouterr().out.count("too little memory beside the training step") == 2


def exhausted_while_recording(*args, **options):
    try:
        exhausted()
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("how", [exhausted, exhausted_while_recording])
def test_running_out_of_memory_names_the_options_that_help(dataset, tmp_path, monkeypatch, how):
    monkeypatch.setattr(train.Step, "run", how)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (2**30, 12 * 2**30))
    with pytest.raises(UserError, match="12.0 GiB") as error:
        run(dataset, tmp_path, "--max_iters=1")
    assert str(error.value).index("--recompute=pointwise") < str(error.value).index("--batch_size=2")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_draw_every_window_of_an_epoch_once(tmp_path, world):
    """Through the real Loader of each rank: a step has the same windows at any world size, an epoch each of them once."""
    write_shard(tmp_path / "train_000000.bin", np.arange(48 * 5 + 5, dtype=np.uint16))
    windows = TrainWindows(Tokens.open(tmp_path, "train"), 5, seed=3)
    assert windows.per_epoch == 48
    loaders = []
    for rank in range(world):
        buffers = SimpleNamespace(x=torch.zeros(4 // world, 2, 5, dtype=torch.int64))  # 4 micro-batches of 2 in all
        buffers.y = torch.zeros_like(buffers.x)
        machine = Machine(CPU.device, CPU.dtype, compiled=False, rank=rank, world=world)
        loaders.append(train.Loader(windows, buffers, machine))
    for epoch in range(3):
        drawn: list[int] = []
        for position in range(epoch * 48, (epoch + 1) * 48, 8):
            for loader in loaders:
                assert loader.load(position) is None
                assert torch.equal(loader.step.y, loader.step.x + 1)
            step = torch.stack([loader.step.x for loader in loaders], 1).flatten()[::5].tolist()
            assert step == windows.starts(np.arange(position, position + 8)).tolist()
            drawn += step
        assert sorted(drawn) == [min(drawn) + i * 5 for i in range(48)]


def test_a_batch_is_copied_without_waiting_only_where_an_event_marks_its_end(dataset):
    """A Mac's GPU would copy after the host has filled the buffer anew."""
    said = []
    buffer = SimpleNamespace(shape=(1, 2, 8), copy_=lambda source, non_blocking: said.append(non_blocking))
    windows = TrainWindows(Tokens.open(dataset, "train"), 8, seed=3)
    train.Loader(windows, SimpleNamespace(x=buffer, y=buffer), CPU).load(0)
    assert said == [False, False]


def torchrun(*argv):
    """Two ranks of a script, on a port that torchrun finds."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(start, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), **streams)


# train.py that prepares texts in the folder that comes first on its command line.
ELSEWHERE = """
import sys
from pathlib import Path

import config
import data
import train
from model import WeightsError

data.DATA = Path(sys.argv.pop(1))
config.run_main(train.main, WeightsError)
"""


def test_two_ranks_prepare_a_text_once_and_train_like_one_process(tmp_path, monkeypatch):
    """torchrun with two processes over gloo: the same windows, the same step, and the checkpoint resumes alone."""
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    letters = np.cumsum(np.random.default_rng(0).integers(1, 4, 4000)) % 13
    (tmp_path / "letters.txt").write_text("".join("abcdefghijklm"[i] for i in letters))
    # Two micro-batches a rank: gradients travel after the last alone.
    options = ["--max_iters=6", "--eval_interval=3", "--gradient_accumulation_steps=4", "--eval_iters=0"]
    options += ["--tokenizer=char"]
    places = [f"--dataset={tmp_path / 'letters.txt'}", f"--out_dir={tmp_path / 'two'}"]
    two_ranks = torchrun(str(tmp_path / "elsewhere.py"), str(tmp_path / "data"), *QUICK, *places, *options)
    said, _ = two_ranks.communicate()
    assert two_ranks.returncode == 0, said
    (prepared,) = (tmp_path / "data/cache").iterdir()
    assert prepared.name.startswith("letters-")
    assert run(tmp_path / "letters.txt", tmp_path / "one", *options) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-5)
    one, two = losses(tmp_path / "one", "val_loss"), losses(tmp_path / "two", "val_loss")
    assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-5)  # 25 windows: 16 and 9
    for name, t in weights(tmp_path / "one").items():
        assert torch.allclose(t, weights(tmp_path / "two")[name], atol=1e-5), name
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'two'}", "--max_iters=8"]) == 0
    assert list(losses(tmp_path / "two")) == list(range(1, 9))


def test_two_ranks_resume_the_run_of_one_though_targets_are_shared_unevenly(tmp_path):
    """Masked rows, whole micro-batches of them on one rank alone: two ranks go on as the one process would have."""
    folder, generator = tmp_path / "rows", np.random.default_rng(8)
    folder.mkdir()
    tokens = (np.cumsum(generator.integers(1, 4, 40 * 16 + 1)) % 13).astype(np.uint16)
    mask = np.append(generator.random((40, 16)) < generator.choice([0, 0, 0, 0.2, 1], (40, 1)), False).astype(np.uint8)
    for name, part in (("train", tokens), ("val", tokens)):
        write_shard(folder / f"{name}_000000.bin", part)
        write_shard(folder / f"{name}_mask_000000.bin", mask)
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 13, "kind": "prompt", "row": 16}))
    y = TrainWindows(Tokens.open(folder, "train"), 16, 1337).batch(24, 24)[1].reshape(3, 2, -1)
    targets = (y != MASKED).sum(2)
    assert ((targets == 0).sum(1) == 1).any()  # in a step after resuming one rank has nothing to learn, the other has
    fixed = ["--eval_interval=3", "--decay_lr=False"]
    assert run(folder, tmp_path / "one", *fixed, "--max_iters=6") == 0
    assert run(folder, tmp_path / "both", *fixed, "--max_iters=3") == 0
    two_ranks = torchrun("train.py", "--init_from=resume", f"--out_dir={tmp_path / 'both'}", "--max_iters=6")
    said, _ = two_ranks.communicate()
    assert two_ranks.returncode == 0, said
    one, both = losses(tmp_path / "one"), losses(tmp_path / "both")
    assert list(both) == list(range(1, 7))
    assert list(both.values()) == pytest.approx(list(one.values()), abs=1e-5)
    for name, t in weights(tmp_path / "one").items():
        assert torch.allclose(t, weights(tmp_path / "both")[name], atol=1e-5), name


def rank(process: subprocess.Popen, number: int) -> int:
    """The process id of one of torchrun's children."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (found,) = [int(p) for p in children if f"RANK={number}" in Path(f"/proc/{p}/environ").read_text().split("\0")]
    return found


def test_a_rank_that_waits_for_a_silent_one_ends_with_a_message(dataset, tmp_path):
    """As on GPUs, where NCCL does not notice that a neighbour was killed: torchrun's SIGTERM has to be enough."""
    argv = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=100000", "--log_interval=1"]
    process = torchrun("train.py", *argv)
    silent = 0
    for line in process.stdout:
        if line.startswith("step 12:"):
            silent = rank(process, 1)
            os.kill(silent, signal.SIGSTOP)
            os.kill(rank(process, 0), signal.SIGTERM)
        if "has lost the others" in line:
            os.kill(silent, signal.SIGKILL)
            break
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "exitcode  : 2" in said


def watched_run(started: float | None) -> SimpleNamespace:
    run = SimpleNamespace(progress=SimpleNamespace(step=9), config=SimpleNamespace(out_dir="out"))
    run.clock = SimpleNamespace(total=0.0, started=started)
    return run


@pytest.mark.parametrize("started", [1.0, None])
def test_a_signal_leaves_a_slow_rank_most_of_the_time_that_torchrun_does(monkeypatch, started):
    """Its step may be long, and so may rank 0 be saving: neither is known here, least of all before the first lap."""
    waited, ended = [], []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train.os, "_exit", ended.append)
    over = SimpleNamespace(wait=waited.append, set=lambda: None)
    monkeypatch.setattr(train, "threading", SimpleNamespace(Thread=threading.Thread, Event=lambda: over))
    signal.signal(signal.SIGTERM, lambda *_: None)
    with train.Run.watch_for_lost_ranks(watched_run(started)):
        signal.raise_signal(signal.SIGTERM)
    assert (len(waited), ended) == (1, [2] if started else [])
    assert 20 <= waited[0] < 30


@pytest.mark.parametrize("signalled", [False, True])
def test_the_watch_for_lost_ranks_ends_with_the_run(signalled):
    """A thread left over holds the process group, whose own threads can abort Python as it ends."""
    before = threading.enumerate()
    signal.signal(signal.SIGTERM, lambda *_: None)
    with train.Run.watch_for_lost_ranks(watched_run(1.0)):
        assert len(threading.enumerate()) == len(before) + 1
        if signalled:
            signal.raise_signal(signal.SIGTERM)
    assert threading.enumerate() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_lost_rank_is_told_to_go_on_only_from_what_is_there(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    config, _, _ = train.load_config([*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}"])
    assert train.lost_ranks(config).endswith("its own message stands above)")
    for name in ("last.prev", "last"):
        (tmp_path / name).mkdir()
        assert train.lost_ranks(config).endswith(f"--init_from=resume --out_dir={tmp_path}")
        (tmp_path / name).rmdir()


def test_a_run_that_is_over_waits_for_no_rank(dataset, tmp_path):
    """A signal while its last checkpoint, picture or wandb's record are written must not be taken for a lost rank's."""
    argv = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=3"]
    run = train.Run(*train.load_config(argv))
    running = []
    finish, run.finish = run.finish, lambda status: (running.append(run.clock.started), finish(status))[1]
    assert run.train() == 0
    assert (running, run.clock.started) == ([None], None)


def test_a_rank_that_dies_ends_the_run_and_leaves_a_checkpoint(dataset, tmp_path):
    places = [f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    process = torchrun("train.py", *QUICK, *ENDLESS, *places, "--save_interval_s=0")
    wait_for_line(process, "step 12:")
    os.kill(rank(process, 1), signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 1
    assert "rank      : 1" in said  # torchrun's: which it was, and how it ended
    assert "SIGKILL" in said
    assert "rank 0 has lost the others" in said
    assert "[rank0]: Traceback" not in said
    assert f"--init_from=resume --out_dir={tmp_path}" in said
    step = trainer(tmp_path)["step"]
    assert step >= 11
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}", f"--max_iters={step + 2}"]) == 0
    assert list(losses(tmp_path)) == list(range(1, step + 3))
