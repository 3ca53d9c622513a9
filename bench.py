"""Measure what this machine does with GPT-2: train.py's own step and sample.py's own decoding, never a copy of them.

    python bench.py                                              # the step of GPT-2 124M, micro-batch 12, 1,024 tokens
    python bench.py --sweep=batch_size:4,8,16,32                 # the step at several values of a key
    python bench.py --ladder                                     # what each technique brings, rung after rung
    python bench.py --vram_gb=12 --find_batch                    # the fastest micro-batch of a 12 GB card, emulated
    python bench.py --plan --init_from=gpt2-large --lora_rank=16 # predicted memory and speed, without a GPU
    python bench.py --report                                     # what is worth publishing, in one file and one picture

The last line of the output is JSON. Reading order: main, measure, time_steps, WITHOUT (the ladder), count_work (the plan).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py does, before torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import config as configuration
import model as gpt
import train
from config import BenchConfig, UserError
from config.machine import CARDS, Card, Machine, open_machine
from data import DATA, open_dataset
from data import run as run_folder
from data.shards import find
from data.windows import TrainWindows
from model import GPT, LOSS_CHUNK_ROWS, MASKED, Block, GPTConfig, Sampling

GiB = 2**30
MARGIN_GIB = 1.0  # of an emulated or planned card: the driver's context takes 0.4 GiB, a desktop 0.3 and more
MODES = ("none", "pointwise", "block")  # of recomputation
SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
# On a CPU 124M takes half a minute a step: unless a shape is given, it is that of nanoGPT's CPU command.
CPU_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "vocab_size": 65}
Row = dict[str, Any]  # of a table and of the JSON


# --------------------------------------------------------------------------------------------------------------------
# The step


class RandomWindows:
    """Random token ids in the place of data.windows.TrainWindows; they take the same way to the device."""

    tokens = SimpleNamespace(mask=None)

    def __init__(self, vocab_size: int, block_size: int, seed: int):
        self.vocab_size, self.block_size, self.random = vocab_size, block_size, np.random.default_rng(seed)

    def batch(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.random.integers(0, self.vocab_size, (count, self.block_size + 1))
        return ids[:, :-1], ids[:, 1:]


def shape_of(config: BenchConfig, vocab_size: int | None = None) -> GPTConfig:
    keys = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    return GPTConfig(vocab_size=vocab_size or config.vocab_size, **{key: getattr(config, key) for key in keys})


class Training:
    """train.py's model, step and loader; a call makes one step and loads the next one's windows, as there."""

    def __init__(self, config: BenchConfig, machine: Machine):
        self.config, self.machine, self.position = config, machine, 0
        windows: Any = RandomWindows(config.vocab_size, config.block_size, config.seed)
        named = DATA / config.dataset
        ready = find(named if named.is_dir() else Path(config.dataset), "train")
        self.data, vocab_size = "random ids", config.vocab_size
        if config.real_data is True or (config.real_data == "auto" and ready):
            dataset = open_dataset(config.dataset, block_size=config.block_size, tokenizer=config.tokenizer)
            windows = TrainWindows(dataset.train, config.block_size, config.seed)  # type: ignore[arg-type]
            self.data, vocab_size = dataset.name, dataset.vocab_size
        torch.manual_seed(config.seed)
        self.model = GPT(shape_of(config, vocab_size))
        if config.recompute == "auto" and config.vram_gb:  # train.py looks at the whole card's memory
            room = config.vram_gb - MARGIN_GIB
            config.recompute = next((m for m in MODES if predict(config, self.model.config, m)["gib"] < room), "block")
        train.prepare_model(self.model, config, machine)
        self.step = train.Step(self.model.train(), config, machine)
        self.loader = train.Loader(windows, self.step, machine)
        self.rows = self.loader.load(0)

    def __call__(self) -> None:
        self.step(self.config.learning_rate, self.rows)
        self.position += self.config.batch_size * self.config.gradient_accumulation_steps
        self.rows = self.loader.load(self.position)


def clean() -> None:
    """Forget the last measurement: its memory, its peak, and what was compiled for its shapes."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def prepared(config: BenchConfig, without: Sequence[str] = ()) -> Iterator[Training]:
    """A Training that is ready, minus the techniques of the ladder that are named in `without`."""
    clean()
    config = replace(config, **{k: v for name in without if isinstance(w := WITHOUT[name], dict) for k, v in w.items()})
    machine = open_machine(config, Block(shape_of(config)))
    with contextlib.ExitStack() as stack:
        for context in (WITHOUT[name] for name in without if callable(WITHOUT[name])):
            stack.enter_context(context())
        if config.attention != "auto":
            kernel = {"flash": "FLASH_ATTENTION", "math": "MATH"}[config.attention]
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend[kernel]))
            # torch's cache of compiled graphs does not know which of attention's kernels they were bound to.
            stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield Training(config, machine)


