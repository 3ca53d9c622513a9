"""Predict the memory and the time of a training step by counting what it does.

step_memory     bytes at the peak of a step, fitted to GPT-2; for a changed model an estimate
predict         the same with the time on a card, for bench.py
available_memory, ran_out_of_memory     what there is, and whether it was too little

Time follows the roofline model (Williams et al. 2009), but as a sum: matrix products run at a share
of the card's peak rate, everything else at a share of its bandwidth, and the two do not overlap.

B batch, T time (block_size), C channels, L layers, H heads, V padded vocabulary. A layer has
12 C^2 weights: query, key and value 3, attention's output 1, the MLP 4 and 4.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt12.cards import Card
from gpt12.device import Machine
from gpt12.distributed import least_of_ranks
from gpt12.loss import CHUNK_ROWS
from gpt12.muon import NEWTON_SCHULZ_ITERATIONS
from gpt12.settings import Recompute, TrainConfig
from model import GPTConfig, parameter_count

GIB = 2**30
# From the fastest to the one that needs the least memory.
RECOMPUTE: tuple[Recompute, ...] = ("none", "pointwise", "block")

# --------------------------------------------------------------------------------------------------
# Memory of a step

# What a layer keeps for the backward pass, in (B, T, C) tensors. none: its input 1, LayerNorm 1,
# query with key and value 3, attention 1, the stream after it 1, LayerNorm 1, the MLP's inside 4,
# GELU 4. pointwise: without the LayerNorms and GELU's output. block: the input.
KEPT = {"none": 16, "pointwise": 10, "block": 1}
# Uncompiled, autocast converts LayerNorm's input to float32 and keeps the copy.
KEPT_UNCOMPILED = {"none": 2, "pointwise": 1, "block": 0}
# The products of LoRA's adapters, one a matrix (3 + 1 + 4 wide) but the last, which nothing needs.
# "none" keeps none of them.
KEPT_BY_ADAPTERS = {"none": 0, "pointwise": 8, "block": 0}
# A CPU has no fused attention with dropout: a layer keeps the softmax, the mask and their product,
# each a whole matrix (B, H, T, T) in float32.
KEPT_MATRICES = {"none": 3, "pointwise": 1, "block": 0}
MATRICES_IN_BACKWARD = 6  # the three, computed again or kept, and their gradients
# Bytes of optimizer state per trained parameter: two moments in 8 bits, for others in float32. Muon
# keeps one, and its update holds a stack of the same size.
MOMENT_BYTES = {"adamw8bit": 2}
PROCESS_BYTES = 0.4 * GIB  # on a CPU: Python and the libraries
CPU_GAPS = 1.1  # on a CPU: what the C library's allocator takes for each byte of a tensor
WORKSPACE_BYTES = 2**25  # buffers of cuBLAS and small tensors


def trained_parameters(shape: GPTConfig, config: TrainConfig) -> int:
    """Count the parameters in memory that get gradients: all, or LoRA's adapters."""
    if config.lora_rank == 0:
        return parameter_count(shape, padded=True)
    # Four matrices with 1 + 1 + 1 + 4 times C inputs and 3 + 1 + 4 + 1 times C outputs.
    return shape.n_layer * config.lora_rank * 16 * shape.n_embd


