"""Time a training step, and the writing of texts. bench.py hands over what is timed.

Reading order: the windows of tokens (open_windows), timing calls (time_calls), what spoils the
figures of a GPU, writing texts (time_decoding).
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.compiler import config as compiler_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.dataset import DATA, open_dataset
from data.shards import find_shards
from data.windows import TrainWindows
from gpt12.device import Machine
from gpt12.distributed import first_ranks_first
from gpt12.generate import Sampling, stream
from gpt12.memory import GIB
from gpt12.settings import BenchConfig
from model import GPT

# Bits of clocks_throttle_reasons.active that mean heat or a power limit of the hardware (NVML's
# nvmlClocksThrottleReasons: HwSlowdown 0x8, SwThermalSlowdown 0x20, HwThermalSlowdown 0x40,
# HwPowerBrakeSlowdown 0x80).
CLOCK_IS_HELD = 0x08 | 0x20 | 0x40 | 0x80
OWN_CONTEXT_GIB = 0.8  # the most that our own context takes outside of torch's allocator
OTHERS_GIB = 0.5  # more than this in other programs is worth a warning
PROFILED_CALLS = 3
PROMPT_RUNS = 4  # how often reading the prompts is timed


class RandomWindows:
    """Windows of random token ids, for machines without a prepared data set.

    It has what Loader uses of TrainWindows: batch() and tokens.mask.
    """

    mask = None  # every position is a target

    def __init__(self, vocab_size: int, block_size: int, seed: int):
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.seed = seed
        self.tokens = self

    def batch(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, int64 (count, T) each, that depend on the position only."""
        generator = np.random.default_rng((self.seed, position))
        shape = (2, count, self.block_size)
        inputs, targets = generator.integers(self.vocab_size, size=shape)
        return inputs, targets


def open_windows(config: BenchConfig) -> tuple[Any, int, str]:
    """Return the windows, the vocabulary's size, and the data's name.

    real_data=auto reads the data set if it is prepared.
    """
    use_dataset = config.real_data
    if use_dataset == "auto":
        named = DATA / config.dataset
        folder = named if named.is_dir() else Path(config.dataset)
        use_dataset = bool(find_shards(folder, "train"))
    if not use_dataset:
        windows = RandomWindows(config.vocab_size, config.block_size, config.seed)
        return windows, config.vocab_size, "random tokens"
    with first_ranks_first():
        dataset = open_dataset(
            config.dataset,
            tokenizer=config.tokenizer,
            val_fraction=config.val_fraction,
            text_column=config.text_column,
            encoding=config.encoding,
            block_size=config.block_size,
        )
    assert dataset.train is not None
    train_windows = TrainWindows(dataset.train, config.block_size, config.seed)
    return train_windows, dataset.vocab_size, dataset.name


# --------------------------------------------------------------------------------------------------
# Timing


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of some work that was done several times, and the memory that it took."""

    ms: float  # median
    ms_p10: float  # 10th percentile
    ms_p90: float
    steps: int  # how often it was timed
    warmup_s: float  # time before that, compilation included
    peak_gib: float | None = None  # most memory in tensors, None without a GPU
    reserved_gib: float | None = None  # most memory that torch took from the driver
    total_gib: float | None = None
    warnings: list[str] = field(default_factory=list)


def time_calls(call: Callable[[], None], machine: Machine, warmup: int, count: int) -> Timing:
    """Time `count` calls after `warmup` others. On a GPU no call waits for the one before."""
    began = time.perf_counter()
    for _ in range(warmup):
        call()
    machine.synchronize()
    warmup_s = time.perf_counter() - began
    marks = []
    events = []
    for i in range(count + 1):
        if i > 0:
            call()
        if machine.on_gpu:  # the end of the work that is queued so far
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        else:
            machine.synchronize()
            marks.append(1e3 * time.perf_counter())
    # The GPU still works through its queue: an idle one would lower its clock.
    held = machine.on_gpu and clock_is_held()
    machine.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(events)]
    times += [after - before for before, after in pairwise(marks)]
    p10, middle, p90 = np.percentile(times, (10, 50, 90)).tolist()
    timing = Timing(ms=middle, ms_p10=p10, ms_p90=p90, steps=count, warmup_s=warmup_s)
    if not machine.on_gpu:
        return timing
    warnings = memory_warnings(machine.world)
    if held:
        warnings.append("the driver holds the clock down because of heat or power")
    return replace(
        timing,
        peak_gib=torch.cuda.max_memory_allocated() / GIB,
        reserved_gib=torch.cuda.max_memory_reserved() / GIB,
        total_gib=torch.cuda.mem_get_info()[1] / GIB,
        warnings=warnings,
    )


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


def profile_calls(call: Callable[[], None], machine: Machine, warmup: int) -> str:
    """Return torch's table of the slowest operations in a few calls after `warmup` others."""
    for _ in range(warmup):
        call()
    machine.synchronize()
    with torch.profiler.profile(acc_events=True) as profiler:
        for _ in range(PROFILED_CALLS):
            call()
        machine.synchronize()
    order = "self_cuda_time_total" if machine.on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(order, row_limit=20, max_name_column_width=60)
    return f"{table}\nthe times are those of {PROFILED_CALLS} steps"


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


def memory_warnings(world: int) -> list[str]:
    """Return what makes the GPU's memory smaller or slower than it could be.

    world: the processes of ours on the machine.
    """
    warnings = []
    free, total = torch.cuda.mem_get_info()
    outside = (total - free - torch.cuda.memory_reserved()) / GIB
    others = max(0.0, outside - OWN_CONTEXT_GIB)
    if others > OTHERS_GIB and world == 1:
        warnings.append(
            f"other programs hold {others:.1f} GiB of the card's memory: nvidia-smi names them"
        )
    # On Windows and WSL the driver does not refuse, it moves memory.
    if torch.cuda.max_memory_reserved() > total - others * GIB:
        warnings.append(
            "the driver spills into the computer's own memory, which is slow: lower batch_size"
        )
    return warnings


# --------------------------------------------------------------------------------------------------
# Writing texts


@dataclass(frozen=True)
class Decoding:
    """The measured speed of writing a number of texts at once."""

    texts: int
    first_s: float  # from the start of stream() to the first token, nothing being warm
    prompt_ms: float  # the same when all is warm: reading the prompts
    ms: float  # mean time per new token of all texts, after the first
    tokens_per_s: float  # new tokens of all texts together


def time_decoding(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling
) -> Decoding:
    """Time how sample.py continues the prompts.

    max_new_tokens: at least 2. With the prompts they fit into the context.
    """
    forget_last_measurement()
    arrivals = [time.perf_counter()]
    # stream() computes the next token before it yields one. So on a CPU the last token, after which
    # there is nothing to compute, comes at once: make one more than is timed.
    for _ in stream(model, prompts, max_new_tokens + 1, sampling):
        arrivals.append(time.perf_counter())
    began, *tokens = arrivals[:-1]
    gap = (tokens[-1] - tokens[0]) / (len(tokens) - 1)
    prompt_times = []
    for _ in range(PROMPT_RUNS):
        start = time.perf_counter()
        next(stream(model, prompts, 1, sampling))
        prompt_times.append(time.perf_counter() - start)
    return Decoding(
        texts=len(prompts),
        first_s=tokens[0] - began,
        prompt_ms=1e3 * median(prompt_times),
        ms=1e3 * gap,
        tokens_per_s=len(prompts) / gap,
    )
