"""Memory of a training step: the formula, and the choices that follow from it.

The formula serves recompute=auto, batch_size=auto, the line that a run prints, and bench.py --plan.
Advice after running out of memory is at the end.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from gpt12.device import Machine
from gpt12.distributed import least_of_ranks
from gpt12.errors import UserError
from gpt12.loss import CHUNK_ROWS
from gpt12.settings import Recompute, TrainConfig
from model import GPTConfig, Matrix, layer_matrices, parameter_count

GIB = 2**30
# From the fastest to the one that needs the least memory.
RECOMPUTE: tuple[Recompute, ...] = ("none", "pointwise", "block")
# Uncompiled, autocast converts LayerNorm's input to float32 and keeps the copy.
KEPT_UNCOMPILED = {"none": 2, "pointwise": 1, "block": 0}
# A CPU has no fused attention with dropout: a layer keeps the softmax, the mask and their product,
# each a whole matrix (B, H, T, T) in float32.
KEPT_MATRICES = {"none": 3, "pointwise": 1, "block": 0}
MATRICES_IN_BACKWARD = 6  # the three, computed again or kept, and their gradients
# Bytes of optimizer state per trained parameter: two moments, in float32 or in 8 bits. Muon keeps
# one in float32, and its update holds a stack of the same size.
MOMENT_BYTES = {"adamw": 8, "muon": 8, "adamw8bit": 2}
PROCESS_BYTES = 0.4 * GIB  # on a CPU: Python and the libraries
CPU_GAPS = 1.1  # on a CPU: what the C library's allocator takes for each byte of a tensor
WORKSPACE_BYTES = 2**25  # buffers of cuBLAS and small tensors
ROOM_FOR_ROWS = 8  # batch_size=auto: choose the cheapest recomputation that fits this many rows
MAX_TOKENS = 32 * 1024  # batch_size=auto: a larger micro-batch is no faster
CPU_BATCH_SIZE = 8
SAFETY = 0.9  # use at most this share of the free memory


def lora_matrices(shape: GPTConfig, config: TrainConfig) -> list[Matrix]:
    """Return the matrices of a layer that get a LoRA adapter; none without lora_rank."""
    if config.lora_rank == 0:
        return []
    if config.lora_targets == "all":
        return layer_matrices(shape)
    targets = config.lora_targets.split(",")
    return [m for m in layer_matrices(shape) if m.name.rpartition(".")[2] in targets]


def trained_parameters(shape: GPTConfig, config: TrainConfig) -> int:
    """Count the parameters in memory that get gradients: all, or LoRA's adapters."""
    if config.lora_rank == 0:
        return parameter_count(shape, padded=True)
    per_layer = 0
    for matrix in lora_matrices(shape, config):
        per_layer += config.lora_rank * (matrix.inputs + matrix.outputs)
    return shape.n_layer * per_layer


def step_memory(
    shape: GPTConfig,
    config: TrainConfig,
    recompute: str,
    compiled: bool = True,
    on_cpu: bool = False,
) -> dict[str, float]:
    """Return the bytes of memory at the peak of a step, by kind.

    Their sum is what torch.cuda.max_memory_allocated would report; on a CPU, the largest resident
    memory of the process. config: batch_size, block_size, gradient_accumulation_steps, dtype,
    optimizer and LoRA's keys count. The attention mask of instruction data, B * T * T numbers, is
    left out: SAFETY has room for it.

    The peak is the largest of three moments: in the loss, when all activations are alive beside a
    chunk of logits; in the backward pass of the last layer; and at the end of the backward pass,
    when all gradients are there.
    """
    work = _Work(shape, config, recompute, compiled, on_cpu)
    moments = [work.in_the_loss(), work.in_the_last_layer(), work.at_the_end()]
    peak = max(moments, key=lambda moment: sum(moment.values()))
    if on_cpu:
        peak = {kind: CPU_GAPS * size for kind, size in peak.items()}
        peak["process"] = PROCESS_BYTES
    return peak