def step_memory(
    shape: GPTConfig, config: TrainConfig, compiled: bool = True, on_cpu: bool = False
) -> dict[str, float]:
    """Return the bytes of memory at the peak of a step, by kind.

    Their sum is what torch.cuda.max_memory_allocated would report; on a CPU, the largest resident
    memory of the process. config: batch_size, block_size, gradient_accumulation_steps, dtype,
    optimizer, lora_rank and recompute count. The attention mask of instruction data, B * T * T
    numbers, is left out.

    The peak is the largest of three moments: in the loss, when all activations are alive beside a
    chunk of logits; in the backward pass of the last layer; and at the end of the backward pass,
    when all gradients are there. The numbers of (B, T, C) tensors in the last two were fitted.
    """
    full = config.lora_rank == 0  # all parameters are trained
    recompute = config.recompute
    number = 4 if config.dtype == "float32" else 2  # bytes of an activation
    master = 2 if config.optimizer == "adamw8bit" else 4  # bytes of a trained parameter
    eager = not compiled and number == 2
    parameters = parameter_count(shape, padded=True)
    trained = trained_parameters(shape, config)
    table = shape.padded_vocab_size * shape.n_embd  # numbers in the embedding table
    tokens = config.batch_size * config.block_size
    stream = number * shape.n_embd * tokens  # bytes of one (B, T, C) tensor
    matrix = 0.0  # bytes of all heads' attention, where it is a whole matrix
    if on_cpu and shape.dropout > 0:
        matrix = 4.0 * shape.n_head * tokens * config.block_size

    per_layer = _kept_per_layer(shape, config, eager, on_cpu) * stream
    kept = shape.n_layer * (per_layer + KEPT_MATRICES[recompute] * matrix)
    # The head's part of the embedding's gradient is in float32, beside that of the lookup.
    head_gradient = 4.0 * table if full else 0.0
    # The head's weight in 16 bits; without recomputation 16-bit copies of all weights are kept.
    workspace = float(WORKSPACE_BYTES)
    if full and number < master:
        workspace += number * (parameters if recompute == "none" else table)
    logits = (number + (4 if eager else 0)) * min(tokens, CHUNK_ROWS) * shape.padded_vocab_size
    backward = 10.0
    if recompute == "block":  # and all activations of the layer, computed again
        backward = 21.5 if full else 40.0
    again = (MATRICES_IN_BACKWARD - KEPT_MATRICES[recompute]) * matrix

    there = {
        "weights": float(master * parameters if full else number * parameters + 4 * trained),
        "moments": float(MOMENT_BYTES.get(config.optimizer, 8) * trained),
        "gradients": float(master * trained if config.gradient_accumulation_steps > 1 else 0),
    }
    in_the_loss = {
        "activations": kept + 4 * stream,
        "logits": logits + head_gradient,
        "workspace": workspace,
    }
    in_the_last_layer = {"activations": kept + backward * stream + again, "logits": head_gradient}
    at_the_end = {
        "gradients": float(master * trained),
        "activations": 13.0 * stream,
        "logits": head_gradient,
    }
    moments = [there | moment for moment in (in_the_loss, in_the_last_layer, at_the_end)]
    peak = max(moments, key=lambda moment: sum(moment.values()))
    if on_cpu:
        peak = {kind: CPU_GAPS * size for kind, size in peak.items()}
        peak["process"] = PROCESS_BYTES
    return peak


def _kept_per_layer(shape: GPTConfig, config: TrainConfig, eager: bool, on_cpu: bool) -> int:
    """Return what a layer keeps for the backward pass, in (B, T, C) tensors."""
    kept = KEPT[config.recompute]
    if eager:
        kept += KEPT_UNCOMPILED[config.recompute]
    if config.lora_rank > 0:
        kept += KEPT_BY_ADAPTERS[config.recompute]
    if config.recompute == "none" and shape.dropout > 0:
        kept += 2 if on_cpu else 1  # two masks; on a GPU each has one byte per number
    return kept


# --------------------------------------------------------------------------------------------------
# Memory of the machine

CGROUPS = Path("/sys/fs/cgroup")  # where Linux shows a container its limits


def needed_memory(shape: GPTConfig, config: TrainConfig, machine: Machine) -> float:
    """Return the predicted bytes at the peak of a step on this machine."""
    on_cpu = machine.device.type == "cpu"
    return sum(step_memory(shape, config, machine.compiled, on_cpu).values())


def available_memory(machine: Machine) -> float:
    """Return the bytes that a process may use, including what it already holds.

    On a GPU its own memory, on a CPU the RAM, or less if a container limits it. Infinity where the
    system does not tell. With several ranks it is the least of theirs, so that all decide the same.
    """
    return least_of_ranks(_own_memory(machine), machine.device)


def _own_memory(machine: Machine) -> float:
    if machine.on_gpu:
        free, total = torch.cuda.mem_get_info(machine.device)
        share = torch.cuda.get_per_process_memory_fraction(machine.device)
        return min(free + torch.cuda.memory_reserved(machine.device), share * total)
    try:
        free = 1024 * _read_number("/proc/meminfo", "MemAvailable")
        held = 1024 * _read_number("/proc/self/status", "VmRSS")
    except OSError:  # not Linux
        return math.inf
    return held + min(free, _left_in_container())


