"""Predict the memory of a training step by counting what it keeps.

The formula was fitted to GPT-2; for a changed model it is an estimate.

B batch, T time (block_size), C channels, H heads.
"""

from __future__ import annotations

import torch

from gpt12.device import Machine
from gpt12.loss import CHUNK_ROWS
from gpt12.settings import Recompute, TrainConfig
from model import GPTConfig, parameter_count

GIB = 2**30
# From the fastest to the one that needs the least memory.
RECOMPUTE: tuple[Recompute, ...] = ("none", "pointwise", "block")

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
