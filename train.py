"""Train or fine-tune a GPT: the optimizer, the schedule, one step, evaluation, and the loop around them.

    python train.py                                          # tiny Shakespeare, the preset that suits this machine
    python train.py config/train_gpt2.py --batch_size=8      # a preset, a changed key
    python train.py --init_from=resume --out_dir=out         # go on where a run stopped
    torchrun --nproc_per_node=2 train.py config/...          # one process a GPU

Reading order: as it stands. Optimizers and schedule, Step (one update), its memory, Loader and evaluate, Run (the loop),
then what Run calls: what a run starts from, what resuming needs, the command line.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch: less memory lost to gaps

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from config.machine import Machine, join_ranks, open_machine, torchrun_ranks
from data import run as run_folder
from gpt12 import config_loader
from gpt12.errors import UserError, run_main
from gpt12.settings import TrainConfig, as_dict
from model import GPT, LOSS_CHUNK_ROWS, MASKED, GPTConfig, Sampling, find_pretrained

# compile=auto: a run of fewer operations than this is over before compiling, some 10 s, has paid. Recorded as a CUDA
# graph, the plain step of a small model takes 1.3 times as long as the compiled one (measured, see the README).
COMPILE_FROM_FLOPS = 6e15
# cuda_graph=auto: a step of more layers than this, over all micro-batches, would make a graph of over 50,000 kernels.
GRAPH_UP_TO_LAYERS = 1000
SAMPLE_TOKENS = 160  # length of the text shown at each evaluation


# --------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule


class Optimizer(torch.optim.Optimizer):
    """torch's without the wrapper that keeps this method and `step` from being compiled: that imports torch's compiler,
    which takes 1 to 3 s."""

    add_param_group = getattr(
        torch.optim.Optimizer.add_param_group, "__wrapped__", torch.optim.Optimizer.add_param_group
    )


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's (Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2)."""

    step = torch.no_grad()(getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step))


