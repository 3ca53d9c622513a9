"""The machine a program runs on: what `auto` becomes for device, dtype and compile, and why."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from gpt12.errors import UserError


class Card(NamedTuple):
    """A GPU by its datasheet."""

    tflops: float  # dense bf16 on the tensor cores with fp32 accumulation: without sparsity, without fp16 accumulation
    bandwidth_gbs: float  # of its memory, GB/s
    vram_gb: float
    fp32_tflops: float  # beside the tensor cores


# By the exact name that the driver gives: a card that is not here has no MFU rather than a wrong one.
CARDS = {
    # NVIDIA Ampere GA102 architecture whitepaper v2.1, tables 2, 9 and appendix A (3090 Ti, 3060: their product pages)
    "NVIDIA GeForce RTX 3060": Card(25.5, 360, 12, 12.7),
    "NVIDIA GeForce RTX 3070": Card(40.6, 448, 8, 20.3),
    "NVIDIA GeForce RTX 3080": Card(59.5, 760, 10, 29.8),
    "NVIDIA GeForce RTX 3090": Card(71.0, 936, 24, 35.6),
    "NVIDIA GeForce RTX 3090 Ti": Card(80.0, 1008, 24, 40.0),
    # NVIDIA Ada GPU architecture whitepaper v2.1, appendix A and B (4060, 4060 Ti, SUPER: their product pages)
    "NVIDIA GeForce RTX 4060": Card(30.2, 272, 8, 15.1),
    "NVIDIA GeForce RTX 4060 Ti": Card(44.1, 288, 16, 22.1),
    "NVIDIA GeForce RTX 4070": Card(58.3, 504, 12, 29.1),
    "NVIDIA GeForce RTX 4070 SUPER": Card(71.0, 504, 12, 35.5),
    "NVIDIA GeForce RTX 4070 Ti": Card(80.2, 504, 12, 40.1),
    "NVIDIA GeForce RTX 4070 Ti SUPER": Card(88.2, 672, 16, 44.1),
    "NVIDIA GeForce RTX 4080": Card(97.5, 717, 16, 48.7),
    "NVIDIA GeForce RTX 4080 SUPER": Card(104.4, 736, 16, 52.2),
    "NVIDIA GeForce RTX 4090": Card(165.2, 1008, 24, 82.6),
    # NVIDIA RTX Blackwell GPU architecture whitepaper v1.1, appendix A to C
    "NVIDIA GeForce RTX 5070": Card(61.7, 672, 12, 30.9),
    "NVIDIA GeForce RTX 5070 Ti": Card(87.9, 896, 16, 43.9),
    "NVIDIA GeForce RTX 5080": Card(112.6, 960, 16, 56.3),
    "NVIDIA GeForce RTX 5090": Card(209.5, 1792, 32, 104.8),
    # Datasheets of the L4, L40S, A100, H100 and H200 (half of what they print with sparsity)
    "NVIDIA L4": Card(121.0, 300, 24, 30.3),
    "NVIDIA L40S": Card(362.0, 864, 48, 91.6),
    "NVIDIA A100-SXM4-40GB": Card(312.0, 1555, 40, 19.5),
    "NVIDIA A100-SXM4-80GB": Card(312.0, 2039, 80, 19.5),
    "NVIDIA A100 80GB PCIe": Card(312.0, 1935, 80, 19.5),
    "NVIDIA H100 PCIe": Card(756.0, 2039, 80, 51.0),
    "NVIDIA H100 80GB HBM3": Card(989.4, 3352, 80, 66.9),
    "NVIDIA H200": Card(989.4, 4800, 141, 66.9),
}


@dataclass
class Machine:
    """Where and how a run computes: what `auto` became, and why."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    rank: int = 0
    world: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else f"{os.cpu_count()} CPU cores"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Products in self.dtype over fp32 master weights (Micikevicius et al. 2017, arXiv:1710.03740, section 3)."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # Weights change between steps, so a cache of their casts could only serve within one forward: no use here.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()


