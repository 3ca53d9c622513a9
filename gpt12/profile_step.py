"""Find the kernels on which a training step spends its time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.profiler import profile

from gpt12.device import Machine
from gpt12.measure import step_runner
from gpt12.settings import BenchConfig

TRACE = Path("trace.json")
STEPS = 3
WARMUP_STEPS = 2  # beyond those in which the step is compiled
KERNELS = 10  # how many of the slowest are listed
# Matrix products, with the position of the first factor among an operation's inputs.
PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::baddbmm": 1,
}


@dataclass(frozen=True)
class Kernel:
    """One kernel's share of a step."""

    kernel: str
    ms: float  # per step
    share: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes."""

    kernels: list[Kernel]  # the slowest, in order
    total_ms: float  # of all kernels of a step
    products_ms: float  # of matrix products
    products_tflops: float  # their rate


def profile_step(config: BenchConfig, machine: Machine) -> Profile:
    """Profile a few steps and write trace.json. Without a CUDA graph, which hides its kernels."""
    with step_runner(replace(config, cuda_graph=False)) as runner:
        for _ in range(runner.step.warmup_calls + WARMUP_STEPS):
            runner()
        machine.synchronize()
        with profile(record_shapes=True, acc_events=True) as profiler:
            for _ in range(STEPS):
                runner()
            machine.synchronize()
    profiler.export_chrome_trace(str(TRACE))
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    by_shape = profiler.key_averages(group_by_input_shape=True)
    products = [event for event in by_shape if event.key in PRODUCTS]
    return _summarize(events, products, "CUDA" if machine.on_gpu else "CPU")


def _summarize(events: list[Any], products: list[Any], device: str) -> Profile:
    """events: the profiler's, by kernel. products: matrix products, by kernel and shape.

    device: the one whose time counts.
    """
    own_ms = {e.key: _own_us(e, device) / 1e3 / STEPS for e in events if _is_on(e, device)}
    total_ms = sum(own_ms.values())
    slowest = sorted(own_ms, key=own_ms.__getitem__, reverse=True)[:KERNELS]
    kernels = [Kernel(name, own_ms[name], own_ms[name] / total_ms) for name in slowest]
    products_ms = sum(_total_us(e, device) for e in products) / 1e3 / STEPS
    flops = sum(e.count * _product_flops(e) for e in products) / STEPS
    return Profile(kernels, total_ms, products_ms, products_tflops=flops / products_ms / 1e9)


def _product_flops(event: Any) -> int:
    """Return the operations of one product (..., n, k) @ (..., k, m).

    The profiler's own count leaves out products that write into a given tensor.
    """
    first = PRODUCTS[event.key]
    a, b = event.input_shapes[first : first + 2]
    return 2 * math.prod(a) * b[-1]


def _is_on(event: Any, device: str) -> bool:
    return event.device_type.name == device


def _own_us(event: Any, device: str) -> float:
    """Return the microseconds of a kernel without those of the operations that it calls."""
    return event.self_device_time_total if device == "CUDA" else event.self_cpu_time_total


def _total_us(event: Any, device: str) -> float:
    return event.device_time_total if device == "CUDA" else event.cpu_time_total
