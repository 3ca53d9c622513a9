"""Measure how fast this machine trains GPT-2 and writes text, and how much memory that takes.

    python bench.py                                    # one training step
    python bench.py --ladder                           # what each technique gains
    python bench.py --sweep=batch_size:4,8,16          # the step at several values of a key
    python bench.py --find_batch                       # the fastest micro-batch in this memory
    python bench.py --sample                           # writing texts, as sample.py does
    python bench.py --plan --init_from=gpt2-xl --lora_rank=16   # what fits a card, without a GPU
    torchrun --nproc_per_node=2 bench.py               # the step on several GPUs

What is timed is train.py's own TrainStep with its Loader. gpt12/measure.py takes the times,
gpt12/memory.py predicts them. `main` at the end is a table of contents.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gpt12.errors import UserError, require_packages, run_main, say

require_packages()
# As in train.py, before torch is imported: let memory segments grow.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from gpt12.cards import CARDS
from gpt12.checkpoint import describe_run
from gpt12.config import load_config
from gpt12.device import Machine, open_machine
from gpt12.distributed import process_group, reported_by_rank_0, torchrun_ranks
from gpt12.files import write_atomically
from gpt12.fit import cap_memory
from gpt12.generate import Sampling, store_by_columns
from gpt12.loader import Loader
from gpt12.measure import (
    Timing,
    attention_kernel,
    forget_last_measurement,
    open_windows,
    profile_calls,
    time_calls,
    time_decoding,
)
from gpt12.memory import (
    GIB,
    RECOMPUTE,
    available_memory,
    largest_batch,
    needed_memory,
    predict,
    ran_out_of_memory,
)
from gpt12.optimizer import find_optimizer
from gpt12.run import check_ranks, prepare_model
from gpt12.settings import BenchConfig, Recompute, SampleConfig, model_shape
from gpt12.twin import is_gpt2
from gpt12.weights import new_model
from model import flops_per_token, parameter_count
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
TEXTS = (1, 4, 16, 64)  # written at once
# Memory of a planned or imitated card that torch does not get: the driver's context takes 0.4 GiB,
# a desktop 0.3 or more.
MARGIN_GIB = 1.0
LARGEST_BATCH = 1024  # find_batch stops here
NOTHING_FITS = (
    "nothing fits, not even one row: try --lora_rank=16, --optimizer=adamw8bit or a smaller model"
)


def read(argv: Sequence[str]) -> tuple[BenchConfig, set[str]]:
    """Return the configuration, with the shape that init_from means, and the keys that are set."""
    config, given = load_config(BenchConfig, argv)
    if config.init_from in GPT2_SHAPES:
        n_layer, n_head, n_embd = GPT2_SHAPES[config.init_from]
        config = replace(config, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True)
    elif config.init_from != "scratch":
        raise UserError(
            f"init_from={config.init_from}: only a model's shape matters here, so it must be "
            f"one of scratch, {', '.join(GPT2_SHAPES)}"
        )
    if "gradient_accumulation_steps" not in given:
        config = replace(config, gradient_accumulation_steps=torchrun_ranks().world)
    check_ranks(config)
    find_optimizer(config.optimizer)  # or UserError
    return config, given


# --------------------------------------------------------------------------------------------------
# The step


@dataclass(frozen=True, kw_only=True)
class StepResult(Timing):
    """A measured training step, over all ranks together."""

    label: str
    tokens: int
    tokens_per_s: float
    batch_size: int
    block_size: int
    micro_steps: int  # on each rank
    data: str  # name of the data set, or "random tokens"
    parameters: int
    flops_per_token: int
    dtype: str
    compile: bool
    recompute: Recompute
    attention: str
    cuda_graph: bool
    loss: float  # of the last step
    # For a GPU whose datasheet is known:
    mfu: float | None = None  # share of the datasheet's rate
    predicted_ms: float | None = None
    predicted_gib: float | None = None


@dataclass(frozen=True)
class OutOfMemory:
    """Stands for a step that did not fit into the memory."""

    label: str
    batch_size: int
    error: str = "out of memory"


Row = StepResult | OutOfMemory


class StepRunner:
    """Makes training steps one after the other, as the loop of train.py does."""

    def __init__(self, config: BenchConfig, machine: Machine, cuda_graph: bool = True):
        windows, vocab_size, self.data = open_windows(config)
        self.shape = model_shape(config, vocab_size)
        self.config = config
        self.machine = machine
        torch.manual_seed(config.seed)
        self.model = new_model(self.shape)
        prepare_model(self.model, config, machine)
        packed = windows.tokens.mask is not None
        self.step = TrainStep(self.model.train(), config, machine, packed, cuda_graph)
        self.loader = Loader(windows, self.step.x, self.step.y, machine, self.step.example_starts)
        self.position = 0
        self.batch_targets = self.loader.load(self.position)

    def __call__(self) -> None:
        """Make a step and load the windows of the next one. Does not wait for the device."""
        self.step(self.config.learning_rate, self.batch_targets)
        self.position += self.config.batch_size * self.config.gradient_accumulation_steps
        self.batch_targets = self.loader.load(self.position)


def decide(config: BenchConfig) -> tuple[BenchConfig, Machine]:
    """Return the configuration with "auto" decided as train.py does for a long run."""
    machine = open_machine(
        config.device,
        config.dtype,
        config.compile,
        deterministic=config.deterministic,
    )
    decided = replace(
        config,
        dtype=str(machine.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        compile=machine.compiled,
        lora_alpha=config.lora_alpha or 2.0 * config.lora_rank or None,
        eval_only=False,  # a preset for evaluation still describes a model that can be trained
    )
    return decided, machine


@contextlib.contextmanager
def step_runner(
    config: BenchConfig, tf32: bool = True, cuda_graph: bool = True
) -> Iterator[StepRunner]:
    """Prepare a training step; clean up later.

    tf32: whether float32 products on a GPU may round their inputs to TF32, as in training.
    cuda_graph: whether a step that train.py would record as a CUDA graph is recorded.
    """
    forget_last_measurement()
    config, machine = decide(config)
    if machine.device.type == "cpu":
        needed = needed_memory(model_shape(config, config.vocab_size), config, machine)
        if needed > available_memory(machine):  # the system would kill the program without a word
            raise torch.OutOfMemoryError
    tf32_before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32_before and tf32
    try:
        with attention_kernel(config.attention):
            yield StepRunner(config, machine, cuda_graph)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32_before
        if machine.compiled:
            torch.compiler.reset()  # what was compiled for these shapes


def measure_step(config: BenchConfig, label: str = "", **techniques: bool) -> StepResult:
    """Time train.py's step in this configuration. techniques: see step_runner."""
    with step_runner(config, **techniques) as runner:
        step = runner.step
        machine = runner.machine
        timing = time_calls(runner, machine, step.warmup_calls + WARMUP_STEPS, config.steps)
        # The ranks wait for each other in every step, so they all take the same time.
        tokens = step.x.numel() * machine.world
        result = StepResult(
            **vars(timing),
            label=label,
            tokens=tokens,
            tokens_per_s=1e3 * tokens / timing.ms,
            batch_size=config.batch_size,
            block_size=config.block_size,
            micro_steps=step.micro_steps,
            data=runner.data,
            parameters=parameter_count(runner.shape),
            flops_per_token=flops_per_token(runner.shape),
            dtype=runner.config.dtype,
            compile=machine.compiled,
            recompute=config.recompute,
            attention=config.attention,
            cuda_graph=step.graph is not None,
            loss=step.loss.item(),
        )
        result = compare_with_datasheet(result, runner)
    for warning in result.warnings:
        say(f"warning: {warning}")
    return result