class Muon(Optimizer):
    """Momentum made orthogonal, for the blocks' matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    The step is scaled to AdamW's usual size, 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv:2502.16982, 2.2), so
    one learning rate serves both. Equal shapes are stacked and orthogonalized in one batch. c_attn holds three
    matrices, q, k and v, which are orthogonalized apart.
    """

    def __init__(self, params: list[nn.Parameter], lr: Tensor, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True  # as torch's fused optimizers do:
        self.grad_scale: Tensor | None = None  # gradients are divided by this,
        self.found_inf: Tensor | None = None  # and where this is 1 the step is skipped, on the device

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._step_stack(params, group)

    def _step_stack(self, params: list[Tensor], group: dict[str, Any]) -> None:
        rows, columns = params[0].shape
        parts = 3 if rows == 3 * columns else 1  # c_attn is (3C, C)
        g = torch.stack([p.grad for p in params if p.grad is not None]).view(-1, rows // parts, columns)
        if self.grad_scale is not None:
            g /= self.grad_scale
        state = self.state[params[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(g)
        keep = 1.0 if self.found_inf is None else 1 - self.found_inf
        g = g if self.found_inf is None else torch.where(self.found_inf > 0, 0.0, g)
        # A skipped step leaves the momentum as it was: its weight on the new gradient is zero then.
        momentum = state["momentum"].lerp_(g, keep * (1 - group["momentum"]))
        update = orthogonalize(g.lerp(momentum, group["momentum"]))  # Nesterov's look ahead
        step = keep * group["lr"] * 0.2 * max(g.shape[1:]) ** 0.5
        decay = 1 - keep * group["lr"] * group["weight_decay"]
        for p, u in zip(params, update.view(-1, rows, columns), strict=True):
            p.mul_(decay).sub_(step * u)


def orthogonalize(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g, (n, rows, columns), roughly: singular values of 0.7 to 1.2.

    Five Newton-Schulz steps of a quintic whose slope at 0 is steep (Jordan et al. 2024); bf16 suffices on a GPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    tall = g.size(1) > g.size(2)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = a * x + torch.baddbmm(xx, xx, xx, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(g.dtype)


def build_optimizers(model: GPT, config: Any, machine: Machine) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Matrices and embeddings decay, biases and LayerNorms do not (Brown et al. 2020, appendix B). The learning rate is a
    tensor on the device: a recorded step reads the new value without being recorded anew.
    """
    lr = torch.tensor(float(config.learning_rate), device=machine.device)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in trainable if config.optimizer == "muon" and p.ndim == 2 and ".h." in n and "lora" not in n]
    chosen = {id(p) for p in muon}
    rest = [p for _, p in trainable if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    adamw: torch.optim.Optimizer
    if config.optimizer == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError("optimizer=adamw8bit needs torchao: pip install torchao") from None
        adamw = AdamW8bit(groups, lr=lr, betas=betas, bf16_stochastic_round=True)
    else:
        fused = machine.device.type != "mps"  # whose kernel ignores the factor and the flag of Step.update
        adamw = AdamW(groups, lr=lr, betas=betas, fused=fused, capturable=machine.on_gpu)
    return [adamw, Muon(muon, lr, config.beta1, config.weight_decay)] if muon else [adamw]


def learning_rate(step: int, config: Any) -> float:
    """The rate of the update that follows `step` finished ones.

    Linear warm-up, then cosine to min_lr at lr_decay_iters (Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5), or
    'wsd': a plateau, then linear to min_lr over the last decay_fraction (Haegele et al. 2024, arXiv:2405.18392, 3).
    """
    if not config.decay_lr:
        return config.learning_rate
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= end:
        return config.min_lr
    if config.schedule == "wsd":
        share = min(1.0, (end - step) / max(1, config.decay_fraction * (end - config.warmup_iters)))
    else:
        share = 0.5 + 0.5 * math.cos(math.pi * (step - config.warmup_iters) / (end - config.warmup_iters))
    return config.min_lr + share * (config.learning_rate - config.min_lr)


# --------------------------------------------------------------------------------------------------------------------
# One step


class Step:
    """One update: forward and backward over the micro-batches, clip, optimize. bench.py times this very object.

    Nothing in it waits for the device. What happened stays there in `loss` (mean over the step's targets, nats),
    `grad_norm` (before clipping), `bad` (updates skipped in a row because loss or gradient was not finite) and
    `skipped` (all of these) until the host asks. After three plain steps a small step is recorded as a CUDA graph and
    replayed from then on.
    """

    def __init__(self, model: GPT, config: Any, machine: Machine):
        self.model, self.config, self.machine = model, config, machine
        self.forward: Any = model
        if machine.world > 1:
            ids = [machine.device.index] if machine.on_gpu else None
            # Few large all-reduces disturb the backward pass beside them less than torch's of 25 MB (README, Two GPUs).
            options: dict[str, Any] = {"gradient_as_bucket_view": True, "bucket_cap_mb": 100}
            self.forward = nn.parallel.DistributedDataParallel(model, device_ids=ids, **options)
        self.optimizers = build_optimizers(model, config, machine)
        self.lr: Tensor = self.optimizers[0].param_groups[0]["lr"]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.micro_steps = config.gradient_accumulation_steps // machine.world
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        shape = (self.micro_steps, config.batch_size, config.block_size)
        self.x = torch.zeros(shape, dtype=torch.int64, device=machine.device)
        self.y = torch.zeros_like(self.x)
        self.divisor = torch.ones((), device=machine.device)
        self.loss, self.grad_norm, self.bad, self.skipped = (torch.zeros((), device=machine.device) for _ in range(4))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graphed = wants_graph(model, config, machine)
        self.steps, self.warmup = 0, 4 if self.graphed else 1  # steps until nothing is compiled or recorded any more

    def __call__(self, lr: float, rows: list[int] | None = None) -> None:
        """Update once from self.x and self.y, (micro-steps, B, T). rows: targets in each micro-batch, if some are masked."""
        self.lr.fill_(lr)
        targets = self.x.numel() if rows is None else sum(rows)
        world = self.machine.world
        # DistributedDataParallel averages over ranks, so each divides by the mean number of targets.
        self.divisor.fill_(targets / world)
        if world > 1:
            dist.all_reduce(self.divisor)
        self.divisor.clamp_(min=1 / world)  # of one target in all, where there is none
        self.steps += 1
        if self.graph is not None:
            self.graph.replay()
        elif self.graphed and self.steps >= self.warmup and rows is None:
            self.record()
        else:
            self.run(rows)

    def run(self, rows: list[int] | None = None) -> None:
        for p in self.params:
            p.grad = None
        self.loss.zero_()
        for i in range(self.micro_steps):
            if rows is not None and rows[i] == 0 and self.machine.world == 1:
                continue  # no target in it: nothing to learn, and nothing to compute
            last = i == self.micro_steps - 1  # gradients travel between ranks once, with the last micro-batch
            with contextlib.nullcontext() if last or self.machine.world == 1 else self.forward.no_sync():
                with self.machine.autocast():
                    _, loss = self.forward(self.x[i], self.y[i], self.divisor, None if rows is None else rows[i])
                self.scaler.scale(loss).backward()
            self.loss += loss.detach()
        if self.machine.world > 1:  # so that all skip an update, or none
            dist.all_reduce(self.loss)
            self.loss /= self.machine.world
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Clip to grad_clip by the global norm (Pascanu et al. 2013, algorithm 1) and update, unless not finite."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if not grads:  # every target is masked
            self.grad_norm.zero_()
            return
        if self.scaler.is_enabled():
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        self.grad_norm.copy_(nn.utils.get_total_norm(grads))
        skip = 1 - torch.isfinite(self.grad_norm + self.loss).float()
        self.bad.add_(1).mul_(skip)
        self.skipped.add_(skip)
        # The optimizers divide by this factor and look at the flag as they read the gradients: clipping and skipping
        # cost no pass of their own over them, and no question to the device.
        clip = self.config.grad_clip
        divide_by = (self.grad_norm / clip).clamp(min=1) if clip else torch.ones_like(self.grad_norm)
        for optimizer in self.optimizers:
            if hasattr(optimizer, "_step_supports_amp_scaling"):
                optimizer.grad_scale, optimizer.found_inf = divide_by, skip  # type: ignore[attr-defined]
            else:  # torchao's, and AdamW where it is not fused
                for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                    p.grad.copy_(torch.where(skip > 0, 0.0, p.grad / divide_by))
                self.lr.mul_(1 - skip)  # else it would go on by its momentum
            optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()

    def record(self) -> None:
        """Record a step without running it, then replay it; replays draw the random numbers the plain step would."""
        torch.cuda.synchronize()
        for p in self.params:
            p.grad = None
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()
        self.graph.replay()


def wants_graph(model: GPT, config: Any, machine: Machine) -> bool:
    """Whether the step is recorded: on one GPU, where launching its kernels one by one could keep the device waiting.

    Not with float16, whose loss scale lives on the host; not with torchao's optimizer; not where dropout is drawn again
    by an uncompiled recomputation, which asks the host for the generator's state.
    """
    if config.cuda_graph is True and not machine.on_gpu:
        raise UserError("cuda_graph=True needs a GPU")
    redrawn = config.recompute != "none" and model.config.dropout > 0 and not machine.compiled
    hindered = machine.dtype == torch.float16 or config.optimizer == "adamw8bit" or redrawn
    possible = machine.on_gpu and machine.world == 1 and not hindered
    if config.cuda_graph != "auto":
        return bool(config.cuda_graph) and possible
    return possible and config.gradient_accumulation_steps * model.config.n_layer <= GRAPH_UP_TO_LAYERS


def worth_compiling(model: GPT, config: TrainConfig) -> bool:
    """Whether a run is long enough for compiling to pay; one whose length is not known yet counts as long."""
    if config.eval_only or config.num_epochs > 0 or config.batch_size == "auto":
        return True
    tokens = config.max_iters * config.gradient_accumulation_steps * int(config.batch_size) * config.block_size
    return model.flops_per_token() * tokens >= COMPILE_FROM_FLOPS


# --------------------------------------------------------------------------------------------------------------------
# Memory

# What a layer keeps for the backward pass, in bytes a token in units of n_embd, at 2 bytes a number. none: its input 2,
# two norms 4, qkv 6, attention 2, its projection 2, the MLP's inside 16; pointwise: 12 less, the norms and the GELU's
# output, which is half of the MLP's inside; block: its input.
KEPT = {"none": 32, "pointwise": 20, "block": 2}
# Uncompiled under autocast: that hands both norms their input in fp32, and pointwise also keeps what the MLP adds.
EAGER = {"none": 4, "pointwise": 2, "block": 0}


def parameter_count(shape: GPTConfig) -> int:
    """Parameters in memory, padding included: embeddings, four matrices and two LayerNorms a block, the last LayerNorm."""
    C, norm = shape.n_embd, shape.n_embd * (1 + shape.bias)
    block = 12 * C * C + 9 * C * shape.bias + 2 * norm
    return (shape.padded_vocab_size + shape.block_size) * C + shape.n_layer * block + norm


def step_memory(
    shape: GPTConfig, config: Any, recompute: str, trainable: int | None = None, compiled: bool = True
) -> dict[str, float]:
    """Bytes of a GPU's memory at the peak of a step, by kind; their sum is the allocator's high-water mark.

    trainable: parameters with gradients and moments, if not all (LoRA). The peak is the largest of three moments: in
    the loss, with all activations alive and a chunk of logits beside them; in the backward pass of the last layer,
    which with recompute=block holds a whole layer's activations; at its end, with all gradients and both parts of the
    embedding's. The constants were fitted on 124M and hold within 2% for 350M and 774M (README, what fits); the one for
    a whole layer with adapters on 774M.
    """
    params = parameter_count(shape)
    C, V, L, tokens = shape.n_embd, shape.padded_vocab_size, shape.n_layer, config.batch_size * config.block_size
    number = 4 if config.dtype == "float32" else 2
    master = 2 if config.optimizer == "adamw8bit" else 4
    moments = 2 if config.optimizer == "adamw8bit" else 8
    full = trainable is None
    trained = params if trainable is None else trainable
    head = 4.0 * C * V if full else 0.0  # the head's part of the embedding's gradient, in fp32
    base = {
        "weights": master * params if full else number * params + 4.0 * trained,
        "moments": float(moments * trained),
        "gradients": float(master * trained) if config.gradient_accumulation_steps > 1 else 0.0,
    }
    unit = number / 2 * C * tokens
    eager = not compiled and number == 2  # then some of what is computed in fp32 is also kept in it
    kept = KEPT[recompute] + eager * EAGER[recompute]
    # Dropout's masks, a byte a number: 2 C wide in all; of the adapters' inputs 7 C, and one such input, 2 bytes a number.
    if recompute == "none":
        kept += 2 * (shape.dropout > 0) + (0 if full else 9 * (config.lora_dropout > 0))
    if recompute == "pointwise" and not full:  # the adapters' products, 9 C wide in all: more than "none" keeps
        kept += 18
    narrowed = full and number < master  # fp32 weights are cast for each product, and with "none" the casts are kept
    casts = number * (params - C * V) if recompute == "none" and narrowed else 0.0
    loss = base | {
        "activations": (kept * L + 8) * unit,
        "logits": (number + 4 * eager) * min(tokens, LOSS_CHUNK_ROWS) * V + head,
        "workspace": casts + (number * C * V if narrowed else 0.0) + 2.0**25,
    }
    backward = base | {
        "activations": (kept * L + (20 if recompute != "block" else 43 if full else 80)) * unit,
        "logits": head,
    }
    end = base | {"gradients": float(master * trained), "activations": 26 * unit, "logits": head}
    return max((loss, backward, end), key=lambda moment: sum(moment.values()))


def choose_recompute(model: GPT, config: Any, machine: Machine) -> str:
    """The cheapest recomputation whose predicted memory leaves a tenth of what is free (the model lies there already)."""
    if not machine.on_gpu:
        return "none"
    room = 0.9 * device_memory(machine)
    for recompute in ("none", "pointwise"):
        if sum(step_memory(model.config, config, recompute, trainable(model), machine.compiled).values()) < room:
            return recompute
    return "block"


def device_memory(machine: Machine) -> float:
    """Bytes this process may use: what is free and what it holds, or the share that it was capped to."""
    free, total = torch.cuda.mem_get_info(machine.device)
    share = torch.cuda.get_per_process_memory_fraction(machine.device)
    return min(free + torch.cuda.memory_reserved(machine.device), share * total)


def trainable(model: GPT) -> int | None:
    """Trained parameters, or None where that is all of them."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return None if len(trained) == len(list(model.parameters())) else sum(trained)


# --------------------------------------------------------------------------------------------------------------------
# Data on its way to the device, and evaluation


class Loader:
    """Brings a step's windows from the shards into the step's buffers, through page-locked memory, without waiting."""

    SLOTS = 2  # the host may be filling one buffer while the device copies from the other

    def __init__(self, windows: Any, step: Step, machine: Machine):
        self.windows, self.step, self.machine = windows, step, machine
        shape = (self.SLOTS, 2, *step.x.shape)
        self.buffers = torch.zeros(shape, dtype=torch.int64, pin_memory=machine.on_gpu)
        self.copied: list[torch.cuda.Event | None] = [None] * self.SLOTS
        self.turn = 0

    def load(self, position: int) -> list[int] | None:
        """Load the windows from `position` on; returns the targets of each micro-batch where some are masked.

        Micro-batch m of a step belongs to rank m mod world: the step's windows are the same at any world size.
        """
        self.turn = (self.turn + 1) % self.SLOTS
        if (event := self.copied[self.turn]) is not None:
            event.synchronize()
        x, y = self.buffers[self.turn]
        micro_steps, batch_size, _ = x.shape
        for i in range(micro_steps):
            start = position + (i * self.machine.world + self.machine.rank) * batch_size
            for target, source in zip((x[i], y[i]), self.windows.batch(start, batch_size), strict=True):
                target.copy_(torch.from_numpy(source))
        self.step.x.copy_(x, non_blocking=self.machine.on_gpu)
        self.step.y.copy_(y, non_blocking=self.machine.on_gpu)
        if self.machine.on_gpu:
            self.copied[self.turn] = event = torch.cuda.Event()
            event.record()
        if self.windows.tokens.mask is None:
            return None
        return (y != MASKED).sum((1, 2)).tolist()


@torch.no_grad()
def evaluate(
    model: GPT, windows: Any, count: int, batch_size: int, machine: Machine, leave: Callable[[], bool] = lambda: False
) -> float:
    """Mean loss, in nats a token, over `count` fixed windows of a split (0: all); the same windows every time.

    Dropout is off meanwhile; no random number is drawn and the position in the training data does not move.
    leave: asked before each batch; true ends it there, and what is returned is no split's loss then.
    """
    chosen = windows.choose(count)
    batch = 2 * batch_size  # without gradients twice the micro-batch needs less memory than training does
    losses, targets = [torch.zeros((), device=machine.device)], 0  # a rank of many may have no window
    was_training = model.training
    model.eval()
    with machine.autocast():
        for start in range(machine.rank * batch, len(chosen), machine.world * batch):
            if leave():
                break
            part = chosen[start : start + batch]
            x, y = (torch.from_numpy(a) for a in windows.batch(np.resize(part, batch)))  # one shape: compiled once
            y[len(part) :] = MASKED
            _, loss = model(x.to(machine.device), y.to(machine.device), 1.0)
            losses.append(loss)
            targets += int((y != MASKED).sum())
    model.train(was_training)
    total = sum(torch.stack(losses).tolist())  # on the host, in float64, which Macs' GPUs have not
    if machine.world > 1:
        sums = torch.tensor([total, targets], dtype=torch.float64, device=machine.device)
        dist.all_reduce(sums)
        total, targets = sums.tolist()
    return total / max(1, targets)


# --------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Progress:
    """All of a run's place but its tensors: trainer.json holds exactly this (and the checksums)."""

    step: int = 0  # finished updates
    position: int = 0  # training windows consumed
    tokens: int = 0
    elapsed_s: float = 0.0  # training alone: evaluation, saving and compiling stop the clock
    best_val_loss: float | None = None
    best_step: int = 0
    worse_evaluations: int = 0  # in a row, for patience
    evaluated_step: int = -1
    wandb_id: str | None = None


class Clock:
    """Seconds and steps of training alone. Stopped for evaluation and saving; a stop waits for the device."""

    def __init__(self, machine: Machine, total: float):
        self.machine, self.total, self.seconds, self.steps = machine, total, 0.0, 0
        self.started: float | None = None

    def start(self) -> None:
        self.machine.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        if self.started is not None:
            self.machine.synchronize()
            self._take()
            self.started = None

    def tick(self) -> None:
        self.steps += self.started is not None

    def lap(self) -> float | None:
        """Steps a second since the last lap; the caller has just waited for the device."""
        if self.started is not None:
            self._take()
        rate = self.steps / self.seconds if self.steps and self.seconds else None
        self.seconds, self.steps = 0.0, 0
        return rate

    def _take(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.started  # type: ignore[operator]
        self.total += now - self.started  # type: ignore[operator]
        self.started = now


def stop_signals() -> list[int]:
    """What ends a run after its step: Ctrl-C, a scheduler's SIGTERM and, but under nohup, a terminal that is closed."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


class Run:
    """A training run: builds what it needs from the configuration, then trains until done, stopped or hopeless."""

    def __init__(self, config: TrainConfig, given: set[str], resumed: bool = False):
        from data import check_exists, open_dataset
        from data.windows import EvalWindows, TrainWindows

        self.config, self.out_dir, self.resumed = config, Path(config.out_dir), resumed
        torch.manual_seed(config.seed)  # the initial weights, alike on every rank
        self.progress, last = Progress(), None
        if resumed:
            last, state = run_folder.find_checkpoint(self.out_dir, ("last",))
            self.progress = Progress(**{key: state[key] for key in vars(self.progress) if key in state})
        check_exists(config.dataset)
        start, tokenizer = load_start(config, given, last)
        with first_rank_first():  # it prepares what is not there yet; the others find it ready
            self.dataset = open_dataset(
                config.dataset,
                tokenizer=tokenizer if tokenizer and config.tokenizer == "auto" else config.tokenizer,
                val_fraction=config.val_fraction,
                text_column=config.text_column,
                block_size=config.block_size,
            )
        self.model = check_start(start, tokenizer, self.dataset, config)
        if resumed and run_folder.read_run(self.out_dir).get("data", {}).get("sha256") != self.dataset.source_sha256:
            self.forget_best()
        self.machine = open_machine(config, self.model.blocks[0], worth_compiling(self.model, config))
        self.master = self.machine.rank == 0
        # What auto became: by this memory is counted.
        config.dtype = str(self.machine.dtype).removeprefix("torch.")  # type: ignore[assignment]
        prepare_model(self.model, config, self.machine)
        self.batch_size = settle_batch_size(self.model, config, self.machine)
        self.val = EvalWindows(self.dataset.val, config.block_size)
        self.eval_count = min(config.eval_iters * self.batch_size or self.val.count, self.val.count)
        if config.eval_only:
            return
        if self.dataset.train is None:
            raise UserError(
                f"{self.dataset.folder} holds no training shards (train_*.bin): only --eval_only works with it"
            )
        self.train_tokens = len(self.dataset.train)
        self.windows = TrainWindows(self.dataset.train, config.block_size, config.seed)
        self.train_eval = EvalWindows(self.dataset.train, config.block_size)
        self.step_windows = self.batch_size * config.gradient_accumulation_steps
        if config.num_epochs:
            config.max_iters = math.ceil(config.num_epochs * self.windows.per_epoch / self.step_windows)
        self.step = Step(self.model, config, self.machine)
        self.loader = Loader(self.windows, self.step, self.machine)
        # Dropout's random numbers: a rank's own, and not the first ones over again after resuming.
        torch.manual_seed(config.seed + self.machine.rank + 1_000_003 * self.progress.step)
        if last is not None:
            load_trainer(last, self.step)
        self.clock, self.stop_signal, self.skipped = Clock(self.machine, self.progress.elapsed_s), 0, 0.0
        self.signalled_at = -math.inf
        self.flag = torch.zeros((), dtype=torch.int64, device=self.machine.device)  # the stop signal of all ranks
        self.saved_step = self.progress.step if resumed else -1
        self.drawing: threading.Thread | None = None
        self.told_time = False

    def forget_best(self) -> None:
        """Other data than before: losses on them cannot be compared with those that went before."""
        p = self.progress
        p.best_val_loss, p.best_step, p.worse_evaluations = None, 0, 0
        self.dataset.warnings.append(
            "the data are not those that this run began with: its windows are others now, and its best loss counts no more. "
            f"Copy {self.out_dir / 'best'} if you want to keep it: the best on the new data takes its place"
        )

    # -- telling

    def say(self, text: str) -> None:
        if self.master:
            from tqdm import tqdm

            # Nobody reads (the Ctrl-C that ends a run ends `| tee` first), the log's disk is full, or a signal came amid
            # another line: no reason to lose what is trained.
            with contextlib.suppress(OSError, RuntimeError):
                tqdm.write(text)
                sys.stdout.flush()  # a file or a pipe would get it kilobytes later

    def introduce(self) -> None:
        c, shape = self.config, self.model.config
        for note in [*self.machine.notes, *self.dataset.warnings]:
            self.say(note)
        per_step = self.step_windows * c.block_size
        self.say(
            f"model: {self.model.num_params():,} parameters ({shape.n_layer} layers, {shape.n_head} heads, "
            f"{shape.n_embd} wide, block {shape.block_size}, vocabulary {shape.vocab_size})"
        )
        count = self.dataset.documents
        documents = f"{count:,} document{'s' * (count != 1)}, " if count is not None else ""
        self.say(
            f"data: {self.dataset.name}, {documents}{self.train_tokens:,} training and {len(self.dataset.val):,} validation tokens"
        )
        self.say(
            f"step: {self.batch_size} x {c.block_size} x {c.gradient_accumulation_steps} = {per_step:,} tokens; "
            f"an epoch is {self.windows.per_epoch / self.step_windows:,.1f} steps; {c.max_iters:,} steps are "
            f"{c.max_iters * self.step_windows / self.windows.per_epoch:,.2f} epochs"
        )
        gib = sum(step_memory(shape, c, c.recompute, trainable(self.model), self.machine.compiled).values()) / 2**30
        size = f"{gib:.1f} GiB" if gib >= 0.05 else f"{1024 * gib:.0f} MiB"
        self.say(f"memory: about {size} at the peak of a step (recompute={c.recompute})")
        if self.resumed:
            self.say(f"resuming at step {self.progress.step:,}")

    def show_sample(self) -> None:
        """A text from the model as it is: the newcomer's progress bar."""
        if not self.master or (tokenizer := self.dataset.tokenizer) is None:
            return
        start: list[int] = [] if tokenizer.eot is None else [tokenizer.eot]
        if masked := self.val.tokens.mask is not None:  # questions and answers: the first question
            x, y = self.val.batch(np.array([0]))
            start = x[0, : 1 + int((y[0] != MASKED).argmax())].tolist()
        elif not start:
            try:
                start = list(tokenizer.encode("\n"))
            except UserError:  # a vocabulary of characters that has no line end
                start = self.val.batch(np.array([0]))[0][0, :1].tolist()
        count = min(SAMPLE_TOKENS, 2 * self.config.block_size)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.machine.autocast():
                [ids] = self.model.generate([start], count, sampling=Sampling(0.8, top_k=200), seeds=[self.config.seed])
            if masked:
                ids = start + ids[: ids.index(tokenizer.eot) if tokenizer.eot in ids else None]
            text = tokenizer.decode(ids).strip()
        except torch.OutOfMemoryError:  # what is shown shall not end what is earned
            text = "(no text: too little memory beside the training step)"
        self.model.train(was_training)
        self.say("".join(f"    | {line}\n" for line in text.splitlines()))

    # -- the loop

    def train(self) -> int:
        """Train to the end; returns the exit status."""
        c, p = self.config, self.progress
        if self.resumed and p.evaluated_step == p.step >= c.max_iters:
            self.say(f"this run is complete ({p.step} of {c.max_iters} steps); go on with --max_iters={2 * p.step}")
            return 0
        self.introduce()
        self.open_folder()
        handlers = {number: signal.signal(number, self.on_signal) for number in stop_signals()}
        bar = self.open_bar()
        self.model.train()
        self.last_save, status, warm = time.monotonic(), 0, p.step + self.step.warmup
        rows = self.loader.load(p.position) if p.step < c.max_iters else None
        while True:
            due = p.step % c.eval_interval == 0 or p.step >= c.max_iters
            if due and p.evaluated_step != p.step:
                if self.log_evaluation():
                    self.say(f"stopping: no better validation loss in {c.patience} evaluations")
                    break
                if p.evaluated_step != p.step:
                    status = 128 + self.stop_signal
                    break
            if p.step >= c.max_iters:
                break
            lr = learning_rate(p.step, c)
            self.step(lr, rows)
            self.clock.tick()
            p.step += 1
            p.position += self.step_windows
            p.tokens += self.step_windows * c.block_size
            if p.step < c.max_iters:
                rows = self.loader.load(p.position)  # the host gathers while the device computes
            bar.update()
            if (p.step % c.log_interval == 0 or p.step == c.max_iters) and self.log_step(bar, lr):
                status = 1
                break
            if p.step == warm:  # compiling and recording are over
                self.clock.start()
            if self.agree_to_stop():
                status = 128 + self.stop_signal
                break
            if time.monotonic() - self.last_save >= c.save_interval_s:
                self.save("last")
        bar.close()
        self.clock.stop()  # nobody waits for another rank from here on
        status = self.finish(status)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return status

    def on_signal(self, number: int, frame: Any) -> None:
        if self.stop_signal:
            if time.monotonic() - self.signalled_at < 0.3:  # one and the same: `timeout` sends its own twice
                return
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.stop_signal, self.signalled_at = number, time.monotonic()
        self.say(f"\n{signal.Signals(number).name}: finishing this step, then saving (again to quit at once)")

    @contextlib.contextmanager
    def watch_for_lost_ranks(self) -> Iterator[None]:
        """End this process, with a message, when a signal finds it waiting for a rank that is no more.

        The neighbour of a killed rank waits inside NCCL, where Python's handlers never run, until torchrun, which
        sends SIGTERM to the survivors, kills it after 30 s without a word. Only the C part of the handler still runs;
        it writes into this socket. A rank also waits while rank 0 saves or another's step is long, and a signal of
        the user's finds it so: therefore most of the 30 s are left to it.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        over = threading.Event()

        def wait() -> None:
            signalled, step = reader.recv(1), self.progress.step
            # Of a first step there is no time yet.
            if not signalled or over.wait(max(25, 3 * self.clock.total / max(1, step))):
                return
            if self.progress.step == step and self.clock.started is not None:
                print(f"error: {lost_ranks(self.config)}", file=sys.stderr, flush=True)
                os._exit(2)

        watcher = threading.Thread(target=wait, daemon=True)
        watcher.start()
        before = signal.set_wakeup_fd(writer.fileno())
        try:
            yield
        finally:  # a thread that outlives the run would keep the process group alive when Python ends, which can abort
            signal.set_wakeup_fd(before)
            over.set()
            writer.close()
            watcher.join()
            reader.close()

    def agree_to_stop(self) -> bool:
        """A signal that reached any rank stops all of them after the same step, one later than the signal came.

        Reading the flag of the step before leaves the device with a step to work on while the host waits.
        """
        if self.machine.world > 1:
            before, self.flag = self.flag, torch.full_like(self.flag, self.stop_signal)
            dist.all_reduce(self.flag, dist.ReduceOp.MAX)
            self.stop_signal = max(self.stop_signal, int(before))
            return int(before) > 0
        return self.stop_signal > 0

    def open_bar(self) -> Any:
        from tqdm import tqdm

        total, done = self.config.max_iters, self.progress.step
        # Not on a terminal: no bar, whose redrawing would fill a log file, but a line a logged step.
        return tqdm(total=total, initial=done, unit="step", disable=None if self.master else True, smoothing=0.05)

    def log_step(self, bar: Any, lr: float) -> bool:
        """One line of metrics, reading the device for the first time since the last; true if the run is hopeless."""
        p, step = self.progress, self.step
        # This waits for the device.
        loss, grad_norm, bad, skipped = torch.stack([step.loss, step.grad_norm, step.bad, step.skipped]).tolist()
        steps_per_s = self.clock.lap()
        rate = steps_per_s and round(steps_per_s * self.step_windows * self.config.block_size)
        if self.master:
            self.record(loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=rate)
            bar.set_postfix_str(f"loss {loss:.4f}" + (f", {rate:,.0f} tokens/s" if rate else ""), refresh=False)
            if bar.disable:
                pace = f", {rate:,.0f} tokens/s{self.time_left(steps_per_s)}" if rate and steps_per_s else ""
                self.say(f"step {p.step}: loss {loss:.4f}, lr {lr:.2e}{pace}")
        if skipped > self.skipped:
            new, self.skipped = skipped - self.skipped, skipped
            self.say(
                f"step {p.step}: loss or gradient not finite; skipped {new:.0f} update(s) since the last log, "
                f"the last {bad:.0f} in a row"
            )
        if bad < self.config.max_bad_steps:
            return False
        self.say(
            f"stopping at step {p.step}: {bad:.0f} updates in a row had a loss or gradient that is not finite. The weights are "
            f"as before the first of them. Training window {p.position}; try a lower learning_rate or dtype=float32"
        )
        return True

    def time_left(self, steps_per_s: float) -> str:
        """What the bar would show, said once where there is none."""
        seconds, told, self.told_time = (self.config.max_iters - self.progress.step) / steps_per_s, self.told_time, True
        hours, minutes = divmod(round(seconds / 60), 60)
        return "" if told or seconds <= 60 else f", about {f'{hours} h ' if hours else ''}{minutes} min to go"

    def record(self, **row: float | None) -> None:
        """A line of metrics.jsonl, and of wandb's record, where a step's loss is called train/loss."""
        p = self.progress
        self.metrics.append({"step": p.step, "tokens": p.tokens, **row, "elapsed_s": self.elapsed()})
        if self.wandb:
            self.wandb.log({"train/loss" if key == "loss" else key: value for key, value in row.items()}, step=p.step)

    def log_evaluation(self) -> bool:
        """Evaluate, tell, keep the best; true if patience is over. A signal ends it early, as if it had not begun.

        Not that of one rank of several, which cannot tell the others without waiting for them at every batch.
        """
        c, p = self.config, self.progress
        running = self.clock.started is not None
        self.clock.stop()
        signalled = lambda: self.machine.world == 1 and self.stop_signal > 0  # noqa: E731
        train_loss, val_loss = (
            evaluate(self.model, w, self.eval_count, self.batch_size, self.machine, signalled)
            for w in (self.train_eval, self.val)
        )
        if signalled():
            return False
        p.evaluated_step = p.step
        before = (p.best_val_loss, p.best_step)
        better = p.step > 0 and math.isfinite(val_loss) and (p.best_val_loss is None or val_loss < p.best_val_loss)
        if better:
            p.best_val_loss, p.best_step, p.worse_evaluations = val_loss, p.step, 0
        elif p.step > 0:
            p.worse_evaluations += 1
        self.say(
            f"step {p.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f} (perplexity {math.exp(min(val_loss, 700)):.2f})"
            + (", the best so far" if better else "")
        )
        if self.master:
            self.record(train_loss=train_loss, val_loss=val_loss)
        self.show_sample()
        if better and not self.as_rank_0(self.save("best")):
            p.best_val_loss, p.best_step = before  # what best/ still holds
        if p.step > 0 and c.always_save_checkpoint:
            self.save("last")
        if self.master:
            self.draw()
        if running:
            self.clock.start()
        return 0 < c.patience <= p.worse_evaluations

    def as_rank_0(self, saved: bool) -> bool:
        """What rank 0 says, which alone writes: else the ranks would count other evaluations for patience."""
        said = torch.tensor(int(saved), device=self.machine.device)
        if self.machine.world > 1:
            dist.broadcast(said, 0)
        return bool(said)

    def elapsed(self) -> float:
        return round(self.clock.total, 3)

    # -- the run's folder

    def draw(self) -> None:
        """loss.png, drawn beside the training: importing and running a plotting library takes longer than a small step."""
        if self.drawing is not None:
            self.drawing.join()
        rows, file = list(self.metrics.rows), self.out_dir / "loss.png"
        self.drawing = threading.Thread(target=run_folder.draw_losses, args=(rows, file))
        self.drawing.start()

    def open_folder(self) -> None:
        c, self.wandb = self.config, None
        if not self.master:
            return
        shape = self.model.config
        c.n_layer, c.n_head, c.n_embd, c.bias = shape.n_layer, shape.n_head, shape.n_embd, shape.bias
        facts = run_folder.describe(
            as_dict(c),
            device=self.machine.name,
            dtype=c.dtype,
            compile=self.machine.compiled,
            world_size=self.machine.world,
            data={"name": self.dataset.name, "sha256": self.dataset.source_sha256, "tokens": self.train_tokens},
        )
        if c.wandb_log:
            self.wandb = start_wandb(c, facts, self.progress)
        if not self.resumed and (previous := run_folder.set_aside(self.out_dir)):
            self.say(f"the run that was in {self.out_dir} lies in {previous} now; delete what you no longer need")
        run_folder.write_json(self.out_dir / "run.json", facts)
        self.metrics = run_folder.Metrics(self.out_dir / "metrics.jsonl", self.progress.step if self.resumed else None)

    def save(self, name: str) -> bool:
        """Write best/ or last/; a disk that does not take it is told, and training goes on with the older one."""
        running = self.clock.started is not None
        self.clock.stop()
        self.progress.elapsed_s, saved = self.elapsed(), True
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            self.say(f"not saving {self.out_dir / name}: weights are not finite. Try a lower learning_rate")
            saved = False
        elif self.master:
            try:
                size = 4 * self.model.num_params() * (1 if name == "best" else 3)
                run_folder.save_checkpoint(
                    self.out_dir / name, lambda folder: self.write(folder, name), vars(self.progress), size
                )
            except OSError as e:
                self.say(f"could not save {self.out_dir / name}: {e}. What was there before is untouched; make room")
                saved = False
        if name == "last":
            self.last_save = time.monotonic()
            self.saved_step = self.progress.step if saved else self.saved_step
        if running:
            self.clock.start()
        return saved

    def write(self, folder: Path, name: str) -> None:
        tokenizer = self.dataset.tokenizer
        self.model.save_pretrained(folder, eot=None if tokenizer is None else tokenizer.eot)
        if tokenizer is not None:
            tokenizer.save(folder)
        if name == "last":
            save_trainer(folder, self.step)
        elif self.config.lora_rank:
            self.model.save_adapter(folder / "adapter", self.config.init_from)

    def finish(self, status: int) -> int:
        """Save what is not saved yet, and say how to go on."""
        p = self.progress
        if self.saved_step != p.step and not self.save("last"):
            status = status or 1
        if self.master:
            if self.drawing is not None:
                self.drawing.join()
            self.metrics.close()
            if self.wandb:
                self.wandb.finish(exit_code=status)
            if status > 128:
                self.say(
                    f"stopped at step {p.step:,}; go on with: python train.py --init_from=resume --out_dir={self.out_dir}"
                )
            else:
                best = f", best val loss {p.best_val_loss:.4f} at step {p.best_step:,}" if p.best_val_loss else ""
                self.say(
                    f"{p.step:,} steps in {self.elapsed():.1f} s of training{best}; curves: {self.out_dir}/loss.png"
                )
                start = [row["val_loss"] for row in self.metrics.rows if row["step"] == 0 and row.get("val_loss")]
                if not self.resumed and p.best_val_loss and start and start[0] <= p.best_val_loss:
                    self.say(f"no better than what it began with, val loss {start[0]:.4f}: try a lower learning_rate")
                if self.dataset.tokenizer is not None:
                    self.say(f"read what it writes: python sample.py --out_dir={self.out_dir}")
        return status


# --------------------------------------------------------------------------------------------------------------------
# What a run starts from


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The other ranks begin when rank 0 is through."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def start_wandb(config: TrainConfig, facts: dict[str, Any], progress: Progress) -> Any:
    """Start the run's record at Weights & Biases, or go on with it."""
    try:
        import wandb

        run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name,
            config=facts,
            dir=config.out_dir,
            id=progress.wandb_id,
            resume="allow",
        )
    except Exception as e:  # not installed, not logged in, no network
        hint = "Log in with `wandb login`, set WANDB_MODE=offline, or leave wandb_log out"
        raise UserError(f"wandb_log=True, but wandb does not start: {e}. {hint}") from None
    progress.wandb_id = run.id
    return run


def load_start(config: TrainConfig, given: set[str], last: Path | None) -> tuple[GPT | None, Any]:
    """The model to start from on the CPU (None: from scratch) and its tokenizer if it has one. last: when resuming."""
    from data.tokenizers import load_tokenizer

    source = Path(config.init_from)
    if last is not None:
        if not config.lora_rank or config.eval_only:  # else adapters go on, and from the model that they began with
            source = last
    elif config.init_from == "scratch":
        if config.lora_rank:
            raise UserError(
                "lora_rank with init_from=scratch: LoRA adapts a trained model, say which with --init_from="
            )
        return None, None
    elif config.lora_rank and Path(config.out_dir).resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(
            f"init_from={source} lies in out_dir={config.out_dir}, whose files this run replaces, and resuming needs the "
            "model that the adapters began with: choose another --out_dir="
        )
    if (source / "run.json").exists():
        source = run_folder.find_checkpoint(source, ("best", "last"))[0]
    if source.suffix != ".pt":
        source = find_pretrained(config.init_from if source == Path(config.init_from) else source)
    asked = last is not None or "block_size" in given
    model = GPT.from_pretrained(source, config.block_size if asked else None, config.dropout)
    if last is not None and source != last:
        check_base(model, last, config)
    config.block_size = model.config.block_size
    tokenizer = load_tokenizer(source) if source.is_dir() else None
    return model, tokenizer


def check_base(model: GPT, last: Path, config: TrainConfig) -> None:
    """Refuse to resume adapters on another model than theirs. Its positions, which no adapter changes, tell the two apart."""
    import safetensors

    with safetensors.safe_open(last / "model.safetensors", framework="pt") as content:
        then = content.get_tensor("transformer.wpe.weight").float()
    now = model.get_parameter("transformer.wpe.weight").detach()
    rows = min(len(then), len(now))  # resuming may have made block_size smaller
    # They may have been saved in 16 bits.
    if then.size(1) != now.size(1) or not torch.allclose(then[:rows], now[:rows], rtol=1e-2, atol=1e-6):
        raise UserError(
            f"{config.init_from}, which the adapters in {config.out_dir} began with, is another model now. Put back the one "
            f"that it was, or begin a new run with the adapted one: --init_from={last}"
        )


def check_start(model: GPT | None, tokenizer: Any, dataset: Any, config: TrainConfig) -> GPT:
    """Refuse data of another tokenizer than the model's; without a model, make one of the data's vocabulary."""
    if model is None:
        keys = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        return GPT(GPTConfig(vocab_size=dataset.vocab_size, **{key: getattr(config, key) for key in keys}))
    other = tokenizer and dataset.tokenizer and tokenizer.sha256 != dataset.tokenizer.sha256
    made_with, ids = dataset.meta.get("tokenizer"), model.config.vocab_size
    if other or dataset.vocab_size > ids:
        advice = "Pass the text itself as --dataset=FILE"
        if tokenizer is None:
            advice = "That has no tokenizer beside it: put its files there, or choose a smaller one with --tokenizer="
        elif config.tokenizer != "auto":
            advice = (
                f"--tokenizer={config.tokenizer} does not go with --init_from, whose model brings its own ({tokenizer.name}): "
                "leave it out, or begin anew with --init_from=scratch"
            )
        raise UserError(
            f"dataset {dataset.name} was made with another tokenizer ({made_with}, {dataset.vocab_size} tokens) than the "
            f"model to start from ({ids} tokens). {advice}"
        )
    if tokenizer is None and dataset.vocab_size < ids:
        dataset.warnings.append(
            f"{config.init_from} has no tokenizer: its {ids} ids are taken to begin with the {dataset.vocab_size} of "
            f"{dataset.name} ({made_with}). If it learned with another, what it has learned is lost"
        )
    return model


def prepare_model(model: GPT, config: Any, machine: Machine) -> None:
    """Put the model on the device in the form that the configuration asks for: adapters, precision, recomputation."""
    if config.optimizer == "adamw8bit":
        model.bfloat16()  # no fp32 master: rounding at random keeps what a small update changes
    if config.lora_rank and not config.eval_only:
        targets = [] if config.lora_targets == "all" else config.lora_targets.split(",")
        model.to(machine.dtype)  # frozen weights need no fp32 master either
        config.lora_alpha = config.lora_alpha or 2.0 * config.lora_rank
        model.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout, targets)
    if config.quantize == "int8":
        model.quantize()
    model.to(machine.device)
    if config.batch_size != "auto":  # else settled with it
        if config.recompute == "auto":
            config.recompute = choose_recompute(model, config, machine)
        model.set_recompute(config.recompute)
    if machine.compiled and config.quantize == "none":  # Inductor (torch 2.11, 2.13) stumbles over int8 weights here
        model.compile_parts()


def settle_batch_size(model: GPT, config: Any, machine: Machine) -> int:
    """batch_size=auto: the smallest micro-batch within 2% of the fastest that fits, by measuring real steps.

    gradient_accumulation_steps is then the rows of a step. What is chosen divides them, so that the step stays the
    same, and is written into the configuration, so that resuming keeps it. Each rank measures alone: one that runs out
    of memory would leave the others waiting for its gradients. Then the rank on which the fewest sizes fit decides.
    """
    if config.batch_size != "auto":
        return int(config.batch_size)
    if config.eval_only:  # nothing is trained: any size that fits will do
        config.batch_size = 8
        return 8
    rows, recompute, seconds = config.gradient_accumulation_steps // machine.world, config.recompute, {}
    alone = replace(machine, rank=0, world=1)
    for batch_size in (b for b in range(1, min(rows, 128) + 1) if rows % b == 0):
        trial = copy.copy(config)
        trial.batch_size, trial.gradient_accumulation_steps = batch_size, rows // batch_size * machine.world
        trial.cuda_graph = wants_graph(model, trial, machine)  # as the run would: small steps gain the most by it
        trial.gradient_accumulation_steps = 2  # enough to measure
        if recompute == "auto":
            trial.recompute = choose_recompute(model, trial, machine)
        model.set_recompute(trial.recompute)
        try:
            seconds[batch_size, trial.recompute] = _time_step(Step(model, trial, alone)) / batch_size
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
            break
        finally:
            model.zero_grad(set_to_none=True)
            if machine.compiled:  # torch compiles a function for eight shapes; with a ninth it would run uncompiled
                torch.compiler.reset()
            if machine.on_gpu:
                torch.cuda.empty_cache()
    if machine.world > 1:
        everyone = [seconds] * machine.world
        dist.all_gather_object(everyone, seconds)
        seconds = min(everyone, key=len)
    if not seconds:
        raise torch.OutOfMemoryError
    fastest = min(seconds.values())
    config.batch_size, config.recompute = min(key for key, value in seconds.items() if value <= 1.02 * fastest)
    config.gradient_accumulation_steps = rows // config.batch_size * machine.world
    model.set_recompute(config.recompute)
    machine.notes.append(
        f"batch_size: {config.batch_size} x {config.gradient_accumulation_steps} micro-batches, recompute={config.recompute} "
        f"(rows a second by size: {', '.join(f'{b}: {2 / s:,.0f}' for (b, _), s in seconds.items())})"
    )
    return int(config.batch_size)


def _time_step(step: Step) -> float:
    """Seconds of a step with a learning rate of 0, which leaves the weights as they are; the least of three."""
    step.x.random_(0, step.model.config.vocab_size)
    step.y.copy_(step.x)
    seconds = []
    for _ in range(step.warmup + 4):
        step.machine.synchronize()
        start = time.perf_counter()
        step(0.0)
        step.machine.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[-3:])


# --------------------------------------------------------------------------------------------------------------------
# What resuming needs


def trainer_tensors(step: Step) -> dict[str, Tensor]:
    """Every tensor that resuming needs beside the weights: moments, adapters, loss scale, random numbers."""
    names = {id(p): name for name, p in step.model.named_parameters()}
    tensors: dict[str, Tensor] = {f"adapter.{n}": p for n, p in step.model.named_parameters() if "lora_" in n}
    for optimizer in step.optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                name = f"optimizer.{names[id(p)]}.{key}"
                if hasattr(value, "__tensor_flatten__"):  # torchao's 8-bit moments: codes, scales and their table
                    tensors |= {f"{name}:{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
                else:
                    tensors[name] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if step.machine.on_gpu:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if step.scaler.is_enabled():
        scaler = step.scaler.state_dict()
        tensors["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
    return tensors


def save_trainer(folder: Path, step: Step) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: t.detach().contiguous() for name, t in trainer_tensors(step).items()}, folder / "trainer.safetensors"
    )


@torch.no_grad()
def load_trainer(folder: Path, step: Step) -> None:
    """Put a checkpoint's tensors where they were. Memory-mapped, and copied one by one: resuming needs no more memory.

    The random numbers are rank 0's, which alone saved: the others keep those that they began with.
    """
    import safetensors

    params = dict(step.model.named_parameters())
    owner = {id(p): optimizer for optimizer in step.optimizers for g in optimizer.param_groups for p in g["params"]}
    with safetensors.safe_open(folder / "trainer.safetensors", framework="pt") as content:
        for name in content.keys():  # noqa: SIM118 (not a dict)
            kind, _, rest = name.partition(".")
            tensor = content.get_tensor(name)
            if kind == "adapter":
                params[rest].copy_(tensor)
            elif kind == "optimizer":
                param, _, key = rest.rpartition(".")
                key, _, part = key.partition(":")
                state = owner[id(params[param])].state[params[param]]
                if part:
                    state.setdefault(key, {})[part] = tensor.to(step.machine.device)
                else:
                    # Of positions past a block_size that resuming has made smaller there is nothing to go on with.
                    cropped = tensor.ndim == params[param].ndim and param.endswith("wpe.weight")
                    state[key] = (tensor[: len(params[param])] if cropped else tensor).to(step.machine.device)
            elif kind == "scaler" and step.scaler.is_enabled():
                state = step.scaler.state_dict() | {"scale": tensor[0].item(), "_growth_tracker": int(tensor[1])}
                step.scaler.load_state_dict(state)
            elif name == "rng.cpu" and step.machine.rank == 0:
                torch.set_rng_state(tensor)
            elif name == "rng.cuda" and step.machine.rank == 0 and step.machine.on_gpu:
                torch.cuda.set_rng_state(tensor)
    for optimizer in step.optimizers:
        for p, state in optimizer.state.items():
            for key, parts in state.items():
                if isinstance(parts, dict):
                    state[key] = _assemble_8bit(parts, signed=key == "exp_avg", like=p)


def _assemble_8bit(parts: dict[str, Tensor], signed: bool, like: Tensor) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.__tensor_unflatten__(parts, [signed, like.dtype], like.shape, like.stride())


# --------------------------------------------------------------------------------------------------------------------
# The command line


def load_config(argv: list[str]) -> tuple[TrainConfig, set[str], bool]:
    """Configuration, the keys that were set by hand, and whether to resume. Without any argument: Shakespeare."""
    if not argv:
        preset = "train_shakespeare_char" if torch.cuda.is_available() else "train_shakespeare_cpu"
        print(
            f"no preset given: training config/{preset}.py, which suits this machine (--help shows what else there is)"
        )
        argv = [str(run_folder.REPOSITORY / "config" / f"{preset}.py")]
    # What is given on resuming is checked together with what was saved, not with the defaults.
    resuming = "--init_from=resume" in [word.replace("-from", "_from") for word in argv]
    config, given = config_loader.load(TrainConfig, argv, check=not resuming)
    if config.init_from != "resume":
        return config, given, False
    saved = run_folder.read_run(Path(config.out_dir))
    adapters = ("lora_rank", "lora_alpha", "lora_targets")
    for key in ("n_layer", "n_head", "n_embd", "bias", *adapters, "optimizer", "val_fraction"):
        if key in given and getattr(config, key) != saved["config"].get(key):
            raise UserError(
                f"{key}={getattr(config, key)}, but the run in {config.out_dir} has {saved['config'].get(key)}: leave "
                f"--{key} out, or begin a new run"
            )
    folder = config.out_dir
    # What dtype=auto became then holds: another precision would be another run.
    config, given = config_loader.load(TrainConfig, argv, saved["config"] | {"dtype": saved.get("dtype", "auto")})
    # The folder that was read: its name may have changed since, or run.json be a stranger's and lead elsewhere.
    config.init_from, config.out_dir = saved["config"]["init_from"], folder
    if (
        config.batch_size == "auto"
        and saved["config"]["batch_size"] != "auto"
        and "gradient_accumulation_steps" not in given
    ):
        config.gradient_accumulation_steps *= saved["config"]["batch_size"]  # auto counts rows
    return config, given, True


def evaluate_only(run: Run) -> None:
    for note in [*run.machine.notes, *run.dataset.warnings]:
        run.say(note)
    loss = evaluate(run.model, run.val, run.eval_count, run.batch_size, run.machine)
    run.say(
        f"{run.dataset.name}: val loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f} "
        f"over {run.eval_count:,} windows of {run.config.block_size:,} tokens"
    )


def memory_ran_out(error: RuntimeError) -> bool:
    """Where memory runs out while a CUDA graph is recorded, breaking that off is an error of its own."""
    return any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__))


def out_of_memory(config: TrainConfig) -> UserError:
    free, total = torch.cuda.mem_get_info()
    stronger = {"none": ["--recompute=pointwise", "--recompute=block"], "pointwise": ["--recompute=block"]}
    knobs = stronger.get(config.recompute, [])  # auto: it has not come to a step, or has tried them all
    if config.batch_size != "auto" and int(config.batch_size) > 1:
        half = f"--batch_size={int(config.batch_size) // 2} --gradient_accumulation_steps={2 * config.gradient_accumulation_steps}"
        knobs.append(f"{half} (the same step in smaller pieces)")
    knobs += ["--optimizer=adamw8bit", "--lora_rank=16 (fine-tuning)", f"--block_size={config.block_size // 2}"]
    peak = torch.cuda.max_memory_allocated()
    return UserError(
        f"out of GPU memory: {peak / 2**30:.1f} GiB were in use, the card has {total / 2**30:.1f} GiB, other programs leave "
        f"{(free + torch.cuda.memory_reserved()) / 2**30:.1f}.\nTry, in this order:\n  " + "\n  ".join(knobs)
    )


def lost_ranks(config: TrainConfig) -> str:
    advice = ". Go on from the last checkpoint with the same torchrun line and --init_from=resume"
    saved = any((Path(config.out_dir) / name).exists() for name in ("last", "last.prev"))
    return (
        f"rank {os.environ['RANK']} has lost the others: one of them has ended (torchrun names it below, its own message "
        f"stands above){f'{advice} --out_dir={config.out_dir}' if saved else ''}"
    )


def train_watched(run: Run) -> int:
    with run.watch_for_lost_ranks() if run.machine.world > 1 else contextlib.nullcontext():
        return run.train()


def main(argv: list[str] | None = None) -> int:
    config, given, resumed = load_config(sys.argv[1:] if argv is None else argv)
    rank, world, _ = torchrun_ranks()
    if rest := config.gradient_accumulation_steps % world:
        near = config.gradient_accumulation_steps + world - rest
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not a multiple of {world} ranks: "
            f"pass --gradient_accumulation_steps={near}"
        )
    join_ranks(config)
    try:
        if config.eval_only:
            evaluate_only(Run(config, given, resumed))
            return 0
        with run_folder.lock(Path(config.out_dir)) if rank == 0 else contextlib.nullcontext():
            return train_watched(Run(config, given, resumed))
    except RuntimeError as error:
        if memory_ran_out(error):
            raise out_of_memory(config) from None
        # gloo has no exception of its own; NCCL's are these, or its watchdog ends the process.
        lost = isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or " by peer" in str(error)
        if world == 1 or not lost:
            raise
        raise UserError(lost_ranks(config)) from None
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
