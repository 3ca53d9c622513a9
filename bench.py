"""Measure what this machine does with GPT-2: train.py's own step and sample.py's own decoding, never a copy of them.

`python bench.py --help` lists what can be measured; the last line of the output is JSON.
Reading order: main, measure, time_steps; WITHOUT (the ladder); count_work (the plan).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from timeit import repeat
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py does, before torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as gpt
import train
from config.machine import CARDS, Card, Machine, choose_device, join_ranks, open_machine, torchrun_ranks
from data import run as run_folder
from data.dataset import DATA, open_dataset
from data.shards import find_shards
from data.windows import TrainWindows
from gpt12 import config_loader
from gpt12.errors import UserError, run_main
from gpt12.settings import BenchConfig
from model import GPT, LOSS_CHUNK_ROWS, MASKED, Block, GPTConfig, Sampling

GiB = 2**30
MARGIN_GIB = 1.0  # of an emulated or planned card: the driver's context takes 0.4 GiB, a desktop 0.3 and more
RECOMPUTE = ("none", "pointwise", "block")
SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
# On a CPU 124M takes half a minute a step: unless a shape is given, it is that of nanoGPT's CPU command.
CPU_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65}
COLUMNS = {"": "{label}", "ms/step": "{ms:,.1f}", "10th to 90th percentile": "{ms_p10:,.1f} to {ms_p90:,.1f}"}
COLUMNS |= {"tokens/s": "{tokens_per_s:,.0f}", "x": "{times:.2f}", "MFU": "{mfu:.1%}", "peak GiB": "{peak_gib:.2f}"}
NOTHING_FITS = "nothing fits, not even one row: try --lora_rank=16, --optimizer=adamw8bit or a smaller model"
KEYS = "--batch_size={batch_size} --recompute={recompute}"
FASTEST = f"fastest: {KEYS}, {{tokens_per_s:,.0f}} tokens/s"
RANK, WORLD, _ = torchrun_ranks()
Row = dict[str, Any]  # of a table and of the JSON

# --------------------------------------------------------------------------------------------------------------------
# The step


def shape_of(config: Any) -> GPTConfig:
    return GPTConfig(**{key: getattr(config, key) for key in GPTConfig.__dataclass_fields__})


def open_data(config: Any) -> tuple[Any, Any]:
    """The configuration with its data set's vocabulary, and that data set; None where random ids stand in for it."""
    named, dataset = DATA / config.dataset, None
    ready = find_shards(named if named.is_dir() else Path(config.dataset), "train")
    if config.real_data is True or (config.real_data == "auto" and ready):
        dataset = open_dataset(config.dataset, block_size=config.block_size, tokenizer=config.tokenizer)
        config = replace(config, vocab_size=dataset.vocab_size)
    return config, dataset


class Training:
    """train.py's model, step and loader; a call makes one step and loads the next one's windows, as there.

    Its data are the data set's where that is prepared, else random ids, which take the same way.
    """

    def __init__(self, config: Any, machine: Machine):
        config, dataset = open_data(config)
        self.config, self.machine, self.position, self.data = config, machine, 0, "random ids"
        size, draw = config.block_size, np.random.default_rng(config.seed).integers
        batch = lambda position, count: draw(0, config.vocab_size, (2, count, size))  # noqa: E731 (x and y)
        windows: Any = SimpleNamespace(tokens=SimpleNamespace(mask=None), batch=batch)
        if dataset:
            windows, self.data = TrainWindows(dataset.train, size, config.seed), dataset.name
        torch.manual_seed(config.seed)
        self.model = GPT(shape_of(config))
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
def prepared(config: Any, without: Sequence[str] = ()) -> Iterator[Training]:
    """A Training that is ready, minus the techniques of the ladder that are named in `without`."""
    clean()
    missing = [WITHOUT[name] for name in without]
    config = replace(config, **{k: v for keys in missing if isinstance(keys, dict) for k, v in keys.items()})
    machine = open_machine(config)
    with contextlib.ExitStack() as stack:
        for patch in missing:
            if callable(patch):
                stack.enter_context(patch(config))
        if config.attention != "auto":
            kernels = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
            stack.enter_context(sdpa_kernel(kernels[config.attention]))
            # torch's cache of compiled graphs does not know which of attention's kernels they were bound to.
            stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield Training(config, machine)


