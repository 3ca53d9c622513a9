"""Predict memory and time of a training step on a card, by counting the work.

Memory comes from gpt12/memory.py. Time follows the roofline model (Williams et al. 2009), but as a
sum: matrix products run at a share of the card's peak rate, everything else at a share of its
bandwidth, and the two do not overlap.

C channels, L layers, H heads, T time (block_size), V padded vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import torch

from gpt12.cards import CARDS, Card
from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.gpu_state import MARGIN_GIB
from gpt12.loss import CHUNK_ROWS
from gpt12.memory import GIB, RECOMPUTE, step_memory, trained_parameters
from gpt12.muon import NEWTON_SCHULZ_ITERATIONS
from gpt12.settings import BenchConfig, Recompute, model_shape
from model import GPTConfig, Matrix, layer_matrices

# Fitted to measured steps of GPT-2 124M on an H200, which tests/test_plan.py lists.
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
# Bytes that an update moves for each trained parameter: the gradient (for its norm, then for the
# update) is read, the weight and two moments are read and written. Muon is counted like AdamW.
UPDATE_BYTES = {"adamw": 4 + 4 + 24, "muon": 4 + 4 + 24, "adamw8bit": 2 + 2 + 8}


# --------------------------------------------------------------------------------------------------
# Cards


def card_to_plan_for(config: BenchConfig) -> Card:
    """Return the datasheet of --card, or the one that was typed in. Raises UserError if unknown."""
    card = _typed_card(config) or CARDS.get(config.card)
    if card is None or (card.vram_gb == 0 and config.vram_gb is None):
        known = "\n  ".join(CARDS)
        raise UserError(
            f"card={config.card} is unknown, or its memory is. Give --peak_tflops, "
            f"--bandwidth_gbs and --vram_gb from its datasheet, or --card= one of\n  {known}"
        )
    return card


def _full_name(name: str) -> str:
    """Return the name of the only known card that ends like this, else the name itself."""
    matches = [known for known in CARDS if known.lower().endswith(name.lower())]
    return matches[0] if len(matches) == 1 else name


def card_of_machine(config: BenchConfig, machine: Machine) -> Card | None:
    """Return the datasheet of this machine's GPU, None if it is not known for certain.

    Name and memory must agree: there is an RTX 3080 with 10 GB and another card with 12 that has
    the same name.
    """
    typed = _typed_card(config)
    if typed is not None:
        return typed
    card = CARDS.get(machine.name)
    if card is None:
        return None
    total_gib = torch.cuda.mem_get_info()[1] / GIB
    if abs(total_gib / card.vram_gb - 1) > 0.12:
        return None
    return card


def _typed_card(config: BenchConfig) -> Card | None:
    """Return the card described by --peak_tflops and --bandwidth_gbs."""
    if config.peak_tflops is None or config.bandwidth_gbs is None:
        return None
    return Card(
        tflops=config.peak_tflops,
        bandwidth_gbs=config.bandwidth_gbs,
        vram_gb=config.vram_gb or 0.0,
        fp32_tflops=config.peak_tflops / 2,  # as on GeForce cards
    )


# --------------------------------------------------------------------------------------------------
# Counting the work


@dataclass(frozen=True)
class Work:
    """What one process does in a step."""

    tokens: int
    flops: float  # operations in matrix products
    softmax: float  # elements of attention matrices, over all passes
    bytes: float  # read and written by everything that is not a matrix product
    layers: int  # layers times micro-batches


def count_work(config: BenchConfig, recompute: Recompute) -> Work:
    """Count the work of a step. config: batch_size and dtype decided."""
    shape = model_shape(config, config.vocab_size)
    micro_steps = config.gradient_accumulation_steps
    tokens = micro_steps * int(config.batch_size) * config.block_size
    passes = 3 if recompute == "block" else 2  # forward, backward, and perhaps forward again
    # Causal attention computes half of the matrix.
    softmax = passes * tokens * config.block_size / 2 * shape.n_head * shape.n_layer
    return Work(
        tokens=tokens,
        flops=tokens * _flops_per_token(config, shape, recompute) + _muon_flops(config, shape),
        softmax=softmax,
        bytes=_moved_bytes(config, shape, recompute, tokens),
        layers=micro_steps * shape.n_layer,
    )


def _layer_weights(shape: GPTConfig) -> int:
    """Count the numbers in all layers' matrices."""
    return shape.n_layer * sum(m.outputs * m.inputs for m in layer_matrices(shape))


