"""Measure how fast this machine trains GPT-2 and writes text, and how much memory that takes.

    python bench.py                                    # one training step
    python bench.py --ladder                           # what each technique gains
    python bench.py --sweep=batch_size:4,8,16          # the step at several values of a key
    python bench.py --find_batch                       # the fastest micro-batch in this memory
    python bench.py --sample                           # writing texts, as sample.py does
    python bench.py --plan --init_from=gpt2-xl --lora_rank=16   # what fits a card, without a GPU
    torchrun --nproc_per_node=2 bench.py               # the step on several GPUs

What is timed is train.py's own TrainStep, its loading included. gpt12/measure.py takes the times,
predict() predicts them. A row holds the figures of one step, by their names in bench.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpt12.errors import (
    UserError,
    is_rank_0,
    ran_out_of_memory,
    require_packages,
    run_main,
    say,
)

require_packages()
# As in train.py, before torch is imported: let memory segments grow.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from data.windows import TrainWindows
from gpt12.cards import CARDS, Card, find_card
from gpt12.config import load_config
from gpt12.device import Machine, available_memory, cap_memory, open_machine
from gpt12.distributed import process_group, reported_by_rank_0, torchrun_ranks
from gpt12.folder import describe_run, user_error_if_unwritable, write_json
from gpt12.generate import store_by_columns
from gpt12.loss import CHUNK_ROWS
from gpt12.measure import (
    Row,
    attention_kernel,
    forget_last_measurement,
    open_tokens,
    show_fastest,
    show_rows,
    show_step,
    time_calls,
    time_decoding,
)
from gpt12.memory import GIB, RECOMPUTE, step_memory, trained_parameters
from gpt12.muon import NEWTON_SCHULZ_ITERATIONS
from gpt12.run import (
    check_ranks,
    decide_dtype_and_alpha,
    overruled_keys,
    prepare_model,
)
from gpt12.settings import BenchConfig, Recompute, SampleConfig, TrainConfig, model_shape
from gpt12.twin import is_gpt2
from gpt12.weights import new_model
from model import GPTConfig, flops_per_token, parameter_count
from train import TrainStep

# Layers, heads and width of the published models.
GPT2_SHAPES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
# On a CPU a step of GPT-2 takes half a minute. Unless a shape is given, the model is that of
# nanoGPT's command for CPUs.
CPU_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65}
WARMUP_STEPS = 3  # beyond those in which the step is compiled and recorded
PROFILED_STEPS = 3
TEXTS = (1, 4, 16, 64)  # written at once
# Memory of a planned or imitated card that torch does not get: the driver's context takes 0.4 GiB,
# a desktop 0.3 or more.
MARGIN_GIB = 1.0


def read(argv: Sequence[str]) -> tuple[BenchConfig, Sequence[Recompute]]:
    """Return the configuration, with the shape that it means, and the recomputation to try.

    The recomputation is the kind that was asked for, or all. Say which shape was chosen, and which
    keys the shape of GPT-2 overrules.
    """
    loaded = load_config(BenchConfig, argv)
    config = loaded.config
    given = loaded.given
    if config.init_from in GPT2_SHAPES:
        n_layer, n_head, n_embd = GPT2_SHAPES[config.init_from]
        asked = config
        config = replace(config, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True)
        for note in overruled_keys(asked, given, config):
            say(note)
    elif config.init_from != "scratch":
        raise UserError(
            f"init_from={config.init_from}: only a model's shape matters here, so it must be "
            f"one of scratch, {', '.join(GPT2_SHAPES)}"
        )
    elif not config.plan and given.isdisjoint(CPU_SHAPE):
        machine = open_machine(config.device, "float32", compile=False)
        if machine.device.type == "cpu":
            config = replace(config, **CPU_SHAPE)  # type: ignore[arg-type]
            say("the model is a small one, for CPUs: give a shape or --init_from=gpt2 for another")
    if "gradient_accumulation_steps" not in given:
        config = replace(config, gradient_accumulation_steps=torchrun_ranks().world)
    check_ranks(config)
    return config, (config.recompute,) if "recompute" in given else RECOMPUTE


# --------------------------------------------------------------------------------------------------
# The step


class StepRunner:
    """Makes training steps one after the other, as the loop of train.py does.

    cuda_graph: whether a step that train.py would record as a CUDA graph is recorded.
    """

    def __init__(self, config: BenchConfig, cuda_graph: bool = True):
        forget_last_measurement()
        self.config, self.machine = decide(config)  # a row of a table may have a machine of its own
        tokens, vocab_size, self.data = open_tokens(config)
        self.shape = model_shape(config, vocab_size)
        if self.machine.compiled:
            torch.compiler.reset()  # what was compiled for other shapes
        needed = step_memory(self.shape, self.config, self.machine)
        if self.machine.device.type == "cpu" and needed > available_memory(self.machine):
            raise torch.OutOfMemoryError  # the system would kill the program without a word
        torch.manual_seed(config.seed)
        self.model = new_model(self.shape)
        prepare_model(self.model, self.config, self.machine)
        packed = tokens.mask is not None
        self.step = TrainStep(self.model.train(), self.config, self.machine, packed, cuda_graph)
        self.windows = TrainWindows(tokens, config.block_size, config.seed)
        self.position = 0
        self.step.load(self.windows, self.position)
        self.warmup = self.step.warmup_calls + WARMUP_STEPS

    def __call__(self) -> None:
        """Make a step and load the windows of the next one. Does not wait for the device."""
        self.step(self.config.learning_rate)
        self.position += self.config.windows_per_step
        self.step.load(self.windows, self.position)


def decide(config: BenchConfig) -> tuple[BenchConfig, Machine]:
    """Return the configuration with "auto" decided as train.py does for a long run."""
    machine = open_machine(
        config.device, config.dtype, config.compile, deterministic=config.deterministic
    )
    return replace(decide_dtype_and_alpha(config, machine), compile=machine.compiled), machine


def measure_step(config: BenchConfig, label: str, cuda_graph: bool = True) -> Row:
    """Time train.py's step in this configuration, over all ranks together."""
    say(f"measuring {label} ...")
    with attention_kernel(config.attention):
        runner = StepRunner(config, cuda_graph)
        step = runner.step
        machine = runner.machine
        row = time_calls(runner, machine, runner.warmup, config.steps)
        # The ranks wait for each other in every step, so they all take the same time.
        tokens = step.x.numel() * machine.world
        row |= {
            "label": label,
            "tokens": tokens,
            "tokens_per_s": 1e3 * tokens / row["ms"],
            "micro_steps": step.micro_steps,  # on each rank
            "data": runner.data,
            "parameters": parameter_count(runner.shape),
            "flops_per_token": flops_per_token(runner.shape),
            "dtype": runner.config.dtype,
            "compile": machine.compiled,
            "cuda_graph": step.graph is not None,
            "loss": step.loss.item(),  # of the last step
        }
        compare_with_datasheet(row, runner)
    for warning in row["warnings"]:
        say(f"warning: {warning}")
    return row


