"""gpt12/memory.py: counted bytes against torch's own counters and against measurements."""

from dataclasses import replace

import pytest
import torch

from gpt12.introduction import introduction
from gpt12.lora import add_lora
from gpt12.memory import COMPILED_GPU, CPU_GAPS, GIB, step_memory, trained_parameters
from model import GPT, GPTConfig, Shared
from tests.bench_helpers import make_124m, shape_of
from tests.helpers import CPU, built, config

GPT2 = GPTConfig(bias=False)  # 124M


def full_size(**changes):
    """Return the configuration of 12 rows of 1,024 tokens in bf16."""
    return config(**{"batch_size": 12, "block_size": 1024, "dtype": "bfloat16"} | changes)


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
    ("line", "gib"),
    [
        ("gpt2 --batch_size=32", 11.4),
        ("gpt2 --batch_size=64", 20.6),
        ("gpt2 --recompute=pointwise --batch_size=12", 4.26),
        ("gpt2-medium --recompute=pointwise --batch_size=2", 5.61),
        ("gpt2-medium --recompute=pointwise --batch_size=8", 8.57),
        ("gpt2-large --batch_size=1", 11.94),
        ("gpt2-large --recompute=block --batch_size=32 --optimizer=adamw8bit", 7.5),
        ("gpt2-xl --recompute=block --batch_size=4 --optimizer=adamw8bit", 9.4),
        ("gpt2-medium --batch_size=8 --lora_rank=16", 7.3),
        ("gpt2-large --batch_size=5 --lora_rank=16", 9.2),
        ("gpt2-xl --recompute=block --batch_size=16 --lora_rank=16", 7.5),
    ],
)
def test_predicted_memory_is_what_was_measured(line, gib):
    """Measured on an H200 at T=1024 (docs/results.md)."""
    options = make_124m(f"--recompute=none --init_from={line}")
    assert step_memory(shape_of(options), options) / GIB == pytest.approx(gib, rel=0.03)


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


# --------------------------------------------------------------------------------------------------
# What a run tells


@pytest.mark.parametrize("is_gpt2", [True, False])
@pytest.mark.usefixtures("own_folder")
def test_the_predicted_memory_of_a_run_is_told(monkeypatch, is_gpt2):
    monkeypatch.setattr("gpt12.introduction.is_gpt2", lambda shape: is_gpt2)
    lines = introduction(built())
    line = next(line for line in lines if line.startswith("memory:"))
    known = "memory: about 0.435 GiB at the peak of a step (recompute=none)"
    doubt = "" if is_gpt2 else ", an estimate, because model.py is not GPT-2's"
    assert line == known + doubt