def _flops_per_token(config: BenchConfig, shape: GPTConfig, recompute: str) -> float:
    """Count the operations of matrix products per token."""
    layers = _layer_weights(shape)
    multiplied = layers + shape.padded_vocab_size * shape.n_embd
    flops: float
    # A multiplication and an addition per weight, once in the forward pass and once in the backward
    # pass for the input's gradient; once more for the gradient of each weight that is trained.
    if config.lora_rank == 0:
        flops = 6 * multiplied
    else:
        flops = 4 * multiplied + 6 * trained_parameters(shape, config)
    # Attention: two products forward and five backward (Dao 2023, arXiv:2307.08691, section 3.1),
    # half of each because of causality.
    attention_products = 7
    if recompute == "block":
        last = layer_matrices(shape)[-1]  # nothing needs its product again
        flops += 2 * (layers - shape.n_layer * last.outputs * last.inputs)
        attention_products += 2
    return flops + attention_products * shape.block_size * shape.n_embd * shape.n_layer


def _muon_flops(config: BenchConfig, shape: GPTConfig) -> int:
    """Count the operations of Muon's Newton-Schulz iterations."""
    if config.optimizer != "muon":
        return 0
    per_layer = sum(_newton_schulz_flops(matrix) for matrix in layer_matrices(shape))
    return NEWTON_SCHULZ_ITERATIONS * shape.n_layer * per_layer


def _newton_schulz_flops(matrix: Matrix) -> int:
    """Count one iteration for a matrix X of m x n, m <= n: X X^T, its square, their sum times X."""
    rows = matrix.outputs // matrix.stacked
    m = min(rows, matrix.inputs)
    n = max(rows, matrix.inputs)
    return matrix.stacked * (2 * m * m * n + 2 * m * m * m + 2 * m * m * n)


def _moved_bytes(config: BenchConfig, shape: GPTConfig, recompute: str, tokens: int) -> float:
    """Count the bytes that everything but the matrix products reads and writes in a step."""
    C = shape.n_embd
    layers = _layer_weights(shape)
    head = shape.padded_vocab_size * C
    parameters = layers + head + shape.block_size * C
    number = 4 if config.dtype == "float32" else 2  # bytes of an activation
    all_weights = config.lora_rank == 0
    micro_steps = config.gradient_accumulation_steps

    per_layer = MOVED_NUMBERS + MOVED_AGAIN[recompute]
    if shape.bias:
        per_layer += sum(m.outputs for m in layer_matrices(shape)) // C  # gradients of biases
    if not all_weights:
        per_layer += MOVED_BY_ADAPTERS
    embedding_and_head = 20 * C + 2 * shape.padded_vocab_size  # the loss reads and writes logits
    per_token: float = number * (shape.n_layer * per_layer * C + embedding_and_head)

    per_micro_batch = 0
    if all_weights:
        # The head's gradient is read and written for each chunk of rows.
        per_token += 8 * head / CHUNK_ROWS
        # The head's gradient is set to zero, scaled and added to the embedding's.
        per_micro_batch += 28 * head
        if number == 2:
            per_micro_batch += 12 * layers  # weights are cast to 16 bits, gradients back
        if micro_steps > 1:
            per_micro_batch += 12 * parameters  # gradients are added up

    per_update = UPDATE_BYTES[config.optimizer]
    trained = parameters if all_weights else trained_parameters(shape, config)
    return tokens * per_token + micro_steps * per_micro_batch + per_update * trained


# --------------------------------------------------------------------------------------------------
# Predicting


@dataclass(frozen=True)
class MemoryPrediction:
    """The predicted peak memory of a step."""

    batch_size: int
    recompute: Recompute
    gib: float
    memory_gib: dict[str, float]  # by kind