def torchrun_ranks() -> tuple[int, int, int]:
    """This process's rank, how many there are, and its rank on this machine, as torchrun sets them."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return rank, world, local


def join_ranks(config: Any) -> None:
    """Join the ranks that torchrun started, if it did: they choose dtype=auto together in open_machine, which follows."""
    _, world, local = torchrun_ranks()
    if world == 1:
        return
    gpu = torch.cuda.is_available() and config.device != "cpu"
    if gpu:  # before the first collective, which else has to guess
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group(config.backend if gpu else "gloo")


def open_machine(config: Any, layer: nn.Module | None = None, long: bool = True) -> Machine:
    """Resolve device, dtype and compile. Raises UserError for what was asked for and is not there.

    layer: a module (B, T, C) -> (B, T, C) of the model that is trained, if one is; on a CPU, dtype=auto is the dtype in
        which it runs faster.
    long: whether there is enough to do for compiling to pay; if not, compile=auto is off.
    """
    rank, world, local = torchrun_ranks()
    notes: list[str] = []
    kind = choose_device(config.device, notes)
    device = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)  # cuda:0 unless torchrun says else
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device={device}: this machine has {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if getattr(config, "deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return Machine(
        device,
        choose_dtype(config.dtype, device, layer, notes),
        choose_compile(config.compile, device, long, notes),
        rank,
        world,
        notes,
    )


def choose_device(asked: str, notes: list[str]) -> str:
    available = torch.cuda.is_available()
    if asked == "auto":
        kind = "cuda" if available else "mps" if torch.backends.mps.is_available() else "cpu"
        if kind == "cpu" and (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
            notes.append(f"device: cpu, although there is an NVIDIA card. {_why_no_cuda()}")
        else:
            notes.append(f"device: {kind}" + (f" ({torch.cuda.get_device_name()})" if available else ""))
        return kind
    if asked.startswith("cuda") and not available:
        raise UserError(f"device={asked}, but torch sees no usable GPU. {_why_no_cuda()}. Or pass --device=cpu")
    if asked == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            f"device={asked}, but this torch has no MPS, which needs a Mac with an Apple GPU. Or pass --device=cpu"
        )
    try:
        torch.empty(1, device=asked if asked != "cuda" else "cuda:0")
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device={asked} cannot be used: {str(e).splitlines()[0]}") from None
    return asked


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            "This torch was built without CUDA: pip install --force-reinstall torch --index-url "
            "https://download.pytorch.org/whl/cu126"
        )
    return (
        f"This torch needs a driver for CUDA {torch.version.cuda} (nvidia-smi shows yours): update the driver, or "
        "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
    )


def choose_dtype(asked: str, device: torch.device, layer: nn.Module | None, notes: list[str]) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    training = layer is not None  # else the weights themselves are brought to this precision
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            notes.append(f"dtype: bfloat16{' autocast over fp32 weights' if training else ''}")
            return torch.bfloat16
        notes.append(f"dtype: float16{' with loss scaling' if training else ''}, because this GPU has no bfloat16")
        return torch.float16
    if device.type == "cpu" and layer is not None:
        both = (torch.float32, torch.bfloat16)
        seconds: dict[torch.dtype, float] = {}
        for dtype in both * 3:  # in turns, so that what else the machine does meets both
            seconds[dtype] = min(_time_layer(layer, dtype), seconds.get(dtype, 1e9))
        if dist.is_initialized():  # one precision for all ranks: the first one's clock decides
            shared = [seconds]
            dist.broadcast_object_list(shared, 0)
            [seconds] = shared
        # A tenth and more: nothing less is worth the lost digits, and a noisy clock shall not decide.
        best = torch.bfloat16 if seconds[torch.bfloat16] < 0.9 * seconds[torch.float32] else torch.float32
        figures = ", ".join(f"{str(d).removeprefix('torch.')} {1e3 * s:.1f} ms" for d, s in seconds.items())
        why = (
            "which measured best here"
            if best == min(both, key=seconds.__getitem__)
            else "since bfloat16 gains too little"
        )
        notes.append(f"dtype: {str(best).removeprefix('torch.')}, {why} ({figures} a layer)")
        return best
    return torch.float32


def _time_layer(layer: nn.Module, dtype: torch.dtype) -> float:
    """Seconds of one forward and backward pass on the CPU; leaves random numbers alone."""
    width = next(layer.parameters()).shape[0]
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(2, 128, width, requires_grad=True)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = layer(x).float().sum()
        loss.backward()
        elapsed = time.perf_counter() - start
    for p in layer.parameters():
        p.grad = None
    return elapsed


def choose_compile(asked: Any, device: torch.device, long: bool, notes: list[str]) -> bool:
    if asked == "auto" and (device.type != "cuda" or not long):
        where = "on a CPU" if device.type != "cuda" else "for this little work"
        notes.append(f"compile: off, because {where} compiling takes longer than it saves")
        return False
    if asked is False:
        return False
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as e:  # whatever the compiler's stack raises: no C++ compiler, no Triton, an unknown GPU
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if asked is True:
            raise UserError(f"compile=True, but torch.compile fails here: {reason}. Pass --compile=False") from None
        notes.append(f"compile: off, because torch.compile fails here: {reason}")
        return False
    return True