def compare_with_datasheet(result: StepResult, runner: StepRunner) -> StepResult:
    """Add MFU and the prediction, if the card is known and computes in 16 bits."""
    machine = runner.machine
    card = CARDS.get(machine.name)
    if card is None or machine.dtype == torch.float32:
        return result
    # There is an RTX 3080 with 10 GB, and another card with 12 that has the same name.
    if result.total_gib is None or abs(result.total_gib / card.vram_gb - 1) > 0.12:
        return result
    mfu = None
    if runner.config.lora_rank == 0:  # 6N + 12LCT counts a gradient for every weight
        achieved = result.flops_per_token * result.tokens_per_s / machine.world
        mfu = achieved / (card.tflops * 1e12)
    on_one_rank = replace(runner.config, gradient_accumulation_steps=result.micro_steps)
    predicted = predict(runner.shape, on_one_rank, card)
    return replace(result, mfu=mfu, predicted_ms=predicted.ms, predicted_gib=predicted.gib)


def try_to_measure(label: str, config: BenchConfig, **techniques: bool) -> Row:
    """Measure a step, or return that memory did not suffice."""
    say(f"measuring {label} ...")
    try:
        return measure_step(config, label, **techniques)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
    return OutOfMemory(label, config.batch_size)


def imitate_card(vram_gb: float, machine: Machine) -> None:
    """Limit torch's allocator to what a card with this much memory would leave it."""
    if not machine.on_gpu:
        raise UserError(
            f"vram_gb={vram_gb:g} limits a GPU's memory, and there is no GPU. --plan predicts "
            "what fits, without one"
        )
    share = (vram_gb - MARGIN_GIB) * GIB / torch.cuda.mem_get_info()[1]
    if not 0 < share <= 1:
        raise UserError(f"vram_gb={vram_gb:g} cannot be imitated: this card has not that much")
    torch.cuda.set_per_process_memory_fraction(share)


