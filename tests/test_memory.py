"""gpt12/memory.py: the memory formula against tensors that are kept, and what is chosen by it."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt12 import memory
from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.log import RunLog
from gpt12.lora import add_lora
from gpt12.memory import (
    CPU_GAPS,
    GIB,
    MAX_TOKENS,
    choose_batch_size,
    choose_recompute,
    step_memory,
    trained_parameters,
)
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
    ("recompute", "dropout", "lora"),
    [
        ("none", 0, {}),
        ("none", 0.1, {}),
        ("pointwise", 0, {}),
        ("pointwise", 0.1, {}),
        ("none", 0, {"lora_dropout": 0.1}),
        ("pointwise", 0, {"lora_dropout": 0.1, "lora_targets": "c_attn"}),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_the_formula_counts_what_a_layer_keeps_for_the_backward_pass(recompute, dropout, lora):
    """Against the tensors that the compiler's own partition of a layer saves."""
    B, T, C = 3, 33, 64
    shape = GPTConfig(T, 13, 1, 2, C, dropout)
    model = GPT(shape).train()
    changes = {"batch_size": B, "block_size": T, "dtype": "bfloat16"}
    if lora:
        model.bfloat16()
        targets = [lora["lora_targets"]] if "lora_targets" in lora else []
        add_lora(model, rank=2, alpha=4.0, dropout=lora["lora_dropout"], targets=targets)
        changes |= {"lora_rank": 2} | lora
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


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_on_a_cpu_the_formula_counts_the_attention_matrices_that_dropout_keeps(dropout):
    """Against the tensors that a layer saves."""
    B, T, C = 2, 64, 32
    shape = GPTConfig(T, 13, 1, 2, C, dropout)
    [block] = GPT(shape).train().transformer.h
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def note(t):
        if t.numel() >= B * T * C and t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(B, T, C, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x)
    activations = []
    for n_layer in (1, 2):
        layers = replace(shape, n_layer=n_layer)
        found = step_memory(layers, config(batch_size=B, block_size=T), "none", on_cpu=True)
        activations.append(found["activations"])
    assert activations[1] - activations[0] == pytest.approx(CPU_GAPS * sum(kept.values()))


@pytest.mark.parametrize(
    ("batch_size", "recompute", "measured_gib"),
    [(2, "none", 7.5), (4, "none", 13.2), (4, "block", 4.1)],
)
def test_on_a_cpu_the_formula_predicts_what_runs_of_gpt2_took(batch_size, recompute, measured_gib):
    """The largest resident memory of train.py config/finetune_gpt2.py --init_from=scratch."""
    shape = replace(GPT2, dropout=0.1)
    options = full_size(batch_size=batch_size, dtype="float32")
    kinds = step_memory(shape, options, recompute, compiled=False, on_cpu=True)
    assert sum(kinds.values()) / GIB == pytest.approx(measured_gib, rel=0.1)


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


@pytest.mark.parametrize(("free", "chosen"), [(45, "none"), (20, "pointwise"), (10, "block")])
def test_on_a_cpu_too(monkeypatch, free, chosen):
    """Where dropout makes attention keep whole matrices."""
    allow(monkeypatch, free)
    shape = replace(GPT2, dropout=0.1)
    assert choose_recompute(shape, full_size(dtype="float32"), CPU) == chosen


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


def test_on_a_cpu_the_free_ram_and_what_the_process_holds_are_available(monkeypatch, tmp_path):
    def read(file, name):
        return {("/proc/meminfo", "MemAvailable"): 3, ("/proc/self/status", "VmRSS"): 2}[file, name]

    monkeypatch.setattr(memory, "_read_kib", read)
    assert memory.available_memory(CPU) == 5 * 1024
    monkeypatch.undo()
    if Path("/proc/meminfo").exists():
        assert 0 < memory.available_memory(CPU) < 2**50


