"""What only a GPU can show: bf16 numerics, the fused loss, CUDA graphs, memory. pytest -m gpu."""

import gc
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train
from gpt12 import fit
from gpt12.device import Machine
from gpt12.generate import generate
from gpt12.lora import add_lora
from gpt12.loss import IGNORE_INDEX, fused_loss_and_gradient_in_place, loss_and_gradient_in_place
from gpt12.memory import GIB, step_memory
from gpt12.run import MEMORY_KEYS, prepare_model
from gpt12.weights import save_pretrained
from model import GPT, GPTConfig
from tests.helpers import (
    built,
    config,
    losses,
    read_json,
    resume,
    run,
    same_tensors,
    weights,
    write_shard,
)
from tests.models import relative

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_folder")]
SMALL = GPTConfig(128, 1000, 4, 4, 256, bias=True)


@pytest.fixture(autouse=True)
def as_at_the_start():
    """Forget what a test before has set and compiled.

    Float32 products are not rounded to TF32. torch compiles a layer a few times only, and runs it
    as it is from then on.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.compiler.reset()


def make_step(
    shape: GPTConfig = SMALL,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = True,
    cuda_graph: bool = False,
    **changes,
) -> train.TrainStep:
    """Return a step on the GPU. changes: keys of the configuration."""
    torch.manual_seed(0)
    values = {
        "batch_size": 8,
        "block_size": shape.block_size,
        "dropout": shape.dropout,
        "dtype": str(dtype).removeprefix("torch."),
        "learning_rate": 1e-3,
    }
    found = config(**values | changes)
    machine = Machine(torch.device("cuda", 0), dtype, compiled)
    model = GPT(shape)
    prepare_model(model, found, machine)
    return train.TrainStep(model, found, machine, cuda_graph=cuda_graph)


def fill(step: train.TrainStep, seed: int = 0) -> None:
    """Fill the step's buffers with ids that have a structure to learn."""
    generator = torch.Generator().manual_seed(seed)
    micro_steps, batch_size, block_size = step.x.shape
    shape = (micro_steps, batch_size, block_size + 1)
    ids = torch.randint(1, 4, shape, generator=generator).cumsum(2) * 7
    ids %= step.model.config.vocab_size
    step.x.copy_(ids[..., :-1])
    step.y.copy_(ids[..., 1:])


def curve_of(step: train.TrainStep, steps: range) -> list[float]:
    """Return the losses of updates at the same rate, each on data of its own."""
    curve = []
    for i in steps:
        fill(step, i)
        step(1e-3)
        curve.append(step.loss.item())
    return curve