def compare_with_datasheet(row: Row, runner: StepRunner) -> None:
    """Add MFU and the prediction, if the card is known and computes in 16 bits."""
    machine = runner.machine
    card = CARDS.get(machine.name)
    if card is None or machine.dtype == torch.float32:
        return
    if runner.config.lora_rank == 0:  # 6N + 12LCT counts a gradient for every weight
        achieved = row["flops_per_token"] * row["tokens_per_s"] / machine.world
        row["mfu"] = achieved / (card.tflops * 1e12)
    on_one_rank = replace(runner.config, gradient_accumulation_steps=row["micro_steps"])
    predicted = predict(runner.shape, on_one_rank, card)
    row["predicted_ms"] = predicted["ms"]
    row["predicted_gib"] = predicted["peak_gib"]


def try_to_measure(label: str, config: BenchConfig, cuda_graph: bool = True) -> Row:
    """Measure a step, or return that memory did not suffice."""
    try:
        return measure_step(config, label, cuda_graph)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
    return {"label": label, "error": "out of memory"}


def imitate_card(vram_gb: float, machine: Machine) -> None:
    """Limit torch's allocator to what a card with this much memory would leave it."""
    total = 0.0
    if machine.on_gpu:
        total = torch.cuda.get_device_properties(machine.device).total_memory / GIB
    if vram_gb > total + MARGIN_GIB:
        raise UserError(
            f"vram_gb={vram_gb:g} limits a GPU's memory, and this machine has none of that size. "
            "--plan predicts what fits, without one"
        )
    torch.cuda.set_per_process_memory_fraction((vram_gb - MARGIN_GIB) / total)