# --------------------------------------------------------------------------------------------------
# The commands that measure several steps

# The techniques of the ladder in the order of its rungs, and what switches each on: a key, or an
# argument of step_runner. On every rung are the padded vocabulary, the 16-bit residual stream under
# autocast, the loss in chunks of rows and the fused AdamW, because they have no switch.
TECHNIQUES = {
    "TF32": "tf32",
    "16-bit autocast": "dtype",
    "torch.compile": "compile",
    "flash attention": "attention",
    "CUDA graph": "cuda_graph",
    "recomputation": "recompute",
}


def climb_ladder(config: BenchConfig) -> list[Row]:
    """Measure a plain float32 step, then one technique more at each rung.

    Techniques that change nothing here are left out.
    """
    top, machine = decide(config)
    if top.recompute == "none":
        top = replace(top, recompute="pointwise")
    rung = replace(top, dtype="float32", compile=False, attention="math", recompute="none")
    used = {"tf32": False, "cuda_graph": False}
    rows = [try_to_measure("fp32, eager", rung, **used)]
    for name, switch in TECHNIQUES.items():
        if switch in used:
            if not machine.on_gpu:
                continue
            used[switch] = True
        elif getattr(rung, switch) == getattr(top, switch):
            continue
        else:
            rung = replace(rung, **{switch: getattr(top, switch)})
        rows.append(try_to_measure(f"+ {name}", rung, **used))
    return rows


def sweep(config: BenchConfig, argv: Sequence[str]) -> list[Row]:
    """Measure the step at each value of --sweep=KEY:VALUE,VALUE."""
    key, _, values = str(config.sweep).partition(":")
    if not values:
        raise UserError(
            f"sweep={config.sweep} must look like KEY:VALUE,VALUE, as in --sweep=batch_size:4,8,16"
        )
    configs = {}
    for value in values.split(","):  # all are read before the first is measured
        setting = f"{key}={value}"
        configs[setting], _ = read([*argv, f"--{setting}"])
    return [try_to_measure(setting, swept) for setting, swept in configs.items()]