def free_memory() -> None:
    """Free what an earlier step or test left: it would be freed while the next one measures."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# --------------------------------------------------------------------------------------------------
# Numerics. tests/test_loss.py has the loss's backward scale, on the GPU too.


@pytest.mark.parametrize("recompute", ["none", "pointwise", "block"])
def test_every_gradient_of_the_compiled_bf16_step_is_near_fp32(recompute):
    exact = make_step(dtype=torch.float32, compiled=False)
    fast = make_step(recompute=recompute)
    for step in (exact, fast):
        fill(step)
        step(0.0)
    for (name, a), b in zip(exact.model.named_parameters(), fast.model.parameters(), strict=True):
        error = ((b.grad - a.grad).norm() / a.grad.norm()).item()
        assert error < 0.01, (name, error)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["pointwise", "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_under_dropout_are_the_slope_of_the_loss(recompute, compiled, dropout):
    """A recomputed layer must drop the same values again. The slope needs no backward pass."""
    lora = {"lora_rank": 4, "lora_alpha": 8.0}
    shape = replace(SMALL, dropout=dropout)
    step = make_step(shape, torch.float32, compiled, recompute=recompute, **lora)
    fill(step)
    trained = [p for p in step.model.parameters() if p.requires_grad]
    for name, p in step.model.named_parameters():
        if "lora_B" in name:  # else no gradient reaches A
            torch.nn.init.normal_(p, std=0.1)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return step.model.train()(step.x[0], step.y[0])[1]

    def move(distance: float) -> None:
        with torch.no_grad():
            for p, direction in zip(trained, directions, strict=True):
                p += distance * direction

    gradients = torch.autograd.grad(loss(), trained)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    directions = [g / norm for g in gradients]
    move(0.02)
    above = loss().item()
    move(-0.04)
    below = loss().item()
    assert (above - below) / 0.04 == pytest.approx(norm, rel=0.03)


@pytest.mark.parametrize("targets", [0, 1, 77])
def test_the_fused_loss_equals_the_plain_formula(targets):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(77, 50304, device="cuda", generator=generator) * 3
    target = torch.full((77,), IGNORE_INDEX, device="cuda")
    target[:targets] = torch.randint(0, 50257, (targets,), device="cuda", generator=generator)
    if targets > 1:
        target[0] = 0
        target[1] = 50256
    exact = logits.double()
    wanted = loss_and_gradient_in_place(exact, target, 50257).item()
    fused = logits.clone()
    loss = fused_loss_and_gradient_in_place(fused, target, 50257).item()
    assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert (fused - exact).abs().max() < 1e-6
    rounded = logits.bfloat16()
    loss = fused_loss_and_gradient_in_place(rounded, target, 50257).item()
    assert loss == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert (rounded - exact).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("dtype", "compiled", "tolerance"),
    [(torch.float32, False, 1e-4), (torch.bfloat16, False, 3e-2), (torch.bfloat16, True, 3e-2)],
)
def test_packed_examples_are_computed_as_if_each_were_alone(dtype, compiled, tolerance):
    step = make_step(dtype=dtype, compiled=compiled)
    fill(step)
    ids = step.x[0]
    ends = [40, 96, 128]
    starts = torch.zeros_like(ids)
    alone = []
    with torch.no_grad(), step.machine.autocast():
        for start, end in itertools.pairwise([0, *ends]):
            starts[:, start:end] = start
            alone.append(step.model.transformer(ids[:, start:end]))
        packed = step.model.transformer(ids, example_starts=starts)
    assert relative(packed.float(), torch.cat(alone, dim=1).float()) < tolerance


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recorded_step_gives_the_plain_steps_losses(optimizer, compiled):
    """With dropout: the graph draws the plain step's random numbers. The context gets longer.

    Two plain runs show how much the GPU's order of additions matters.
    """
    shape = GPTConfig(128, 1000, 2, 4, 128, dropout=0.1)
    curves = []
    for graph in (False, False, True):
        step = make_step(
            shape,
            compiled=compiled,
            optimizer=optimizer,
            cuda_graph=graph,
            gradient_accumulation_steps=2,
        )
        step.model.train()
        torch.manual_seed(1)
        step.set_context_length(32)
        curve = curve_of(step, range(10))
        step.set_context_length(128)
        curve += curve_of(step, range(10, 30))
        assert (step.graph is not None) == graph
        curves.append(torch.tensor(curve))
    spread = (curves[0] - curves[1]).abs().max().item()
    assert (curves[2] - curves[0]).abs().max().item() <= max(3 * spread, 2e-3)


def test_200_steps_of_the_fastest_path_end_where_the_plain_path_ends():
    plain = {"compiled": False, "dtype": torch.float32}
    fastest = {"recompute": "pointwise", "cuda_graph": True}
    ends = []
    for options in (plain, fastest):
        curve = curve_of(make_step(**options), range(200))
        ends.append(sum(curve[150:]) / 50)
    print("mean of the last 50 losses, plain fp32 and the fastest path:", ends)
    assert ends[0] == pytest.approx(ends[1], abs=0.01)


# --------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "compiled"),
    [(12, 12, 768, True), (12, 12, 768, False), (24, 16, 1024, True), (36, 20, 1280, True)],
)
@pytest.mark.parametrize(("recompute", "batch_size"), [("none", 4), ("pointwise", 8), ("block", 8)])
def test_a_step_takes_the_memory_that_is_predicted(
    n_layer, n_head, n_embd, compiled, recompute, batch_size
):
    shape = GPTConfig(1024, 50257, n_layer, n_head, n_embd)
    free_memory()
    before = torch.cuda.memory_allocated()
    step = make_step(shape, compiled=compiled, recompute=recompute, batch_size=batch_size)
    for _ in range(2):
        step.x.random_(0, 50257)
        step.y.random_(0, 50257)
        step(1e-4)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = step_memory(shape, step.config, step.machine)
    print(
        f"{n_layer} layers, {recompute}, {batch_size}: predicted {predicted / GIB:.2f}, "
        f"measured {measured / GIB:.2f} GiB"
    )
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("lora", [False, True])
def test_saving_takes_no_second_model_on_the_device(tmp_path, lora):
    model = GPT(GPTConfig(256, 5000, 8, 8, 512)).cuda()
    if lora:
        add_lora(model, rank=8, alpha=16.0)
    torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda"))  # cuBLAS's workspace
    free_memory()
    before = torch.cuda.memory_allocated()
    save_pretrained(model, tmp_path)
    largest_matrix = 4 * 4 * 512 * 512  # bytes; there are 16 of them, and 16 smaller ones
    assert torch.cuda.max_memory_allocated() - before <= 4 * largest_matrix


# --------------------------------------------------------------------------------------------------
# Writing text


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_recorded_decoder_writes_what_a_cpu_writes(penalty):
    """Past the context's end, too. The CPU's texts are compared in test_generate.py."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 1000, 2, 4, 128)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # a decided model: no ties that rounding could turn
    prompts = [[1, 2, 3], [7], [5] * 20]
    keys = {"max_new_tokens": 150, "temperature": 0, "repetition_penalty": penalty}
    expected = generate(model, prompts, **keys)
    assert generate(model.cuda(), prompts, **keys) == expected


