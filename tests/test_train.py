"""train.py: the optimizer, the schedule, one update, evaluation, and the loop."""

import itertools
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data.prepare import write_packed
from data.shards import Tokens
from data.tokenizers import CharTokenizer
from data.windows import EvalWindows, TrainWindows
from gpt12.checkpoint import Saver, trainer_tensors
from gpt12.device import Machine
from gpt12.errors import run_main
from gpt12.folder import Progress
from gpt12.lora import add_lora
from gpt12.loss import IGNORE_INDEX
from gpt12.optimizer import OPTIMIZERS, Entry
from gpt12.run import Request, Run, schedule_jumps
from gpt12.twin import gpt2_logits
from tests.helpers import (
    CPU,
    DEVICES,
    OUT,
    config,
    evaluations,
    fill,
    losses,
    plain_step,
    random_rows,
    resume,
    run,
    same_tensors,
    same_weights,
    set_weights,
    small_gpt,
    small_step,
    train_on,
    trainer,
    weights,
    write_shard,
)
from tests.models import starts_of

pytestmark = pytest.mark.usefixtures("own_folder")


def moments(step: train.TrainStep) -> dict[str, torch.Tensor]:
    """Return copies of the optimizers' state."""
    tensors = trainer_tensors(step)
    return {name: t.clone() for name, t in tensors.items() if name.startswith("optimizer.")}


def parameters(step: train.TrainStep) -> list[torch.Tensor]:
    """Return copies of the model's parameters."""
    return [p.clone() for p in step.model.parameters()]


def assert_same_checkpoints(one: str, other: str) -> None:
    """Compare the last checkpoints of two runs, bit for bit."""
    for file in ("model", "trainer"):
        assert same_tensors(weights(one, file=file), weights(other, file=file))


def assert_same_gradients(one, other):
    """Compare the gradients of two steps, up to rounding."""
    for i, (a, b) in enumerate(zip(one.parameters, other.parameters, strict=True)):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max(), i


def break_gradients(step: train.TrainStep, value: float = math.nan):
    """Let all gradients be `value` until the hook that is returned is removed."""
    weight = step.model.transformer.ln_f.weight
    return weight.register_hook(lambda gradient: torch.full_like(gradient, value))


# --------------------------------------------------------------------------------------------------
# Optimizer and learning rate


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_optimizers_of_a_step_read_one_learning_rate(optimizer):
    """A recorded step has no other way to a new one. Loading a checkpoint keeps it."""
    step = small_step(optimizer=optimizer)
    rates = [group["lr"] for found in step.optimizers for group in found.param_groups]
    train_on(step, 3, lr=0.125)
    assert len(rates) > 1
    for found in step.optimizers:
        for group in found.param_groups:
            assert group["lr"] is rates[0]
    assert (rates[0].item(), rates[0].dtype) == (0.125, torch.float32)


