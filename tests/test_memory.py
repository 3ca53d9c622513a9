"""gpt12/memory.py: counted bytes and work against torch's own counters and against measurements."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt12.cards import CARDS
from gpt12.introduction import introduction
from gpt12.lora import add_lora
from gpt12.memory import (
    COMPILED_GPU,
    CPU_FLOPS_PER_CORE,
    CPU_GAPS,
    GIB,
    RECOMPUTE,
    predict,
    predict_sizes,
    product_flops,
    step_memory,
    trained_parameters,
    warn_of_long_run,
)
from gpt12.muon import orthogonalize
from gpt12.settings import model_shape
from model import GPT, GPTConfig, Shared, flops_per_token
from tests.bench_helpers import SHAPE, make, make_124m
from tests.helpers import CPU, built, config

pytestmark = pytest.mark.usefixtures("no_picture")
GPT2 = GPTConfig(bias=False)  # 124M
RTX_4070_TI = CARDS["NVIDIA GeForce RTX 4070 Ti"]


def full_size(**changes):
    """Return the configuration of 12 rows of 1,024 tokens in bf16."""
    return config(**{"batch_size": 12, "block_size": 1024, "dtype": "bfloat16"} | changes)


def shape_of(options):
    """Return the shape of a model of random tokens."""
    return model_shape(options, options.vocab_size)


def predicted_gib(options):
    """Return the predicted peak of a step in GiB."""
    return step_memory(shape_of(options), options) / GIB


# --------------------------------------------------------------------------------------------------
# Memory. tests/test_gpu.py compares it with the allocator's peak.


def growth_per_layer(shape, options, machine=COMPILED_GPU):
    """Return the bytes by which two layers need more than one: (for weights, for activations).

    Twice the rows need twice the activations.
    """
    differences = []
    for batch_size in (options.batch_size, 2 * options.batch_size):
        rows = replace(options, batch_size=batch_size)
        one, two = (step_memory(replace(shape, n_layer=n), rows, machine) for n in (1, 2))
        differences.append(two - one)
    activations = differences[1] - differences[0]
    return differences[0] - activations, activations


def kept_bytes(block, x):
    """Return the bytes of the tensors that a layer saves for its backward pass.

    Not of its weights or their copies in 16 bits, and not of a mean or variance for each row.
    """
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}
    rows = x.size(0) * x.size(1)

    def note(t):
        storage = t.untyped_storage()
        is_activation = t.numel() >= x.numel() and t.numel() % rows == 0
        if is_activation and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x, Shared(torch.arange(x.size(1))[None], None, None))
    return sum(kept.values())


@pytest.mark.parametrize(
    ("recompute", "dropout", "lora_rank"),
    [("none", 0, 0), ("none", 0.1, 0), ("pointwise", 0, 0), ("pointwise", 0.1, 2)],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_the_formula_counts_what_a_layer_keeps_for_the_backward_pass(recompute, dropout, lora_rank):
    """Against what the compiler's own partition of a layer saves."""
    B, T, C = 3, 33, 64
    shape = GPTConfig(T, 13, 1, 2, C, dropout)
    model = GPT(shape).train()
    if lora_rank:
        model.bfloat16()
        add_lora(model, lora_rank, 4.0)
    model.set_recompute(recompute)
    [block] = model.transformer.h
    # A GPU's attention draws its mask again; a CPU's formula keeps a whole matrix.
    block.attn.dropout = 0.0
    block.compile(backend="aot_eager_decomp_partition")
    x = torch.randn(B, T, C, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_bytes(block, x)
    keys = {"batch_size": B, "block_size": T, "dtype": "bfloat16", "lora_rank": lora_rank}
    assert growth_per_layer(shape, config(**keys, recompute=recompute))[1] == kept


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_on_a_cpu_the_formula_counts_the_attention_matrices_that_dropout_keeps(dropout):
    B, T, C = 2, 64, 32
    shape = GPTConfig(T, 13, 1, 2, C, dropout)
    [block] = GPT(shape).train().transformer.h
    kept = kept_bytes(block, torch.randn(B, T, C, requires_grad=True))
    _, growth = growth_per_layer(shape, config(batch_size=B, block_size=T), machine=CPU)
    assert growth == pytest.approx(CPU_GAPS * kept)


@pytest.mark.parametrize(
    ("batch_size", "recompute", "measured_gib"),
    [(2, "none", 7.5), (4, "none", 13.2), (4, "block", 4.1)],
)
def test_on_a_cpu_the_formula_predicts_what_runs_of_gpt2_took(batch_size, recompute, measured_gib):
    """The largest resident memory of train.py config/finetune_gpt2.py --init_from=scratch."""
    shape = replace(GPT2, dropout=0.1)
    options = full_size(batch_size=batch_size, dtype="float32", recompute=recompute)
    assert step_memory(shape, options, machine=CPU) / GIB == pytest.approx(measured_gib, rel=0.1)


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
    options = make_124m(init_from=init_from, recompute=recompute, **keys)
    assert predicted_gib(options) == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_parameters_that_are_trained_are_counted_padding_included(lora_rank):
    shape = GPTConfig(8, 13, 2, 2, 8)
    model = GPT(shape)
    if lora_rank:
        add_lora(model, lora_rank, 8.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(shape, config(lora_rank=lora_rank)) == trained


def test_weights_state_and_gradients_take_the_bytes_of_their_formats():
    """Of a layer: beside its weights stand AdamW's two moments and the gradients."""
    n = 12 * 768**2 + 2 * 768  # without biases
    adapters = 16 * 16 * 768
    # With so many rows the peak is in the backward pass.
    many = {"batch_size": 64, "gradient_accumulation_steps": 2}
    for keys, expected in (
        ({}, (4 + 8 + 4) * n),
        ({"optimizer": "adamw8bit"}, (2 + 2 + 2) * n),
        ({"lora_rank": 16}, 2 * n + (4 + 8 + 4) * adapters),
    ):
        assert growth_per_layer(GPT2, full_size(**many | keys))[0] == expected, keys


def test_the_sizes_of_a_plan_end_with_the_largest_that_fits():
    for recompute in RECOMPUTE:
        options = make_124m(recompute=recompute)
        rows = predict_sizes(shape_of(options), options, 11.0, RTX_4070_TI)
        largest = rows[-1]["batch_size"]
        assert [row["batch_size"] for row in rows[:-1]] == [
            n for n in (1, 4, 16, 64) if n < largest
        ]
        assert rows[-1]["peak_gib"] <= 11.0
        assert predicted_gib(replace(options, batch_size=largest + 1)) > 11.0
        assert predict_sizes(shape_of(options), options, 1.0, RTX_4070_TI) == []


# --------------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize(("recompute", "attention"), [("none", 12), ("block", 16)])
def test_the_work_is_counted_as_torch_counts_it(recompute, attention):
    """FlopCounterMode sees every product of a step with the plain head and loss.

    It runs plain attention, which takes 12 T C L a token, 16 if computed again. A causal kernel
    takes 7 and 9.
    """
    C = SHAPE["n_embd"]
    L = SHAPE["n_layer"]
    T = SHAPE["block_size"]
    options = make(recompute=recompute)
    model = GPT(shape_of(options))
    model.set_recompute(recompute)
    x = torch.zeros(SHAPE["batch_size"], T, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = model(x)
        F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    products = counter.get_total_flops() - x.numel() * attention * T * C * L
    kernel = x.numel() * (9 if recompute == "block" else 7) * T * C * L
    counted = product_flops(shape_of(options), options, x.numel())
    # LayerNorm's weights are counted like those of matrices.
    assert counted - kernel == pytest.approx(products, rel=0.01)


def test_muons_products_are_counted_as_torch_counts_them():
    C = SHAPE["n_embd"]
    muon, adamw = (
        product_flops(shape_of(make()), make(optimizer=name), 48) for name in ("muon", "adamw")
    )
    with FlopCounterMode(display=False) as counter:
        for count, rows, columns in ((4, C, C), (1, 4 * C, C), (1, C, 4 * C)):
            orthogonalize(torch.ones(count, rows, columns))
    assert muon - adamw == SHAPE["n_layer"] * counter.get_total_flops()


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
    options = make_124m(batch_size=batch_size, recompute=recompute)
    found = predict(shape_of(options), options, CARDS["NVIDIA H200"])
    assert found["ms"] == pytest.approx(ms, rel=0.025)


def predicted(**keys):
    options = make_124m(**keys)
    return predict(shape_of(options), options, RTX_4070_TI)


def test_methods_that_save_memory_do_and_those_that_cost_time_do():
    plain = predicted()
    lora = predicted(lora_rank=16)
    assert lora["peak_gib"] < predicted(optimizer="adamw8bit")["peak_gib"] < plain["peak_gib"]
    slower = [
        {"lora_rank": 16},
        {},
        {"bias": True},
        {"recompute": "pointwise"},
        {"optimizer": "muon"},
        {"recompute": "block"},
        {"dtype": "float32"},
    ]
    times = [predicted(**keys)["ms"] for keys in slower]
    assert times == sorted(times)
    assert predicted(gradient_accumulation_steps=8)["tokens_per_s"] > plain["tokens_per_s"]


# --------------------------------------------------------------------------------------------------
# What a run tells


def test_a_run_of_hours_on_a_cpu_is_warned_of_and_the_small_preset_named():
    shape = GPTConfig(bias=False)
    a_second = CPU_FLOPS_PER_CORE / flops_per_token(shape)  # tokens
    warnings = []
    for hours in (1.9, 5):
        steps = round(hours * 3600 * 2 * a_second / 1024)
        length = config(batch_size=1, block_size=1024)
        warnings.append(warn_of_long_run(shape, length, steps, cores=2))
    assert warnings[0] is None
    assert "about 5 hours on this CPU. config/train_shakespeare_cpu.py" in warnings[1]


@pytest.mark.parametrize("is_gpt2", [True, False])
def test_the_predicted_memory_of_a_run_is_told(dataset, tmp_path, monkeypatch, is_gpt2):
    monkeypatch.setattr("gpt12.introduction.is_gpt2", lambda shape: is_gpt2)
    lines = introduction(built(dataset, tmp_path))
    line = next(line for line in lines if line.startswith("memory:"))
    known = "memory: about 0.435 GiB at the peak of a step (recompute=none)"
    doubt = "" if is_gpt2 else ", an estimate, because model.py is not GPT-2's"
    assert line == known + doubt