def find_batch(config: BenchConfig, given: set[str]) -> list[Row]:
    """Measure micro-batches of 1, 2, 4 ... rows until one does not fit or is slower.

    Raises UserError if none fits.
    """
    _, machine = decide(config)
    kinds = kinds_of_recomputation(config, given)
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
            if isinstance(row, OutOfMemory) or row.tokens_per_s < 0.95 * speed:
                break
            speed = max(speed, row.tokens_per_s)
            batch_size *= 2
    measured = [row for row in rows if isinstance(row, StepResult)]
    if not measured:
        raise UserError(NOTHING_FITS)
    best = max(measured, key=lambda row: row.tokens_per_s)
    say(f"fastest: {best.label}, {best.tokens_per_s:,.0f} tokens/s")
    return rows


def kinds_of_recomputation(config: BenchConfig, given: set[str]) -> tuple[Recompute, ...]:
    """Return the kinds to try: the one that was asked for, or all."""
    return (config.recompute,) if "recompute" in given else RECOMPUTE


# --------------------------------------------------------------------------------------------------
# --profile, --sample, --plan


def profile(config: BenchConfig) -> None:
    """Print torch's table of a few steps. Without a CUDA graph, which hides its kernels."""
    with step_runner(config, cuda_graph=False) as runner:
        say(profile_calls(runner, runner.machine, runner.step.warmup_calls + WARMUP_STEPS))