def test_a_recorded_decoder_draws_what_a_plain_one_draws(monkeypatch):
    """By the same kernels. Every text has a length of its own, and all pass the context's end."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 50257, 2, 4, 128)).eval().to("cuda", torch.bfloat16)
    prompts = [[1, 2, 3], [7], [5] * 20]
    recorded = generate(model, prompts, max_new_tokens=150)
    monkeypatch.setattr("gpt12.generate.record", lambda step: SimpleNamespace(replay=step))
    assert generate(model, prompts, max_new_tokens=150) == recorded


# --------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture
def many_letters(tmp_path):
    """A data set of 97 ids."""
    folder = tmp_path / "many"
    folder.mkdir()
    steps = np.random.default_rng(0).integers(1, 4, 30000)
    tokens = (np.cumsum(steps) % 97).astype(np.uint16)
    write_shard(folder / "train_000000.bin", tokens[:25000])
    write_shard(folder / "val_000000.bin", tokens[25000:])
    (folder / "meta.json").write_text('{"vocab_size": 97}')


ON_GPU = (
    "--device=cuda --dtype=auto --compile=auto --n_layer=2 --n_embd=64 --block_size=64 "
    "--batch_size=8 --dropout=0.1 --eval_interval=100 --dataset=many"
).split()


def test_deterministic_training_resumes_bit_for_bit(many_letters, monkeypatch):
    # Both save after each step: an evaluation's text draws random numbers, whose state is saved.
    options = [*ON_GPU, "--deterministic", "--max_iters=20", "--save_interval_s=0"]
    original = train.TrainStep.__call__
    count = itertools.count()

    def killed_at_the_eighth_step(self, *args):
        if next(count) == 7:
            raise SystemExit
        original(self, *args)

    try:
        run("--out_dir=whole", *options)
        with monkeypatch.context() as m, pytest.raises(SystemExit):
            m.setattr("train.TrainStep.__call__", killed_at_the_eighth_step)
            run(*options)
        resume()
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses() == losses("whole")
    for file in ("model", "trainer"):
        assert same_tensors(weights(file=file), weights("whole", file=file))


def reserved_by_attempt(found) -> list[tuple[Any, int]]:
    """Return each attempt of a run with the most memory that it reserves."""
    reserved = []
    for attempt in fit.list_attempts(found.config):
        free_memory()
        assert fit.fits_in_a_trial(attempt, found, train.TrainStep)
        reserved.append((attempt, torch.cuda.max_memory_reserved()))
    return reserved


def test_less_memory_leads_to_a_later_attempt_with_the_same_losses(many_letters):
    """The allocator is capped between what a attempt takes and what the attempt before it takes."""
    options = [*ON_GPU, "--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=1024"]
    options += ["--compile=False", "--deterministic", "--dropout=0", "--max_iters=3"]
    reserved = reserved_by_attempt(built(*options))
    print("GiB by attempt:", [round(size / GIB, 2) for _, size in reserved])
    asked = reserved[0][0]
    total = torch.cuda.mem_get_info()[1]
    seen = []
    try:
        for (_, more), (attempt, less) in itertools.pairwise(reserved):
            if less > 0.9 * more:
                continue  # no cap between the two would be safe
            name = f"{attempt.recompute}-{attempt.batch_size}"
            typed = [f"--{key}={getattr(attempt, key)}" for key in MEMORY_KEYS]
            free_memory()
            run(f"--out_dir=typed-{name}", *options, *typed)
            free_memory()
            torch.cuda.set_per_process_memory_fraction((less + more) / 2 / total)
            run(f"--out_dir=fallen-{name}", *options)
            torch.cuda.set_per_process_memory_fraction(1.0)
            facts = read_json(f"fallen-{name}/run.json")
            for key in MEMORY_KEYS:
                assert facts["config"][key] == getattr(attempt, key), (name, key)
                assert facts["requested"][key] == getattr(asked, key)
            assert losses(f"fallen-{name}") == losses(f"typed-{name}")
            seen.append(name)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.use_deterministic_algorithms(False)
    assert {"pointwise-8", "pointwise-4", "block-4"} <= set(seen)


def test_a_save_of_a_run_with_a_recorded_step_holds_the_weights_after_the_replay(many_letters):
    """The checkpoint has the tensors that the graph updates, not copies of them."""
    found = train.Trainer(built(*ON_GPU, "--max_iters=12"))
    assert found.train() == 0
    assert found.train_step.graph is not None
    assert found.saver.last_holds == (12, 12)
    now = found.run.model.transformer.wpe.weight.cpu()
    assert torch.equal(weights()["transformer.wpe.weight"], now)
    counts = {t.item() for name, t in weights(file="trainer").items() if ".step" in name}
    assert counts == {12.0}
