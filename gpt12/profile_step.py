"""Find the kernels on which a training step spends its time."""

from __future__ import annotations

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
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


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
        with profile(record_shapes=True, with_flops=True, acc_events=True) as profiler:
            for _ in range(STEPS):
                runner()
            machine.synchronize()
    profiler.export_chrome_trace(str(TRACE))
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    return _summarize(events, "CUDA" if machine.on_gpu else "CPU")


def _summarize(events: list[Any], device: str) -> Profile:
    """events: the profiler's, averaged by kernel. device: the one whose time counts."""
    own_ms = {e.key: _own_us(e, device) / 1e3 / STEPS for e in events if _is_on(e, device)}
    total_ms = sum(own_ms.values())
    slowest = sorted(own_ms, key=own_ms.__getitem__, reverse=True)[:KERNELS]
    kernels = [Kernel(name, own_ms[name], own_ms[name] / total_ms) for name in slowest]
    products = [e for e in events if e.key in PRODUCTS]
    products_ms = sum(_total_us(e, device) for e in products) / 1e3 / STEPS
    flops = sum(e.flops for e in products) / STEPS
    return Profile(kernels, total_ms, products_ms, products_tflops=flops / products_ms / 1e9)


def _is_on(event: Any, device: str) -> bool:
    return event.device_type.name == device


def _own_us(event: Any, device: str) -> float:
    """Return the microseconds of a kernel without those of the operations that it calls."""
    return event.self_device_time_total if device == "CUDA" else event.self_cpu_time_total


def _total_us(event: Any, device: str) -> float:
    return event.device_time_total if device == "CUDA" else event.cpu_time_total