# --------------------------------------------------------------------------------------------------
# Predicting the time of a step on a card
#
# This follows the roofline model (Williams et al. 2009), but as a sum: matrix products run at a
# share of the card's peak rate, everything else at a share of its bandwidth, and the two do not
# overlap. C channels, L layers. A layer has 12 C^2 weights: query, key and value 3, attention's
# output 1, the MLP 4 and 4.

# Fitted to measured steps of GPT-2 124M on an H200, which tests/test_bench.py lists.
PRODUCTS_SHARE = 0.69  # of the datasheet's rate, reached by matrix products of this size
# An estimate: GeForce cards clock above their datasheet, and their slower tensor cores wait less.
GEFORCE_PRODUCTS_SHARE = 0.88
BANDWIDTH_SHARE = 0.73  # of the datasheet's bandwidth, reached by kernels that only move numbers
SOFTMAX_FLOPS = 60  # float32 operations for an element of the attention matrix in one pass
SECONDS_PER_LAYER = 0.15e-3  # kernels of a layer starting and running out, in a micro-batch

EXAMINED_CONTEXT = 2048  # tokens that show whether model.py is GPT-2's
LARGEST_BATCH = 1024  # micro-batches up to this size are considered
# Numbers that all kernels but matrix products read and write, per token, layer and channel.
# Forward 16: LayerNorm with the sum before it 4, twice; GELU 8. Backward 30: GELU 12; LayerNorm
# 6, twice; joining the gradients of query, key and value 6.
MOVED_NUMBERS = 16 + 30
MOVED_AGAIN = {"none": 0, "pointwise": 12, "block": 16}  # computed again in the backward pass
MOVED_BY_ADAPTERS = 54  # adding the adapters' products, 6 for each of 9 outputs
MOVED_BY_BIASES = 9  # their gradients, one for each of 9 outputs
# Bytes that an update moves for each trained parameter: the gradient (for its norm, then for the
# update) is read, the weight and two moments are read and written. Muon is counted like AdamW.
UPDATE_BYTES = {"adamw8bit": 2 + 2 + 8}
# Bytes that a micro-batch moves for each trained parameter: weights are cast to 16 bits, gradients
# back; the head's gradient is set to zero, scaled and added to the embedding's.
CAST_BYTES = 17


def predict(shape: GPTConfig, config: TrainConfig, card: Card) -> dict[str, Any]:
    """Predict memory and time of a compiled step on a card, by the names in bench.json.

    config: batch_size and dtype are decided.
    """
    micro_steps = config.gradient_accumulation_steps
    tokens = micro_steps * config.batch_size * config.block_size
    peak = card.tflops * 1e12
    if config.dtype == "float32":
        peak /= 2  # TF32
    is_geforce = card.tflops < 3 * card.fp32_tflops
    peak *= GEFORCE_PRODUCTS_SHARE if is_geforce else PRODUCTS_SHARE
    # Elements of attention matrices: forward, backward, perhaps forward again; causality halves.
    passes = 3 if config.recompute == "block" else 2
    elements = passes * tokens * config.block_size / 2 * shape.n_head * shape.n_layer
    seconds = (
        product_flops(shape, config, tokens) / peak
        + moved_bytes(shape, config, tokens) / (BANDWIDTH_SHARE * card.bandwidth_gbs * 1e9)
        + elements * SOFTMAX_FLOPS / (card.fp32_tflops * 1e12)
        + micro_steps * shape.n_layer * SECONDS_PER_LAYER
    )
    return {
        "batch_size": config.batch_size,
        "recompute": config.recompute,
        "ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "peak_gib": step_memory(shape, config) / GIB,
    }


