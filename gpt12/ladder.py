"""Show what each technique gains: a plain float32 step, then one technique more at each rung.

The ladder adds only what a key or a torch flag can switch off. Four techniques are on every rung,
because model.py and train.py have no switch for them:
    the vocabulary padded to a multiple of 64       model.py, GPTConfig.padded_vocab_size
    a residual stream in 16 bits under autocast     model.py, Transformer.forward
    head and loss in chunks of rows                 gpt12/loss.py
    AdamW in one fused kernel, with clipping in it  train.py, AdamW
The loss's Triton kernel comes with torch.compile (gpt12/run.py, compile_model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gpt12.cuda_graph import use_graph_for_training
from gpt12.device import Machine
from gpt12.measure import OutOfMemory, StepResult, measure_step, try_to_measure
from gpt12.settings import BenchConfig
from gpt12.terminal import say

TF32 = "TF32"
AUTOCAST = "16-bit autocast"
COMPILE = "torch.compile"
FLASH = "flash attention"
CUDA_GRAPH = "CUDA graph"
RECOMPUTATION = "recomputation"

# The techniques in the order of the rungs, and the keys that switch each off. TF32 has no key: it
# is torch.backends.cuda.matmul.allow_tf32.
SWITCHED_OFF: Mapping[str, Mapping[str, Any]] = {
    TF32: {},
    AUTOCAST: {"dtype": "float32"},
    COMPILE: {"compile": False},
    FLASH: {"attention": "math"},
    CUDA_GRAPH: {"cuda_graph": False},
    RECOMPUTATION: {"recompute": "none"},
}
Row = StepResult | OutOfMemory


def climb_ladder(config: BenchConfig, machine: Machine) -> list[Row]:
    """Measure every rung. machine: as the configuration's "auto" settings choose it.

    If the lowest rung does not fit into memory, the micro-batch is halved for all until it does.
    """
    if config.recompute in ("auto", "none"):
        config = replace(config, recompute="pointwise")
    techniques = choose_techniques(config, machine)
    lowest = measure_rung(config, techniques, 0)
    while isinstance(lowest, OutOfMemory) and int(config.batch_size) > 1:
        config = replace(config, batch_size=int(config.batch_size) // 2)
        say(f"the lowest rung does not fit: trying a micro-batch of {config.batch_size} instead")
        lowest = measure_rung(config, techniques, 0)
    rows = [lowest]
    for used in range(1, len(techniques) + 1):
        rows.append(measure_rung(config, techniques, used))
    return rows


def choose_techniques(config: BenchConfig, machine: Machine) -> list[str]:
    """Return the techniques that change something here, and say which ones do not."""
    chosen = []
    left_out = []
    for name in SWITCHED_OFF:
        reason = why_left_out(name, config, machine)
        if reason is None:
            chosen.append(name)
        else:
            left_out.append(f"{name} ({reason})")
    if left_out:
        say(f"left out, because they change nothing here: {', '.join(left_out)}")
    return chosen


def why_left_out(name: str, config: BenchConfig, machine: Machine) -> str | None:
    """Return why a technique would change nothing, None if it changes something."""
    if name in (TF32, CUDA_GRAPH) and not machine.on_gpu:
        return "no GPU"
    if name == CUDA_GRAPH and not use_graph_for_training(config, config.n_layer, machine):
        return "not used for this step"
    if name == AUTOCAST and machine.dtype == torch.float32:
        return "float32"
    if name == COMPILE and not machine.compiled:
        return "off"
    if name == FLASH and config.attention == "math":
        return "attention=math"
    return None


def measure_rung(config: BenchConfig, techniques: Sequence[str], used: int) -> Row:
    """Measure a step with the first `used` of the techniques."""
    label = "fp32, eager" if used == 0 else f"+ {techniques[used - 1]}"
    for name in techniques[used:]:
        config = replace(config, **SWITCHED_OFF[name])
    tf32 = TF32 not in techniques[used:]
    return try_to_measure(label, config, partial(measure_step, tf32=tf32))
