"""gpt12/memory.py: the memory formula against tensors that are kept, and what is chosen by it."""

from dataclasses import replace

import pytest
import torch

from gpt12 import memory
from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.lora import add_lora
from gpt12.memory import (
    GIB,
    MAX_TOKENS,
    choose_batch_size,
    choose_recompute,
    step_memory,
    trained_parameters,
)
from gpt12.run_log import RunLog
from model import GPT, GPTConfig
from tests.helpers import CPU, built, config, run
from train import TrainStep

pytestmark = pytest.mark.usefixtures("no_picture")
GPU = Machine(torch.device("cuda"), torch.bfloat16, compiled=True)
GPT2 = GPTConfig(bias=False)  # 124M


def full_size(**changes):
    """Return the configuration of 12 rows of 1,024 tokens in bf16."""
    return config(**{"batch_size": 12, "block_size": 1024, "dtype": "bfloat16"} | changes)


# --------------------------------------------------------------------------------------------------
# The formula. tests/test_gpu.py compares it with the allocator's peak.


@pytest.mark.parametrize(
    ("recompute", "dropout", "lora_dropout"),
    [
        ("none", 0, None),
        ("none", 0.1, None),
        ("pointwise", 0, None),
        ("pointwise", 0.1, None),
        ("none", 0, 0.1),
    ],
)
def test_the_formula_counts_what_a_layer_keeps_for_the_backward_pass(
    recompute, dropout, lora_dropout
):
    """Against the tensors that the compiler's own partition of a layer saves."""
    B, T, C = 3, 33, 64
    shape = GPTConfig(T, 13, 1, 2, C, dropout)
    model = GPT(shape).train()
    changes = {"batch_size": B, "block_size": T, "dtype": "bfloat16"}
    if lora_dropout is not None:
        model.bfloat16()
        add_lora(model, rank=2, alpha=4.0, dropout=lora_dropout)
        changes |= {"lora_rank": 2, "lora_dropout": lora_dropout}
    model.set_recompute(recompute)
    [block] = model.transformer.h
    # A GPU's attention draws its mask again; a CPU's formula keeps a whole matrix.
    block.attn.dropout = 0.0
    block.compile(backend="aot_eager_decomp_partition")
    kept: dict[int, int] = {}

    def note(t):
        # Not weights, and not a row's mean or variance.
        if t.numel() >= B * T * C and t.numel() % (B * T) == 0:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(B, T, C, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
    activations = []
    for n_layer in (1, 2):
        layers = replace(shape, n_layer=n_layer)
        found = step_memory(layers, config(**changes), recompute)
        activations.append(found["activations"])
    assert activations[1] - activations[0] == sum(kept.values())


@pytest.mark.parametrize("targets", ["all", "c_attn,c_fc"])
def test_lora_trains_as_many_parameters_as_are_counted(targets):
    shape = GPTConfig(8, 13, 2, 2, 8)
    model = GPT(shape)
    add_lora(model, 4, 8.0, targets=[] if targets == "all" else targets.split(","))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(shape, config(lora_rank=4, lora_targets=targets)) == trained


def test_without_lora_all_parameters_are_trained_and_padding_is_counted_in_memory():
    shape = GPTConfig(8, 13, 2, 2, 8)
    trained = sum(p.numel() for p in GPT(shape).parameters())
    assert trained_parameters(shape, config()) == trained


def test_weights_moments_and_gradients_take_the_bytes_of_their_formats():
    n = trained_parameters(GPT2, full_size())
    adamw = step_memory(GPT2, full_size(gradient_accumulation_steps=2), "block")
    assert (adamw["weights"], adamw["moments"], adamw["gradients"]) == (4 * n, 8 * n, 4 * n)
    options = {"optimizer": "adamw8bit", "gradient_accumulation_steps": 2}
    eight_bit = step_memory(GPT2, full_size(**options), "block")
    moments = (eight_bit["weights"], eight_bit["moments"], eight_bit["gradients"])
    assert moments == (2 * n, 2 * n, 2 * n)
    adapters = full_size(lora_rank=16)
    lora = step_memory(GPT2, adapters, "block")
    assert lora["moments"] == 8 * trained_parameters(GPT2, adapters) < 0.1 * adamw["moments"]


# --------------------------------------------------------------------------------------------------
# recompute=auto and batch_size=auto


def allow(monkeypatch, gib: float) -> None:
    """Act a GPU with so much free memory."""
    monkeypatch.setattr(memory, "available_memory", lambda machine: gib * GIB)


@pytest.mark.parametrize(("free", "chosen"), [(12, "none"), (5, "pointwise"), (3, "block")])
def test_the_cheapest_recomputation_that_fits_is_chosen(monkeypatch, free, chosen):
    """124M with 12 rows of 1,024 tokens needs over 5 GiB with none, 4.3 with pointwise."""
    allow(monkeypatch, free)
    assert choose_recompute(GPT2, full_size(), GPU) == chosen
    assert choose_recompute(GPT2, full_size(), CPU) == "none"


def needed(batch_size: int, recompute: str, **changes) -> float:
    """Return the bytes of a step of GPT-2 with this micro-batch of a step of 60 rows."""
    changes |= {"batch_size": batch_size, "gradient_accumulation_steps": 60 // batch_size}
    return sum(step_memory(GPT2, full_size(**changes), recompute).values())


@pytest.mark.parametrize("free", [3.0, 4.5, 6.0, 10.0, 40.0])
def test_batch_size_auto_is_the_largest_divisor_that_fits_with_what_8_rows_need(monkeypatch, free):
    allow(monkeypatch, free)
    asked = full_size(batch_size="auto", recompute="auto", gradient_accumulation_steps=60)
    found = choose_batch_size(GPT2, asked, GPU)
    assert found.batch_size * found.gradient_accumulation_steps == 60
    room = memory.SAFETY * free * GIB
    one_at_once = full_size(batch_size=8, gradient_accumulation_steps=60)
    fitting = [
        recompute
        for recompute in ("none", "pointwise", "block")
        if sum(step_memory(GPT2, one_at_once, recompute).values()) < room
    ]
    assert found.recompute == (fitting[0] if fitting else "block")
    sizes = [size for size in (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30) if size * 1024 <= MAX_TOKENS]
    largest = max(size for size in sizes if needed(size, found.recompute) < room)
    assert found.batch_size == largest


def test_batch_size_auto_never_exceeds_32k_tokens(monkeypatch):
    allow(monkeypatch, 1000)
    asked = full_size(batch_size="auto", gradient_accumulation_steps=512)
    assert choose_batch_size(GPT2, asked, GPU).batch_size == 32
    asked = full_size(batch_size="auto", block_size=256, gradient_accumulation_steps=512)
    assert choose_batch_size(GPT2, asked, GPU).batch_size == 128


def test_batch_size_auto_is_1_where_nothing_fits(monkeypatch):
    """The step then runs out of memory, and the message says what to change."""
    allow(monkeypatch, 0.1)
    asked = full_size(batch_size="auto", recompute="auto", gradient_accumulation_steps=60)
    found = choose_batch_size(GPT2, asked, GPU)
    assert (found.batch_size, found.recompute) == (1, "block")


@pytest.mark.parametrize(("rows", "batch_size"), [(6, 6), (16, 8), (30, 6), (13, 1)])
@pytest.mark.parametrize("world", [1, 2])
def test_batch_size_auto_on_a_cpu_is_at_most_8_and_keeps_the_rows_of_a_step(
    world, rows, batch_size
):
    machine = Machine(CPU.device, CPU.dtype, compiled=False, world=world)
    asked = config(batch_size="auto", recompute="auto", gradient_accumulation_steps=rows * world)
    found = choose_batch_size(GPTConfig(8, 13, 1, 1, 8), asked, machine)
    assert (found.batch_size, found.recompute) == (batch_size, "none")
    assert found.batch_size * found.gradient_accumulation_steps == rows * world


def test_what_the_user_gave_stays(monkeypatch):
    allow(monkeypatch, 3)
    given = full_size(batch_size=12, recompute="none")
    assert choose_batch_size(GPT2, given, GPU) == given
    given = full_size(batch_size="auto", recompute="none", gradient_accumulation_steps=60)
    assert choose_batch_size(GPT2, given, GPU).recompute == "none"


def test_memory_that_this_process_holds_counts_as_free_and_a_cap_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    for share, usable in ((1.0, 5.0), (0.25, 3.0)):
        monkeypatch.setattr(
            torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share
        )
        assert memory.available_memory(GPU) == usable * GIB


# --------------------------------------------------------------------------------------------------
# Out of memory


def exhausted(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def exhausted_while_recording(*args, **options):
    try:
        exhausted()
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def card(monkeypatch):
    """A card of 12 GiB with 1 free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10 * GIB)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("how", [exhausted, exhausted_while_recording])
def test_running_out_of_memory_names_the_options_that_help_best_first(
    dataset, tmp_path, monkeypatch, how
):
    monkeypatch.setattr(TrainStep, "compute", how)
    with pytest.raises(UserError) as error:
        run(dataset, tmp_path, "--max_iters=1", "--recompute=none")
    message = str(error.value)
    figures = "10.0 GiB were in use, the card has 12.0 GiB, other programs leave 11.0"
    assert figures in message
    knobs = [line.split()[0] for line in message.splitlines()[2:]]
    assert knobs == [
        "--recompute=pointwise",
        "--recompute=block",
        "--batch_size=2",
        "--optimizer=adamw8bit",
        "--lora_rank=16",
        "--block_size=8",
    ]
    assert "--batch_size=2 --gradient_accumulation_steps=4" in message


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("options", [[], ["--batch_size=auto"]])
def test_a_model_that_does_not_fit_ends_with_the_same_advice(
    dataset, tmp_path, monkeypatch, options
):
    """Memory that ends before recompute=auto and batch_size=auto have become something."""
    monkeypatch.setattr("gpt12.run.prepare_model", exhausted)
    with pytest.raises(UserError, match="--optimizer=adamw8bit"):
        run(dataset, tmp_path, "--max_iters=1", *options)


def test_another_error_is_not_taken_for_too_little_memory(dataset, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug about memory")

    monkeypatch.setattr(TrainStep, "compute", fail)
    with pytest.raises(RuntimeError, match="a bug about memory"):
        run(dataset, tmp_path, "--max_iters=1")


def test_the_predicted_memory_of_a_run_is_told(dataset, tmp_path, capsys):
    RunLog(built(dataset, tmp_path)).introduce()
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("memory:"))
    assert line == "memory: about 32 MiB at the peak of a step (recompute=none)"  # not 0.0 GiB