def product_flops(shape: GPTConfig, config: TrainConfig, tokens: int) -> float:
    """Count the operations of the matrix products of a step."""
    C = shape.n_embd
    L = shape.n_layer
    attention = L * C * config.block_size
    weights = (flops_per_token(shape) - 12 * attention) / 6
    # A multiplication and an addition per weight, once in the forward pass and once in the backward
    # pass for the input's gradient; once more for the gradient of each weight that is trained.
    # Attention: two products forward and five backward (Dao 2023, arXiv:2307.08691, section 3.1),
    # half of each because of causality.
    per_token = 6 * weights + 7 * attention
    if config.lora_rank > 0:
        per_token += 6 * trained_parameters(shape, config) - 2 * weights
    if config.recompute == "block":  # all again but the layer's last product, which nothing needs
        per_token += 2 * 8 * C * C * L + 2 * attention
    update = 0
    if config.optimizer == "muon":
        # An iteration for X of m x n, m <= n, is X X^T, its square, and their sum times X:
        # 4 m^2 n + 2 m^3. A layer has four of C x C and two of C x 4C.
        update = NEWTON_SCHULZ_ITERATIONS * L * (4 * 6 + 2 * 18) * C**3
    return float(tokens * per_token + update)


def moved_bytes(shape: GPTConfig, config: TrainConfig, tokens: int) -> float:
    """Count the bytes that everything but the matrix products reads and writes in a step."""
    C = shape.n_embd
    head = shape.padded_vocab_size * C
    trained = trained_parameters(shape, config)
    number = 4 if config.dtype == "float32" else 2  # bytes of an activation
    per_layer = MOVED_NUMBERS + MOVED_AGAIN[config.recompute]
    if shape.bias:
        per_layer += MOVED_BY_BIASES
    if config.lora_rank > 0:
        per_layer += MOVED_BY_ADAPTERS
    # The loss reads and writes logits.
    per_token = number * (shape.n_layer * per_layer * C + 20 * C + 2 * shape.padded_vocab_size)
    per_update = UPDATE_BYTES.get(config.optimizer, 4 + 4 + 24) * trained
    if config.lora_rank > 0:
        return float(tokens * per_token + per_update)
    micro_steps = config.gradient_accumulation_steps
    per_micro_batch = CAST_BYTES * trained
    if micro_steps > 1:
        per_micro_batch += 12 * trained  # gradients are added up
    # The head's gradient is read and written for each chunk of rows.
    head_bytes = tokens * 8 * head / CHUNK_ROWS
    return tokens * per_token + head_bytes + micro_steps * per_micro_batch + per_update


def predict_sizes(
    shape: GPTConfig, config: TrainConfig, room_gib: float, card: Card
) -> list[dict[str, Any]]:
    """Predict steps with micro-batches of 1, 4, 16, 64 and batch_size rows, and the largest.

    They fit into room_gib, or the row of batch_size says that it does not.
    """

    def sized(batch_size: int) -> TrainConfig:
        return replace(config, batch_size=batch_size)

    largest = 0
    while largest < LARGEST_BATCH:
        if step_memory(shape, sized(largest + 1)) > room_gib * GIB:
            break
        largest += 1
    rows = []
    for size in sorted({1, 4, 16, 64, config.batch_size, largest} - {0}):
        row = {"label": f"--batch_size={size} --recompute={config.recompute}"}
        if size <= largest:
            rows.append(predict(shape, sized(size), card) | row)
        elif size == config.batch_size:
            needed = step_memory(shape, sized(size)) / GIB
            rows.append(row | {"error": f"does not fit: {needed:.3g} GiB"})
    return rows


# --------------------------------------------------------------------------------------------------
# The commands that look at several steps

# The techniques of the ladder in the order of its rungs, and the key that switches each on. On
# every rung are TF32, the padded vocabulary, the 16-bit residual stream under autocast, the loss in
# chunks of rows and the fused AdamW, because they have no switch.
TECHNIQUES = {
    "16-bit autocast": "dtype",
    "torch.compile": "compile",
    "flash attention": "attention",
    "recomputation": "recompute",
}


def climb_ladder(top: BenchConfig, machine: Machine) -> list[Row]:
    """Measure a plain float32 step, then one technique more at each rung, up to those of `top`.

    Techniques that change nothing here are left out.
    """
    if top.recompute == "none":
        top = replace(top, recompute="pointwise")
    rung = replace(top, dtype="float32", compile=False, attention="math", recompute="none")
    rows = [try_to_measure("fp32, eager", rung, cuda_graph=False)]
    for name, key in TECHNIQUES.items():
        if getattr(rung, key) != getattr(top, key):
            rung = replace(rung, **{key: getattr(top, key)})
            rows.append(try_to_measure(f"+ {name}", rung, cuda_graph=False))
    if machine.on_gpu:
        rows.append(try_to_measure("+ CUDA graph", top))
    return rows