def measure(config: BenchConfig, without: Sequence[str] = ()) -> Row:
    """Time train.py's step in this configuration, on all ranks together."""
    with prepared(config, without) as training:
        config, machine, step = training.config, training.machine, training.step
        row = time_steps(training, machine, step.warmup + 3, config.steps) | {"tokens": step.x.numel()}
        ranks = [{"tokens": row["tokens"], "ms": row["ms"], "peak_gib": row.get("peak_gib")}] * machine.world
        if machine.world > 1:
            dist.all_gather_object(ranks, ranks[0])
            row |= {"ranks": ranks, "tokens": sum(rank["tokens"] for rank in ranks)}
        row["tokens_per_s"] = sum(rank["tokens"] / rank["ms"] for rank in ranks) * 1e3
        row["ms"] = row["tokens"] / row["tokens_per_s"] * 1e3  # of one rank its median still
        row |= {key: getattr(config, key) for key in ("batch_size", "block_size", "recompute", "attention")}
        row |= {"micro_steps": step.micro_steps, "data": training.data, "parameters": training.model.num_params()}
        row |= {"dtype": str(machine.dtype).removeprefix("torch."), "compile": machine.compiled}
        row |= {"cuda_graph": step.graph is not None, "flops_per_token": training.model.flops_per_token(), "mfu": None}
        card, mine = find_card(config, machine), replace(config, gradient_accumulation_steps=step.micro_steps)
        if card and machine.dtype != torch.float32:
            if not config.lora_rank:  # 6N + 12LCT counts a gradient for every weight
                row["mfu"] = row["flops_per_token"] * row["tokens_per_s"] / machine.world / (card.tflops * 1e12)
            plan = predict(mine, training.model.config, config.recompute, card)
            row |= {"roofline": plan["floor_ms"] / row["ms"], "predicted_gib": plan["gib"], "predicted_ms": plan["ms"]}
        return row


def time_steps(run: Callable[[], None], machine: Machine, warmup: int, steps: int) -> Row:
    """Milliseconds of `steps` calls, none of which waits for the device; compiling is part of the warm-up.

    Returns the median and the deciles around it, seconds of warm-up, peak memory, the clock at work, and warnings.
    """
    machine.synchronize()
    started, driver = time.perf_counter(), None
    for _ in range(warmup):
        run()
    machine.synchronize()
    warmup_s, marks = time.perf_counter() - started, [mark(machine)]
    for i in range(steps):
        run()
        marks.append(mark(machine))
        if i == steps // 2 and machine.on_gpu:
            driver = ask_driver(machine)  # while it works: at rest its clock says nothing
    machine.synchronize()
    times = [a.elapsed_time(b) if machine.on_gpu else 1e3 * (b - a) for a, b in zip(marks, marks[1:])]
    deciles = quantiles(times, n=10, method="inclusive") if steps > 1 else times * 9
    row = {"ms": median(times), "ms_p10": deciles[0], "ms_p90": deciles[8], "steps": steps, "warmup_s": warmup_s}
    return row | (gpu_state(machine, times, driver) if machine.on_gpu else {"warnings": []})


