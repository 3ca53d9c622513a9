"""Time a training step, and the writing of texts. bench.py hands over what is timed.

Reading order: the tokens (open_tokens), timing calls (time_calls), what spoils the
figures of a GPU, writing texts (time_decoding).
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.compiler import config as compiler_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.dataset import DATA
from gpt12.device import Machine
from gpt12.errors import UserError, say
from gpt12.generate import stream
from gpt12.memory import GIB
from gpt12.run import open_data
from gpt12.settings import BenchConfig, SampleConfig
from model import GPT

# Bits of clocks_throttle_reasons.active that mean heat or a power limit of the hardware (NVML's
# nvmlClocksThrottleReasons: HwSlowdown 0x8, SwThermalSlowdown 0x20, HwThermalSlowdown 0x40,
# HwPowerBrakeSlowdown 0x80).
CLOCK_IS_HELD = 0x08 | 0x20 | 0x40 | 0x80
OUTSIDE_GIB = 1.3  # outside of torch's allocator; our own context takes up to 0.8
PROMPT_RUNS = 4  # how often nothing but reading the prompts is timed

Row = dict[str, Any]  # the figures of a measurement, by their names in bench.json


class RandomTokens:
    """A long split of random token ids, for machines without a prepared data set.

    It has what TrainWindows uses of Tokens.
    """

    mask = None  # every position is a target

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return 10**9

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return ids (len(starts), length) that depend on the starts only."""
        generator = np.random.default_rng(starts.tolist())
        return generator.integers(self.vocab_size, size=(len(starts), length))


def open_tokens(config: BenchConfig) -> tuple[Any, int, str]:
    """Return the training tokens, the vocabulary's size, and the data's name.

    real_data=auto reads the data set if it is prepared.
    """
    use_dataset = config.real_data
    if use_dataset == "auto":
        folders = (DATA / config.dataset, Path(config.dataset))
        use_dataset = any(shard for folder in folders for shard in folder.glob("*train*.bin"))
    if not use_dataset:
        return RandomTokens(config.vocab_size), config.vocab_size, "random tokens"
    dataset = open_data(config)
    return dataset.train, dataset.text_vocab_size, dataset.name


# --------------------------------------------------------------------------------------------------
# Timing


def time_calls(call: Callable[[], None], machine: Machine, warmup: int, count: int) -> Row:
    """Time `count` calls after `warmup` others. On a GPU no call waits for the one before.

    Returns the median and the 10th and 90th percentile in ms, how often it was timed, the seconds
    before that, compilation included, warnings, and what the GPU's memory held at most.
    """
    began = time.perf_counter()
    for _ in range(warmup):
        call()
    machine.synchronize()
    warmup_s = time.perf_counter() - began
    marks = [mark(machine)]
    for _ in range(count):
        call()
        marks.append(mark(machine))
    # The GPU still works through its queue: an idle one would lower its clock.
    held = machine.on_gpu and clock_is_held()
    machine.synchronize()
    if machine.on_gpu:
        times = [before.elapsed_time(after) for before, after in pairwise(marks)]
    else:
        times = [1e3 * (after - before) for before, after in pairwise(marks)]
    p10, middle, p90 = np.percentile(times, (10, 50, 90)).tolist()
    row = {"ms": middle, "ms_p10": p10, "ms_p90": p90, "steps": count, "warmup_s": warmup_s}
    if not machine.on_gpu:
        return row | {"warnings": []}
    return row | {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "total_gib": torch.cuda.mem_get_info()[1] / GIB,
        "warnings": warnings_about(machine, held),
    }


def mark(machine: Machine) -> Any:
    """Return the end of the work so far: an event in a GPU's queue, or the time in seconds."""
    if machine.on_gpu:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    machine.synchronize()
    return time.perf_counter()


def forget_last_measurement() -> None:
    """Free the memory of the measurement before, and begin a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Use this kernel for attention: "flash", "math", or "auto", torch's own choice."""
    if name == "auto":
        yield
        return
    kernel = SDPBackend.FLASH_ATTENTION if name == "flash" else SDPBackend.MATH
    # torch keeps compiled graphs on the disk, and their key does not name the kernel inside. The
    # tag becomes part of the key.
    tag = compiler_config.patch(  # type: ignore[attr-defined]  # torch adds patch() itself
        cache_key_tag=f"attention={name}"
    )
    with sdpa_kernel(kernel), tag:
        yield


# --------------------------------------------------------------------------------------------------
# What spoils the figures of a GPU