def _left_in_container() -> float:
    """Return the bytes that the limit of a container leaves, infinity without a limit.

    A cgroup of version 2, then of version 1. The kernel gives up pages of files that are not in use
    before it kills a process, so these count as free.
    """
    left = math.inf
    for folder, limit_file, used_file in (
        (CGROUPS, "memory.max", "memory.current"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = int((folder / limit_file).read_text())
            used = int((folder / used_file).read_text())
            unused_files = _read_number(folder / "memory.stat", "inactive_file")
        except (OSError, ValueError):  # no such cgroup, or "max": no limit
            continue
        left = min(left, limit - used + unused_files)
    return left


def _read_number(file: str | Path, name: str) -> int:
    """Return the number in a line `name: 123 kB` or `name 123` of a file of the kernel."""
    for line in Path(file).read_text().splitlines():
        words = line.split()
        if words[0].rstrip(":") == name:
            return int(words[1])
    raise OSError(f"{file} does not tell {name}")


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the memory is used up.

    While a CUDA graph is recorded, running out of memory breaks off the recording, which raises an
    error of its own. If a CPU's RAM or a Mac's memory runs out, only the message says so.
    """
    if any(words in str(error) for words in ("DefaultCPUAllocator", "MPS backend out of memory")):
        return True
    return any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__))


# --------------------------------------------------------------------------------------------------
# Time of a step on a card

# Fitted to measured steps of GPT-2 124M on an H200, which tests/test_memory.py lists.
PRODUCTS_SHARE = 0.69  # of the datasheet's rate, reached by matrix products of this size
# An estimate: GeForce cards clock above their datasheet, and their slower tensor cores wait less.
GEFORCE_PRODUCTS_SHARE = 0.88
BANDWIDTH_SHARE = 0.73  # of the datasheet's bandwidth, reached by kernels that only move numbers
SOFTMAX_FLOPS = 60  # float32 operations for an element of the attention matrix in one pass
SECONDS_PER_LAYER = 0.15e-3  # kernels of a layer starting and running out, in a micro-batch

LARGEST_BATCH = 1024  # micro-batches up to this size are considered
# Numbers that all kernels but matrix products read and write, per token, layer and channel.
# Forward 16: LayerNorm with the sum before it 4, twice; GELU 8. Backward 30: GELU 12; LayerNorm
# 6, twice; joining the gradients of query, key and value 6.
MOVED_NUMBERS = 16 + 30
MOVED_AGAIN = {"none": 0, "pointwise": 12, "block": 16}  # computed again in the backward pass
MOVED_BY_ADAPTERS = 54  # adding the adapters' products, 6 for each of 9 outputs
MOVED_BY_BIASES = 9  # their gradients, one for each of 9 outputs
# Bytes that an update moves for each trained parameter: the gradient (for its norm, then for the
# update) is read, the weight and two moments are read and written. Muon is counted like AdamW.
UPDATE_BYTES = {"adamw8bit": 2 + 2 + 8}


@dataclass(frozen=True)
class Prediction:
    """The predicted memory and time of a compiled step on a card."""

    batch_size: int
    recompute: Recompute
    memory_gib: dict[str, float]  # by kind
    gib: float
    ms: float
    tokens_per_s: float


def predict(shape: GPTConfig, config: TrainConfig, card: Card) -> Prediction:
    """Predict memory and time of a step on a card. config: batch_size and dtype are decided."""
    micro_steps = config.gradient_accumulation_steps
    tokens = micro_steps * config.batch_size * config.block_size
    peak = card.tflops * 1e12
    if config.dtype == "float32":
        peak /= 2  # TF32
    is_geforce = card.tflops < 3 * card.fp32_tflops
    products = product_flops(shape, config, tokens) / peak
    moves = moved_bytes(shape, config, tokens) / (card.bandwidth_gbs * 1e9)
    # Elements of attention matrices: forward, backward, perhaps forward again; causality halves.
    passes = 3 if config.recompute == "block" else 2
    elements = passes * tokens * config.block_size / 2 * shape.n_head * shape.n_layer
    seconds = (
        products / (GEFORCE_PRODUCTS_SHARE if is_geforce else PRODUCTS_SHARE)
        + moves / BANDWIDTH_SHARE
        + elements * SOFTMAX_FLOPS / (card.fp32_tflops * 1e12)
        + micro_steps * shape.n_layer * SECONDS_PER_LAYER
    )
    kinds = step_memory(shape, config, config.compile is not False)
    return Prediction(
        batch_size=config.batch_size,
        recompute=config.recompute,
        memory_gib={kind: size / GIB for kind, size in kinds.items()},
        gib=sum(kinds.values()) / GIB,
        ms=1e3 * seconds,
        tokens_per_s=tokens / seconds,
    )


def product_flops(shape: GPTConfig, config: TrainConfig, tokens: int) -> float:
    """Count the operations of the matrix products of a step."""
    C = shape.n_embd
    L = shape.n_layer
    layers = 12 * C * C * L
    multiplied = layers + shape.padded_vocab_size * C
    # A multiplication and an addition per weight, once in the forward pass and once in the backward
    # pass for the input's gradient; once more for the gradient of each weight that is trained.
    if config.lora_rank == 0:
        per_token = 6 * multiplied
    else:
        per_token = 4 * multiplied + 6 * trained_parameters(shape, config)
    # Attention: two products forward and five backward (Dao 2023, arXiv:2307.08691, section 3.1),
    # half of each because of causality.
    per_token += 7 * config.block_size * C * L
    if config.recompute == "block":  # all again but the layer's last product, which nothing needs
        per_token += 2 * (layers - 4 * C * C * L) + 2 * config.block_size * C * L
    update = 0
    if config.optimizer == "muon":
        # An iteration for X of m x n, m <= n, is X X^T, its square, and their sum times X:
        # 4 m^2 n + 2 m^3. A layer has four of C x C and two of C x 4C.
        update = NEWTON_SCHULZ_ITERATIONS * L * (4 * 6 + 2 * 18) * C**3
    return float(tokens * per_token + update)


def moved_bytes(shape: GPTConfig, config: TrainConfig, tokens: int) -> float:
    """Count the bytes that everything but the matrix products reads and writes in a step."""
    C = shape.n_embd
    layers = 12 * C * C * shape.n_layer
    head = shape.padded_vocab_size * C
    parameters = layers + head + shape.block_size * C
    number = 4 if config.dtype == "float32" else 2  # bytes of an activation
    micro_steps = config.gradient_accumulation_steps

    per_layer = MOVED_NUMBERS + MOVED_AGAIN[config.recompute]
    if shape.bias:
        per_layer += MOVED_BY_BIASES
    if config.lora_rank > 0:
        per_layer += MOVED_BY_ADAPTERS
    # The loss reads and writes logits.
    outside_of_layers = 20 * C + 2 * shape.padded_vocab_size
    per_token: float = number * (shape.n_layer * per_layer * C + outside_of_layers)
    per_micro_batch = 0
    trained = trained_parameters(shape, config)
    if config.lora_rank == 0:
        trained = parameters
        # The head's gradient is read and written for each chunk of rows.
        per_token += 8 * head / CHUNK_ROWS
        # The head's gradient is set to zero, scaled and added to the embedding's.
        per_micro_batch += 28 * head
        if number == 2:
            per_micro_batch += 12 * layers  # weights are cast to 16 bits, gradients back
        if micro_steps > 1:
            per_micro_batch += 12 * parameters  # gradients are added up
    per_update = UPDATE_BYTES.get(config.optimizer, 4 + 4 + 24) * trained
    return tokens * per_token + micro_steps * per_micro_batch + per_update


def largest_batch(shape: GPTConfig, config: TrainConfig, room_gib: float) -> int:
    """Return the largest micro-batch whose predicted memory fits into room_gib; 0 if none does."""

    def needed(batch_size: int) -> float:
        sized = replace(config, batch_size=batch_size)
        return sum(step_memory(shape, sized, config.compile is not False).values())

    return bisect_right(range(1, LARGEST_BATCH + 1), room_gib * GIB, key=needed)
