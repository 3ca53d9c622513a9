"""Find settings with which a training step fits into the memory, by trying.

    ladder()      the settings to try: more is computed again, then micro-batches are smaller
    fit()         go down the ladder; ranks agree on the lowest of their rungs
    try_step()    do once what takes the most memory in a run, and change nothing

A GPU tries. A CPU compares an estimate with the free memory: the system would kill the run.
"""

from __future__ import annotations

import gc
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gpt12.device import Machine
from gpt12.distributed import least_of_ranks
from gpt12.errors import UserError, say
from gpt12.memory import available_memory, needed_memory, ran_out_of_memory
from gpt12.settings import TrainConfig
from model import GPT

# A micro-batch of so many tokens keeps a GPU busy. Recompute whole blocks before going below.
SMALL_MICRO_BATCH = 4096
ADVICE = (
    "end other programs that use it, or take a smaller model or --block_size, "
    "--optimizer=adamw8bit, or for fine-tuning --lora_rank=16"
)


def ladder(config: TrainConfig) -> list[TrainConfig]:
    """Return the settings to try, from those that were asked for to those that need the least.

    A step has the same tokens with all of them.
    """
    rungs = [config]
    if config.recompute == "none":
        rungs.append(replace(config, recompute="pointwise"))
    while (smaller := divided(rungs[-1])) is not None:
        if smaller.batch_size * smaller.block_size < SMALL_MICRO_BATCH:
            break
        rungs.append(smaller)
    if config.recompute != "block":
        rungs.append(replace(rungs[-1], recompute="block"))
    while (smaller := divided(rungs[-1])) is not None:
        rungs.append(smaller)
    return rungs


def divided(config: TrainConfig) -> TrainConfig | None:
    """Cut the micro-batch by its smallest prime factor. Return None for a single sequence."""
    for factor in range(2, config.batch_size + 1):
        if config.batch_size % factor == 0:
            return replace(
                config,
                batch_size=config.batch_size // factor,
                gradient_accumulation_steps=config.gradient_accumulation_steps * factor,
            )
    return None


def fit(
    config: TrainConfig,
    model: GPT,
    machine: Machine,
    make_step: Callable[[TrainConfig, Machine], Any],
    may_change: bool,
) -> TrainConfig:
    """Return the first settings of the ladder that fit on every rank.

    make_step: builds train.py's TrainStep.
    may_change: whether the settings may be others than those that were asked for.
    Raises UserError if none fit.
    """
    if machine.on_gpu:
        cap_memory(machine)

        def fits(rung: TrainConfig) -> bool:
            return fits_in_a_trial(rung, model, machine, make_step)
    elif machine.device.type == "cpu":
        free = available_memory(machine)

        def fits(rung: TrainConfig) -> bool:
            return needed_memory(model.config, rung, machine) <= free
    else:
        return config
    rungs = ladder(config) if may_change else [config]
    own = 0
    while own < len(rungs) and not fits(rungs[own]):
        own += 1
        if own < len(rungs):
            say(f"out of memory with {words(rungs[own - 1])}: trying {words(rungs[own])}")
    chosen = -int(least_of_ranks(-own, machine.device))
    if chosen == len(rungs):
        reason = "" if may_change else " (deterministic=True keeps a resumed run as it is)"
        raise UserError(f"out of memory with {words(rungs[-1])}{reason}: {ADVICE}")
    if chosen > own:
        say(f"another rank has less memory: {words(rungs[chosen])}")
    model.set_recompute(rungs[chosen].recompute)
    return rungs[chosen]


def words(config: TrainConfig) -> str:
    """Name the settings that the ladder changes."""
    return (
        f"recompute={config.recompute}, batch_size={config.batch_size}, "
        f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
    )


# --------------------------------------------------------------------------------------------------
# Trying on a GPU


def cap_memory(machine: Machine) -> None:
    """On Windows and WSL, let no more be allocated than is free now.

    The driver would not refuse more but move it into the computer's own memory, which is slow.
    """
    if sys.platform == "win32" or "microsoft" in platform.release().lower():
        free, total = torch.cuda.mem_get_info(machine.device)
        usable = free + torch.cuda.memory_reserved(machine.device)
        torch.cuda.set_per_process_memory_fraction(usable / total, machine.device)


def fits_in_a_trial(
    config: TrainConfig,
    model: GPT,
    machine: Machine,
    make_step: Callable[[TrainConfig, Machine], Any],
) -> bool:
    """Try the settings once and tell whether the memory sufficed.

    The weights and the random numbers are afterwards as before.
    """
    # Without other ranks nothing waits for them. DistributedDataParallel keeps all gradients as
    # long as it lives, as the second of two micro-batches finds them.
    micro_steps = 1 if config.gradient_accumulation_steps == 1 else 2
    alone = replace(machine, rank=0, world=1)
    small = replace(config, gradient_accumulation_steps=micro_steps)
    devices = [machine.device] if machine.on_gpu else []
    model.set_recompute(config.recompute)
    if machine.on_gpu:
        torch.cuda.reset_peak_memory_stats(machine.device)
    fitted = True
    try:
        with torch.random.fork_rng(devices):
            try_step(make_step(small, alone))
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        fitted = False
    # Not inside of `except`: there the error would still hold the tensors of the step.
    for parameter in model.parameters():
        parameter.grad = None
    if not fitted:
        gc.collect()
        torch.compiler.reset()
        if machine.on_gpu:
            torch.cuda.empty_cache()
    return fitted


def try_step(step: Any) -> None:
    """Make a step whose update is skipped, and evaluate a batch. step: a TrainStep."""
    allocate_state(step)
    batch_targets = None
    if step.example_starts is not None:
        # All positions but one are targets: no other number takes more memory.
        batch_targets = [step.x[0].numel() - 1] * step.micro_steps
    step.model.train()
    step.set_divisor(batch_targets)
    step.accumulate_gradients(batch_targets)
    step.loss.fill_(math.nan)
    step.update_weights()
    step.model.eval()
    tensors = [step.x[0], step.y[0]]
    if step.example_starts is not None:
        tensors.append(step.example_starts[0])
    with torch.no_grad(), step.machine.autocast():
        step.model(*[torch.cat([tensor, tensor]) for tensor in tensors], divisor=1.0)
    step.model.train()
    step.machine.synchronize()


@torch.no_grad()
def allocate_state(step: Any) -> None:
    """Let the optimizers make their state as in their first update, and keep the weights."""
    if step.on_device:  # an update can be skipped
        for parameter in step.parameters:
            parameter.grad = torch.zeros_like(parameter)
        one = torch.ones((), device=step.machine.device)
        step.step_optimizers([], divide_by=one, skip=one)
        step.clear_gradients()
        return
    for parameter in step.parameters:
        before = parameter.clone()
        parameter.grad = torch.zeros_like(parameter)
        for optimizer in step.optimizers:
            optimizer.step()  # passes over parameters without a gradient
        parameter.copy_(before)
        parameter.grad = None


def tenth_is_free(machine: Machine) -> bool:
    """Tell whether the last trial left a tenth of the memory free, which a CUDA graph may need."""
    if not machine.on_gpu:
        return False
    usable = available_memory(machine)
    return torch.cuda.max_memory_reserved(machine.device) <= 0.9 * usable
