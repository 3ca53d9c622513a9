"""Predictions: counted work against torch's own counters, memory and time against measurements."""

import gc
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt12 import lora, measure
from gpt12.bench_request import with_model_shape
from gpt12.cards import CARDS, Card
from gpt12.config import load_config
from gpt12.errors import UserError
from gpt12.memory import GIB, RECOMPUTE
from gpt12.plan import (
    Prediction,
    card_of_machine,
    card_to_plan_for,
    count_work,
    largest_batch,
    make_plan,
    predict,
    predict_memory,
)
from gpt12.settings import BenchConfig, TrainConfig, model_shape
from model import GPT, GPTConfig
from tests.bench_helpers import SHAPE, fake_gpu_memory, make, make_124m
from tests.helpers import ROOT

RTX_4070_TI = CARDS["NVIDIA GeForce RTX 4070 Ti"]
SHAKESPEARE_TOKENS = 301_966  # of GPT-2's tokenizer in the training split (nanoGPT's README)

# --------------------------------------------------------------------------------------------------
# Cards


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("NVIDIA GeForce RTX 3080", 9.8, True),
        ("NVIDIA GeForce RTX 3080", 11.8, False),  # another card with the same name
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 9.8, False),
        ("NVIDIA H200", 139.8, True),
    ],
)
def test_a_card_is_recognized_by_name_and_memory(monkeypatch, name, gib, known):
    fake_gpu_memory(monkeypatch, gib)
    card = card_of_machine(make(), SimpleNamespace(name=name, on_gpu=True))
    assert (card is not None) == known


def test_a_card_can_be_described_by_its_datasheet():
    typed = make(peak_tflops=100, bandwidth_gbs=500, vram_gb=10)
    assert card_of_machine(typed, SimpleNamespace(name="?")) == Card(100, 500, 10, 50)
    assert card_to_plan_for(typed) == Card(100, 500, 10, 50)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"card": "RTX 4070 Laptop"}, "NVIDIA GeForce RTX 4070 Ti"),
        ({"peak_tflops": 40, "bandwidth_gbs": 400}, "vram_gb"),
    ],
)
def test_an_unknown_card_is_refused_with_the_known_names(keys, message):
    with pytest.raises(UserError, match=message):
        make_plan(make(**keys))


@pytest.mark.parametrize("name", ["RTX 4070 Ti", "rtx 4070 ti", "NVIDIA GeForce RTX 4070 Ti"])
def test_the_end_of_a_cards_name_is_enough(name):
    plan = make_plan(make(card=name))
    assert (plan.name, plan.card) == ("NVIDIA GeForce RTX 4070 Ti", RTX_4070_TI)


def test_an_ending_that_several_cards_have_is_refused():
    with pytest.raises(UserError, match="card=Ti is unknown"):
        make_plan(make(card="Ti"))


def test_a_plan_leaves_one_gib_of_the_card_free():
    typed = make_plan(make(peak_tflops=40, bandwidth_gbs=448, vram_gb=8))
    assert (typed.card.tflops, typed.card.bandwidth_gbs, typed.room_gib) == (40, 448, 7)
    assert make_plan(make(card="NVIDIA H200")).room_gib == 140


# --------------------------------------------------------------------------------------------------
# Counted work