class Lion(torch.optim.Optimizer):
    """Somebody's optimizer that knows nothing of us (Chen et al. 2023, arXiv:2302.06675)."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert isinstance(group["lr"], float)
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * momentum.lerp(p.grad, 0.1).sign())
                momentum.lerp_(p.grad, 0.01)


# Adagrad raises where found_inf is set, and has a state before its first step.
OTHERS = {"adagrad": torch.optim.Adagrad, "lion": Lion}


@pytest.mark.parametrize("stacked", [1, 3])
def test_a_matrix_that_two_layers_share_is_updated_once(stacked):
    model = small_gpt()
    first, second = model.transformer.h
    if stacked == 3:
        second.attn.c_attn.weight = first.attn.c_attn.weight
    else:
        second.mlp.c_fc.weight = first.mlp.c_fc.weight
    groups = train.parameter_groups(model, 0.1)
    found = [parameter for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found)) and set(found) == set(model.parameters())


@pytest.mark.parametrize("name", OTHERS)
def test_any_optimizer_is_added_by_one_entry(name, monkeypatch):
    """It makes the same steps here as by hand, is skipped, clipped, saved and resumed."""
    make = OTHERS[name]
    entry = Entry(lambda groups, lr, betas: [make(groups, lr)])
    monkeypatch.setitem(OPTIMIZERS, name, entry)
    step = small_step(optimizer=name, grad_clip=0.1)
    model = small_gpt()
    by_hand = make(train.parameter_groups(model, 0.1), 1.0)
    for lr in (1e-2, 3e-3):
        train_on(step, 3, lr=lr)
        for p, ours in zip(model.parameters(), step.parameters, strict=True):
            p.grad = ours.grad.clone()  # clipped, with the same rounding
        assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() < 0.1001
        for group in by_hand.param_groups:
            group["lr"] = lr
        by_hand.step()
    assert same_weights(step.model, [*model.parameters()])
    states = moments(step)
    break_gradients(step)
    step(1e-2)
    assert step.bad.item() == 1
    assert same_weights(step.model, [*model.parameters()])
    assert same_tensors(moments(step), states)
    options = [f"--optimizer={name}", "--decay_lr=False"]
    run("--out_dir=whole", *options, "--max_iters=6")
    run("--out_dir=parts", *options, "--max_iters=3")
    resume("--out_dir=parts", "--max_iters=6")
    assert_same_checkpoints("whole", "parts")


def schedule(**changes):
    values = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110}
    return config(**values | changes)


def test_the_learning_rate_follows_its_closed_form():
    cosine = {0: 1 / 11, 10: 1.0, 60: 0.55, 110: 0.1}
    found = {step: train.learning_rate(step, schedule()) for step in cosine}
    assert found == pytest.approx(cosine)
    assert train.learning_rate(5, schedule(decay_lr=False)) == 1.0
    assert train.learning_rate(30, schedule(lr_decay_iters=30)) == 0.1


@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_the_wsd_schedule_is_the_lowest_of_its_three_lines(fraction):
    """At every step: the line of the warm-up, of the plateau or of the decay; then min_lr."""
    wsd = schedule(schedule="wsd", decay_fraction=fraction, learning_rate=2.0)
    for step in range(120):
        decay = 0.1 + (2.0 - 0.1) * (110 - step) / (fraction * 100)
        expected = max(0.1, min(2.0 * (step + 1) / 11, 2.0, decay))
        assert train.learning_rate(step, wsd) == pytest.approx(expected), step


# --------------------------------------------------------------------------------------------------
# Loading


def loading_step(batch_size, micro_batches, rank=0, world=1, packed=False):
    """Return a step of so many micro-batches on this rank, for windows of five tokens."""
    shape = {"batch_size": batch_size, "gradient_accumulation_steps": micro_batches}
    step = train.TrainStep(small_gpt(), config(block_size=5, **shape), CPU, packed)
    step.machine = replace(CPU, rank=rank, world=world)
    return step


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_draw_every_window_of_an_epoch_once(tmp_path, world):
    """A step has the same windows with any number of ranks: 4 micro-batches of 2 in all."""
    write_shard(tmp_path / "train_000000.bin", np.arange(48 * 5 + 5, dtype=np.uint16))
    windows = TrainWindows(Tokens(tmp_path, "train"), 5, seed=3)
    assert windows.per_epoch == 48
    steps = [loading_step(2, 4 // world, rank, world) for rank in range(world)]
    for epoch in range(3):
        drawn: list[int] = []
        for position in range(epoch * 48, (epoch + 1) * 48, 8):
            for step in steps:
                step.load(windows, position)
                assert step.targets_per_batch == [10] * (4 // world)  # every position
            # Micro-batch m belongs to rank m % world.
            x, y = torch.stack([step.batch for step in steps], dim=2)
            assert torch.equal(y, x + 1)
            starts = x.flatten()[::5].tolist()
            assert starts == windows.starts(np.arange(position, position + 8)).tolist()
            drawn += starts
        assert sorted(drawn) == [min(drawn) + i * 5 for i in range(48)]


def test_of_masked_data_the_examples_are_loaded_and_the_targets_of_a_micro_batch_counted(tmp_path):
    tokens = np.arange(4 * 5 + 1, dtype=np.uint16)
    mask = np.zeros(len(tokens), np.uint8)
    mask[5] = mask[7] = 2  # two examples in the second row
    mask[[6, 8, 9]] = 1  # with three targets
    write_shard(tmp_path / "train_000000.bin", tokens)
    write_shard(tmp_path / "train_mask_000000.bin", mask)
    windows = TrainWindows(Tokens(tmp_path, "train"), 5, seed=3)
    step = loading_step(1, 4, packed=True)  # each row is a micro-batch
    step.load(windows, 0)
    assert sorted(step.targets_per_batch) == [0, 0, 0, 3]
    second = step.targets_per_batch.index(3)
    _, y, starts = step.batch
    assert y[second].tolist() == [[6, -1, 8, 9, -1]]
    assert starts[second].tolist() == [[0, 0, 2, 2, 2]]
    assert not starts[:second].any() and not starts[second + 1 :].any()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_host_waits_for_a_copy_and_on_cuda_only_before_it_fills_the_array_anew(
    dataset, monkeypatch, on_gpu
):
    """A Mac's GPU would copy after the host has filled the array: its copies are waited for."""
    windows = TrainWindows(Tokens(dataset, "train"), 5, seed=3)
    step = loading_step(1, 1)
    monkeypatch.setattr("gpt12.device.Machine.on_gpu", on_gpu)
    step.on_host = torch.zeros_like(step.batch)  # page-locked memory needs a GPU
    acted = Mock()
    step.batch = acted
    if on_gpu:
        step.copied = acted
    acted.fill.side_effect = windows.batch
    monkeypatch.setattr(windows, "batch", acted.fill)
    step.load(windows, 0)
    step.load(windows, 2)
    calls = [(name, *keys.values()) for name, _, keys in acted.mock_calls]
    if on_gpu:
        assert calls == [("synchronize",), ("fill",), ("copy_", True), ("record",)] * 2
    else:
        assert calls == [("fill",), ("copy_", False)] * 2