def sweep(config: BenchConfig, argv: Sequence[str]) -> list[Row]:
    """Measure the step at each value of --sweep=KEY:VALUE,VALUE.

    config: of the command line without the values.
    """
    key, _, values = str(config.sweep).partition(":")
    if not values:
        raise UserError(
            f"sweep={config.sweep} must look like KEY:VALUE,VALUE, as in --sweep=batch_size:4,8,16"
        )
    if key.replace("-", "_") != "init_from":  # the small model for CPUs stays small at each value
        argv = [*(f"--{name}={getattr(config, name)}" for name in CPU_SHAPE), *argv]
    configs = {}
    for value in values.split(","):  # all are read before the first is measured
        setting = f"{key}={value}"
        configs[setting], _ = read([*argv, f"--{setting}"])
    return [try_to_measure(setting, swept) for setting, swept in configs.items()]


def find_batch(config: BenchConfig, kinds: Sequence[Recompute], machine: Machine) -> list[Row]:
    """Measure micro-batches of 1, 2, 4 ... rows until one does not fit or is slower.

    kinds: of recomputation, to try each.
    """
    if not machine.on_gpu:
        kinds = kinds[:1]  # computing twice only costs time there
    elif config.vram_gb is None:
        cap_memory(machine)
    rows: list[Row] = []
    for recompute in kinds:
        speed = 0.0
        batch_size = 1
        while batch_size <= LARGEST_BATCH:
            trial = replace(config, batch_size=batch_size, recompute=recompute)
            row = try_to_measure(f"--batch_size={batch_size} --recompute={recompute}", trial)
            rows.append(row)
            if "error" in row or row["tokens_per_s"] < 0.95 * speed:
                break
            speed = max(speed, row["tokens_per_s"])
            batch_size *= 2
    return rows


def plan(config: BenchConfig, kinds: Sequence[Recompute]) -> dict[str, Any]:
    """Predict which micro-batches fit the card of the configuration, and how fast they are."""
    name = find_card(config.card)
    card = CARDS[name]
    room_gib = (config.vram_gb or card.vram_gb) - MARGIN_GIB
    method = f"LoRA of rank {config.lora_rank}" if config.lora_rank else config.optimizer
    say(
        f"predicted for {name} with {room_gib:g} GiB for the compiled step: {config.n_layer} "
        f"layers, {config.n_embd} wide, {method}"
    )
    shape = model_shape(config, config.vocab_size)
    # Attention takes time and memory with the square of the context.
    if not is_gpt2(replace(shape, block_size=min(shape.block_size, EXAMINED_CONTEXT))):
        say("model.py is not GPT-2's, so that these are estimates")
    rows = []
    for recompute in kinds:
        rows += predict_sizes(shape, replace(config, recompute=recompute), room_gib, card)
    show_rows(rows)
    return {"card": name, "rows": rows, "best": show_fastest(rows)}


# --------------------------------------------------------------------------------------------------
# --profile, --sample


def profile(config: BenchConfig) -> None:
    """Print torch's table of a few steps. Without a CUDA graph, which hides its kernels."""
    with attention_kernel(config.attention):
        runner = StepRunner(config, cuda_graph=False)
        for _ in range(runner.warmup):
            runner()
        runner.machine.synchronize()
        with torch.profiler.profile(acc_events=True) as profiler:
            for _ in range(PROFILED_STEPS):
                runner()
            runner.machine.synchronize()
        order = "self_cuda_time_total" if runner.machine.on_gpu else "self_cpu_time_total"
    say(profiler.key_averages().table(order, row_limit=20, max_name_column_width=60))
    say(f"the times are those of {PROFILED_STEPS} steps")