def test_a_system_that_does_not_tell_its_free_ram_counts_as_unlimited(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 12 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        memory._read_kib(str(tmp_path / "meminfo"), "MemAvailable")
    monkeypatch.setattr(Path, "read_text", lambda self: (tmp_path / "none").open())
    assert memory.available_memory(CPU) == math.inf


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
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
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
def test_the_advice_starts_from_what_auto_has_become(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainStep, "compute", exhausted)
    options = ["--recompute=auto", "--batch_size=auto", "--gradient_accumulation_steps=6"]
    with pytest.raises(UserError) as error:
        run(dataset, tmp_path, "--max_iters=1", *options)
    knobs = [line.strip() for line in str(error.value).splitlines()[2:5]]
    assert knobs[:2] == ["--recompute=pointwise", "--recompute=block"]
    assert knobs[2].startswith("--batch_size=3 --gradient_accumulation_steps=2 ")


@pytest.mark.parametrize(
    ("changes", "resumed", "expected"),
    [
        ({}, False, ["--optimizer=adamw8bit", "--lora_rank=16"]),
        ({"optimizer": "adamw8bit"}, False, ["--lora_rank=16"]),
        ({"lora_rank": 16}, False, []),
        ({}, True, []),  # a resumed run keeps its optimizer and its adapters
    ],
)
@pytest.mark.usefixtures("card")
def test_what_a_run_has_already_or_cannot_change_is_not_advised(changes, resumed, expected):
    asked = full_size(batch_size=1, recompute="block", **changes)
    lines = str(memory.out_of_memory_advice(asked, resumed)).splitlines()[2:]
    assert [line.split()[0] for line in lines] == [*expected, "--block_size=512"]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("options", [[], ["--batch_size=auto"]])
def test_a_model_that_does_not_fit_ends_with_the_same_advice(
    dataset, tmp_path, monkeypatch, options
):
    """Memory that ends before recompute=auto and batch_size=auto have become something."""
    monkeypatch.setattr("gpt12.run.prepare_model", exhausted)
    with pytest.raises(UserError, match="--optimizer=adamw8bit"):
        run(dataset, tmp_path, "--max_iters=1", *options)


def test_on_a_cpu_a_run_that_needs_more_than_the_free_ram_ends_before_it_begins(dataset, tmp_path):
    with pytest.raises(UserError) as error:
        run(dataset, tmp_path, "--batch_size=100000000", "--recompute=auto")
    title, _, *knobs = str(error.value).splitlines()
    assert re.match(r"a step needs about [\d,.]+ GiB of memory, and [\d,.]+ are free\.$", title)
    names = [knob.split()[0].partition("=")[0] for knob in knobs]
    assert names == [
        "--batch_size",
        "--lora_rank",
        "--block_size",
        "config/train_shakespeare_cpu.py",
    ]
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("rows", [64, 75])
def test_the_advised_batch_size_is_one_that_fits_and_makes_the_same_step(monkeypatch, rows):
    allow(monkeypatch, 4)
    asked = full_size(batch_size=rows, dtype="float32", recompute="block")
    with pytest.raises(UserError) as error:
        memory.check_memory(GPT2, asked, CPU)
    size, pieces = map(int, re.findall(r"(?:batch_size|steps)=(\d+)", str(error.value)))
    assert size * pieces == rows
    fitting = replace(asked, batch_size=size)
    memory.check_memory(GPT2, fitting, CPU)
    with pytest.raises(UserError):
        memory.check_memory(GPT2, replace(asked, batch_size=2 * size), CPU)


def test_evaluation_and_a_gpu_are_not_checked_before_they_begin(monkeypatch):
    allow(monkeypatch, 0)
    memory.check_memory(GPT2, full_size(), GPU)
    memory.check_memory(GPT2, full_size(eval_only=True), CPU)


def test_a_cpu_that_cannot_allocate_ends_with_advice(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainStep, "compute", lambda *args: torch.empty(2**60))
    with pytest.raises(UserError, match=r"^out of memory\.\nTry.*\n  --recompute=pointwise\n"):
        run(dataset, tmp_path, "--max_iters=1", "--recompute=none")


def test_another_error_is_not_taken_for_too_little_memory(dataset, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug about memory")

    monkeypatch.setattr(TrainStep, "compute", fail)
    with pytest.raises(RuntimeError, match="a bug about memory"):
        run(dataset, tmp_path, "--max_iters=1")


def test_the_predicted_memory_of_a_run_is_told(dataset, tmp_path, capsys):
    RunLog(built(dataset, tmp_path)).introduce()
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("memory:"))
    assert line == "memory: about 0.4 GiB at the peak of a step (recompute=none)"