def sample(config: BenchConfig) -> list[dict[str, Any]]:
    """Time how sample.py, with its own defaults, continues 1, 4, 16 and 64 random prompts.

    The model has random weights. A prompt fills a quarter of the context.
    """
    defaults = SampleConfig()
    machine = open_machine(config.device, config.dtype, compile=False)
    model = new_model(model_shape(config, config.vocab_size)).eval()
    model.to(machine.device, machine.dtype)
    if not machine.on_gpu:
        store_by_columns(model)
    sampling = Sampling(temperature=defaults.temperature, top_k=defaults.top_k or 0)
    length = max(1, config.block_size // 4)
    new_tokens = min(config.max_new_tokens, config.block_size - length)
    say(f"prompts of {length} tokens, {new_tokens} new tokens, {config.n_layer} layers")
    rows = []
    for texts in TEXTS:
        prompts = torch.randint(config.vocab_size, (texts, length)).tolist()
        row = time_decoding(model, prompts, new_tokens, sampling)
        say(
            f"{texts:3} at once: first token after {row.first_s:.2f} s ({row.prompt_ms:,.1f} ms "
            f"when warm), then {row.ms:,.2f} ms a token, {row.tokens_per_s:,.0f} tokens/s"
        )
        rows.append(asdict(row))
    return rows


def plan(config: BenchConfig, given: set[str]) -> dict[str, Any]:
    """Predict which micro-batches fit the card of the configuration, and how fast they are."""
    names = [known for known in CARDS if known.lower().endswith(config.card.lower())]
    if len(names) != 1:
        raise UserError(
            f"card={config.card} is unknown. Add a line with its datasheet's figures to "
            "gpt12/cards.py, or choose one of\n  " + "\n  ".join(CARDS)
        )
    card = CARDS[names[0]]
    room_gib = (config.vram_gb or card.vram_gb) - MARGIN_GIB
    method = f"LoRA of rank {config.lora_rank}" if config.lora_rank else config.optimizer
    say(
        f"predicted for {names[0]} with {room_gib:g} GiB for the step: {config.n_layer} layers, "
        f"{config.n_embd} wide, {method}"
    )
    shape = model_shape(config, config.vocab_size)
    rows = []
    for recompute in kinds_of_recomputation(config, given):
        kind = replace(config, recompute=recompute)
        largest = largest_batch(shape, kind, room_gib)
        sizes = [size for size in (1, 4, 16, 64) if size < largest]
        for size in [*sizes, largest] if largest > 0 else []:
            rows.append(predict(shape, replace(kind, batch_size=size), card))
    if not rows:
        raise UserError(NOTHING_FITS)
    if not is_gpt2(shape):
        say("model.py is not GPT-2's, so that these are estimates")
    say("recompute  micro-batch    GiB    ms/step  tokens/s  memory by kind")
    for row in rows:
        kinds = ", ".join(f"{kind} {gib:.2f}" for kind, gib in row.memory_gib.items())
        say(
            f"{row.recompute:9} {row.batch_size:12,} {row.gib:6.2f} {row.ms:10,.1f} "
            f"{row.tokens_per_s:9,.0f}  {kinds}"
        )
    best = max(rows, key=lambda row: row.tokens_per_s)
    keys = f"--batch_size={best.batch_size} --recompute={best.recompute}"
    say(f"fastest: {keys}, {best.tokens_per_s:,.0f} tokens/s")
    return {"card": names[0], "rows": [asdict(row) for row in rows], "best": asdict(best)}


# --------------------------------------------------------------------------------------------------
# What is shown and written


def show_step(step: StepResult) -> None:
    """Print everything about one measured step."""
    say(
        f"model      {step.parameters:,} parameters, {step.dtype}, recompute={step.recompute}, "
        f"compile={step.compile}, cuda_graph={step.cuda_graph}"
    )
    say(
        f"step       {step.tokens:,} tokens in micro-batches of {step.batch_size} sequences x "
        f"{step.block_size:,} tokens, {step.data}"
    )
    say(
        f"time       {step.ms:,.1f} ms, from {step.ms_p10:,.1f} to {step.ms_p90:,.1f} "
        f"(10th to 90th percentile of {step.steps} steps), after {step.warmup_s:.1f} s of warm-up"
    )
    say(f"speed      {step.tokens_per_s:,.0f} tokens/s")
    if step.mfu is not None:
        say(f"MFU        {step.mfu:.1%} of the datasheet's bf16 rate, at 6N + 12LCT a token")
    if step.peak_gib is not None:
        say(
            f"memory     {step.peak_gib:.2f} GiB in tensors at the peak, {step.reserved_gib:.2f} "
            f"GiB taken from the driver, of {step.total_gib:.1f}"
        )
    if step.predicted_ms is not None:
        say(f"predicted  {step.predicted_ms:,.1f} ms, {step.predicted_gib:.2f} GiB in tensors")


def show_steps(rows: Sequence[Row], title: str | None = None) -> list[dict[str, Any]]:
    """Print measured steps side by side, their speed as a multiple of the first one's.

    title: of bench.png, None for no picture. Returns the rows for JSON.
    """
    measured = [row for row in rows if isinstance(row, StepResult)]
    say(f"{'':36} ms/step     10% to 90%    tokens/s times first    MFU  peak GiB")
    for row in rows:
        if isinstance(row, OutOfMemory):
            say(f"{row.label:36} out of memory")
            continue
        mfu = "" if row.mfu is None else f"{row.mfu:.1%}"
        peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        say(
            f"{row.label:36} {row.ms:7,.1f} {row.ms_p10:7,.1f} {row.ms_p90:7,.1f}"
            f"{row.tokens_per_s:12,.0f} {row.tokens_per_s / measured[0].tokens_per_s:12.2f}"
            f"{mfu:>7}{peak:>10}"
        )
    if title is not None and measured:
        draw(measured, title)
    return [asdict(row) for row in rows]


def draw(rows: Sequence[StepResult], title: str) -> None:
    """Draw bench.png: a bar for the speed of each step, with its peak memory beside it."""
    from matplotlib.figure import Figure  # not pyplot, which takes twice as long to import

    figure = Figure((8, 1.2 + 0.33 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axis = figure.add_subplot(xticks=[], xlabel="training, tokens/s")
    bars = axis.barh([row.label for row in rows], [row.tokens_per_s for row in rows])
    texts = []
    for row in rows:
        memory = "" if row.peak_gib is None else f", {row.peak_gib:.2f} GiB"
        texts.append(f"{row.tokens_per_s:,.0f}{memory}")
    axis.bar_label(bars, texts, padding=3, fontsize=8)
    axis.margins(x=0.25)
    axis.invert_yaxis()
    figure.savefig("bench.png", dpi=110)
    say("wrote bench.png")


def finish(config: BenchConfig, device: str, results: dict[str, Any]) -> None:
    """Print the results as JSON if asked for, else write them to bench.json. Only rank 0 does.

    The step's figures stand at the top level, each other measurement under its own name. Keys of
    the configuration that have their default value are left out. A plan goes to plan.json, because
    a prediction must not replace what was measured.
    """
    if torchrun_ranks().rank != 0:
        return
    changed = {}
    for key in fields(config):
        if getattr(config, key.name) != getattr(BenchConfig(), key.name):
            changed[key.name] = getattr(config, key.name)
    content = describe_run(changed, device=device, **results)
    if config.json:
        say(json.dumps(content))
        return
    file = Path("plan.json" if config.plan else "bench.json")
    try:
        write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{file} cannot be written here: {error.strerror or error}. Go to another folder, "
            "or print the figures with --json"
        ) from None
    say(f"wrote {file}: all figures, with versions and settings (--json prints them instead)")


# --------------------------------------------------------------------------------------------------
# The commands


def measure(argv: Sequence[str], config: BenchConfig, given: set[str]) -> None:
    """Measure what was asked for, one after the other, and show it."""
    machine, argv = prepare(argv, config, given)
    config, _ = read(argv)
    results: dict[str, Any] = {}
    if config.sweep is not None:
        rows = sweep(config, argv)
        results["sweep"] = show_steps(rows, machine.name)
    if config.ladder:
        size = f"{config.batch_size} x {config.block_size:,} tokens"
        title = f"{machine.name}, {config.n_layer} layers, {config.n_embd:,} wide, {size}"
        results["ladder"] = show_steps(climb_ladder(config), title)
    if config.find_batch:
        results["find_batch"] = show_steps(find_batch(config, given))
    if config.sample:
        results["sample"] = sample(config)
    if config.profile:
        profile(config)
    elif not results:
        step = measure_step(config)
        show_step(step)
        results = asdict(step)
    if results:
        finish(config, machine.name, results)


def prepare(
    argv: Sequence[str], config: BenchConfig, given: set[str]
) -> tuple[Machine, Sequence[str]]:
    """Describe the machine. Returns it, and the command line with the shape that suits a CPU."""
    _, machine = decide(config)
    for line in (f"{machine.name}, torch {torch.__version__}", *machine.notes):
        say(line)
    if config.vram_gb is not None:
        imitate_card(config.vram_gb, machine)
    shape_given = config.init_from != "scratch" or not given.isdisjoint(CPU_SHAPE)
    if shape_given or machine.device.type != "cpu":
        return machine, argv
    say(
        "on a CPU the model is a small one, that of nanoGPT's command for CPUs; give a shape or "
        "--init_from=gpt2 for another"
    )
    return machine, [*(f"--{key}={value}" for key, value in CPU_SHAPE.items()), *argv]


def main(argv: Sequence[str] | None = None) -> None:
    """Read what was asked for, then predict or measure."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with reported_by_rank_0():
            config, given = read(argv)
            alone = config.sweep or config.ladder or config.find_batch or config.sample
            if torchrun_ranks().world > 1 and (alone or config.profile or config.plan):
                raise UserError("with several processes only the step can be measured")
            if config.plan:
                finish(config, "", {"plan": plan(config, given)})
                return
            with process_group(config.device, config.backend):
                measure(argv, config, given)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise UserError(
            "out of memory. bench.py measures what was asked for and makes nothing smaller: try "
            "--find_batch, --recompute=pointwise, --recompute=block or a smaller --batch_size"
        ) from None


if __name__ == "__main__":
    run_main(main)
