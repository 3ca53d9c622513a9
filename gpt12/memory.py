"""Predict the memory and the time of a training step by counting what it does.

step_memory     bytes at the peak of a step, fitted to GPT-2; for a changed model an estimate
predict         the same with the time on a card, for bench.py

Time follows the roofline model (Williams et al. 2009), but as a sum: matrix products run at a share
of the card's peak rate, everything else at a share of its bandwidth, and the two do not overlap.

B batch, T time (block_size), C channels, L layers, H heads, V padded vocabulary. A layer has
12 C^2 weights: query, key and value 3, attention's output 1, the MLP 4 and 4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gpt12.cards import Card
from gpt12.device import Machine
from gpt12.loss import CHUNK_ROWS
from gpt12.muon import NEWTON_SCHULZ_ITERATIONS
from gpt12.settings import Recompute, TrainConfig
from model import GPTConfig, flops_per_token, parameter_count

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
# The outputs of LoRA's adapters. Those of the first three matrices are 3, 1 and 4 wide; nothing
# needs the fourth. "none" keeps none of them.
KEPT_BY_ADAPTERS = {"none": 0, "pointwise": 8, "block": 0}
# A CPU has no fused attention with dropout: a layer keeps the softmax, the mask and their product,
# each a whole matrix (B, H, T, T) in float32.
KEPT_MATRICES = {"none": 3, "pointwise": 1, "block": 0}
MATRICES_IN_BACKWARD = 6  # the three, computed again or kept, and their gradients
# Bytes of optimizer state per trained parameter: two moments in 8 bits, for others in float32. Muon
# keeps one, and its update holds a stack of the same size.
STATE_BYTES = {"adamw8bit": 2}
PROCESS_BYTES = 0.4 * GIB  # on a CPU: Python and the libraries
CPU_GAPS = 1.1  # on a CPU: what the C library's allocator takes for each byte of a tensor
WORKSPACE_BYTES = 2**25  # buffers of cuBLAS and small tensors
COMPILED_GPU = Machine(torch.device("cuda"), torch.bfloat16, compiled=True)


def trained_parameters(shape: GPTConfig, config: TrainConfig) -> int:
    """Count the parameters in memory that get gradients: all, or LoRA's adapters."""
    if config.lora_rank == 0:
        return parameter_count(shape, padded=True)
    # Four matrices with 1 + 1 + 1 + 4 times C inputs and 3 + 1 + 4 + 1 times C outputs.
    return shape.n_layer * config.lora_rank * 16 * shape.n_embd


def _attention_matrices(shape: GPTConfig, config: TrainConfig, number: int) -> tuple[float, float]:
    """Return what attention's matrices take in a layer on a CPU, in (B, T, C) tensors.

    Without a fused kernel, each head has whole matrices (T, T). The first number returned counts
    those that are kept for the backward pass, the second those that only it makes.
    number: bytes of an activation.
    """
    matrix = 4 * shape.n_head * config.block_size / (number * shape.n_embd)
    kept = KEPT_MATRICES[config.recompute]
    return kept * matrix, (MATRICES_IN_BACKWARD - kept) * matrix


