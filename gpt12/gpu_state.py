"""The state of a GPU during a measurement: memory, clock, and what spoils the figures."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from statistics import median

import torch

from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.memory import GIB
from gpt12.terminal import say

# What is asked of nvidia-smi.
DRIVER_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "power.draw",
    "clocks_throttle_reasons.active",
)
# Bits of clocks_throttle_reasons.active that mean heat or a power limit of the hardware (NVML's
# nvmlClocksThrottleReasons: HwSlowdown 0x8, SwThermalSlowdown 0x20, HwThermalSlowdown 0x40,
# HwPowerBrakeSlowdown 0x80).
CLOCK_IS_HELD = 0x08 | 0x20 | 0x40 | 0x80
# Memory of a planned or imitated card that torch does not get: the driver's context takes 0.4 GiB,
# a desktop 0.3 or more.
MARGIN_GIB = 1.0
OWN_CONTEXT_GIB = 0.8  # the most that our own context takes outside of torch's allocator
OTHERS_GIB = 0.5  # more than this in other programs is worth a warning
SLOWDOWN = 0.05  # steps that become slower by more than this are worth a warning


@dataclass(frozen=True)
class GpuState:
    """What is known of a GPU after a measurement. Without a GPU nothing is known."""

    peak_gib: float | None = None  # most memory in tensors
    reserved_gib: float | None = None  # most memory that torch took from the driver
    total_gib: float | None = None
    driver: dict[str, str] = field(default_factory=dict)  # nvidia-smi's answers by field
    warnings: list[str] = field(default_factory=list)


def ask_driver(machine: Machine) -> subprocess.Popen[str] | None:
    """Start nvidia-smi for this GPU and do not wait for it. None without a GPU or nvidia-smi.

    Ask while the GPU works: an idle GPU lowers its clock.
    """
    if not machine.on_gpu:
        return None
    uuid = torch.cuda.get_device_properties(machine.device).uuid
    command = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        f"--query-gpu={','.join(DRIVER_FIELDS)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None


def read_gpu_state(
    machine: Machine, times: list[float], query: subprocess.Popen[str] | None
) -> GpuState:
    """Return the GPU's state after steps that took `times`.

    query: what ask_driver returned.
    """
    if not machine.on_gpu:
        return GpuState()
    driver: dict[str, str] = {}
    if query is not None:
        answers = query.communicate()[0].strip().split(", ")
        driver = dict(zip(DRIVER_FIELDS, answers))
    return GpuState(
        peak_gib=torch.cuda.max_memory_allocated() / GIB,
        reserved_gib=torch.cuda.max_memory_reserved() / GIB,
        total_gib=torch.cuda.mem_get_info()[1] / GIB,
        driver=driver,
        warnings=[
            *_warnings_about_speed(times, driver),
            *_warnings_about_memory(alone=machine.world == 1),
        ],
    )


def _warnings_about_speed(times: list[float], driver: dict[str, str]) -> list[str]:
    warnings = []
    quarter = (len(times) + 3) // 4
    slower = median(times[-quarter:]) / median(times[:quarter]) - 1
    if slower > SLOWDOWN:
        warnings.append(
            f"the steps became {slower:.0%} slower during the measurement: the clock drops, or "
            "other programs use the card"
        )
    reasons = driver.get("clocks_throttle_reasons.active", "")
    if reasons.startswith("0x") and int(reasons, 16) & CLOCK_IS_HELD:
        clock = driver["clocks.sm"]
        warnings.append(f"the driver holds the clock at {clock} MHz because of heat or power")
    return warnings


def _warnings_about_memory(alone: bool) -> list[str]:
    """alone: this process is the only one of ours on the machine."""
    free, total = torch.cuda.mem_get_info()
    outside = (total - free - torch.cuda.memory_reserved()) / GIB
    others = max(0.0, outside - OWN_CONTEXT_GIB)
    warnings = []
    if others > OTHERS_GIB and alone:
        warnings.append(
            f"other programs hold {others:.1f} GiB of the card's memory: nvidia-smi names them"
        )
    if torch.cuda.max_memory_reserved() > total - others * GIB:
        warnings.append(
            "the driver spills into the computer's own memory, which is slow: lower batch_size"
        )
    return warnings


def imitate_card(vram_gb: float, machine: Machine) -> None:
    """Limit torch's allocator to what a card with this much memory would leave it.

    Raises UserError without a GPU, or if the GPU has less memory.
    """
    if not machine.on_gpu:
        raise UserError(
            f"vram_gb={vram_gb:g} limits a GPU's memory, and there is no GPU. --plan predicts "
            "what fits, without one"
        )
    total = torch.cuda.mem_get_info()[1] / GIB
    room = vram_gb - MARGIN_GIB
    if not 0 < room <= total:
        raise UserError(
            f"vram_gb={vram_gb:g} cannot be imitated on a card of {total:.1f} GiB: choose more "
            f"than {MARGIN_GIB:g} and at most {total + MARGIN_GIB:.1f}"
        )
    torch.cuda.set_per_process_memory_fraction(room / total)
    say(
        f"imitating a card of {vram_gb:g} GB: torch may use {room:g} GiB, the driver and the "
        "desktop get the rest"
    )