@pytest.mark.parametrize(("recompute", "attention"), [("none", 12), ("block", 16)])
def test_the_work_is_counted_as_torch_counts_it(recompute, attention):
    """FlopCounterMode sees every product of a step with the plain head and loss.

    It runs plain attention, which takes 12 T C L a token, 16 if computed again. A causal kernel
    takes 7 and 9.
    """
    C = SHAPE["n_embd"]
    L = SHAPE["n_layer"]
    T = SHAPE["block_size"]
    config = make(recompute=recompute)
    model = GPT(model_shape(config, config.vocab_size))
    model.set_recompute(recompute)
    x = torch.zeros(SHAPE["batch_size"], T, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = model(x)
        F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    products = counter.get_total_flops() - x.numel() * attention * T * C * L
    kernel = x.numel() * (9 if recompute == "block" else 7) * T * C * L
    assert count_work(config, recompute).flops - kernel == pytest.approx(products, rel=1e-6)


def test_muons_products_are_counted_as_torch_counts_them():
    from gpt12.muon import orthogonalize

    C = SHAPE["n_embd"]
    extra = count_work(make(optimizer="muon"), "none").flops - count_work(make(), "none").flops
    with FlopCounterMode(display=False) as counter:
        for count, rows, columns in ((4, C, C), (1, 4 * C, C), (1, C, 4 * C)):
            orthogonalize(torch.ones(count, rows, columns))
    assert extra == SHAPE["n_layer"] * counter.get_total_flops()


@pytest.mark.parametrize("targets", ["all", "c_attn,c_fc", "c_proj"])
def test_lora_trains_what_the_plan_counts(targets):
    config = make(lora_rank=3, lora_targets=targets)
    model = GPT(model_shape(config, config.vocab_size))
    lora.add_lora(model, 3, 1.0, targets=[] if targets == "all" else targets.split(","))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = predict_memory(config, "none").memory_gib["moments"]
    assert moments * GIB == pytest.approx(8 * trained)


# --------------------------------------------------------------------------------------------------
# Predictions


@pytest.mark.parametrize(
    ("batch_size", "recompute", "ms"),
    [
        (64, "none", 112.7),
        (32, "none", 58.5),
        (12, "pointwise", 24.75),
        (32, "pointwise", 60.7),
        (32, "block", 67.4),
    ],
)
def test_predicted_time_is_what_was_measured(batch_size, recompute, ms):
    """Measured on an H200: 124M, T=1024, bias=False, torch 2.11 (docs/results.md)."""
    config = make_124m(batch_size=batch_size, dtype="bfloat16")
    assert predict(config, recompute, CARDS["NVIDIA H200"]).ms == pytest.approx(ms, rel=0.025)


@pytest.mark.parametrize(
    ("init_from", "recompute", "keys", "gib"),
    [
        ("gpt2", "none", {"batch_size": 32}, 11.4),
        ("gpt2", "none", {"batch_size": 64}, 20.6),
        ("gpt2", "pointwise", {"batch_size": 12}, 4.26),
        ("gpt2-medium", "pointwise", {"batch_size": 2}, 5.61),
        ("gpt2-medium", "pointwise", {"batch_size": 8}, 8.57),
        ("gpt2-large", "none", {"batch_size": 1}, 11.94),
        ("gpt2-large", "block", {"batch_size": 32, "optimizer": "adamw8bit"}, 7.5),
        ("gpt2-xl", "block", {"batch_size": 4, "optimizer": "adamw8bit"}, 9.4),
        ("gpt2-medium", "none", {"batch_size": 8, "lora_rank": 16}, 7.3),
        ("gpt2-large", "none", {"batch_size": 5, "lora_rank": 16}, 9.2),
        ("gpt2-xl", "block", {"batch_size": 16, "lora_rank": 16}, 7.5),
    ],
)
def test_predicted_memory_is_what_was_measured(init_from, recompute, keys, gib):
    """Measured on an H200 at T=1024 (docs/results.md)."""
    config = make_124m(init_from=init_from, dtype="bfloat16", **keys)
    config = with_model_shape(config, set(keys), on_cpu=False)
    assert predict_memory(config, recompute).gib == pytest.approx(gib, rel=0.03)


def test_accumulation_keeps_a_gradient_of_every_weight():
    one = predict_memory(make_124m(batch_size=32), "none").gib
    many = predict_memory(make_124m(batch_size=32, gradient_accumulation_steps=8), "none").gib
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(GPTConfig(bias=False)).parameters())
    assert (many - one) * GIB == pytest.approx(4 * parameters)


def predicted(recompute="none", **keys):
    return predict(make_124m(**keys), recompute, RTX_4070_TI)


def test_methods_that_save_memory_do():
    eight_bit = predicted(optimizer="adamw8bit")
    assert predicted(lora_rank=16).gib < eight_bit.gib < predicted().gib


def test_methods_that_cost_time_do():
    assert predicted().ms < predicted("pointwise").ms < predicted("block").ms
    assert predicted(lora_rank=16).ms < predicted().ms < predicted(optimizer="muon").ms
    assert predicted(optimizer="muon").ms < predicted(dtype="float32").ms
    assert predicted(bias=True).ms > predicted().ms
    assert predicted(gradient_accumulation_steps=8).tokens_per_s > predicted().tokens_per_s


def test_the_largest_batch_is_the_last_that_fits():
    config = make_124m()
    for recompute in RECOMPUTE:
        largest = largest_batch(config, recompute, 11.0)
        fits = predict_memory(replace(config, batch_size=largest), recompute)
        too_large = predict_memory(replace(config, batch_size=largest + 1), recompute)
        assert fits.gib <= 11.0 < too_large.gib
    assert largest_batch(config, "none", 1.0) == 0


