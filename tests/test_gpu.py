"""What only a GPU can show: compiled bf16 numerics, the fused loss, CUDA graphs, memory. Run there: pytest -m gpu."""

import gc
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from data.shards import write_shard
from gpt12.device import Machine
from gpt12.generate import Sampling, generate
from gpt12.lora import add_lora
from gpt12.loss import cross_entropy_chunk, fused_cross_entropy_chunk
from gpt12.targets import IGNORE_INDEX
from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig

pytestmark = pytest.mark.gpu
SMALL = GPTConfig(128, 1000, 4, 4, 256, bias=True)


def make_step(shape=SMALL, dtype=torch.bfloat16, compiled=True, **changes) -> train.Step:
    torch.manual_seed(0)
    values = {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
    }
    values |= {"gradient_accumulation_steps": 1, "batch_size": 8, "block_size": shape.block_size, "cuda_graph": False}
    values |= {
        "recompute": "none",
        "dtype": "bfloat16" if dtype == torch.bfloat16 else "float32",
        "lora_rank": 0,
        "quantize": "none",
    }
    config = SimpleNamespace(**values | changes)
    machine = Machine(torch.device("cuda", 0), dtype, compiled)
    model = GPT(shape)
    train.prepare_model(model, config, machine)
    return train.Step(model, config, machine)


def fill(step: train.Step, seed: int = 0) -> None:
    """Ids with structure, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    ids = (
        torch.randint(1, 4, (*step.x.shape[:2], step.x.size(2) + 1), generator=generator).cumsum(2) * 7
    ) % step.model.config.vocab_size
    step.x.copy_(ids[..., :-1])
    step.y.copy_(ids[..., 1:])


@pytest.mark.parametrize("recompute", ["none", "pointwise", "block"])
def test_every_gradient_of_the_compiled_bf16_step_is_near_fp32(recompute):
    exact, fast = make_step(dtype=torch.float32, compiled=False), make_step(recompute=recompute)
    for step in (exact, fast):
        fill(step)
        step(0.0)
    for (name, a), b in zip(exact.model.named_parameters(), fast.model.parameters(), strict=True):
        error = ((b.grad - a.grad).norm() / a.grad.norm()).item()
        assert error < 0.01, (name, error)


@pytest.mark.parametrize("targets", [0, 1, 77])
def test_the_fused_loss_equals_the_plain_formula(targets):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(77, 50304, device="cuda", generator=generator) * 3
    target = torch.full((77,), IGNORE_INDEX, device="cuda")
    target[:targets] = torch.randint(0, 50257, (targets,), device="cuda", generator=generator)
    if targets > 1:
        target[0], target[1] = 0, 50256
    exact, fused, rounded = logits.double(), logits.clone(), logits.bfloat16()
    wanted = cross_entropy_chunk(exact, target, 50257)
    assert fused_cross_entropy_chunk(fused, target, 50257).item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert (fused - exact).abs().max() < 1e-6
    assert fused_cross_entropy_chunk(rounded, target, 50257).item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-6)
    assert (rounded - exact).abs().max() < 1e-2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recorded_step_gives_the_plain_steps_losses(optimizer, compiled):
    """Dropout on: the replayed graph draws the plain step's random numbers. The spread is that of two plain runs."""
    curves = []
    for graph in (False, False, True):
        shape = GPTConfig(128, 1000, 2, 4, 128, dropout=0.1)
        step = make_step(shape, compiled=compiled, optimizer=optimizer, cuda_graph=graph, gradient_accumulation_steps=2)
        step.model.train()
        torch.manual_seed(1)
        curve = []
        for i in range(30):
            fill(step, i)
            step(1e-3)
            curve.append(step.loss.item())
        assert (step.graph is not None) == graph
        curves.append(torch.tensor(curve))
    spread = (curves[0] - curves[1]).abs().max().item()
    assert (curves[2] - curves[0]).abs().max().item() <= max(3 * spread, 2e-3)


