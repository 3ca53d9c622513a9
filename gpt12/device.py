"""The machine a run uses: what "auto" becomes for device, dtype and compile, and why."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpt12.distributed import Ranks, torchrun_ranks
from gpt12.errors import UserError

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
        if self.on_gpu:
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def memory_gib(self) -> float | None:
        """Return the GPU's total memory in GiB, None without a GPU."""
        if not self.on_gpu:
            return None
        return torch.cuda.get_device_properties(self.device).total_memory / 2**30


def open_machine(
    device: str,
    dtype: str,
    compile: bool | str,  # noqa: A002 (the configuration's key)
    training: bool = False,
    long: bool = True,
    deterministic: bool = False,
) -> Machine:
    """Choose device, dtype and compile where they are "auto", and prepare torch for them.

    training: changes only the notes. In training the weights stay float32 and products use
    autocast; otherwise the caller converts the weights.
    long: whether there is enough work for compiling to pay off.
    Raises UserError if something was asked for that this machine does not have.
    """
    ranks = torchrun_ranks()
    notes: list[str] = []
    kind = _choose_device(device, notes)
    place = _place(kind, ranks)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        # torch would start a pool of compiling processes, one a core, and wait at the end of the
        # program until they have all started. The few GPU kernels here compile as fast without it.
        # A CPU's kernels go through a C++ compiler, which takes longer: there the pool stays.
        os.environ.setdefault(COMPILE_THREADS, "1")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return Machine(
        device=place,
        dtype=_choose_dtype(dtype, place, training, notes),
        compiled=_choose_compile(compile, place, long, notes),
        rank=ranks.rank,
        world=ranks.world,
        notes=notes,
    )


def _place(kind: str, ranks: Ranks) -> torch.device:
    """Return the torch device: for "cuda" the GPU of this rank."""
    if kind != "cuda":
        place = torch.device(kind)
    else:
        place = torch.device("cuda", ranks.local)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={place}: this machine has {torch.cuda.device_count()} GPU(s)")
    return place


def _choose_device(asked: str, notes: list[str]) -> str:
    if asked == "auto":
        return _best_device(notes)
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device={asked}, but torch cannot use a GPU. {_why_no_cuda()}. Or pass --device=cpu"
        )
    if asked == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            f"device={asked} needs a Mac with an Apple GPU and a torch that supports it. "
            "Or pass --device=cpu"
        )
    try:
        torch.empty(1, device="cuda:0" if asked == "cuda" else asked)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={asked} cannot be used: {str(error).splitlines()[0]}") from None
    return asked


def _best_device(notes: list[str]) -> str:
    if torch.cuda.is_available():
        notes.append(f"device: cuda ({torch.cuda.get_device_name()})")
        return "cuda"
    if torch.backends.mps.is_available():
        notes.append("device: mps")
        return "mps"
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        notes.append(f"device: cpu, although there is an NVIDIA card. {_why_no_cuda()}")
    else:
        notes.append("device: cpu")
    return "cpu"


def _why_no_cuda() -> str:
    """Say why torch cannot use an NVIDIA card, and the line that fixes it."""
    reinstall = f"pip install --force-reinstall torch --index-url {CUDA_WHEELS}"
    if torch.version.cuda is None:
        return f"This torch was built without CUDA: {reinstall}"
    return (
        f"This torch needs a driver for CUDA {torch.version.cuda} (nvidia-smi shows yours): "
        f"update the driver, or {reinstall}"
    )


def _choose_dtype(
    asked: str, device: torch.device, training: bool, notes: list[str]
) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        notes.append("dtype: bfloat16" + (" autocast" if training else ""))
        return torch.bfloat16
    notes.append(
        "dtype: float16"
        + (" with loss scaling" if training else "")
        + ", because this GPU has no bfloat16"
    )
    return torch.float16


def _choose_compile(asked: bool | str, device: torch.device, long: bool, notes: list[str]) -> bool:
    if asked is False:
        return False
    if asked == "auto" and device.type != "cuda":
        notes.append("compile: off, because on this device compiling takes longer than it saves")
        return False
    if asked == "auto" and not long:
        notes.append("compile: off, because for so little work it takes longer than it saves")
        return False
    reason = _try_compiler(device)
    if reason is None:
        return True
    if asked is True:
        raise UserError(
            f"compile=True, but torch.compile fails here: {reason}. Pass --compile=False"
        )
    notes.append(f"compile: off, because torch.compile fails here: {reason}")
    return False


def _try_compiler(device: torch.device) -> str | None:
    """Compile a small function; return the first line of the error if that fails."""

    def double_plus_one(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1

    try:
        torch.compile(double_plus_one)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, an unknown GPU: any library may raise
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None
