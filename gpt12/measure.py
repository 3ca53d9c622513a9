"""Time a training step: train.py's own TrainStep and Loader, on the data set or on random tokens.

Reading order: the windows (RandomWindows), the step (StepRunner, step_runner), timing (time_calls),
and all of it together (measure_step, try_to_measure).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.compiler import config as compiler_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.dataset import DATA, open_dataset
from data.shards import find_shards
from data.windows import TrainWindows
from gpt12.device import Machine, open_machine
from gpt12.distributed import rank_0_first
from gpt12.gpu_state import ask_driver, read_gpu_state
from gpt12.loader import Loader
from gpt12.memory import choose_recompute, ran_out_of_memory
from gpt12.plan import card_of_machine, predict
from gpt12.run import prepare_model
from gpt12.settings import BenchConfig, Recompute, model_shape
from gpt12.terminal import say
from gpt12.weights import new_model
from model import GPTConfig, flops_per_token, parameter_count
from train import TrainStep

WARMUP_STEPS = 3  # beyond those in which the step is compiled and recorded
RANDOM_DATA = "random tokens"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The time and the memory of some work that was done several times."""

    label: str = ""
    ms: float  # median
    ms_p10: float  # 10th percentile
    ms_p90: float
    steps: int  # how often it was timed
    warmup_s: float  # time before that, compilation included
    tokens: int  # per call
    tokens_per_s: float
    mfu: float | None = None  # share of the GPU's peak rate, None if that is not known
    peak_gib: float | None = None  # most memory in tensors, None without a GPU
    reserved_gib: float | None = None
    total_gib: float | None = None
    driver: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StepResult(Measurement):
    """A measured training step."""

    batch_size: int
    block_size: int
    micro_steps: int  # on each rank
    data: str  # name of the data set, or RANDOM_DATA
    parameters: int
    flops_per_token: int
    dtype: str
    compile: bool
    recompute: Recompute
    attention: str
    cuda_graph: bool
    loss: float  # of the last step
    ranks: list[dict[str, Any]] = field(default_factory=list)  # each rank's figures, if several
    # For a GPU whose datasheet is known:
    predicted_ms: float | None = None
    predicted_gib: float | None = None
    roofline: float | None = None  # the least time that rate and bandwidth allow, over the measured


@dataclass(frozen=True)
class OutOfMemory:
    """Stands for a measurement that did not fit into the GPU's memory."""

    label: str
    batch_size: int
    error: str = "out of memory"


AnyMeasurement = TypeVar("AnyMeasurement", bound=Measurement)

# --------------------------------------------------------------------------------------------------
# The data


class NoMask:
    """Stands for a split's tokens: without a mask, every position is a target."""

    mask = None


