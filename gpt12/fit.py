"""Find settings with which a training step fits into the memory, by trying.

    list_attempts()   the settings to try: more is computed again, then micro-batches are smaller
    fit()             take the first attempt that fits; ranks agree on the latest of theirs
    try_step()        do once what takes the most memory in a run, and change nothing

A GPU tries. A CPU compares an estimate with the free memory: the system would kill the run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gpt12.device import Machine, available_memory, cap_memory
from gpt12.distributed import least_of_ranks
from gpt12.errors import UserError, ran_out_of_memory, say
from gpt12.memory import step_memory
from gpt12.run import Run
from gpt12.settings import TrainConfig

# A micro-batch of this many tokens keeps a GPU busy. Whole blocks are recomputed before it gets
# smaller.
SMALL_MICRO_BATCH = 4096
ADVICE = (
    "end other programs that use it, or take a smaller model or --block_size, "
    "--optimizer=adamw8bit, or for fine-tuning --lora_rank=16"
)


def list_attempts(config: TrainConfig) -> list[TrainConfig]:
    """Return the settings to try, from those that were asked for to those that need the least.

    A step has the same tokens with all of them.
    """
    attempts = [config]
    if config.recompute == "none":
        attempts.append(replace(config, recompute="pointwise"))
    while True:
        attempt = attempts[-1]
        smaller = divided(attempt)
        is_small = smaller is None or smaller.batch_size * smaller.block_size < SMALL_MICRO_BATCH
        if is_small and attempt.recompute != "block":
            attempts.append(replace(attempt, recompute="block"))
        elif smaller is not None:
            attempts.append(smaller)
        else:
            return attempts


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


def fit(run: Run, make_step: Callable[..., Any]) -> Run:
    """Return the run with the first attempt that fits on every rank.

    make_step: train.py's TrainStep.
    Raises UserError if none fit.
    """
    machine = run.machine
    if machine.on_gpu:
        cap_memory(machine)
    keep = run.request.resumed and run.config.deterministic
    attempts = [run.config] if keep else list_attempts(run.config)
    own = 0
    while own < len(attempts) and not fits(attempts[own], run, make_step):
        own += 1
        if own < len(attempts):
            say(f"out of memory with {words(attempts[own - 1])}: trying {words(attempts[own])}")
    chosen = -int(least_of_ranks(-own, machine.device))
    if chosen == len(attempts):
        reason = " (deterministic=True keeps a resumed run as it is)" if keep else ""
        raise UserError(f"out of memory with {words(attempts[-1])}{reason}: {ADVICE}")
    if chosen > own:
        say(f"another rank has less memory: {words(attempts[chosen])}")
    run.model.set_recompute(attempts[chosen].recompute)
    return replace(run, config=attempts[chosen])


def fits(config: TrainConfig, run: Run, make_step: Callable[..., Any]) -> bool:
    """Tell whether a step with these settings fits into the memory."""
    if run.machine.on_gpu:
        return fits_in_a_trial(config, run, make_step)
    if run.machine.device.type == "cpu":
        needed = step_memory(run.model.config, config, run.machine)
        return needed <= available_memory(run.machine)
    return True  # there is no estimate for a Mac's GPU


def words(config: TrainConfig) -> str:
    """Name the settings that differ between attempts."""
    return (
        f"recompute={config.recompute}, batch_size={config.batch_size}, "
        f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
    )


# --------------------------------------------------------------------------------------------------
# Trying on a GPU


def fits_in_a_trial(config: TrainConfig, run: Run, make_step: Callable[..., Any]) -> bool:
    """Try the settings once and tell whether the memory sufficed.

    The weights and the random numbers are afterwards as before.
    """
    # The trial runs as a single rank, so that it waits for no other. Its second micro-batch finds
    # the gradients of the first in memory, as DistributedDataParallel always keeps all gradients.
    micro_steps = min(2, config.gradient_accumulation_steps)
    alone = replace(run.machine, rank=0, world=1)
    small = replace(config, gradient_accumulation_steps=micro_steps)
    device = run.machine.device
    run.model.set_recompute(config.recompute)
    torch.cuda.reset_peak_memory_stats(device)
    fitted = True
    try:
        with torch.random.fork_rng([device]):
            try_step(make_step(run.model, small, alone, run.packed, cuda_graph=False))
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        fitted = False
    # Not inside of `except`: there the error would still hold the tensors of the step.
    run.model.zero_grad()
    if not fitted:
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return fitted


def try_step(step: Any) -> None:
    """Make the optimizers' state, then a step, and evaluate a batch. step: a TrainStep.

    With a rate of 0 no update changes the weights.
    """
    step.make_states()
    if step.example_starts is not None:
        # A window can have this many targets. More targets take more memory.
        step.targets_per_batch = [step.x[0].numel() - 1] * step.micro_steps
    step.model.train()
    step(0.0)
    step.model.eval()
    arrays = step.batch[:, 0]
    with torch.no_grad(), step.machine.autocast():
        step.model(*[torch.cat([array, array]) for array in arrays], divisor=1.0)
    step.model.train()
    step.machine.synchronize()


def tenth_is_free(machine: Machine) -> bool:
    """Tell whether the last trial left a tenth of the memory free, which a CUDA graph may need."""
    if not machine.on_gpu:
        return False
    usable = available_memory(machine)
    return torch.cuda.max_memory_reserved(machine.device) <= 0.9 * usable