@dataclass(frozen=True)
class Prediction(MemoryPrediction):
    """The predicted memory and time of a step on a card."""

    tokens: int
    ms: float
    tokens_per_s: float
    floor_ms: float  # at the datasheet's full rate and bandwidth


def predict_memory(config: BenchConfig, recompute: Recompute) -> MemoryPrediction:
    """Predict the peak memory of a step."""
    compiled = config.compile is not False
    kinds = step_memory(model_shape(config, config.vocab_size), config, recompute, compiled)
    memory_gib = {kind: n / GIB for kind, n in kinds.items()}
    return MemoryPrediction(
        batch_size=int(config.batch_size),
        recompute=recompute,
        gib=sum(memory_gib.values()),
        memory_gib=memory_gib,
    )


def predict(config: BenchConfig, recompute: Recompute, card: Card) -> Prediction:
    """Predict memory and time of a compiled step on a card."""
    work = count_work(config, recompute)
    peak = card.tflops * 1e12
    if config.dtype == "float32":
        peak /= 2  # TF32
    products = work.flops / peak
    moves = work.bytes / (card.bandwidth_gbs * 1e9)
    softmax = work.softmax * SOFTMAX_FLOPS / (card.fp32_tflops * 1e12)
    is_geforce = card.tflops < 3 * card.fp32_tflops
    share = GEFORCE_PRODUCTS_SHARE if is_geforce else PRODUCTS_SHARE
    launches = work.layers * SECONDS_PER_LAYER
    seconds = products / share + moves / BANDWIDTH_SHARE + softmax + launches
    return Prediction(
        **vars(predict_memory(config, recompute)),
        tokens=work.tokens,
        ms=1e3 * seconds,
        tokens_per_s=work.tokens / seconds,
        floor_ms=1e3 * (products + moves),
    )


def largest_batch(config: BenchConfig, recompute: Recompute, room_gib: float) -> int:
    """Return the largest micro-batch whose predicted memory fits into room_gib; 0 if none does."""

    def needed_gib(batch_size: int) -> float:
        return predict_memory(replace(config, batch_size=batch_size), recompute).gib

    return bisect_right(range(1, LARGEST_BATCH + 1), room_gib, key=needed_gib)


@dataclass(frozen=True)
class Plan:
    """What a card could do with a model and a method."""

    name: str  # of the card
    card: Card
    room_gib: float  # memory for the step
    candidates: list[Prediction]  # several micro-batches for each kind of recomputation
    rows: list[Prediction]  # the largest micro-batch of each kind, which is its fastest

    @property
    def best(self) -> Prediction | None:
        """Return the fastest, None if nothing fits."""
        return max(self.rows, key=_tokens_per_s, default=None)


def _tokens_per_s(prediction: Prediction) -> float:
    return prediction.tokens_per_s


def make_plan(config: BenchConfig) -> Plan:
    """Predict which micro-batches fit the card that the configuration names, and how fast they are.

    Raises UserError if the card is unknown.
    """
    config = replace(config, card=_full_name(config.card))
    card = card_to_plan_for(config)
    room_gib = (config.vram_gb or card.vram_gb) - MARGIN_GIB
    if room_gib <= 0:
        raise UserError(f"vram_gb={config.vram_gb:g} must be more than {MARGIN_GIB:g}")
    candidates = []
    rows = []
    for recompute in kinds_of_recomputation(config):
        largest = largest_batch(config, recompute, room_gib)
        if largest == 0:
            continue
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < largest]
        for size in (*sizes, largest):
            candidates.append(predict(replace(config, batch_size=size), recompute, card))
        rows.append(candidates[-1])
    name = "this card" if config.peak_tflops is not None else config.card
    return Plan(name=name, card=card, room_gib=room_gib, candidates=candidates, rows=rows)


def kinds_of_recomputation(config: BenchConfig) -> tuple[Recompute, ...]:
    """Return the kinds to try: the one that was asked for, or all."""
    return RECOMPUTE if config.recompute == "auto" else (config.recompute,)