class _Work:
    """The quantities that the three moments share."""

    def __init__(
        self, shape: GPTConfig, config: TrainConfig, recompute: str, compiled: bool, on_cpu: bool
    ):
        self.config = config
        self.recompute = recompute
        self.full = config.lora_rank == 0  # all parameters are trained
        self.number = 4 if config.dtype == "float32" else 2  # bytes of an activation
        self.master = 2 if config.optimizer == "adamw8bit" else 4  # bytes of a trained parameter
        self.moment_bytes = MOMENT_BYTES.get(config.optimizer, 8)
        self.uncompiled = not compiled and self.number == 2
        self.n_layer = shape.n_layer
        self.parameters = parameter_count(shape, padded=True)
        self.trained = trained_parameters(shape, config)
        self.table = shape.padded_vocab_size * shape.n_embd  # numbers in the embedding table
        self.vocab = shape.padded_vocab_size
        self.tokens = int(config.batch_size) * config.block_size
        self.stream = self.number * shape.n_embd * self.tokens  # bytes of one (B, T, C) tensor
        # Widths of activations in units of n_embd.
        matrices = {matrix.name: matrix for matrix in layer_matrices(shape)}
        outputs = sum(m.outputs for name, m in matrices.items() if name.startswith("attn."))
        self.qkv = (outputs - matrices["attn.c_proj"].outputs) / shape.n_embd
        self.hidden = matrices["mlp.c_fc"].outputs / shape.n_embd
        # LoRA's adapters read the inputs of their matrices and add to the outputs.
        adapted = lora_matrices(shape, config)
        self.widths_in = sum(m.inputs for m in adapted) / shape.n_embd
        self.widths_out = sum(m.outputs for m in adapted) / shape.n_embd
        self.dropout = shape.dropout
        self.on_cpu = on_cpu
        self.matrix = 0.0  # bytes of the attention of all heads, where it is a whole matrix
        if on_cpu and shape.dropout > 0:
            self.matrix = 4.0 * shape.n_head * self.tokens * config.block_size

    def kept_per_layer(self) -> float:
        """Return what a layer keeps, in (B, T, C) tensors."""
        # In this order: the layer's input, LayerNorm, query with key and value, attention, the
        # stream after it, LayerNorm, the MLP's inside, GELU.
        if self.recompute == "none":
            kept = 1 + 1 + self.qkv + 1 + 1 + 1 + self.hidden + self.hidden
        elif self.recompute == "pointwise":  # without the two LayerNorms and GELU's output
            kept = 1 + self.qkv + 1 + 1 + self.hidden
        else:
            kept = 1
        if self.uncompiled:
            kept += KEPT_UNCOMPILED[self.recompute]
        if self.recompute == "none" and self.dropout > 0:
            kept += 2 if self.on_cpu else 1  # two masks; on a GPU each has one byte per number
        if self.recompute == "none" and not self.full and self.config.lora_dropout > 0:
            # The masks of the adapters' inputs, one byte per number, and one such input.
            kept += self.widths_in / 2 + 1
        if self.recompute == "pointwise" and not self.full:
            kept += self.widths_out  # the adapters' products, which "none" does not keep
        return kept

    def parameters_and_state(self) -> dict[str, float]:
        """Return what is there all the time."""
        if self.full:
            weights = self.master * self.parameters
        else:
            weights = self.number * self.parameters + 4 * self.trained
        gradients = 0
        if self.config.gradient_accumulation_steps > 1:
            gradients = self.master * self.trained
        return {
            "weights": float(weights),
            "moments": float(self.moment_bytes * self.trained),
            "gradients": float(gradients),
        }

    def kept_matrices(self) -> float:
        """Return the bytes of attention matrices that all layers keep."""
        return KEPT_MATRICES[self.recompute] * self.n_layer * self.matrix

    def head_gradient(self) -> float:
        """Return the bytes of the head's part of the embedding's gradient, which is in float32."""
        return 4.0 * self.table if self.full else 0.0

    def in_the_loss(self) -> dict[str, float]:
        """All activations are alive, and a chunk of logits beside them."""
        logit_bytes = self.number
        if self.uncompiled:
            logit_bytes += 4  # a float32 copy of the chunk
        workspace = float(WORKSPACE_BYTES)
        if self.full and self.number < self.master:
            workspace += self.number * self.table  # the head's weight in 16 bits
            if self.recompute == "none":
                # The 16-bit copies of all weights are kept for the backward pass.
                workspace += self.number * (self.parameters - self.table)
        moment = self.parameters_and_state()
        moment["activations"] = (self.kept_per_layer() * self.n_layer + 4) * self.stream
        moment["activations"] += self.kept_matrices()
        chunk = logit_bytes * min(self.tokens, CHUNK_ROWS) * self.vocab
        moment["logits"] = chunk + self.head_gradient()
        moment["workspace"] = workspace
        return moment

    def in_the_last_layer(self) -> dict[str, float]:
        """The backward pass of the last layer holds that layer's gradients beside all that is kept.

        The numbers of (B, T, C) tensors in it were fitted to measurements.
        """
        if self.recompute != "block":
            gradients = 10.0
        elif self.full:
            gradients = 21.5  # and all activations of this layer, computed again
        else:
            gradients = 40.0
        moment = self.parameters_and_state()
        moment["activations"] = (self.kept_per_layer() * self.n_layer + gradients) * self.stream
        matrices = MATRICES_IN_BACKWARD - KEPT_MATRICES[self.recompute]
        moment["activations"] += self.kept_matrices() + matrices * self.matrix
        moment["logits"] = self.head_gradient()
        return moment

    def at_the_end(self) -> dict[str, float]:
        """All gradients are there; the embedding's is held in two parts, lookup and head."""
        moment = self.parameters_and_state()
        moment["gradients"] = float(self.master * self.trained)
        moment["activations"] = 13.0 * self.stream
        moment["logits"] = self.head_gradient()
        return moment