def step_memory(shape: GPTConfig, config: TrainConfig, machine: Machine = COMPILED_GPU) -> float:
    """Return the bytes of memory at the peak of a step.

    They are what torch.cuda.max_memory_allocated would report; on a CPU, the largest resident
    memory of the process. config: batch_size, block_size, gradient_accumulation_steps, dtype,
    optimizer, lora_rank and recompute count. The attention mask of instruction data, B * T * T
    numbers, is left out.

    The peak is the largest of three moments: in the loss, when all activations are alive beside a
    chunk of logits; in the backward pass of the last layer; and at the end of the backward pass,
    when all gradients are there. The numbers of (B, T, C) tensors in the last two were fitted.
    """
    full = config.lora_rank == 0  # all parameters are trained
    on_cpu = machine.device.type == "cpu"
    number = 4 if config.dtype == "float32" else 2  # bytes of an activation
    master = 2 if config.optimizer == "adamw8bit" else 4  # bytes of a trained parameter
    eager = not machine.compiled and number == 2
    parameters = parameter_count(shape, padded=True)
    trained = trained_parameters(shape, config)
    table = shape.padded_vocab_size * shape.n_embd  # numbers in the embedding table
    tokens = config.batch_size * config.block_size
    stream = number * shape.n_embd * tokens  # bytes of one (B, T, C) tensor
    kept = shape.n_layer * _kept_per_layer(shape, config, eager, on_cpu)
    backward = 10.0
    if config.recompute == "block":  # and all activations of the layer, computed again
        backward = 21.5 if full else 40.0
    if on_cpu and shape.dropout > 0:
        kept_matrices, others = _attention_matrices(shape, config, number)
        kept += shape.n_layer * kept_matrices
        backward += others
    # The head's weight in 16 bits; without recomputation 16-bit copies of all weights are kept.
    workspace = WORKSPACE_BYTES
    if full and number < master:
        workspace += number * (parameters if config.recompute == "none" else table)
    logits = (number + (4 if eager else 0)) * min(tokens, CHUNK_ROWS) * shape.padded_vocab_size
    # The head's part of the embedding's gradient is in float32, beside that of the lookup.
    head_gradient = 4 * table if full else 0
    weights = master * parameters if full else number * parameters + 4 * trained
    state = STATE_BYTES.get(config.optimizer, 8) * trained
    gradients = master * trained
    earlier = gradients if config.gradient_accumulation_steps > 1 else 0  # of other micro-batches
    in_loss = earlier + (kept + 4) * stream + logits + workspace
    in_last_layer = earlier + (kept + backward) * stream
    at_end = gradients + 13 * stream
    peak = weights + state + head_gradient + max(in_loss, in_last_layer, at_end)
    return CPU_GAPS * peak + PROCESS_BYTES if on_cpu else peak


def _kept_per_layer(shape: GPTConfig, config: TrainConfig, eager: bool, on_cpu: bool) -> float:
    """Return what a layer keeps for the backward pass, in (B, T, C) tensors."""
    kept = float(KEPT[config.recompute])
    if eager:
        kept += KEPT_UNCOMPILED[config.recompute]
    if config.lora_rank > 0:
        kept += KEPT_BY_ADAPTERS[config.recompute]
    if config.recompute == "none" and shape.dropout > 0:
        kept += 2 if on_cpu else 1  # two masks; on a GPU each has one byte per number
    return kept


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
# Bytes that a micro-batch moves for each trained parameter: weights are cast to 16 bits, gradients
# back; the head's gradient is set to zero, scaled and added to the embedding's.
CAST_BYTES = 17


def predict(shape: GPTConfig, config: TrainConfig, card: Card) -> dict[str, Any]:
    """Predict memory and time of a compiled step on a card, by the names in bench.json.

    config: batch_size and dtype are decided.
    """
    micro_steps = config.gradient_accumulation_steps
    tokens = micro_steps * config.batch_size * config.block_size
    peak = card.tflops * 1e12
    if config.dtype == "float32":
        peak /= 2  # TF32
    is_geforce = card.tflops < 3 * card.fp32_tflops
    peak *= GEFORCE_PRODUCTS_SHARE if is_geforce else PRODUCTS_SHARE
    # Elements of attention matrices: forward, backward, perhaps forward again; causality halves.
    passes = 3 if config.recompute == "block" else 2
    elements = passes * tokens * config.block_size / 2 * shape.n_head * shape.n_layer
    seconds = (
        product_flops(shape, config, tokens) / peak
        + moved_bytes(shape, config, tokens) / (BANDWIDTH_SHARE * card.bandwidth_gbs * 1e9)
        + elements * SOFTMAX_FLOPS / (card.fp32_tflops * 1e12)
        + micro_steps * shape.n_layer * SECONDS_PER_LAYER
    )
    return {
        "batch_size": config.batch_size,
        "recompute": config.recompute,
        "ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "peak_gib": step_memory(shape, config) / GIB,
    }