# --------------------------------------------------------------------------------------------------
# One update


def test_accumulated_micro_batches_give_the_mean_over_all_targets():
    """A micro-batch of 8 rows equals four of 2, although one has one target and one none."""
    x, y = random_rows(8)
    y[0:2] = IGNORE_INDEX
    y[2, :] = IGNORE_INDEX
    y[3, 1:] = IGNORE_INDEX
    whole = small_step(batch_size=8)
    parts = small_step(gradient_accumulation_steps=4)
    scores = whole.model(x)[0].flatten(0, 1)
    expected = nn.functional.cross_entropy(scores, y.flatten(), ignore_index=IGNORE_INDEX)
    for step in (whole, parts):
        fill(step, x, y)
        step(1e-2)
    assert whole.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert_same_gradients(parts, whole)


# Renew it only when the model or the optimizer is meant to change. The reference must agree first.
GOLDEN = Path(__file__).parent / "golden_losses.json"


@pytest.mark.gpt2
@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_ten_training_steps_give_the_golden_losses_and_those_of_the_reference(clip):
    """The reference: GPT-2 from its formulas and torch's plain AdamW, in float64."""
    ids = (np.cumsum(np.arange(200) % 7) % 13).astype(np.int64)
    step = small_step(grad_clip=clip)
    exact = {
        name: p.double() for name, p in step.model.state_dict().items() if "lm_head" not in name
    }
    groups = []
    for p in exact.values():
        p.requires_grad_()
        groups.append({"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0})
    oracle = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    curve = []
    expected = []
    norms = []
    for i in range(0, 50, 5):
        batch = torch.from_numpy(np.stack([ids[i : i + 9], ids[i + 50 : i + 59]]))
        x, y = batch[:, :-1], batch[:, 1:]
        fill(step, x, y)
        step(1e-2)
        curve.append(step.loss.item())
        tied = {"lm_head.weight": exact["transformer.wte.weight"]}
        logits = gpt2_logits(exact | tied, 2, x)[..., :13].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, y.flatten())
        oracle.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(exact.values(), clip).item()
        oracle.step()
        expected.append(loss.item())
        norms.append(norm)
        assert step.grad_norm.item() == pytest.approx(norm, rel=1e-3)
    assert curve == pytest.approx(expected, abs=1e-4)
    if clip == 0.6:
        assert min(norms) < clip < max(norms)  # some updates are clipped
        return
    golden = json.loads(GOLDEN.read_text())
    assert curve == pytest.approx(golden, abs=1e-4), f"renew {GOLDEN.name} with {curve}?"


@pytest.mark.parametrize("variant", ["none", "pointwise", "block", "lora"])
def test_a_step_on_packed_rows_is_the_step_on_one_example_a_row(variant):
    """Loss and gradients are equal: examples of 8, 3 and 5, 2 and 2 and 4, and 8 tokens."""
    packed = (((8,), (3, 5)), ((2, 2, 4), (8,)))  # two micro-batches of two rows
    x, y = random_rows(rows=4)
    y[0, :3] = IGNORE_INDEX
    lengths = [length for rows in packed for row in rows for length in row]
    alone_x = torch.zeros(len(lengths), 8, dtype=torch.int64)
    alone_y = torch.full_like(alone_x, IGNORE_INDEX)
    parts = zip(x.flatten().split(lengths), y.flatten().split(lengths), strict=True)
    for i, (inputs, targets) in enumerate(parts):
        alone_x[i, : len(inputs)] = inputs
        alone_y[i, : len(inputs)] = targets
    models = [small_gpt(), small_gpt()]
    if variant == "lora":
        for model in models:
            add_lora(model, 2, 4.0)
            set_weights(model)
    else:
        models[1].set_recompute(variant)
    alone = small_step(model=models[0], batch_size=len(lengths))
    accumulated = config(gradient_accumulation_steps=2)
    together = train.TrainStep(models[1], accumulated, CPU, packed=True)
    together.example_starts.copy_(torch.stack([starts_of(rows) for rows in packed]))
    fill(alone, alone_x, alone_y)
    alone(1e-2)
    fill(together, x, y)
    together(1e-2)
    assert together.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
    assert_same_gradients(together, alone)


def test_the_first_share_of_the_steps_has_a_short_context():
    short = config(short_context_share=0.3, max_iters=10)
    assert [train.context_of_step(step, short) for step in range(6)] == [1, 1, 1, 8, 8, 8]
    assert train.context_of_step(0, config()) == 8


@pytest.mark.parametrize(
    ("step", "changes", "notes"),
    [
        (6, "", []),
        (6, "--max_iters=20 --lr_decay_iters=10", ["short context ends at step 16 and not at"]),
        (6, "--short_context_share=0 --lr_decay_iters=10", ["ends at step 6 and not at step 8"]),
        (8, "--max_iters=20 --lr_decay_iters=10 --short_context_share=0", []),
        (0, "--max_iters=20", []),
        (4, "--learning_rate=2e-2", ["learning rate goes on at 0.0134 and not at 0.00689"]),
    ],
)
def test_a_resumed_run_notes_what_its_typed_keys_make_jump(step, changes, notes):
    options = "--short_context_share=0.8 --max_iters=10 --min_lr=1e-3 --warmup_iters=0".split()
    before = config(*options)
    now = config(*options, *changes.split())
    parts = dict.fromkeys(field.name for field in fields(Run))
    parts["request"] = Request(now, frozenset(), now, before)
    run = Run(**parts | {"config": now, "progress": Progress(step=step)})
    for said, expected in zip(schedule_jumps(run, train.learning_rate), notes, strict=True):
        assert expected in said


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped(value, optimizer, device):
    """Weights, moments and step counts stay, and the skipped updates are counted."""
    step = plain_step(device, optimizer=optimizer, gradient_accumulation_steps=2)
    fill(step, *random_rows(4))
    step(1e-2)
    before = parameters(step)
    states = moments(step)
    hook = break_gradients(step, value)
    for bad in (1, 2):
        step(1e-2)
        assert step.bad.item() == bad
    assert same_weights(step.model, before)
    assert same_tensors(moments(step), states)
    hook.remove()
    step(1e-2)
    assert (step.bad.item(), step.skipped.item()) == (0, 2)
    assert all(torch.isfinite(p).all() for p in parameters(step))
    assert not same_weights(step.model, before)


def test_a_loss_that_is_not_finite_skips_the_update_although_the_gradients_are():
    step = small_step()
    fill(step, *random_rows())
    before = parameters(step)
    forward = step.forward
    step.forward = lambda *args, **more: (None, forward(*args, **more)[1] + math.inf)
    step(1e-2)
    assert step.bad.item() == 1
    assert math.isfinite(step.grad_norm.item())
    assert same_weights(step.model, before)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_without_a_target_changes_nothing_and_shows_no_old_norm(dtype, world, monkeypatch):
    """With float16 there is nothing to find a loss scale by, least of all in the first step."""
    step = small_step(replace(CPU, dtype=dtype))
    step.machine = replace(step.machine, world=world)
    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: tensor)
    x, y = random_rows()
    none = torch.full_like(y, IGNORE_INDEX)
    for targets in (none, y, none, none, y):
        before = parameters(step)
        fill(step, x, targets)
        step(1e-2)
        trained = targets is y
        assert (step.grad_norm.item() > 0) == trained
        assert (step.loss.item() > 0) == trained
        assert step.bad.item() == 0
        assert same_weights(step.model, before) != trained