def needed_memory(shape: GPTConfig, config: TrainConfig, recompute: str, machine: Machine) -> float:
    """Return the predicted bytes at the peak of a step on this machine."""
    on_cpu = machine.device.type == "cpu"
    return sum(step_memory(shape, config, recompute, machine.compiled, on_cpu).values())


# --------------------------------------------------------------------------------------------------
# Choices


def available_memory(machine: Machine) -> float:
    """Return the bytes that a process may use, including what it already holds.

    On a GPU its own memory, on a CPU the RAM. Infinity where the system does not tell. With several
    ranks it is the least of theirs, so that all decide the same.
    """
    return least_of_ranks(_own_memory(machine), machine.device)


def _own_memory(machine: Machine) -> float:
    if machine.on_gpu:
        free, total = torch.cuda.mem_get_info(machine.device)
        share = torch.cuda.get_per_process_memory_fraction(machine.device)
        return min(free + torch.cuda.memory_reserved(machine.device), share * total)
    try:
        free = _read_kib("/proc/meminfo", "MemAvailable")
        return 1024.0 * (free + _read_kib("/proc/self/status", "VmRSS"))
    except OSError:  # not Linux
        return math.inf


def _read_kib(file: str, name: str) -> int:
    """Return the number in a line `name: 123 kB` of a file of the kernel."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{file} does not tell {name}")


def choose_recompute(shape: GPTConfig, config: TrainConfig, machine: Machine) -> Recompute:
    """Return the cheapest recomputation that fits config.batch_size rows, else "block"."""
    room = SAFETY * available_memory(machine)
    for recompute in RECOMPUTE:
        if needed_memory(shape, config, recompute, machine) < room:
            return recompute
    return "block"


def choose_batch_size(shape: GPTConfig, config: TrainConfig, machine: Machine) -> TrainConfig:
    """Resolve batch_size="auto" and recompute="auto"; return the new configuration.

    gradient_accumulation_steps is then the number of rows of a step on all ranks, and the
    micro-batch has to divide a rank's share of them. The recomputation is the cheapest one that
    fits 8 rows, and the micro-batch the largest that fits, up to 32k tokens. On a CPU and for
    evaluation there are at most 8 rows.
    """
    if config.batch_size != "auto":
        if config.recompute == "auto":
            config = replace(config, recompute=choose_recompute(shape, config, machine))
        return config
    rows = config.gradient_accumulation_steps // machine.world
    limit = rows if machine.on_gpu and not config.eval_only else min(rows, CPU_BATCH_SIZE)
    sizes = [size for size in range(1, limit + 1) if rows % size == 0]
    recompute = config.recompute
    if recompute == "auto":
        trial = replace(config, batch_size=min(ROOM_FOR_ROWS, rows))
        recompute = choose_recompute(shape, trial, machine)
    largest = sizes[0]
    for size in sizes:
        trial = _with_batch_size(config, size, rows, recompute, machine)
        needed = needed_memory(shape, trial, recompute, machine)
        fits = needed < SAFETY * available_memory(machine)
        if fits and size * config.block_size <= MAX_TOKENS:
            largest = size
    return _with_batch_size(config, largest, rows, recompute, machine)


def _with_batch_size(
    config: TrainConfig, batch_size: int, rows: int, recompute: Recompute, machine: Machine
) -> TrainConfig:
    """Return the configuration with this micro-batch and the same rows per step."""
    return replace(
        config,
        batch_size=batch_size,
        gradient_accumulation_steps=rows // batch_size * machine.world,
        recompute=recompute,
    )


# --------------------------------------------------------------------------------------------------
# Out of memory


def check_memory(shape: GPTConfig, config: TrainConfig, machine: Machine) -> None:
    """Raise UserError if a step needs more RAM than is free.

    The operating system would kill the program without a word. A GPU's driver raises an error,
    which out_of_memory_advice() explains.
    """
    if machine.on_gpu or config.eval_only:
        return
    free = available_memory(machine)
    needed = needed_memory(shape, config, config.recompute, machine)
    if needed <= free:
        return
    pieces = 0
    for divisor in _divisors(int(config.batch_size)):
        pieces = divisor
        smaller = replace(config, batch_size=int(config.batch_size) // pieces)
        if needed_memory(shape, smaller, config.recompute, machine) <= free:
            break
    title = f"a step needs about {needed / GIB:,.1f} GiB of memory, and {free / GIB:,.1f} are free."
    raise _advice(title, _memory_knobs(config, pieces, on_cpu=True))


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the memory is used up.

    While a CUDA graph is recorded, running out of memory breaks off the recording, which raises an
    error of its own. If a CPU's RAM runs out, only the message says so.
    """
    if "DefaultCPUAllocator" in str(error):
        return True
    return any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__))