def clock_is_held() -> bool:
    """Ask nvidia-smi whether heat or a power limit holds this GPU's clock down at present."""
    uuid = torch.cuda.get_device_properties().uuid
    query = "--query-gpu=clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True).stdout
        return bool(int(answer, 16) & CLOCK_IS_HELD)
    except (OSError, ValueError):  # no nvidia-smi, or it does not know
        return False


def warnings_about(machine: Machine, held: bool) -> list[str]:
    """Return what makes the GPU slower or its memory smaller than it could be.

    held: whether its clock is held down.
    """
    warnings = []
    if held:
        warnings.append("the driver holds the clock down because of heat or power")
    free, total = torch.cuda.mem_get_info()
    outside = (total - free - torch.cuda.memory_reserved()) / GIB
    if outside > OUTSIDE_GIB and machine.world == 1:  # other ranks would look like other programs
        warnings.append(
            f"other programs hold much of the card's memory ({outside:.1f} GiB are not ours): "
            "nvidia-smi names them"
        )
    # On Windows and WSL the driver does not refuse, it moves memory.
    if torch.cuda.max_memory_reserved() > total:
        warnings.append(
            "the driver spills into the computer's own memory, which is slow: lower batch_size"
        )
    return warnings


# --------------------------------------------------------------------------------------------------
# Writing texts


def time_decoding(model: GPT, prompts: list[list[int]], config: SampleConfig) -> Row:
    """Time how sample.py continues the prompts.

    config: max_new_tokens is at least 2; prompt and new tokens fit into the context. The row holds
        first_ms       time to the first token in the first run
        prompt_ms      the same time in later runs
        ms             mean time of a decoding step after that, one token for each text
        tokens_per_s   new tokens of all texts together
    """
    forget_last_measurement()
    first_tokens = []
    # Before stream() yields a token, it computes the next one. After the last token there is no
    # next one, so on a CPU it comes too early. It is not timed.
    for count in [1] * PROMPT_RUNS + [config.max_new_tokens + 1]:
        some = replace(config, max_new_tokens=count)
        began = time.perf_counter()
        arrivals = [time.perf_counter() for _ in stream(model, prompts, some)]
        first_tokens.append(arrivals[0] - began)
    gap = (arrivals[-2] - arrivals[0]) / (config.max_new_tokens - 1)
    cold, *warm = first_tokens
    return {
        "texts": len(prompts),
        "first_ms": 1e3 * cold,
        "prompt_ms": 1e3 * median(warm),
        "ms": 1e3 * gap,
        "tokens_per_s": len(prompts) / gap,
    }


# --------------------------------------------------------------------------------------------------
# Showing

# What a table of rows shows: a figure's name, its title and its format.
COLUMNS = {
    "first_ms": ("first token ms", ",.1f"),
    "prompt_ms": ("when warm ms", ",.1f"),
    "ms": ("ms", ",.2f"),
    "ms_p10": ("10%", ",.2f"),
    "ms_p90": ("90%", ",.2f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "times_first": ("times first", ".2f"),
    "mfu": ("MFU", ".1%"),
    "peak_gib": ("peak GiB", ".3g"),
}


def show_rows(rows: Sequence[Row]) -> None:
    """Print steps side by side, their speed as a multiple of the first one's that fits."""
    fitting = [row for row in rows if "error" not in row]
    for row in fitting[1:]:
        row["times_first"] = row["tokens_per_s"] / fitting[0]["tokens_per_s"]
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    say(" " * 36 + "".join(f"{COLUMNS[name][0]:>14}" for name in columns))
    for row in rows:
        line = f"{row['label']:36}"
        for name in columns:
            line += f"{row[name]:14{COLUMNS[name][1]}}" if name in row else " " * 14
        say(f"{line}  {row.get('error', '')}".rstrip())


def show_step(row: Row) -> None:
    """Print everything about one measured step."""
    show_rows([row])
    for name, value in row.items():
        if name in COLUMNS:
            continue
        shown = value
        if isinstance(value, float):  # a few MB are not 0.00 GiB
            shown = f"{value:,.2f}" if value >= 1 else f"{value:.3g}"
        say(f"{name:16} {shown}")


def show_fastest(rows: Sequence[Row]) -> Row:
    """Print and return the fastest of the steps. Raises UserError if nothing fits."""
    fitting = [row for row in rows if "error" not in row]
    if not fitting:
        raise UserError(
            "nothing fits, not even one row: try --lora_rank=16, --optimizer=adamw8bit or a "
            "smaller model"
        )
    best = max(fitting, key=lambda row: row["tokens_per_s"])
    say(f"fastest: {best['label']}, {best['tokens_per_s']:,.0f} tokens/s")
    return best
