"""The machine a run uses: what "auto" becomes for device, dtype and compile, and why.

Also what makes its work faster (compile_model, record), and how much memory it has.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt12.distributed import least_of_ranks, torchrun_ranks
from gpt12.errors import UserError, one_line
from model import GPT

CUDA_WHEELS = "https://download.pytorch.org/whl/cu126"
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"  # torch's environment variable


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    compiled: bool  # whether torch.compile is used
    rank: int = 0
    world: int = 1  # number of processes
    notes: list[str] = field(default_factory=list)  # what "auto" became and why, one line each

    @property
    def on_gpu(self) -> bool:
        """Tell whether the device is an NVIDIA (or ROCm) GPU."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """Return the GPU's name as its driver reports it, or the number of CPU cores."""
        if self.on_gpu:
            return torch.cuda.get_device_name(self.device)
        return f"{os.cpu_count()} CPU cores"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Run matrix products in self.dtype while weights stay float32 (mixed precision).

        Micikevicius et al. 2017, arXiv:1710.03740, section 3.
        """
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # Autocast's cache would keep the cast weights of one forward pass, where each weight is
        # used once.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def open_machine(
    device: str,
    dtype: str,
    compile: bool | str,  # noqa: A002 (the configuration's key)
    long: bool = True,
    deterministic: bool = False,
) -> Machine:
    """Choose device, dtype and compile where they are "auto", and prepare torch for them.

    long: whether there is enough work for compiling to pay off.
    Raises UserError if something was asked for that this machine does not have.
    """
    ranks = torchrun_ranks()
    notes: list[str] = []
    if device == "auto":
        device = _best_device(notes)
    place = torch.device("cuda", ranks.local) if device == "cuda" else torch.device(device)
    _check_device(device, place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = True
        # torch would start a pool of compiling processes, one a core, and wait at the end of the
        # program until they have all started. The few GPU kernels here compile as fast without it.
        # A CPU's kernels go through a C++ compiler, which takes longer: there the pool stays.
        os.environ.setdefault(COMPILE_THREADS, "1")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return Machine(
        device=place,
        dtype=_best_dtype(place, notes) if dtype == "auto" else getattr(torch, dtype),
        compiled=_choose_compile(compile, place, long, notes),
        rank=ranks.rank,
        world=ranks.world,
        notes=notes,
    )


def _best_device(notes: list[str]) -> str:
    if torch.cuda.is_available():
        notes.append(f"device: cuda ({torch.cuda.get_device_name()})")
        return "cuda"
    if torch.backends.mps.is_available():
        notes.append("device: mps")
        return "mps"
    reason = ""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        reason = f", although there is an NVIDIA card. {_why_no_cuda()}"
    notes.append(f"device: cpu{reason}")
    return "cpu"


def _check_device(asked: str, place: torch.device) -> None:
    """Raise UserError if the device cannot hold a tensor."""
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)
        if place.type == "cuda" and not torch.cuda.is_available():
            reason = _why_no_cuda()
        raise UserError(f"device={asked} cannot be used: {reason}. Or pass --device=cpu") from None


def _why_no_cuda() -> str:
    """Say why torch cannot use an NVIDIA card, and the line that fixes it."""
    reinstall = f"pip install --force-reinstall torch --index-url {CUDA_WHEELS}"
    if torch.version.cuda is None:
        return f"This torch was built without CUDA: {reinstall}"
    return (
        f"This torch needs a driver for CUDA {torch.version.cuda} (nvidia-smi shows yours): "
        f"update the driver, or {reinstall}"
    )


def _best_dtype(device: torch.device, notes: list[str]) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        notes.append("dtype: bfloat16")
        return torch.bfloat16
    notes.append("dtype: float16, because this GPU has no bfloat16")
    return torch.float16


def _choose_compile(asked: bool | str, device: torch.device, long: bool, notes: list[str]) -> bool:
    if asked is False:
        return False
    if asked == "auto" and device.type != "cuda":
        reason = "on this device compiling takes longer than it saves"
    elif asked == "auto" and not long:
        reason = "for so little work it takes longer than it saves"
    else:
        reason = _try_compiler(device)
    if reason and asked is True:
        raise UserError(f"compile=True, but {reason}. Pass --compile=False")
    if reason:
        notes.append(f"compile: off, because {reason}")
    return not reason


def _try_compiler(device: torch.device) -> str:
    """Compile a small function. If that fails, return the reason in one line."""
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, an unknown GPU: any library may raise
        return f"torch.compile fails here: {one_line(error)}"
    return ""


def compile_model(model: GPT) -> None:
    """Compile the layers in place, and use the loss's Triton kernel.

    Equal layers are compiled once, so this takes a fraction of the time of compiling the whole
    model.
    """
    # torch warns of in-place operations under selective checkpointing; a layer has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    layers: list[nn.Module] = [*model.transformer.h, model.transformer.ln_f]
    for layer in layers:
        layer.compile(dynamic=False)
    model.fused_loss = model.lm_head.weight.is_cuda


def record(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Record a GPU's work as a CUDA graph without running it.

    A step of a small model is hundreds of kernels of a few microseconds. Launching them one by one
    takes the host longer than the GPU needs to run them; a graph launches all of them at once.

    The work must have run before, so that nothing is compiled or allocated for the first time. It
    may not ask the GPU for a value. Replaying reads and writes the same tensors, and draws new
    random numbers.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


# --------------------------------------------------------------------------------------------------
# Memory of the machine

ROOT = Path("/")  # of the files in which Linux tells how much memory there is


def cap_memory(machine: Machine) -> None:
    """On Windows and WSL, let no more be allocated than is free now.

    The driver would not refuse more but move it into the computer's own memory, which is slow.
    """
    if sys.platform == "win32" or "microsoft" in platform.release().lower():
        free, total = torch.cuda.mem_get_info(machine.device)
        usable = free + torch.cuda.memory_reserved(machine.device)
        torch.cuda.set_per_process_memory_fraction(usable / total, machine.device)


def available_memory(machine: Machine) -> float:
    """Return the bytes that a process may use, including what it already holds.

    On a GPU its own memory, on a CPU the RAM, or less if a container limits it. Infinity where the
    system does not tell. With several ranks it is the least of theirs, so that all decide the same.
    """
    return least_of_ranks(_own_memory(machine), machine.device)


def _own_memory(machine: Machine) -> float:
    if machine.on_gpu:
        free, total = torch.cuda.mem_get_info(machine.device)
        share = torch.cuda.get_per_process_memory_fraction(machine.device)
        return min(free + torch.cuda.memory_reserved(machine.device), share * total)
    try:
        free = 1024 * _read_number(ROOT / "proc/meminfo", "MemAvailable")
        held = 1024 * _read_number(ROOT / "proc/self/status", "VmRSS")
    except OSError:  # not Linux
        return math.inf
    return held + min(free, _left_in_container())


def _left_in_container() -> float:
    """Return the bytes that the limit of a container leaves, infinity without a limit.

    The kernel gives up pages of files that are not in use before it kills a process, so these count
    as free.
    """
    cgroup = ROOT / "sys/fs/cgroup"  # of version 2
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        unused_files = _read_number(cgroup / "memory.stat", "inactive_file")
    except (OSError, ValueError):  # no such cgroup, or "max": no limit
        return math.inf
    return float(limit - used + unused_files)


def _read_number(file: Path, name: str) -> int:
    """Return the number in a line `name: 123 kB` or `name 123` of a file of the kernel."""
    for line in file.read_text().splitlines():
        words = line.split()
        if words[0].rstrip(":") == name:
            return int(words[1])
    raise OSError(f"{file} does not tell {name}")