def product_flops(shape: GPTConfig, config: TrainConfig, tokens: int) -> float:
    """Count the operations of the matrix products of a step."""
    C = shape.n_embd
    L = shape.n_layer
    attention = L * C * config.block_size
    weights = (flops_per_token(shape) - 12 * attention) / 6
    # A multiplication and an addition per weight, once in the forward pass and once in the backward
    # pass for the input's gradient; once more for the gradient of each weight that is trained.
    # Attention: two products forward and five backward (Dao 2023, arXiv:2307.08691, section 3.1),
    # half of each because of causality.
    per_token = 6 * weights + 7 * attention
    if config.lora_rank > 0:
        per_token += 6 * trained_parameters(shape, config) - 2 * weights
    if config.recompute == "block":  # all again but the layer's last product, which nothing needs
        per_token += 2 * 8 * C * C * L + 2 * attention
    update = 0
    if config.optimizer == "muon":
        # An iteration for X of m x n, m <= n, is X X^T, its square, and their sum times X:
        # 4 m^2 n + 2 m^3. A layer has four of C x C and two of C x 4C.
        update = NEWTON_SCHULZ_ITERATIONS * L * (4 * 6 + 2 * 18) * C**3
    return float(tokens * per_token + update)


def moved_bytes(shape: GPTConfig, config: TrainConfig, tokens: int) -> float:
    """Count the bytes that everything but the matrix products reads and writes in a step."""
    C = shape.n_embd
    head = shape.padded_vocab_size * C
    trained = trained_parameters(shape, config)
    number = 4 if config.dtype == "float32" else 2  # bytes of an activation
    per_layer = MOVED_NUMBERS + MOVED_AGAIN[config.recompute]
    if shape.bias:
        per_layer += MOVED_BY_BIASES
    if config.lora_rank > 0:
        per_layer += MOVED_BY_ADAPTERS
    # The loss reads and writes logits.
    per_token = number * (shape.n_layer * per_layer * C + 20 * C + 2 * shape.padded_vocab_size)
    per_update = UPDATE_BYTES.get(config.optimizer, 4 + 4 + 24) * trained
    if config.lora_rank > 0:
        return float(tokens * per_token + per_update)
    micro_steps = config.gradient_accumulation_steps
    per_micro_batch = CAST_BYTES * trained
    if micro_steps > 1:
        per_micro_batch += 12 * trained  # gradients are added up
    # The head's gradient is read and written for each chunk of rows.
    head_bytes = tokens * 8 * head / CHUNK_ROWS
    return tokens * per_token + head_bytes + micro_steps * per_micro_batch + per_update


def predict_sizes(
    shape: GPTConfig, config: TrainConfig, room_gib: float, card: Card
) -> list[dict[str, Any]]:
    """Predict steps with micro-batches of 1, 4, 16 and 64 rows and with the largest that fits.

    They fit into room_gib; a list without rows means that none does.
    """

    def sized(batch_size: int) -> TrainConfig:
        return replace(config, batch_size=batch_size)

    largest = 0
    while largest < LARGEST_BATCH:
        if step_memory(shape, sized(largest + 1)) > room_gib * GIB:
            break
        largest += 1
    rows = []
    for size in sorted({1, 4, 16, 64, largest}):
        if 0 < size <= largest:
            label = f"--batch_size={size} --recompute={config.recompute}"
            rows.append(predict(shape, sized(size), card) | {"label": label})
    return rows


# A core does about this many operations a second in float32.
CPU_FLOPS_PER_CORE = 25e9
LONG_RUN_HOURS = 2


def warn_of_long_run(shape: GPTConfig, config: TrainConfig, steps: int, cores: int) -> str | None:
    """Return a warning if the steps that are left will take many hours on this CPU."""
    flops = float(flops_per_token(shape)) * steps * config.tokens_per_step
    hours = flops / (cores * CPU_FLOPS_PER_CORE) / 3600
    if hours < LONG_RUN_HOURS:
        return None
    return (
        f"this run will take about {hours:,.0f} hours on this CPU. "
        "config/train_shakespeare_cpu.py trains a small model in half a minute, also on your own "
        "text: "
        "python train.py config/train_shakespeare_cpu.py --dataset=my.txt --tokenizer=char"
    )