def measure(config: Any, without: Sequence[str] = ()) -> Row:
    """Time train.py's step in this configuration, on all ranks together."""
    with prepared(config, without) as training:
        config, machine, step, model = training.config, training.machine, training.step, training.model
        row = time_steps(training, machine, step.warmup + 3, config.steps, step.x.numel())
        if machine.world > 1:
            ranks: list[Row] = [{}] * machine.world
            own = ("tokens", "tokens_per_s", "ms", "ms_p10", "ms_p90", "peak_gib")
            dist.all_gather_object(ranks, {key: row.get(key) for key in own})
            row |= {"ranks": ranks} | {key: sum(rank[key] for rank in ranks) for key in ("tokens", "tokens_per_s")}
            row["ms"] = row["tokens"] / row["tokens_per_s"] * 1e3
            row |= {"ms_p10": min(r["ms_p10"] for r in ranks), "ms_p90": max(r["ms_p90"] for r in ranks)}
        row |= {key: getattr(config, key) for key in ("batch_size", "block_size", "recompute", "attention")}
        row |= {"micro_steps": step.micro_steps, "data": training.data, "parameters": model.num_params()}
        row |= {"dtype": str(machine.dtype).removeprefix("torch."), "compile": machine.compiled, "mfu": None}
        row |= {"cuda_graph": step.graph is not None, "loss": step.loss.item()}
        row["flops_per_token"] = model.flops_per_token()
        if (card := find_card(config, machine)) and machine.dtype != torch.float32:
            if not config.lora_rank:  # 6N + 12LCT counts a gradient for every weight
                row["mfu"] = row["flops_per_token"] * row["tokens_per_s"] / machine.world / (card.tflops * 1e12)
            plan = predict(replace(config, gradient_accumulation_steps=step.micro_steps), config.recompute, card)
            row |= {"roofline": plan["floor_ms"] / row["ms"], "predicted_gib": plan["gib"], "predicted_ms": plan["ms"]}
    for text in row["warnings"]:
        say(f"warning: {text}")
    return row


def time_steps(run: Callable[[], None], machine: Machine, warmup: int, steps: int, tokens: int) -> Row:
    """Milliseconds of `steps` calls, none of which waits for the device; compiling is part of the warm-up.

    Returns their median and outer deciles, what that is in tokens/s at `tokens` a call, the warm-up's seconds and, of
    a GPU, its memory, its clock and warnings.
    """

    def mark() -> Any:
        if not machine.on_gpu:
            machine.synchronize()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # a point in time in the GPU's own queue
        event.record()
        return event

    started, driver = time.perf_counter(), None
    for _ in range(warmup):
        run()
    machine.synchronize()
    warmup_s, marks = time.perf_counter() - started, [mark()]
    for i in range(steps):
        run()
        marks.append(mark())
        if i == steps // 2 and machine.on_gpu:
            driver = ask_driver(machine)  # while it works: at rest its clock says nothing
    machine.synchronize()
    times = [a.elapsed_time(b) if machine.on_gpu else 1e3 * (b - a) for a, b in pairwise(marks)]
    deciles = quantiles(times, n=10, method="inclusive") if steps > 1 else times * 9
    row: Row = {"ms": median(times), "ms_p10": deciles[0], "ms_p90": deciles[8], "steps": steps, "warmup_s": warmup_s}
    row |= {"tokens": tokens, "tokens_per_s": 1e3 * tokens / row["ms"]}
    return row | (gpu_state(machine, times, driver) if machine.on_gpu else {"warnings": []})