def sample(config: BenchConfig, machine: Machine) -> list[Row]:
    """Time how sample.py, with its own defaults, continues 1, 4, 16 and 64 random prompts.

    The model has random weights. A prompt fills a quarter of the context.
    """
    model = new_model(model_shape(config, config.vocab_size)).eval()
    model.to(machine.device, machine.dtype)
    if not machine.on_gpu:
        store_by_columns(model)
    length = max(1, config.block_size // 4)
    new_tokens = min(config.max_new_tokens, config.block_size - length)
    say(f"prompts of {length} tokens, {new_tokens} new tokens, {config.n_layer} layers")
    rows = []
    for texts in TEXTS:
        prompts = torch.randint(config.vocab_size, (texts, length)).tolist()
        row = time_decoding(model, prompts, SampleConfig(max_new_tokens=new_tokens))
        rows.append(row | {"label": f"texts at once: {texts}"})
    return rows


# --------------------------------------------------------------------------------------------------
# The commands


def finish(config: BenchConfig, device: str, results: dict[str, Any]) -> None:
    """Print the results as JSON if asked for, else write them to bench.json. Only rank 0 does.

    The step's figures stand at the top level, each other measurement under its own name. A plan
    goes to plan.json, because a prediction must not replace what was measured.
    """
    if not is_rank_0():
        return
    content = describe_run(asdict(config), device=device, **results)
    if config.json:
        print(json.dumps(content), flush=True)
        return
    file = "plan.json" if config.plan else "bench.json"
    with user_error_if_unwritable(Path(file)):
        write_json(Path(file), content)
    say(f"wrote {file}: all figures, with versions and settings (--json prints them instead)")
    if config.ladder:
        draw(results["ladder"], f"GPT-2 of {config.n_layer} layers of {config.n_embd}: {device}")


def draw(rows: list[Row], title: str) -> None:
    """Draw bench.png: a bar for the speed of each step, and its peak memory in words."""
    from matplotlib.figure import Figure  # not pyplot, which takes twice as long to import

    words = []
    for row in rows:
        text = row.get("error") or f"{row['tokens_per_s']:,.0f}"
        if "peak_gib" in row:
            text += f", {row['peak_gib']:.3g} GiB"
        words.append(text)
    figure = Figure(figsize=(8, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="tokens/s in training, peak memory", xticks=[])
    speeds = [row.get("tokens_per_s", 0) for row in rows]
    bars = axes.barh([row["label"] for row in rows], speeds, color="#0072B2")
    axes.bar_label(bars, words, padding=3)
    axes.margins(x=0.3)  # room for the words
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("bench.png", dpi=110)
    say("wrote bench.png")


def introduce(config: BenchConfig, machine: Machine) -> None:
    """Describe the machine, and limit the memory if that was asked for."""
    for line in (f"{machine.name}, torch {torch.__version__}", *machine.notes):
        say(line)
    if config.vram_gb is not None:
        imitate_card(config.vram_gb, machine)


def measure(argv: Sequence[str], config: BenchConfig, kinds: Sequence[Recompute]) -> None:
    """Measure what was asked for, one after the other, and show it."""
    config, machine = decide(config)
    introduce(config, machine)
    results: dict[str, Any] = {}
    if config.sweep is not None:
        results["sweep"] = sweep(config, argv)
    if config.ladder:
        results["ladder"] = climb_ladder(config, machine)
    if config.find_batch:
        results["find_batch"] = find_batch(config, kinds, machine)
    if config.sample:
        results["sample"] = sample(config, machine)
    for rows in results.values():
        show_rows(rows)
    if config.find_batch:
        show_fastest(results["find_batch"])
    if config.profile:
        profile(config)
    elif not results:
        size = f"{config.batch_size} x {config.block_size:,} tokens"
        results = measure_step(config, f"{size}, recompute={config.recompute}")
        show_step(results)
    if results:
        finish(config, machine.name, results)


def main(argv: Sequence[str] | None = None) -> None:
    """Read what was asked for, then predict or measure."""
    argv = sys.argv[1:] if argv is None else argv
    with reported_by_rank_0():
        config, kinds = read(argv)
        alone = config.sweep or config.ladder or config.find_batch or config.sample
        if torchrun_ranks().world > 1 and (alone or config.profile or config.plan):
            raise UserError("with several processes only the step can be measured")
        if config.plan:
            finish(config, "", {"plan": plan(config, kinds)})
            return
        with process_group(config.device, config.backend):
            measure(argv, config, kinds)


if __name__ == "__main__":
    run_main(
        main,
        out_of_memory="bench.py measures what was asked for and makes nothing smaller. Try "
        "--find_batch, --recompute=pointwise, --recompute=block or a smaller --batch_size",
    )