def test_the_plan_for_the_4070_ti(monkeypatch):
    """Without asking for a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    plan = make_plan(make_124m())
    assert (plan.name, plan.card, plan.room_gib) == ("NVIDIA GeForce RTX 4070 Ti", RTX_4070_TI, 11)
    assert [row.recompute for row in plan.rows] == ["none", "pointwise", "block"]
    for row in plan.rows:
        tried = [c.batch_size for c in plan.candidates if c.recompute == row.recompute]
        assert tried[:2] == [1, 2]
        assert tried[-1] == row.batch_size
        assert sum(row.memory_gib.values()) == pytest.approx(row.gib)
        assert row.gib <= 11
        assert row.tokens == row.batch_size * 1024
        assert row.tokens_per_s * row.ms / 1e3 == pytest.approx(row.tokens)
        # 798 MFLOP a token with causal attention, so the datasheet allows no more than this.
        assert row.tokens_per_s < 80.2e12 / 798e6
        assert row.floor_ms < row.ms
    # The README's prediction.
    assert (plan.best.batch_size, plan.best.recompute) == (30, "none")
    assert plan.best.tokens_per_s == pytest.approx(65_000, rel=0.01)


def plan_of_preset(name: str) -> tuple[BenchConfig, Prediction]:
    argv = [str(ROOT / "config" / name), "--dtype=bfloat16"]
    preset, given = load_config(BenchConfig, argv)
    preset = with_model_shape(preset, given, on_cpu=False)
    return preset, predict(preset, "none", RTX_4070_TI)


@pytest.mark.parametrize("name", ["train_gpt2.py", "train_gpt2_12gb.py", "train_gpt2_fast.py"])
def test_the_days_that_a_preset_and_the_results_name_are_the_predicted_ones(name):
    _, prediction = plan_of_preset(name)
    train, _ = load_config(TrainConfig, [str(ROOT / "config" / name)])
    days = train.max_iters * prediction.ms / 1e3 / 86400
    shown = f"{days:.0f} days" if days > 10 else f"{days:.1f} days"
    thousands = round(prediction.tokens_per_s / 1000)
    assert shown.replace(" days", " days on") in (ROOT / "config" / name).read_text()
    row = f"| {thousands},000 tokens/s, {shown}, {prediction.gib:.1f} GiB | `python train.py"
    assert f"{row} config/{name}` |" in (ROOT / "docs/results.md").read_text()


def test_the_other_predictions_in_the_readme_and_the_results_are_those_of_the_program():
    results = (ROOT / "docs/results.md").read_text()
    readme = (ROOT / "README.md").read_text()
    _, small = plan_of_preset("finetune_gpt2.py")
    thousands = round(small.tokens_per_s / 1000)
    row = f"| `python train.py config/finetune_gpt2.py` | {thousands},000 tokens/s, **predicted** |"
    assert row in readme
    for name in ("finetune_gpt2.py", "finetune_gpt2_medium.py"):
        preset, prediction = plan_of_preset(name)
        windows = math.ceil(3 * SHAKESPEARE_TOKENS / preset.block_size)
        seconds = windows * preset.block_size / prediction.tokens_per_s
        assert f"| {seconds:.0f} s | `python train.py config/{name}` |" in results
        assert f"{seconds:.0f} s on a 4070 Ti" in (ROOT / "config" / name).read_text()
    options = "--block_size=512 --batch_size=4"
    short, _ = load_config(BenchConfig, [*options.split(), "--dtype=bfloat16"])
    thousands = round(predict(short, "none", RTX_4070_TI).tokens_per_s / 1000)
    row = f"| {thousands},000 tokens/s | `python bench.py --plan {options}` |"
    assert row in results


def test_the_plan_knows_that_an_uncompiled_step_needs_more_memory():
    same = {"dtype": "bfloat16", "recompute": "none"}
    compiled = make_plan(make(compile=True, **same)).best
    eager = make_plan(make(compile=False, **same)).best
    assert eager.batch_size == compiled.batch_size  # this small model fits either way
    assert eager.gib > compiled.gib


def test_a_plan_for_less_memory_than_other_programs_take_is_refused():
    with pytest.raises(UserError, match=r"vram_gb=0\.5 must be more than 1"):
        make_plan(make_124m(vram_gb=0.5))


def test_a_plan_where_nothing_fits_is_empty():
    plan = make_plan(make_124m(vram_gb=2))
    assert plan.rows == []
    assert plan.best is None


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_predicted_memory_is_the_allocators(recompute):
    config = make_124m(batch_size=8, recompute=recompute, real_data=False, steps=3)
    gc.collect()
    left_by_other_tests = torch.cuda.memory_allocated() / GIB
    result = measure.measure_step(config)
    step_gib = result.peak_gib - left_by_other_tests
    assert step_gib == pytest.approx(result.predicted_gib, rel=0.05)
    assert result.cuda_graph
    assert result.compile
    assert result.mfu > 0
