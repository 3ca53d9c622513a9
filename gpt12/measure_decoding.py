"""Time generation as sample.py does it: reading a prompt, then one new token after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch

from gpt12.device import Machine
from gpt12.generate import Sampling, decode_bytes, generate, store_by_columns, stream
from gpt12.measure import forget_last_measurement
from gpt12.plan import card_of_machine
from gpt12.settings import BenchConfig, model_shape
from model import GPT

BATCH_SIZES = (1, 4, 16, 64)  # texts that are written at once
TEMPERATURE = 0.8
TOP_K = 200
PROMPT_RUNS = 4  # how often reading the prompt is timed
COMPILED_TOKENS = 2  # the first new tokens, which compile and record the decoding step


@dataclass(frozen=True)
class DecodingResult:
    """The measured speed of generation for a number of texts at once."""

    label: str
    batch: int  # texts
    prefill_ms: float  # to read the prompts and choose the first token
    prefill_tokens_per_s: float
    ms: float  # median time per new token of all texts
    tokens_per_s: float  # new tokens of all texts together
    # For a GPU whose datasheet is known: the speed if its memory delivers every weight once
    # per decoding step (one token of every text), and the share of that speed that was reached.
    bound_tokens_per_s: float | None = None
    bound_share: float | None = None


def prompt_length(config: BenchConfig) -> int:
    """Return the tokens of a prompt: a quarter of the context."""
    return max(1, config.block_size // 4)


def new_tokens(config: BenchConfig) -> int:
    """Return how many tokens are generated: as many as asked for, but not over the context."""
    return min(config.max_new_tokens, config.block_size - prompt_length(config))


def random_prompts(config: BenchConfig, batch: int) -> torch.Tensor:
    """Return random token ids, (batch, prompt_length)."""
    return torch.randint(config.vocab_size, (batch, prompt_length(config)))


def measure_decoding(config: BenchConfig, machine: Machine, batch: int) -> DecodingResult:
    """Time the generation of `batch` texts with random weights."""
    forget_last_measurement()
    model = build_model(config, machine)
    prompts = random_prompts(config, batch).tolist()
    sampling = Sampling(TEMPERATURE, top_k=TOP_K)
    prefill = []
    for _ in range(PROMPT_RUNS):
        began = time.perf_counter()
        generate(model, prompts, 1, sampling=sampling)
        prefill.append(time.perf_counter() - began)
    arrivals = []
    # stream() computes the next token before it yields one. So on a CPU the last token, after which
    # there is nothing to compute, comes at once: make one more than is timed.
    count = new_tokens(config)
    for _ in stream(model, prompts, count + 1, sampling):
        arrivals.append(time.perf_counter())
    result = decoding_result(config, f"batch {batch}", batch, median(prefill), arrivals[:count])
    return with_bound(result, config, machine, decode_bytes(model))


def build_model(config: BenchConfig, machine: Machine) -> GPT:
    """Return a model with random weights in the form in which sample.py uses it."""
    with machine.device:
        model = GPT(model_shape(config, config.vocab_size)).eval()
    model.to(machine.dtype)
    if not machine.on_gpu:
        store_by_columns(model)
    return model


def decoding_result(
    config: BenchConfig, label: str, batch: int, prefill_s: float, arrivals: Sequence[float]
) -> DecodingResult:
    """Return the speeds. arrivals: when each new token of all texts was there, in seconds."""
    first = min(COMPILED_TOKENS, len(arrivals) - 2)
    gap = median(after - before for before, after in pairwise(arrivals[first:]))
    return DecodingResult(
        label=label,
        batch=batch,
        prefill_ms=1e3 * prefill_s,
        prefill_tokens_per_s=batch * prompt_length(config) / prefill_s,
        ms=1e3 * gap,
        tokens_per_s=batch / gap,
    )


def with_bound(
    result: DecodingResult, config: BenchConfig, machine: Machine, weight_bytes: int
) -> DecodingResult:
    """Add what the memory's bandwidth allows, if the card is known.

    weight_bytes: what one decoding step has to read.
    """
    card = card_of_machine(config, machine)
    if card is None:
        return result
    bound = result.batch * card.bandwidth_gbs * 1e9 / weight_bytes
    return replace(result, bound_tokens_per_s=bound, bound_share=result.tokens_per_s / bound)
