"""Record GPU work as a CUDA graph and replay it.

A step of a small model is hundreds of kernels of a few microseconds. Launching them one by one
takes the host longer than the GPU needs to run them; a graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpt12.device import Machine
from gpt12.optimizer import OPTIMIZERS
from gpt12.settings import TrainConfig

# Recording a step of more layers than this, over all micro-batches, would make a graph of over
# 50,000 kernels.
MAX_LAYERS = 1000


def record(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Record `work` without running it.

    It must have run before, so that nothing is compiled or allocated for the first time. It may not
    ask the GPU for a value. Replaying reads and writes the same tensors, and draws new random
    numbers.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def use_graph_for_training(config: TrainConfig, n_layer: int, machine: Machine) -> bool:
    """Decide whether the training step is recorded.

    Not possible with several ranks, with float16 (its loss scale lives on the host), with an
    optimizer that asks the device for values, and with recomputation under dropout (torch then asks
    the host for the generator's state).
    """
    if not machine.on_gpu or machine.world > 1 or machine.dtype == torch.float16:
        return False
    if not OPTIMIZERS[config.optimizer].recordable:
        return False
    if config.recompute != "none" and config.dropout > 0:
        return False
    return config.gradient_accumulation_steps * n_layer <= MAX_LAYERS