class RandomWindows:
    """Windows of random token ids, for machines without a prepared data set.

    It has what Loader uses of TrainWindows: batch() and tokens.mask.
    """

    def __init__(self, vocab_size: int, block_size: int, seed: int):
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.seed = seed
        self.tokens = NoMask()

    def batch(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, int64 (count, T) each, that depend on the position only."""
        generator = np.random.default_rng((self.seed, position))
        shape = (2, count, self.block_size)
        inputs, targets = generator.integers(self.vocab_size, size=shape)
        return inputs, targets


def open_windows(config: BenchConfig) -> tuple[BenchConfig, Any, str]:
    """Return the configuration with the data's vocabulary, the windows, and the data's name.

    real_data=auto reads the data set if it is prepared.
    """
    named = DATA / config.dataset
    folder = named if named.is_dir() else Path(config.dataset)
    use_dataset = config.real_data is True
    if config.real_data == "auto":
        use_dataset = bool(find_shards(folder, "train"))
    if not use_dataset:
        windows = RandomWindows(config.vocab_size, config.block_size, config.seed)
        return config, windows, RANDOM_DATA
    with rank_0_first():
        dataset = open_dataset(
            config.dataset,
            tokenizer=config.tokenizer,
            val_fraction=config.val_fraction,
            text_column=config.text_column,
            block_size=config.block_size,
        )
    assert dataset.train is not None
    config = replace(config, vocab_size=dataset.vocab_size)
    return config, TrainWindows(dataset.train, config.block_size, config.seed), dataset.name


# --------------------------------------------------------------------------------------------------
# The step


class StepRunner:
    """Makes training steps one after the other, as the loop of train.py does."""

    def __init__(self, config: BenchConfig, machine: Machine):
        config, windows, self.data = open_windows(config)
        shape = model_shape(config, config.vocab_size)
        self.config = resolve(config, shape, machine)
        self.machine = machine
        torch.manual_seed(config.seed)
        self.model = new_model(shape)
        prepare_model(self.model, self.config, machine)
        packed = windows.tokens.mask is not None
        step = TrainStep(self.model.train(), self.config, machine, packed)
        self.step = step
        self.loader = Loader(windows, step.x, step.y, machine, step.example_starts)
        self.position = 0
        self.batch_targets = self.loader.load(self.position)

    def __call__(self) -> None:
        """Make a step and load the windows of the next one. Does not wait for the device."""
        self.step(self.config.learning_rate, self.batch_targets)
        windows_per_step = int(self.config.batch_size) * self.config.gradient_accumulation_steps
        self.position += windows_per_step
        self.batch_targets = self.loader.load(self.position)


def resolve(config: BenchConfig, shape: GPTConfig, machine: Machine) -> BenchConfig:
    """Return the configuration with dtype, lora_alpha and recompute decided as train.py does."""
    lora_alpha = config.lora_alpha
    if config.lora_rank and lora_alpha is None:
        lora_alpha = 2.0 * config.lora_rank
    config = replace(
        config,
        dtype=str(machine.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        lora_alpha=lora_alpha,
        # A preset for evaluation still describes a model that can be trained.
        eval_only=False,
    )
    if config.recompute == "auto":
        config = replace(config, recompute=choose_recompute(shape, config, machine))
    return config


def machine_for_training(config: BenchConfig) -> Machine:
    """Return the machine as train.py would use it for a long run."""
    return open_machine(
        config.device,
        config.dtype,
        config.compile,
        deterministic=config.deterministic,
    )


@contextlib.contextmanager
def step_runner(config: BenchConfig, tf32: bool = True) -> Iterator[StepRunner]:
    """Prepare a training step with the kernel for attention that was asked for; clean up later.

    tf32: whether float32 products on a GPU may use TF32, as in training.
    """
    forget_last_measurement()
    machine = machine_for_training(config)
    try:
        with attention_kernel(config.attention), tf32_allowed(tf32):
            yield StepRunner(config, machine)
    finally:
        if machine.compiled:
            torch.compiler.reset()  # what was compiled for these shapes


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


@contextlib.contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Let float32 products on a GPU round their inputs to TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before and allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --------------------------------------------------------------------------------------------------
# Timing

Mark = torch.cuda.Event | float  # a moment: in the GPU's queue of work, or on the host's clock


def time_calls(
    call: Callable[[], None], machine: Machine, warmup: int, count: int, tokens: int
) -> Measurement:
    """Time `count` calls after `warmup` others. On a GPU no call waits for the one before.

    tokens: how many a call processes.
    """
    began = time.perf_counter()
    for _ in range(warmup):
        call()
    machine.synchronize()
    warmup_s = time.perf_counter() - began
    query = None
    marks = [mark_time(machine)]
    for i in range(count):
        call()
        marks.append(mark_time(machine))
        if i == count // 2:
            query = ask_driver(machine)
    machine.synchronize()
    times = [elapsed_ms(before, after) for before, after in pairwise(marks)]
    p10, middle, p90 = np.percentile(times, (10, 50, 90)).tolist()
    return Measurement(
        ms=middle,
        ms_p10=p10,
        ms_p90=p90,
        steps=count,
        warmup_s=warmup_s,
        tokens=tokens,
        tokens_per_s=1e3 * tokens / middle,
        **vars(read_gpu_state(machine, times, query)),
    )


def mark_time(machine: Machine) -> Mark:
    """Return the present moment. On a GPU: the end of the work that is queued so far."""
    if not machine.on_gpu:
        machine.synchronize()
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(before: Mark, after: Mark) -> float:
    """Return the milliseconds between two moments."""
    if isinstance(before, torch.cuda.Event):
        assert isinstance(after, torch.cuda.Event)
        return before.elapsed_time(after)
    assert isinstance(after, float)
    return 1e3 * (after - before)


def measure_step(config: BenchConfig, tf32: bool = True) -> StepResult:
    """Time train.py's step in this configuration, over all ranks together."""
    with step_runner(config, tf32) as runner:
        step = runner.step
        machine = runner.machine
        timed = time_calls(
            runner,
            machine,
            warmup=step.warmup_calls + WARMUP_STEPS,
            count=config.steps,
            tokens=step.x.numel(),
        )
        ranks: list[dict[str, Any]] = []
        if machine.world > 1:
            ranks = gather_ranks(timed, machine.world)
            timed = combine_ranks(timed, ranks)
        shape = runner.model.config
        recompute = runner.config.recompute
        assert recompute != "auto"
        result = StepResult(
            **vars(timed),
            batch_size=int(config.batch_size),
            block_size=config.block_size,
            micro_steps=step.micro_steps,
            data=runner.data,
            parameters=parameter_count(shape),
            flops_per_token=flops_per_token(shape),
            dtype=runner.config.dtype,
            compile=machine.compiled,
            recompute=recompute,
            attention=config.attention,
            cuda_graph=step.graph is not None,
            loss=step.loss.item(),
            ranks=ranks,
        )
        result = compare_with_datasheet(result, runner.config, machine)
    for warning in result.warnings:
        say(f"warning: {warning}")
    return result


def gather_ranks(timed: Measurement, world: int) -> list[dict[str, Any]]:
    """Return the figures of all ranks, in their order."""
    mine = {
        "tokens": timed.tokens,
        "tokens_per_s": timed.tokens_per_s,
        "ms": timed.ms,
        "ms_p10": timed.ms_p10,
        "ms_p90": timed.ms_p90,
        "peak_gib": timed.peak_gib,
    }
    ranks: list[dict[str, Any]] = [{} for _ in range(world)]
    dist.all_gather_object(ranks, mine)
    return ranks


def combine_ranks(timed: Measurement, ranks: Sequence[dict[str, Any]]) -> Measurement:
    """Return the figures of all ranks together; tokens and speeds add up."""
    tokens = sum(rank["tokens"] for rank in ranks)
    tokens_per_s = sum(rank["tokens_per_s"] for rank in ranks)
    return replace(
        timed,
        tokens=tokens,
        tokens_per_s=tokens_per_s,
        ms=1e3 * tokens / tokens_per_s,
        ms_p10=min(rank["ms_p10"] for rank in ranks),
        ms_p90=max(rank["ms_p90"] for rank in ranks),
    )


def compare_with_datasheet(result: StepResult, config: BenchConfig, machine: Machine) -> StepResult:
    """Add MFU and the plan's prediction, if the card is known and computes in 16 bits."""
    card = card_of_machine(config, machine)
    if card is None or machine.dtype == torch.float32:
        return result
    mfu = None
    if config.lora_rank == 0:  # 6N + 12LCT counts a gradient for every weight
        achieved = result.flops_per_token * result.tokens_per_s / machine.world
        mfu = achieved / (card.tflops * 1e12)
    on_one_rank = replace(config, gradient_accumulation_steps=result.micro_steps)
    assert config.recompute != "auto"
    prediction = predict(on_one_rank, config.recompute, card)
    return replace(
        result,
        mfu=mfu,
        predicted_ms=prediction.ms,
        predicted_gib=prediction.gib,
        roofline=prediction.floor_ms / result.ms,
    )


def try_to_measure(
    label: str, config: BenchConfig, measure: Callable[[BenchConfig], AnyMeasurement]
) -> AnyMeasurement | OutOfMemory:
    """Measure, or return that memory did not suffice."""
    say(f"measuring {label} ...")
    try:
        return replace(measure(config), label=label)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
    return OutOfMemory(label, int(config.batch_size))