def test_a_step_without_a_target_on_any_rank_does_not_divide_by_0(monkeypatch):
    """On several ranks each computes its loss, because the others wait for its gradients."""
    step = small_step()
    step.machine = replace(CPU, world=2)
    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: tensor)
    for targets, divisor in ((0, 0.5), (6, 3)):  # at least one target over two ranks
        step.targets_per_batch = [targets]
        step.set_divisor()
        assert step.divisor.item() == divisor


def loss_over(model, windows, count=50, batch_size=2, machine=CPU):
    """Return the mean loss that a run with this model would evaluate."""
    evaluated = SimpleNamespace(
        model=model,
        machine=machine,
        eval_count=count,
        config=SimpleNamespace(batch_size=batch_size),
    )
    return train.mean_loss(evaluated, windows)


class NoFloat64(TorchDispatchMode):
    """Metal has no such numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        assert getattr(result, "dtype", None) != torch.float64, func
        return result


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_mac_which_lacks_fused_kernels_and_float64_trains_the_same(
    dataset, monkeypatch, optimizer
):
    """Clipped and skipped updates, and evaluation. The machine is acted, on the CPU."""
    fused = small_step(grad_clip=0.1, optimizer=optimizer)
    windows = EvalWindows(Tokens(dataset, "val"), 8)
    expected = loss_over(fused.model, windows, 5)
    mac = small_step(grad_clip=0.1, optimizer=optimizer)
    mac.on_device = False
    groups = train.parameter_groups(mac.model, mac.config.weight_decay)
    mac.optimizers = OPTIMIZERS[optimizer].build(groups, 1e-2, (0.9, 0.95))
    for group in mac.optimizers[-1].param_groups:
        group["fused"] = False
    for module in ("torch.nn.utils.clip_grad", "torch.utils._foreach_utils"):
        monkeypatch.setattr(f"{module}._device_has_foreach_support", lambda device: False)
    with NoFloat64():
        assert loss_over(mac.model, windows, 5) == pytest.approx(expected, rel=1e-6)
    train_on(fused, 3)
    train_on(mac, 3)
    torch.testing.assert_close(moments(mac), moments(fused), rtol=1e-3, atol=1e-7)


PLAIN = Machine(torch.device("cuda"), torch.bfloat16, compiled=False)
COMPILED = replace(PLAIN, compiled=True)
HALF = replace(PLAIN, dtype=torch.float16)
TWO_RANKS = replace(PLAIN, world=2)
MANY = train.MAX_GRAPH_LAYERS // 2  # micro-batches of two layers


@pytest.mark.parametrize(
    ("expected", "changes", "machine"),
    [
        (True, {}, PLAIN),
        (False, {}, CPU),
        # A graph may not become too large.
        (True, {"gradient_accumulation_steps": MANY}, PLAIN),
        (False, {"gradient_accumulation_steps": MANY + 1}, PLAIN),
        # A recorded step can ask the host for nothing.
        (False, {}, HALF),
        (False, {}, TWO_RANKS),
        (False, {"optimizer": "adamw8bit"}, PLAIN),
        (True, {"dropout": 0.1}, PLAIN),
        (False, {"dropout": 0.1, "recompute": "block"}, PLAIN),
        (False, {"dropout": 0.1, "recompute": "block"}, COMPILED),
        (True, {"recompute": "block"}, PLAIN),
    ],
)
def test_only_a_small_step_that_asks_the_host_for_nothing_is_recorded(expected, changes, machine):
    assert train.use_graph_for_training(config(**changes), n_layer=2, machine=machine) == expected


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_an_evaluation_is_the_mean_over_every_target_once(dataset):
    """Of 400 tokens: 50 windows, the last one short, in batches of 6, the last one short too."""
    model = small_gpt(dropout=0.5)
    tokens = Tokens(dataset, "val")
    ids = torch.from_numpy(tokens.gather(np.array([0]), 400)[0].astype(np.int64))
    model.eval()
    with torch.no_grad():
        parts = [model(ids[None, i : i + 8])[0][0].log_softmax(1) for i in range(0, 399, 8)]
    log_probs = torch.cat(parts)[:399]
    model.train()
    expected = -log_probs.gather(1, ids[1:, None]).double().mean().item()
    windows = EvalWindows(tokens, 8)
    for batch_size in (1, 3, 8):
        found = loss_over(model, windows, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-5)
    assert model.training  # again, after it was off


def test_an_evaluation_of_packed_rows_is_the_mean_over_examples_computed_alone(tmp_path):
    model = small_gpt()
    generator = np.random.default_rng(0)
    examples = []
    total = 0.0
    targets = 0
    for length in generator.integers(2, 9, 30).tolist():
        ids = generator.integers(0, 13, length)
        mask = generator.integers(0, 2, length).astype(np.uint8)
        examples.append((ids, mask))
        with torch.no_grad():
            log_probs = model(torch.from_numpy(ids)[None])[0][0].log_softmax(1)
        for t in range(1, length):
            if mask[t] == 1:
                total -= log_probs[t - 1, ids[t]].item()
                targets += 1
    write_packed(tmp_path, "val", examples, 8, CharTokenizer("a"))
    windows = EvalWindows(Tokens(tmp_path, "val"), 8)
    assert windows.count < 25  # packed
    assert loss_over(model, windows) == pytest.approx(total / targets, rel=1e-5)


def test_evaluating_more_often_does_not_move_training():
    options = ["--max_iters=10", "--dropout=0.1"]
    run("--out_dir=rare", *options, "--eval_interval=50")
    run("--out_dir=often", *options, "--eval_interval=3", "--eval_iters=0")
    assert losses("rare") == losses("often")
    assert evaluations("often") == [0, 3, 6, 9, 10]


# --------------------------------------------------------------------------------------------------
# The loop


def kill_after(monkeypatch, steps: int) -> None:
    """Let the process die in the middle of update steps + 1: nothing of ours runs afterwards."""
    original = train.TrainStep.__call__
    count = itertools.count()

    def call(self, *args):
        if next(count) == steps:
            raise SystemExit("killed")
        original(self, *args)

    monkeypatch.setattr("train.TrainStep.__call__", call)


def test_a_killed_run_that_is_resumed_equals_the_unbroken_run_bit_for_bit(monkeypatch):
    options = ["--max_iters=20", "--dropout=0.2"]
    # A clock that a second passes on whenever it is read.
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("gpt12.log.time", clock)
    run("--out_dir=whole", *options)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        kill_after(m, 7)
        run("--out_dir=broken", *options, "--save_interval_s=0")
    state = trainer("broken")
    assert (state["step"], state["position"]) == (7, 7 * 8)
    resume("--out_dir=broken")
    assert losses("broken") == losses("whole")
    assert losses("broken", "tokens") == {step: step * 2 * 4 * 16 for step in range(21)}
    for step, lr in losses("whole", "lr").items():  # of 20 steps two are warm-up
        cosine = 6e-5 + (1e-2 - 6e-5) * (1 + math.cos(math.pi * (step - 3) / 18)) / 2
        assert lr == pytest.approx(1e-2 * step / 3 if step <= 2 else cosine), step
    elapsed = losses("broken", "elapsed_s")
    assert list(elapsed.values()) == sorted(elapsed.values())
    assert 0 < elapsed[6] <= elapsed[8]  # the second process continues the first one's clock
    assert_same_checkpoints("whole", "broken")


@pytest.mark.picture
def test_a_run_learns_and_leaves_what_it_promises():
    run("--max_iters=60", "--eval_interval=20", "--n_layer=2")
    curve = losses()
    assert curve[60] < math.log(3) + 0.4 < curve[1]  # each letter is followed by one of three
    of_best = "best/model.safetensors best/config.json"
    of_last = "last/trainer.json last/trainer.safetensors"
    for name in f"run.json metrics.jsonl loss.png {of_best} {of_last}".split():
        assert (OUT / name).stat().st_size > 0, name


@pytest.mark.parametrize(("always", "steps"), [(True, [2, 4, 5]), (False, [5])])
def test_a_run_logs_and_saves_at_its_intervals_and_at_its_end(monkeypatch, always, steps):
    saved = []
    save = Saver._save

    def noted(self, name):
        saved.append((name, self.progress.step))
        return save(self, name)

    monkeypatch.setattr("gpt12.checkpoint.Saver._save", noted)
    options = ["--max_iters=5", "--eval_interval=2", "--log_interval=3", "--save_interval_s=1e9"]
    run(*options, f"--always_save_checkpoint={always}")
    assert list(losses()) == [3, 5]
    assert [step for name, step in saved if name == "last"] == steps


def test_too_many_bad_updates_stop_the_run_and_last_stays_finite(monkeypatch, capsys):
    original = train.TrainStep.compute
    count = itertools.count()

    def poisoned(self):
        if next(count) == 5:
            break_gradients(self)
        original(self)

    monkeypatch.setattr("train.TrainStep.compute", poisoned)
    monkeypatch.setattr("train.MAX_BAD_STEPS", 3)
    options = ["--max_iters=30", "--log_interval=100", "--eval_interval=100"]
    run(*options, status=1)
    out = capsys.readouterr().out
    assert "stopping at step 9: the last 4 updates" in out
    assert "Try a lower learning_rate" in out
    assert all(torch.isfinite(t).all() for t in weights().values())
    assert trainer()["step"] == 9


def test_patience_counts_the_evaluations_since_the_best(monkeypatch, capsys):
    values = iter((1.0, 4.0, 5.0, 3.0, 4.0, 3.5, 3.4))  # every five steps; step 0 does not count

    def acted(run, windows, stop):
        is_training_split = len(windows.tokens) == 2600
        return 0.0 if is_training_split else next(values)

    monkeypatch.setattr("train.mean_loss", acted)
    run("--max_iters=30", "--eval_interval=5", "--patience=2")
    assert evaluations() == [0, 5, 10, 15, 20, 25]
    assert set(losses(key="train_loss").values()) == {0.0}
    assert "no better validation loss in 2 evaluations" in capsys.readouterr().out
    assert trainer(name="best")["step"] == 15
    assert trainer()["worse_evaluations"] == 2


def test_losses_that_are_not_finite_never_become_the_best(monkeypatch):
    monkeypatch.setattr("train.mean_loss", lambda *args, **options: math.nan)
    run("--max_iters=2", "--eval_interval=1")
    assert not (OUT / "best").exists()
    assert trainer()["best_val_loss"] is None
    assert losses(key="val_loss") == dict.fromkeys(range(3))


# --------------------------------------------------------------------------------------------------
# A user's mistakes


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--learning_rat=1", "learning_rate"),
        ("--dataset=/nowhere/at_all.txt", "at_all.txt"),
        ("--out_dir=/proc/nothing", "cannot be written"),
        ("--init_from=/nowhere", "'/nowhere' is no local folder or file"),
    ],
)
def test_a_users_mistake_ends_with_a_message_and_status_2_and_leaves_nothing(
    capsys, option, message
):
    with pytest.raises(SystemExit) as end:
        run_main(lambda: run(option))
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not OUT.exists()