def test_200_steps_of_the_final_path_end_where_the_plain_path_ends():
    ends = []
    for options in ({"compiled": False, "dtype": torch.float32}, {"recompute": "pointwise", "cuda_graph": True}):
        step = make_step(**options)
        last = []
        for i in range(200):
            fill(step, i)
            step(1e-3)
            last.append(step.loss.item())
        ends.append(sum(last[150:]) / 50)
    print("mean of the last 50 losses, plain fp32 and final path:", ends)
    assert ends[0] == pytest.approx(ends[1], abs=0.01)


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "compiled"),
    [(12, 12, 768, True), (12, 12, 768, False), (24, 16, 1024, True), (36, 20, 1280, True)],
)
@pytest.mark.parametrize(("recompute", "batch_size"), [("none", 4), ("pointwise", 8), ("block", 8)])
def test_a_step_takes_the_memory_that_is_predicted(n_layer, n_head, n_embd, compiled, recompute, batch_size):
    shape = GPTConfig(1024, 50257, n_layer, n_head, n_embd)
    gc.collect()  # what an earlier test left would be freed, and subtracted, while this one measures
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = make_step(shape, compiled=compiled, recompute=recompute, batch_size=batch_size)
    for _ in range(2):
        step.x.random_(0, 50257)
        step.y.random_(0, 50257)
        step(1e-4)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = sum(train.step_memory(shape, step.config, recompute, compiled=compiled).values())
    print(
        f"{n_layer} layers, {recompute}, {batch_size}: predicted {predicted / 2**30:.2f}, measured {measured / 2**30:.2f} GiB"
    )
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_updates_are_skipped_on_the_device(value):
    step = make_step(compiled=False)
    fill(step)
    step(1e-3)
    before = [p.clone() for p in step.model.parameters()]
    hook = step.model.transformer.ln_f.weight.register_hook(lambda g: torch.full_like(g, value))
    step(1e-3)
    hook.remove()
    assert step.bad.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    step(1e-3)
    assert step.bad.item() == 0
    assert not torch.equal(before[0], next(step.model.parameters()))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_recorded_decoder_writes_what_recomputation_writes(compiled):
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 1000, 2, 4, 128)).cuda().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # a decided model: no ties that rounding could turn
    prompts = [[1, 2, 3], [7], [5] * 20]
    texts = generate(model, prompts, 120, sampling=Sampling(temperature=0), compiled=compiled)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        for token in text:
            assert model(torch.tensor([ids], device="cuda"))[0][0, -1].argmax().item() == token
            ids.append(token)


def test_deterministic_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    tokens = (np.cumsum(np.random.default_rng(0).integers(1, 4, 30000)) % 97).astype(np.uint16)
    write_shard(folder / "train_000000.bin", tokens[:25000])
    write_shard(folder / "val_000000.bin", tokens[25000:])
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 97}))
    shape = "--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=8 --gradient_accumulation_steps=2 --dropout=0.1"
    argv = [
        *shape.split(),
        f"--dataset={folder}",
        "--deterministic",
        "--eval_interval=100",
        "--max_iters=20",
        "--warmup_iters=2",
    ]
    assert train.main([*argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    original, count = train.Step.__call__, iter(range(100))

    def call(self, *args):
        if next(count) == 7:
            raise SystemExit
        original(self, *args)

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(train.Step, "__call__", call)
        train.main([*argv, f"--out_dir={tmp_path / 'broken'}", "--save_interval_s=0"])
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'broken'}"]) == 0
    a, b = (from_pretrained(tmp_path / out / "last").state_dict() for out in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("lora", [False, True])
def test_saving_takes_no_second_model_on_the_device(tmp_path, lora):
    model = GPT(GPTConfig(256, 5000, 8, 8, 512)).cuda()
    if lora:
        add_lora(model, 8, 16.0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    save_pretrained(model, tmp_path)
    assert torch.cuda.max_memory_allocated() - before <= 4 * 4 * 4 * 512 * 512  # four of the largest matrices, of 32