def mark(machine: Machine) -> Any:
    """A point in time: an event in the GPU's queue, elsewhere the clock."""
    if machine.on_gpu:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    if machine.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def attempt(label: str, config: BenchConfig, without: Sequence[str] = ()) -> Row:
    """measure(), or a row that says that memory did not suffice."""
    say(f"measuring {label} ...")
    try:
        return {"label": label} | measure(config, without)
    except torch.OutOfMemoryError:
        return {"label": f"{label}: out of memory", "error": "out of memory"}


# --------------------------------------------------------------------------------------------------------------------
# The card

DRIVER = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "clocks_throttle_reasons.active")


def ask_driver(machine: Machine) -> subprocess.Popen[str] | None:
    """nvidia-smi on this very card, running beside us; None where there is none."""
    card = f"--id=GPU-{torch.cuda.get_device_properties(machine.device).uuid}"
    query = ["nvidia-smi", card, f"--query-gpu={','.join(DRIVER)}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def gpu_state(machine: Machine, times: list[float], driver: subprocess.Popen[str] | None) -> Row:
    """Peak memory and clock of the measurement that was just made, and what spoils its figures."""
    state = dict(zip(DRIVER, driver.communicate()[0].strip().split(", "))) if driver else {}
    (free, total), peak = torch.cuda.mem_get_info(), torch.cuda.max_memory_reserved()
    others = (total - free - torch.cuda.memory_reserved()) / GiB - 0.6  # our own context takes 0.4 to 0.6
    slower = median(times[-len(times) // 4 :]) / median(times[: -(-len(times) // 4)]) - 1
    hot = state.get("clocks_throttle_reasons.active", "0x0")
    trouble = {
        f"the steps became {slower:.0%} slower while measured: the clock drops, or others use the card": slower > 0.05,
        f"the driver holds the clock at {state.get('clocks.sm')} MHz, for heat or power": hot.startswith("0x")
        and int(hot, 16) & 0xE8,
        f"{others:.1f} GiB of the card's memory are others': nvidia-smi names them": others > 0.5
        and machine.world == 1,
        "the driver spills into the computer's own memory, which is slow: take a smaller batch_size": peak
        > total - max(0.0, others) * GiB,
    }
    memory = {"peak_gib": torch.cuda.max_memory_allocated() / GiB, "reserved_gib": peak / GiB, "total_gib": total / GiB}
    return memory | {"driver": state, "warnings": [text for text, holds in trouble.items() if holds]}


def find_card(config: BenchConfig, machine: Machine | None = None) -> Card | None:
    """A datasheet: what was given by hand, else the table's entry of this exact name and, of a real card, this memory."""
    if config.peak_tflops and config.bandwidth_gbs:  # GeForce cards do half of it beside their tensor cores
        return Card(config.peak_tflops, config.bandwidth_gbs, config.vram_gb or 0.0, config.peak_tflops / 2)
    card = CARDS.get(machine.name if machine else config.card)
    if card and machine and abs(torch.cuda.mem_get_info()[1] / GiB / card.vram_gb - 1) > 0.12:
        return None  # an RTX 3080 of 12 GB is another card than the one of 10
    return card


# --------------------------------------------------------------------------------------------------------------------
# The ladder


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class SeparateAdamW(torch.optim.AdamW):
    """AdamW as torch runs it unasked: in several passes, and clipping in one of its own."""

    def __init__(self, *args: Any, fused: bool, **options: Any):
        super().__init__(*args, foreach=True, **options)

    def step(self, closure: Any = None) -> Any:
        self.grad_scale = self.found_inf = None  # train.py has scaled the gradients already
        return super().step(closure)


class WholeLogits:
    """Output head and loss as everybody writes them, in the place of model.LinearCrossEntropy."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: Any) -> Tensor:
        loss = whole_loss if chunk is gpt.cross_entropy_chunk else torch.compile(whole_loss, dynamic=False)
        return loss(x, weight, targets, vocab_size)


def whole_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    logits = F.linear(x, weight)[:, :vocab_size].float()  # (N, vocab_size)
    return F.cross_entropy(logits, targets, ignore_index=MASKED, reduction="sum")


def residual_in_fp32(x: Tensor, rule: Callable[[Tensor], torch.dtype] = gpt.compute_dtype) -> torch.dtype:
    return x.dtype if x.ndim == 3 else rule(x)  # leaves the embeddings' sum, (B, T, C), as it is


# Technique -> the step without it: values of keys, or a context around the measurement.
WITHOUT: dict[str, dict[str, Any] | Callable[[], Any]] = {
    "TF32": lambda: swapped(torch.backends.cuda.matmul, "allow_tf32", False),
    "16-bit autocast": {"dtype": "float32"},
    "torch.compile": {"compile": False},
    "flash attention": {"attention": "math"},
    "padded vocabulary": lambda: swapped(GPTConfig, "padded_vocab_size", property(lambda self: self.vocab_size)),
    "fused AdamW": lambda: swapped(torch.optim, "AdamW", SeparateAdamW),
    "16-bit residual": lambda: swapped(gpt, "compute_dtype", residual_in_fp32),
    "loss in chunks": lambda: swapped(gpt, "LinearCrossEntropy", WholeLogits),
    "CUDA graph": {"cuda_graph": False},
    "recomputation": {"recompute": "none"},
}


def climb(config: BenchConfig, machine: Machine) -> list[Row]:
    """The ladder: plain fp32, then one technique more at each rung, in WITHOUT's order."""
    if config.recompute in ("auto", "none"):
        config = replace(config, recompute="pointwise")
    useless = {"TF32": not machine.on_gpu, "CUDA graph": not machine.on_gpu, "torch.compile": not machine.compiled}
    names = [name for name in WITHOUT if not useless.get(name)]
    while "error" in (lowest := attempt("fp32, eager", config, names)) and config.batch_size > 1:
        config = replace(config, batch_size=config.batch_size // 2)
        say(f"the lowest rung does not fit: a ladder at micro-batch {config.batch_size} instead")
    rows = [lowest] + [attempt(f"+ {name}", config, names[i:]) for i, name in enumerate(names, 1)]
    table(rows, STEP_COLUMNS)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# The plan: what a step has to do, counted, and how fast a card does that

# Fitted on GPT-2 124M on a H200 alone: micro-batch 32 and 64 (none), 12 and 32 (pointwise), 32 (block), all within 3%.
PRODUCTS = 0.70  # share of the datasheet's rate that matrix products of this size reach
GEFORCE_PRODUCTS = 0.88  # an estimate: these cards clock above their datasheet, and slower tensor cores wait less
BANDWIDTH = 0.75  # share of the datasheet's bandwidth that kernels reach which only move numbers
SOFTMAX_FLOPS = 60  # fp32 operations an element of the attention matrix and pass, beside the products
LAYER_S = 0.14e-3  # a layer's kernels ramping up and running out, a micro-batch


class Work(NamedTuple):
    """What one step has to do: counts, no times."""

    products: float  # floating-point operations of matrix products, attention's included
    softmax: float  # elements of the attention matrix, once a pass
    moved: float  # bytes that kernels other than products read and write
    layers: int  # times that a layer is run

    def seconds(self, card: Card, dtype: str) -> float:
        share = GEFORCE_PRODUCTS if card.tflops < 3 * card.fp32_tflops else PRODUCTS
        times = self.floor(Card(card.tflops * share, card.bandwidth_gbs * BANDWIDTH, 0, 0), dtype)
        return times + self.softmax * SOFTMAX_FLOPS / (card.fp32_tflops * 1e12) + self.layers * LAYER_S

    def floor(self, card: Card, dtype: str) -> float:
        """The roofline: the datasheet's rate for the products, and for the rest its bandwidth."""
        peak = card.tflops * (0.5 if dtype == "float32" else 1.0)  # TF32 has half of bf16's rate on every card here
        return self.products / (peak * 1e12) + self.moved / (card.bandwidth_gbs * 1e9)


def count_work(shape: GPTConfig, config: BenchConfig, recompute: str, trainable: int | None = None) -> Work:
    """Count a step's work. trainable: parameters that learn, if not all (LoRA)."""
    C, L, H, T = shape.n_embd, shape.n_layer, shape.n_head, config.block_size
    micro, number, full, again = (
        config.gradient_accumulation_steps,
        4 if config.dtype == "float32" else 2,
        trainable is None,
        recompute == "block",
    )
    tokens, blocks, head = micro * config.batch_size * T, 12 * C * C * L, C * shape.padded_vocab_size
    params = blocks + head + T * C
    # A weight: forward 2, backward 2 for its input's gradient and 2 for its own; a block that is computed again stops
    # before its last product, which nothing needs. Causal attention: two products forward, five backward (Dao 2023).
    products = (6 if full else 4) * (blocks + head) + 6 * (trainable or 0) + again * 2 * blocks * 8 / 12
    attention = (7 + 2 * again) * T * C * L
    muon = 300 * C**3 * L * (config.optimizer == "muon")  # five Newton-Schulz steps on q, k, v and three matrices more
    # Numbers a token, layer and channel: forward 16 (LayerNorm with the sum before it 4, twice; GELU 8), backward 30
    # (GELU 12; LayerNorm 6, twice; q, k, v joined 6); again 12 or 16; gradients of biases 9; adapters' sums 54.
    numbers = 46 + {"none": 0, "pointwise": 12, "block": 16}[recompute] + 9 * shape.bias + (0 if full else 54)
    token = number * (C * (L * numbers + 20) + 2 * head / C) + (8 * head / LOSS_CHUNK_ROWS if full else 0)
    # A micro-batch: weights cast down 6, gradients up 6; the head's zeroed, scaled and joined 28; all added up 12.
    per_micro = (12 * blocks * (number == 2) + 28 * head + 12 * params * (micro > 1)) if full else 0
    # The update: the norm reads 4 bytes; AdamW reads the gradient, reads and writes the weight and its moments: 28.
    update = (12 if config.optimizer == "adamw8bit" else 32) * (params if trainable is None else trainable)
    moved = tokens * token + micro * per_micro + update
    return Work(tokens * (products + attention) + muon, (2 + again) * tokens * T / 2 * H * L, moved, micro * L)


def predict(config: BenchConfig, shape: GPTConfig, recompute: str, card: Card | None = None) -> Row:
    """A step's peak memory by kind, GiB, and its milliseconds on `card`."""
    trainable = None
    if config.lora_rank:
        with torch.device("meta"):
            model = GPT(shape)
            model.add_lora(
                config.lora_rank, 1, 0, () if config.lora_targets == "all" else config.lora_targets.split(",")
            )
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = {kind: n / GiB for kind, n in train.step_memory(shape, config, recompute, trainable).items()}
    row: Row = {
        "batch_size": config.batch_size,
        "recompute": recompute,
        "gib": sum(memory.values()),
        "memory_gib": memory,
    }
    if card:
        work = count_work(shape, config, recompute, trainable)
        tokens, seconds = (
            config.batch_size * config.block_size * config.gradient_accumulation_steps,
            work.seconds(card, config.dtype),
        )
        row |= {
            "ms": 1e3 * seconds,
            "floor_ms": 1e3 * work.floor(card, config.dtype),
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
        }
    return row


def largest(config: BenchConfig, recompute: str, room: float) -> int:
    """The largest micro-batch whose predicted memory is within `room` GiB; 0 if none is."""
    gib = lambda size: predict(replace(config, batch_size=size), shape_of(config), recompute)["gib"]  # noqa: E731
    return bisect_right(range(1, 4097), room, key=gib)
