"""Time the same work with transformers' GPT2LMHeadModel, as its users write it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from gpt12.bench_request import BenchRequest
from gpt12.device import Machine
from gpt12.measure import (
    Measurement,
    OutOfMemory,
    forget_last_measurement,
    measure_step,
    open_windows,
    time_calls,
    try_to_measure,
)
from gpt12.measure_decoding import (
    TEMPERATURE,
    TOP_K,
    DecodingResult,
    decoding_result,
    new_tokens,
    random_prompts,
    with_bound,
)
from gpt12.settings import BenchConfig
from gpt12.terminal import say

WARMUP_STEPS = 5
ROUNDS = 2  # how often each side is measured, in turns

# --------------------------------------------------------------------------------------------------
# The same work


def match_settings(config: BenchConfig, request: BenchRequest) -> BenchConfig:
    """Return the configuration with what transformers has, and say what still differs.

    What the user asked for stays. An optimizer that is set in a config file was not asked for: a
    preset has the one that it trains best with.
    """
    trains = "compare" in request.measurements
    if trains and config.optimizer != "adamw" and "optimizer" not in request.typed:
        say(f"optimizer=adamw in place of {config.optimizer}, because transformers uses it here")
        config = replace(config, optimizer="adamw")
    if "bias" not in request.given:
        config = replace(config, bias=True)
    for difference in _differences(config, trains):
        say(f"not the same work: {difference}")
    return config


def _differences(config: BenchConfig, trains: bool) -> list[str]:
    found = []
    if not config.bias:
        found.append("transformers has biases, this run has none")
    if trains and config.optimizer != "adamw":
        found.append(f"transformers uses AdamW, this run {config.optimizer}")
    if trains and config.lora_rank:
        found.append("transformers trains all weights, this run only LoRA's")
    return found


def build_model(config: BenchConfig, use_cache: bool) -> Any:
    """Return transformers' model of the same shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        use_cache=use_cache,
        bos_token_id=None,
        eos_token_id=None,  # so that no text ends early
    )
    return GPT2LMHeadModel(shape)


# --------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Comparison:
    """Measured steps of both sides, in turns."""

    rows: list[Measurement | OutOfMemory]
    ratios: dict[str, float]  # for each other program: how many times as fast gpt12 is


def compare_training(config: BenchConfig, machine: Machine) -> Comparison:
    """Time a training step of ours, of theirs, of ours, of theirs, all on random tokens.

    In turns, because a change of the machine's speed then affects both.
    """
    config, _, _ = open_windows(config)  # for the data set's vocabulary
    config = replace(config, real_data=False)
    sides: dict[str, Callable[[BenchConfig], Measurement]] = {
        "gpt12": measure_step,
        "transformers, eager": partial(measure_their_step, machine=machine, compiled=False),
    }
    if machine.compiled:
        compiled = partial(measure_their_step, machine=machine, compiled=True)
        sides["transformers, compiled"] = compiled
    rows = []
    for _ in range(ROUNDS):
        for name, measure in sides.items():
            rows.append(try_to_measure(name, config, measure))
    return Comparison(rows, speed_ratios(rows))


def speed_ratios(rows: list[Measurement | OutOfMemory]) -> dict[str, float]:
    """Return how many times as fast gpt12 is as each other program that fitted into memory."""
    speeds: dict[str, list[float]] = {}
    for row in rows:
        if isinstance(row, Measurement):
            speeds.setdefault(row.label, []).append(row.tokens_per_s)
    ours = speeds.pop("gpt12", [])
    if not ours:
        return {}
    return {name: median(ours) / median(theirs) for name, theirs in speeds.items()}


def measure_their_step(config: BenchConfig, machine: Machine, compiled: bool) -> Measurement:
    """Time a training step of transformers: autocast, clipping, torch's fused AdamW."""
    forget_last_measurement()
    model = build_model(config, use_cache=False).to(machine.device).train()
    forward = torch.compile(model) if compiled else model
    optimizer = _their_optimizer(model, config)
    shape = (int(config.batch_size), config.block_size)
    x = torch.randint(config.vocab_size, shape, device=machine.device)
    micro_steps = config.gradient_accumulation_steps
    autocast = machine.dtype != torch.float32

    def step() -> None:
        for _ in range(micro_steps):
            with torch.autocast(machine.device.type, machine.dtype, enabled=autocast):
                loss = forward(x, labels=x).loss / micro_steps
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    measured = time_calls(
        step, machine, warmup=WARMUP_STEPS, count=config.steps, tokens=micro_steps * x.numel()
    )
    if compiled:
        torch.compiler.reset()
    return measured


def _their_optimizer(model: nn.Module, config: BenchConfig) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


# --------------------------------------------------------------------------------------------------
# Generation


class TheirGeneration:
    """Generates text with transformers, as measure_decoding.py does with ours."""

    def __init__(self, config: BenchConfig, machine: Machine):
        self.config = config
        self.machine = machine
        self.model = build_model(config, use_cache=True).to(machine.device, machine.dtype).eval()
        # transformers' own default is a cache that grows. A static one needs a GPU to pay off.
        self.caches = ["dynamic", "static"] if machine.on_gpu else ["dynamic"]

    def measure(self, batch: int) -> list[DecodingResult]:
        """Time the generation of `batch` texts with each kind of cache."""
        prompts = random_prompts(self.config, batch).to(self.machine.device)
        results = []
        for cache in self.caches:
            self._generate(prompts, cache)  # warm-up; a static cache compiles here
            began, *arrivals = self._generate(prompts, cache)
            prefill_s = arrivals[0] - began
            label = f"transformers, {cache} cache"
            result = decoding_result(self.config, label, batch, prefill_s, arrivals)
            results.append(with_bound(result, self.config, self.machine, self._weight_bytes()))
        return results

    def _generate(self, prompts: torch.Tensor, cache: str) -> list[float]:
        """Generate and return the time of the beginning and that of each new token."""
        clock = ArrivalTimes()
        self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens(self.config),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            cache_implementation="static" if cache == "static" else None,
            streamer=clock,
        )
        return clock.times

    def _weight_bytes(self) -> int:
        """Return the bytes of weights that a decoding step reads."""
        total = 0
        for module in (self.model.transformer.h, self.model.lm_head):
            for parameter in module.parameters():
                total += parameter.numel() * parameter.element_size()
        return total


class ArrivalTimes:
    """A streamer for transformers' generate that notes when tokens arrive.

    The first call of put() brings the prompt.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Note the present time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end of the texts."""