def attempt(label: str, config: Any, how: Callable[[Any], Row] | None = None) -> Row:
    """A measurement, or a row that says that memory did not suffice."""
    say(f"measuring {label} ...")
    try:
        return {"label": label} | (how or measure)(config)
    except RuntimeError as error:
        if not train.memory_ran_out(error):
            raise
        return {"label": f"{label}: out of memory", "error": "out of memory", "batch_size": config.batch_size}


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
    others = max(0.0, (total - free - torch.cuda.memory_reserved()) / GiB - 0.8)  # our own context takes 0.4 to 0.8
    slower = median(times[-len(times) // 4 :]) / median(times[: -(-len(times) // 4)]) - 1
    reasons, clock = state.get(DRIVER[-1], ""), state.get("clocks.sm")
    held = int(reasons, 16) & 0xE8 if reasons.startswith("0x") else 0  # heat (by hardware, by software), power brake
    signs = {
        f"the steps became {slower:.0%} slower while measured: the clock drops, or others use the card": slower > 0.05,
        f"the driver holds the clock at {clock} MHz, for heat or power": held,
        f"{others:.1f} GiB of the card's memory are others': nvidia-smi names them": others > 0.5 and machine.world < 2,
        "the driver spills into the computer's memory, which is slow: lower batch_size": peak > total - others * GiB,
    }
    memory = {"peak_gib": torch.cuda.max_memory_allocated() / GiB, "reserved_gib": peak / GiB, "total_gib": total / GiB}
    return memory | {"driver": state, "warnings": [text for text, holds in signs.items() if holds]}


def find_card(config: Any, machine: Machine | None = None) -> Card | None:
    """A datasheet: given by hand, else the table's of this exact name and, of a card that is here, this memory."""
    if config.peak_tflops and config.bandwidth_gbs:  # GeForce cards do half of it beside their tensor cores
        return Card(config.peak_tflops, config.bandwidth_gbs, config.vram_gb or 0.0, config.peak_tflops / 2)
    card = CARDS.get(machine.name if machine else config.card)
    if card and machine and abs(torch.cuda.mem_get_info()[1] / GiB / card.vram_gb - 1) > 0.12:
        return None  # the RTX 3080 of 12 GB is another card than the one of 10
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
    """AdamW as torch runs it unasked: in several passes, with clipping in one of its own."""

    def __init__(self, *args: Any, fused: bool, **options: Any):
        super().__init__(*args, **options)

    def step(self, closure: Any = None) -> Any:
        self.grad_scale = self.found_inf = None  # train.py has scaled the gradients already
        return super().step(closure)


def whole_logits(config: Any) -> contextlib.AbstractContextManager[None]:
    """Head and loss as everybody writes them, in the place of model.LinearCrossEntropy."""

    def loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
        logits = F.linear(x, weight)[:, :vocab_size].float()  # (N, vocab_size)
        return F.cross_entropy(logits, targets, ignore_index=MASKED, reduction="sum")

    loss = torch.compile(loss, dynamic=False, disable=not config.compile)
    return swapped(gpt, "LinearCrossEntropy", SimpleNamespace(apply=lambda *args: loss(*args[:4])))


def residual_in_fp32(config: Any) -> contextlib.AbstractContextManager[None]:
    """Leave the embeddings' sum, (B, T, C), as it is; what goes into the head, (N, C), is cast as ever."""
    rule = gpt.compute_dtype
    return swapped(gpt, "compute_dtype", lambda x: x.dtype if x.ndim == 3 else rule(x))


# Technique -> the step without it: values of keys, or a context around the measurement.
WITHOUT: dict[str, Any] = {
    "TF32": lambda _: swapped(torch.backends.cuda.matmul, "allow_tf32", False),
    "16-bit autocast": {"dtype": "float32"},
    "torch.compile": {"compile": False},
    "flash attention": {"attention": "math"},
    "padded vocabulary": lambda _: swapped(GPTConfig, "padded_vocab_size", property(lambda self: self.vocab_size)),
    "fused AdamW": lambda _: swapped(train, "AdamW", SeparateAdamW),
    "16-bit residual": residual_in_fp32,
    "loss in chunks": whole_logits,
    "CUDA graph": {"cuda_graph": False},
    "recomputation": {"recompute": "none"},
}


def ladder(config: Any, machine: Machine) -> list[Row]:
    """Plain fp32, then one technique more at each rung, in WITHOUT's order."""
    if config.recompute in ("auto", "none"):
        config = replace(config, recompute="pointwise")
    no_gpu, wide = "no GPU" * (not machine.on_gpu), "float32" * (machine.dtype == torch.float32)
    vocab, separate = open_data(config)[0].vocab_size, config.optimizer != "adamw"
    useless = {"TF32": no_gpu, "CUDA graph": no_gpu, "torch.compile": "off" * (not machine.compiled)}
    useless |= {"16-bit autocast": wide, "16-bit residual": wide, "fused AdamW": config.optimizer * separate}
    useless["padded vocabulary"] = f"of {vocab:,}" * (vocab % 64 == 0)
    names = [name for name in WITHOUT if not useless.get(name)]
    if len(names) < len(WITHOUT):
        left_out = [f"{name} ({useless[name]})" for name in WITHOUT if name not in names]
        say(f"rungs left out, for little or nothing would change here: {', '.join(left_out)}")

    def rung(i: int) -> Row:
        return attempt(f"+ {names[i - 1]}" if i else "fp32, eager", config, partial(measure, without=names[i:]))

    while "error" in (lowest := rung(0)) and config.batch_size > 1:
        config = replace(config, batch_size=config.batch_size // 2)
        say(f"the lowest rung does not fit: a ladder at micro-batch {config.batch_size} instead")
    return show([lowest, *map(rung, range(1, len(names) + 1))])


# --------------------------------------------------------------------------------------------------------------------
# The plan: what a step has to do, counted, and how fast a card does that

# Fitted on GPT-2 124M on a H200 alone: micro-batch 32 and 64 (none), 12 and 32 (pointwise), 32 (block), all within 2%.
PRODUCTS = 0.69  # share of the datasheet's rate that matrix products of this size reach
GEFORCE_PRODUCTS = 0.88  # an estimate: these cards clock above their datasheet, and slower tensor cores wait less
BANDWIDTH = 0.73  # share of the datasheet's bandwidth that kernels reach which only move numbers
SOFTMAX_FLOPS = 60  # fp32 operations an element of the attention matrix and pass, beside the products
LAYER_S = 0.15e-3  # a layer's kernels ramping up and running out, a micro-batch


def count_work(config: Any, recompute: str, trainable: int | None = None) -> Row:
    """What a step has to do: operations of products, elements of softmax, bytes moved by all other kernels.

    trainable: parameters that learn, if not all (LoRA).
    """
    C, L, H, T, V = config.n_embd, config.n_layer, config.n_head, config.block_size, shape_of(config).padded_vocab_size
    number, full, again = (4 if config.dtype == "float32" else 2), trainable is None, recompute == "block"
    micro, blocks, head = config.gradient_accumulation_steps, 12 * C * C * L, C * V
    tokens, params = micro * config.batch_size * T, blocks + head + T * C
    # A weight: forward 2, backward 2 for its input's gradient and 2 for its own; a block that is computed again stops
    # before its last product, which nothing needs. Causal attention: two products forward, five backward (Dao 2023).
    products = (6 if full else 4) * (blocks + head) + 6 * (trainable or 0) + again * 2 * blocks * 8 / 12
    attention = (7 + 2 * again) * T * C * L
    muon = 300 * C**3 * L * (config.optimizer == "muon")  # five Newton-Schulz steps on q, k, v and three matrices more
    # Numbers a token, layer and channel: forward 16 (LayerNorm with the sum before it 4, twice; GELU 8), backward 30
    # (GELU 12; LayerNorm 6, twice; q, k, v joined 6); again 12 or 16; gradients of biases 9; adapters' sums 54.
    numbers = 46 + {"none": 0, "pointwise": 12, "block": 16}[recompute] + 9 * config.bias + (0 if full else 54)
    token = number * (C * (L * numbers + 20) + 2 * V) + (8 * head / LOSS_CHUNK_ROWS if full else 0)
    # A micro-batch: weights cast down 6, gradients up 6; the head's zeroed, scaled and joined 28; all added up 12.
    per_micro = (12 * blocks * (number == 2) + 28 * head + 12 * params * (micro > 1)) if full else 0
    # The update: the norm reads 4 bytes; AdamW reads the gradient, reads and writes the weight and its moments: 28.
    update = (12 if config.optimizer == "adamw8bit" else 32) * (params if trainable is None else trainable)
    moved, softmax = tokens * token + micro * per_micro + update, (2 + again) * tokens * T / 2 * H * L
    flops = tokens * (products + attention) + muon
    return {"tokens": tokens, "flops": flops, "softmax": softmax, "bytes": moved, "layers": micro * L}


def predict(config: Any, recompute: str, card: Card | None = None) -> Row:
    """A step's peak memory by kind, GiB, and its time on `card`."""
    shape, trainable = shape_of(config), None
    if config.lora_rank:  # the sum of inputs and outputs of the layers that get an adapter
        wide = {"c_attn": 4, "c_proj": 7, "c_fc": 5}
        chosen = wide if config.lora_targets == "all" else config.lora_targets.split(",")
        trainable = config.lora_rank * shape.n_layer * shape.n_embd * sum(wide[name] for name in chosen)
    parts = train.step_memory(shape, config, recompute, trainable, compiled=config.compile is not False)
    memory = {kind: n / GiB for kind, n in parts.items()}
    row = {"batch_size": config.batch_size, "recompute": recompute, "gib": sum(memory.values()), "memory_gib": memory}
    if card is None:
        return row
    work = count_work(config, recompute, trainable)
    peak = card.tflops * 1e12 * (0.5 if config.dtype == "float32" else 1.0)  # TF32's rate is half of bf16's
    products, moves = work["flops"] / peak, work["bytes"] / (card.bandwidth_gbs * 1e9)
    share = GEFORCE_PRODUCTS if card.tflops < 3 * card.fp32_tflops else PRODUCTS
    softmax = work["softmax"] * SOFTMAX_FLOPS / (card.fp32_tflops * 1e12)
    seconds = products / share + moves / BANDWIDTH + softmax + work["layers"] * LAYER_S
    rate = {"ms": 1e3 * seconds, "tokens_per_s": work["tokens"] / seconds, "floor_ms": 1e3 * (products + moves)}
    return row | {"tokens": work["tokens"]} | rate


def largest(config: Any, recompute: str, room: float) -> int:
    """The largest micro-batch whose predicted memory is within `room` GiB, at most 1,024; 0 if none is."""
    return bisect_right(range(1, 1025), room, key=lambda n: predict(replace(config, batch_size=n), recompute)["gib"])


def plan(config: Any, argv: list[str]) -> Row:
    """What a card could do with this model and method, by the formulas alone.

    argv: what was asked for, so that the command which measures it can be told.
    """
    card = find_card(config)
    if card is None or not (config.vram_gb or card.vram_gb):
        hint = "Give --peak_tflops, --bandwidth_gbs and --vram_gb from its datasheet, or --card= one of"
        raise UserError(f"card={config.card} is unknown, or its memory is. {hint}\n  " + "\n  ".join(CARDS))
    room, candidates, rows = (config.vram_gb or card.vram_gb) - MARGIN_GIB, [], []
    for recompute in RECOMPUTE if config.recompute == "auto" else (config.recompute,):
        if top := largest(config, recompute, room):
            sizes = [*(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < top), top]
            candidates += [predict(replace(config, batch_size=n), recompute, card) for n in sizes]
            rows.append(candidates[-1])  # the largest is the fastest, and all that the line of JSON needs
    name = "this card" if config.peak_tflops else config.card
    method = f"LoRA of rank {config.lora_rank}" if config.lora_rank else f"all weights, {config.optimizer}"
    said = f"predicted: {config.n_layer} layers, {config.n_embd} wide, {method}, in {room:g} GiB of {name}"
    say(said + "; uncompiled it takes that memory, but more than that time" * (config.compile is False))
    best = max(rows, key=lambda row: row["tokens_per_s"], default={})
    columns = {"recompute": "{recompute}", "micro-batch": "{batch_size}"}
    columns |= {kind: f"{{memory_gib[{kind}]:.2f}}" for row in candidates for kind in row["memory_gib"]}
    table(candidates, columns | {"GiB in all": "{gib:.2f}", "ms/step": "{ms:,.1f}", "tokens/s": "{tokens_per_s:,.0f}"})
    if best:
        other = ("--plan", "--card", "--batch_size", "--batch-size", "--recompute")  # there, or in KEYS
        kept = [word for word in argv if not word.startswith(other)]
        command = shlex.join(["python", "bench.py", *kept, *fill(KEYS, best).split()])
        say(fill(FASTEST, best))
        say(f"these are predictions for that card; measure it there: {command}")
    else:
        say(NOTHING_FITS)
    return {"card": name, **card._asdict(), "room_gib": room, "rows": rows, "best": best}


# --------------------------------------------------------------------------------------------------------------------
# What can be measured

FACTS = {
    "model": "{parameters:,} parameters, {dtype}, recompute={recompute}, compile={compile}, cuda_graph={cuda_graph}",
    "step": "{tokens:,} tokens in micro-batches of {batch_size} x {block_size}, {data}",
    "time": "{ms:,.1f} ms, from {ms_p10:,.1f} to {ms_p90:,.1f} (10th to 90th percentile of {steps} steps)",
    "speed": "{tokens_per_s:,.0f} tokens/s",
    "MFU": "{mfu:.1%} of the datasheet's bf16 rate, by 6N + 12LCT a token",
    "roofline": "{roofline:.0%} of what rate and bandwidth allow; the plan says {predicted_ms:,.1f} ms",
    "memory": "{peak_gib:.2f} GiB allocated at the peak, {reserved_gib:.2f} reserved of {total_gib:.1f}",
    "planned": "{predicted_gib:.2f} GiB",
    "driver": "{driver[driver_version]}, at {driver[clocks.sm]} of {driver[clocks.max.sm]} MHz, {driver[power.draw]} W",
    "warm-up": "{warmup_s:.1f} s, compilation included",
}


def step(config: Any, machine: Machine) -> Row:
    """One configuration in full."""
    row = measure(config)
    for name, text in FACTS.items():
        if value := fill(text, row):
            say(f"{name:<9} {value}")
    table(row.get("ranks", []), {"each rank: tokens": "{tokens:,}", "ms": "{ms:,.1f}", "peak GiB": "{peak_gib:.2f}"})
    return row


def sweep(config: Any, machine: Machine) -> list[Row]:
    """The step at each value of one key: KEY:VALUE,VALUE."""
    key, _, values = config.sweep.partition(":")
    if not values:
        raise UserError(f"sweep={config.sweep} is no KEY:VALUE,VALUE such as --sweep=batch_size:4,8,16")
    settings = [f"{key}={value}" for value in values.split(",")]
    base = asdict(config)  # all are read before the first is measured: a misspelt one costs no time
    configs = [config_loader.load(BenchConfig, [f"--{setting}"], base)[0] for setting in settings]
    return show([attempt(setting, c) for setting, c in zip(settings, configs)])


def find_batch(config: Any, machine: Machine) -> Row:
    """The fastest micro-batch that fits: half, three quarters and all of what the plan allows, measured."""
    room = torch.cuda.mem_get_info()[0] / GiB if machine.on_gpu else None  # of a CPU's memory nothing is known
    room = config.vram_gb - MARGIN_GIB if config.vram_gb else room
    trials = []
    for recompute in RECOMPUTE if config.recompute == "auto" and room else (config.recompute.replace("auto", "none"),):
        top = largest(config, recompute, room) if room else 0
        sizes = {n for n in (top // 2, top * 3 // 4, top * 19 // 20, top) if n} if room else {1, 2, 4, 8, 16, 32}
        trials += [replace(config, batch_size=n, recompute=recompute) for n in sorted(sizes)]
    rows = show([attempt(fill(KEYS, vars(trial)), trial) for trial in trials])
    best = max((row for row in rows if "error" not in row), key=lambda row: row["tokens_per_s"], default=None)
    if best is None:
        raise UserError(NOTHING_FITS)
    config.batch_size, config.recompute = best["batch_size"], best["recompute"]  # for what is measured after this
    say(fill(FASTEST, best))
    return {"room_gib": room, "rows": rows, "best": best}


def compare(config: Any, machine: Machine) -> Row:
    """Ours, theirs, ours, theirs: what changes on the machine meanwhile changes both. All on random ids."""
    config = replace(open_data(config)[0], real_data=False)
    ways: dict[str, Any] = {"gpt12": measure, "transformers, eager": partial(measure_theirs, machine, False)}
    if machine.compiled:
        ways["transformers, compiled"] = partial(measure_theirs, machine, True)
    rows = show([attempt(name, config, way) for name, way in [*ways.items()] * 2])
    rates = {name: [row["tokens_per_s"] for row in rows if row["label"] == name] for name in ways}
    ours = rates.pop("gpt12")
    ratios = {name: median(ours) / median(theirs) for name, theirs in rates.items() if ours and theirs}
    for name, ratio in ratios.items():
        say(f"gpt12 is {ratio:.2f} times as fast as {name}")
    return {"rows": rows, "ratios": ratios}


def match_theirs(config: Any, given: set[str], argv: list[str], trains: bool) -> None:
    """Make ours the model and the method that theirs are, but for what the user asked for: that is told.

    An optimizer out of a config file is not asked for: a preset has the one that it trains best with.
    """
    if trains and config.optimizer != "adamw" and not any(a.lstrip("-").startswith("optimizer=") for a in argv):
        say(f"optimizer=adamw in place of {config.optimizer}, because transformers is measured with it")
        config.optimizer = "adamw"
    config.bias = config.bias or "bias" not in given
    differs = {
        "transformers has biases, this run has none": not config.bias,
        f"transformers has AdamW, this run {config.optimizer}": trains and config.optimizer != "adamw",
        "transformers trains all weights, this run LoRA's": trains and config.lora_rank,
    }
    for text in (text for text, holds in differs.items() if holds):
        say(f"not the same work: {text}")


def their_model(config: Any, cache: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    options: Row = {key: getattr(config, key) for key in ("n_embd", "n_layer", "n_head", "vocab_size")}
    options |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    options |= {"bos_token_id": None, "eos_token_id": None}  # so that no text ends early
    return GPT2LMHeadModel(GPT2Config(n_positions=config.block_size, use_cache=cache, **options))


def measure_theirs(machine: Machine, compiled: bool, config: Any) -> Row:
    """Time the same work by transformers, as its users write it."""
    clean()
    model = their_model(config, cache=False).to(machine.device).train()
    forward = torch.compile(model) if compiled else model
    sides = [p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": side, "weight_decay": decay} for side, decay in zip(sides, (config.weight_decay, 0.0))]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=True)
    x = torch.randint(config.vocab_size, (config.batch_size, config.block_size), device=machine.device)

    def run() -> None:
        for _ in range(config.gradient_accumulation_steps):
            with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
                loss = forward(x, labels=x).loss / config.gradient_accumulation_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return time_steps(run, machine, 5, config.steps, config.gradient_accumulation_steps * x.numel())


def profile(config: Any, machine: Machine) -> Row:
    """The ten costliest kernels of a step and the rate of its matrix products; trace.json for a closer look."""
    with prepared(replace(config, cuda_graph=False)) as training:  # of a replayed graph no operation is seen
        for _ in range(training.step.warmup + 2):
            training()
        machine.synchronize()
        with torch.profiler.profile(record_shapes=True, with_flops=True, acc_events=True) as profiler:
            for _ in range(3):
                training()
            machine.synchronize()
    profiler.export_chrome_trace("trace.json")
    say("wrote trace.json; chrome://tracing shows it")
    kind, device = ("device", "CUDA") if machine.on_gpu else ("cpu", "CPU")
    events = [e for e in profiler.key_averages() if not e.is_user_annotation]
    times = {e.key: getattr(e, f"self_{kind}_time_total") / 3e3 for e in events if e.device_type.name == device}
    total, costliest = sum(times.values()), sorted(times.items(), key=lambda item: -item[1])[:10]
    rows = [{"kernel": key, "ms": ms, "share": ms / total} for key, ms in costliest]
    table(rows, {"kernel": "{kernel:.80}", "ms/step": "{ms:,.2f}", "share": "{share:.1%}"})
    products = [e for e in events if e.key in ("aten::mm", "aten::addmm", "aten::bmm")]
    ms, flops = sum(getattr(e, f"{kind}_time_total") for e in products) / 3e3, sum(e.flops for e in products) / 3
    result = {"kernels": rows, "total_ms": total, "products_ms": ms, "products_tflops": flops / ms / 1e9}
    say(fill("matrix products: {products_ms:,.1f} of {total_ms:,.1f} ms, at {products_tflops:,.2f} TFLOP/s", result))
    return result


def sample(config: Any, machine: Machine) -> list[Row]:
    """Prefill of a quarter of the context and decoding after it, as sample.py does them, over batches."""
    length, theirs = max(1, config.block_size // 4), None
    if config.compare != "none":
        theirs = their_model(config, cache=True).to(machine.device, machine.dtype).eval()
    card, rows, new = find_card(config, machine), [], min(config.max_new_tokens, config.block_size - length)
    options: Row = {"sampling": Sampling(0.8, top_k=200), "compiled": machine.compiled}

    def pace(label: str, batch: int, prefill: float, times: list[float]) -> Row:
        gap = median(b - a for a, b in pairwise(times[min(2, len(times) - 2) :]))  # the first compile and record
        row: Row = {"label": label, "batch": batch, "ms": 1e3 * gap, "tokens_per_s": batch / gap}
        row |= {"prefill_ms": 1e3 * prefill, "prefill_tokens_per_s": batch * length / prefill}
        if card:
            row["bound_tokens_per_s"] = batch * card.bandwidth_gbs * 1e9 / model.decode_bytes()
            row["bound_share"] = row["tokens_per_s"] / row["bound_tokens_per_s"]
        return row

    for batch in (1, 4, 16, 64):
        clean()
        with machine.device:  # a new model each time: the one before is compiled for its batch
            model = GPT(shape_of(config)).eval()
        if config.quantize == "int8":
            model.quantize()
        model.to(machine.dtype)
        if not machine.on_gpu:
            model.store_by_columns()
        prompt = torch.randint(config.vocab_size, (batch, length))
        start = partial(model.generate, prompt.tolist(), 1, **options)
        prefill = median(repeat(start, number=1, repeat=4))
        times = [time.perf_counter() for _ in model.stream(prompt.tolist(), new, **options)]
        rows.append(pace(f"batch {batch}", batch, prefill, times))
        for cache in (None, "static")[: 1 + machine.on_gpu] if theirs else ():
            for _ in range(2):  # the second time nothing is compiled any more
                times = their_times(theirs, prompt.to(machine.device), new, cache)
            rows.append(pace(f"transformers, {cache or 'dynamic'} cache", batch, times[1] - times[0], times[1:]))
    columns = {"": "{label}", "prefill ms": "{prefill_ms:,.1f}", "ms/token": "{ms:,.2f}"}
    columns |= {"tokens/s": "{tokens_per_s:,.0f}", "bound": "{bound_tokens_per_s:,.0f}", "share": "{bound_share:.0%}"}
    table(rows, columns)
    if card:
        say("bound: every weight read once a token, at the datasheet's bandwidth")
    return rows


def their_times(model: Any, prompt: torch.Tensor, new: int, cache: str | None) -> list[float]:
    """When transformers began and when each of its tokens arrived."""
    times: list[float] = []
    streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    options: Row = {"max_new_tokens": new, "do_sample": True, "temperature": 0.8, "top_k": 200, "streamer": streamer}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), cache_implementation=cache, **options)
    return times


# --------------------------------------------------------------------------------------------------------------------
# Telling


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def fill(text: str, row: Row) -> str:
    """text with the row's figures in it; nothing if one of them is not known."""
    try:
        return text.format(**row)
    except (KeyError, TypeError):
        return ""


def table(rows: list[Row], columns: dict[str, str]) -> None:
    lines = [list(columns), *([fill(text, row) for text in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) * any(line[i] for line in lines[1:]) for i in range(len(columns))]
    for line in lines if rows else ():
        cells = [f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(line, widths)) if width]
        say("  ".join(cells).rstrip())


def show(rows: list[Row]) -> list[Row]:
    """Print steps side by side, with their speed as a multiple of the first one's."""
    rates = [row["tokens_per_s"] for row in rows if "error" not in row]
    table([row if "error" in row else row | {"times": row["tokens_per_s"] / rates[0]} for row in rows], COLUMNS)
    return rows


def draw(result: Row, title: str) -> None:
    """bench.png: a panel of bars for each figure, told apart by place and number, never by colour alone."""
    from matplotlib.figure import Figure  # without pyplot: half the import time

    steps, texts = result.get("ladder") or result.get("sweep", []), result.get("sample", [])
    panels = [
        ("training, tokens/s", "#0072B2", steps, "tokens_per_s", "{tokens_per_s:,.0f}"),
        ("training, peak GiB", "#E69F00", steps, "peak_gib", "{peak_gib:.2f}"),
        ("decoding, tokens/s", "#009E73", texts, "tokens_per_s", "{tokens_per_s:,.0f}"),
    ]  # blue, orange, green of Okabe and Ito
    panels = [panel for panel in panels if any(panel[3] in row for row in panel[2])]
    height = 1.2 + 0.33 * max((len(rows) for _, _, rows, *_ in panels), default=0)
    figure = Figure((1.5 + 4.2 * len(panels), height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for i, (what, color, rows, key, text) in enumerate(panels):
        axis = figure.add_subplot(1, len(panels), i + 1)
        bars = axis.barh(range(len(rows)), [row.get(key, 0) for row in rows], color=color)
        axis.bar_label(bars, [fill(text, row) for row in rows], padding=3, fontsize=8)
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axis.set(xlabel=what, xticks=[])  # the figures stand at the bars
        axis.margins(x=0.2)
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig("bench.png", dpi=110)
    say("wrote bench.png")


# --------------------------------------------------------------------------------------------------------------------
# Which of all this

MODES = (find_batch, step, sweep, ladder, compare, profile, sample)  # in the order in which they are run


def settle(config: Any, given: set[str]) -> set[str]:
    """Put in the shape that is meant, and name the modes to run. Raises UserError for what cannot be."""
    if config.init_from in SHAPES:
        config.n_layer, config.n_head, config.n_embd, config.bias = *SHAPES[config.init_from], True
    elif config.init_from != "scratch":
        known = ", ".join(SHAPES)
        raise UserError(f"init_from={config.init_from}: of a model only the shape is measured, so it may be {known}")
    elif not config.plan and not given & CPU_SHAPE.keys() and choose_device(config.device, []) == "cpu":
        say("on a CPU the model is the small one of nanoGPT's CPU command, unless you give a shape")
        vars(config).update(CPU_SHAPE)
    if "gradient_accumulation_steps" not in given:
        config.gradient_accumulation_steps = WORLD
    if config.gradient_accumulation_steps % WORLD:
        micro = config.gradient_accumulation_steps
        raise UserError(f"gradient_accumulation_steps={micro} is not a multiple of {WORLD} ranks")
    if config.compare != "none" and importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed, so there is nothing to compare with: pip install transformers")
    asked = {mode.__name__ for mode in MODES if getattr(config, mode.__name__, None) not in (None, False, "none")}
    asked |= {"step", "ladder", "sample"} if config.report else set()
    asked |= {"find_batch"} if config.batch_size == "auto" else set()
    asked -= {"compare"} if config.sample else set()  # then it is decoding that is compared
    if asked and WORLD > 1:
        raise UserError(f"under torchrun only the step is measured: leave out {', '.join(sorted(asked))}")
    return asked or {"step"}


def main(argv: list[str] | None = None) -> None:
    config: Any
    argv = sys.argv[1:] if argv is None else argv
    config, given = config_loader.load(BenchConfig, argv)
    modes, name = settle(config, given), config.card
    result: Row = {}
    if config.plan:
        result["plan"] = plan(config, argv)
    else:
        join_ranks(config)
        machine = open_machine(config, Block(shape_of(config)))
        name, config.compile, config.dtype = machine.name, machine.compiled, str(machine.dtype).removeprefix("torch.")
        say("\n".join([f"{name}, torch {torch.__version__}", *machine.notes]))
        if config.vram_gb and not machine.on_gpu:
            raise UserError(f"vram_gb={config.vram_gb:g} needs a GPU, whose memory it limits; --plan needs none")
        if config.vram_gb:
            total, room = torch.cuda.mem_get_info()[1] / GiB, config.vram_gb - MARGIN_GIB
            if not 0 < room <= total:
                raise UserError(f"vram_gb={config.vram_gb:g} cannot be emulated on a card of {total:.1f} GiB")
            torch.cuda.set_per_process_memory_fraction(room / total)
            say(f"emulating {config.vram_gb:g} GB: the allocator gets {room:g} GiB, driver and desktop the rest")
        if config.compare != "none":
            match_theirs(config, given, argv, "compare" in modes)
        result = {mode.__name__: mode(config, machine) for mode in MODES if mode.__name__ in modes}
        if WORLD > 1:
            dist.destroy_process_group()
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    result = run_folder.describe(changed, device=name, **result)
    if {"sweep", "ladder", "sample"} & result.keys():
        rows = {row["batch_size"] for row in result.get("ladder") or result.get("sweep", [])}  # a ladder may halve it
        size = (f"{rows.pop():,} x {{:,}} tokens" if len(rows) == 1 else "{:,} tokens a row").format(config.block_size)
        draw(result, f"{name}, {config.n_layer} layers, {config.n_embd:,} wide, {size}")
    if config.report:
        run_folder.write_json(Path("bench.json"), result)
        say("wrote bench.json; the README says where to publish both")
    say(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
