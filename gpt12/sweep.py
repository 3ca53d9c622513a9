"""Measure a training step at several values of a key, and find the fastest micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpt12.bench_request import BenchRequest, with_model_shape
from gpt12.config import load_config
from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.gpu_state import MARGIN_GIB
from gpt12.measure import OutOfMemory, StepResult, measure_step, try_to_measure
from gpt12.memory import GIB
from gpt12.plan import kinds_of_recomputation, largest_batch
from gpt12.settings import BenchConfig, Recompute

NOTHING_FITS = (
    "nothing fits, not even one row: try --lora_rank=16, --optimizer=adamw8bit or a smaller model"
)
CPU_BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # tried without asking what fits in memory
# What find_batch measures, as shares of the largest micro-batch that should fit. The prediction may
# be a little too high, so one trial is just below it.
SHARES_OF_LARGEST = (0.5, 0.75, 0.95, 1.0)
Row = StepResult | OutOfMemory

# --------------------------------------------------------------------------------------------------
# --sweep=KEY:VALUE,VALUE


def sweep(config: BenchConfig, request: BenchRequest, on_cpu: bool) -> list[Row]:
    """Measure the step at each value of the key."""
    rows = []
    for setting, swept in swept_configs(config, request, on_cpu).items():
        rows.append(try_to_measure(setting, swept, measure_step))
    return rows


def swept_key(config: BenchConfig) -> str:
    """Return the key that --sweep names, empty without a sweep. A "-" in it means "_"."""
    return (config.sweep or "").partition(":")[0].replace("-", "_")


def swept_configs(
    config: BenchConfig, request: BenchRequest, on_cpu: bool = False
) -> dict[str, BenchConfig]:
    """Return the configuration for each value of --sweep, by its "key=value".

    config: what holds for all other keys.
    Raises UserError for a key or a value that does not exist.
    """
    key, _, values = str(config.sweep).partition(":")
    if not values:
        raise UserError(
            f"sweep={config.sweep} must look like KEY:VALUE,VALUE, as in --sweep=batch_size:4,8,16"
        )
    configs = {}
    for value in values.split(","):
        setting = f"{key}={value}"
        swept, _ = load_config(BenchConfig, [*request.argv, f"--{setting}"])
        swept = with_model_shape(swept, request.given, on_cpu)
        swept = replace(swept, compile=config.compile, dtype=config.dtype)
        configs[setting] = swept
    return configs


# --------------------------------------------------------------------------------------------------
# --find_batch


@dataclass(frozen=True)
class FoundBatch:
    """What find_batch measured."""

    room_gib: float | None  # memory that a step may take, None on a CPU
    rows: list[Row]
    best: StepResult  # the fastest


def find_batch(config: BenchConfig, machine: Machine) -> FoundBatch:
    """Measure micro-batches that should fit, and return the fastest.

    Raises UserError if none fits.
    """
    room_gib = _room_gib(config, machine)
    rows: list[Row] = []
    for trial in _trials(config, room_gib):
        label = f"--batch_size={trial.batch_size} --recompute={trial.recompute}"
        rows.append(try_to_measure(label, trial, measure_step))
    fitting = [row for row in rows if isinstance(row, StepResult)]
    if not fitting:
        raise UserError(NOTHING_FITS)
    return FoundBatch(room_gib, rows, best=max(fitting, key=_tokens_per_s))


def _tokens_per_s(row: StepResult) -> float:
    return row.tokens_per_s


def _room_gib(config: BenchConfig, machine: Machine) -> float | None:
    if not machine.on_gpu:
        return None
    if config.vram_gb is not None:
        return config.vram_gb - MARGIN_GIB
    return torch.cuda.mem_get_info()[0] / GIB


def _trials(config: BenchConfig, room_gib: float | None) -> list[BenchConfig]:
    """Return the configurations to measure."""
    if room_gib is None:
        return _with_batch_sizes(config, config.recompute, CPU_BATCH_SIZES)
    trials = []
    for kind in kinds_of_recomputation(config):
        largest = largest_batch(config, kind, room_gib)
        sizes = {int(largest * share) for share in SHARES_OF_LARGEST}
        trials += _with_batch_sizes(config, kind, sorted(sizes - {0}))
    return trials


def _with_batch_sizes(
    config: BenchConfig, recompute: Recompute, sizes: Sequence[int]
) -> list[BenchConfig]:
    return [replace(config, batch_size=size, recompute=recompute) for size in sizes]