def out_of_memory_advice(config: TrainConfig, resumed: bool = False) -> UserError:
    """Return an error that says how much memory there was and what to change, best first.

    resumed: whether an earlier run goes on, which cannot change its optimizer or add adapters.
    """
    if not torch.cuda.is_initialized():
        return _advice("out of memory.", _memory_knobs(config, resumed=resumed, on_cpu=True))
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    usable = free + torch.cuda.memory_reserved()
    title = (
        f"out of GPU memory: {peak / GIB:.1f} GiB were in use, the card has {total / GIB:.1f} GiB, "
        f"other programs leave {usable / GIB:.1f}."
    )
    return _advice(title, _memory_knobs(config, resumed=resumed))


def _advice(title: str, knobs: list[str]) -> UserError:
    lines = [title, "Try, in this order:"]
    for knob in knobs:
        lines.append(f"  {knob}")
    return UserError("\n".join(lines))


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number but 1, ascending."""
    return [n for n in range(2, number + 1) if number % n == 0]


def _memory_knobs(
    config: TrainConfig, pieces: int = 0, resumed: bool = False, on_cpu: bool = False
) -> list[str]:
    """Return the options that save memory, without those that the configuration has already.

    pieces: into how many to cut the micro-batch; 0 means as few as possible.
    """
    knobs = []
    if config.recompute == "none":
        knobs.append("--recompute=pointwise")
    if config.recompute != "block":
        knobs.append("--recompute=block")
    if config.batch_size != "auto" and int(config.batch_size) > 1:
        pieces = pieces or _divisors(int(config.batch_size))[0]
        size = int(config.batch_size) // pieces
        knobs.append(
            f"--batch_size={size} "
            f"--gradient_accumulation_steps={pieces * config.gradient_accumulation_steps} "
            "(the same step in smaller pieces)"
        )
    if not config.lora_rank and not resumed:
        # adamw8bit needs bfloat16, which is slow on most CPUs.
        if config.optimizer != "adamw8bit" and not on_cpu:
            knobs.append("--optimizer=adamw8bit")
        knobs.append("--lora_rank=16 (fine-tuning)")
    knobs.append(f"--block_size={config.block_size // 2}")
    if on_cpu:
        knobs.append("config/train_shakespeare_cpu.py (a small model)")
    return knobs
