"""Show what bench.py measured: tables on the terminal, and JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gpt12.errors import UserError
from gpt12.files import write_atomically
from gpt12.measure import Measurement, OutOfMemory, StepResult
from gpt12.measure_decoding import DecodingResult
from gpt12.plan import Plan, Prediction
from gpt12.profile_step import TRACE, Profile
from gpt12.run_folder import describe_run
from gpt12.settings import BenchConfig
from gpt12.sweep import NOTHING_FITS, FoundBatch
from gpt12.terminal import Table, say
from gpt12.versus_transformers import Comparison

JSON_FILE = Path("bench.json")
PLAN_FILE = Path("plan.json")  # a prediction must not replace what was measured
# Keys that the plan's command does not repeat: it sets them itself, or they belong to the plan.
KEYS_OF_A_PLAN = ("plan", "card", "batch_size", "recompute")

# --------------------------------------------------------------------------------------------------
# One measurement each


def show_step(step: StepResult) -> None:
    """Print everything about one measured step."""
    for name, text in _step_lines(step):
        say(f"{name:<9} {text}")
    ranks = Table("each rank: tokens", "ms", "peak GiB")
    for rank in step.ranks:
        ranks.add(f"{rank['tokens']:,}", f"{rank['ms']:,.1f}", _number(rank["peak_gib"], 2))
    ranks.print()


def _step_lines(step: StepResult) -> list[tuple[str, str]]:
    lines = [
        (
            "model",
            f"{step.parameters:,} parameters, {step.dtype}, recompute={step.recompute}, "
            f"compile={step.compile}, cuda_graph={step.cuda_graph}",
        ),
        (
            "step",
            f"{step.tokens:,} tokens in micro-batches of {step.batch_size} sequences x "
            f"{step.block_size:,} tokens, {step.data}",
        ),
        (
            "time",
            f"{step.ms:,.1f} ms, from {step.ms_p10:,.1f} to {step.ms_p90:,.1f} "
            f"(10th to 90th percentile of {step.steps} steps)",
        ),
        ("speed", f"{step.tokens_per_s:,.0f} tokens/s"),
    ]
    if step.mfu is not None:
        lines.append(("MFU", f"{step.mfu:.1%} of the datasheet's bf16 rate, at 6N + 12LCT a token"))
    if step.roofline is not None:
        reached = f"{step.roofline:.0%} of what the datasheet's rate and bandwidth allow"
        lines.append(("roofline", f"{reached}; prediction: {step.predicted_ms:,.1f} ms"))
    if step.peak_gib is not None:
        lines.append(
            (
                "memory",
                f"{step.peak_gib:.2f} GiB in tensors at the peak, {step.reserved_gib:.2f} GiB "
                f"taken from the driver, of {step.total_gib:.1f}",
            )
        )
    if step.predicted_gib is not None:
        lines.append(("predicted", f"{step.predicted_gib:.2f} GiB in tensors"))
    if step.driver:
        lines.append(("driver", _driver_line(step.driver)))
    compilation = ", compilation included" if step.compile else ""
    lines.append(("warm-up", f"{step.warmup_s:.1f} s{compilation}"))
    return lines


def _driver_line(driver: dict[str, str]) -> str:
    version = driver.get("driver_version", "?")
    clock = driver.get("clocks.sm", "?")
    highest = driver.get("clocks.max.sm", "?")
    power = driver.get("power.draw", "?")
    return f"{version}, at {clock} of {highest} MHz, {power} W"


def show_steps(rows: Sequence[Measurement | OutOfMemory]) -> None:
    """Print measured steps side by side, their speed as a multiple of the first one's."""
    table = Table(
        "", "ms/step", "10th to 90th percentile", "tokens/s", "times first", "MFU", "peak GiB"
    )
    first: float | None = None
    for row in rows:
        if isinstance(row, OutOfMemory):
            table.add(f"{row.label}: {row.error}")
            continue
        if first is None:
            first = row.tokens_per_s
        table.add(
            row.label,
            f"{row.ms:,.1f}",
            f"{row.ms_p10:,.1f} to {row.ms_p90:,.1f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.tokens_per_s / first:.2f}",
            "" if row.mfu is None else f"{row.mfu:.1%}",
            _number(row.peak_gib, 2),
        )
    table.print()


def show_found_batch(found: FoundBatch) -> None:
    """Print the micro-batches that were measured, and the fastest."""
    show_steps(found.rows)
    best = found.best
    keys = f"--batch_size={best.batch_size} --recompute={best.recompute}"
    say(f"fastest: {keys}, {best.tokens_per_s:,.0f} tokens/s")


def show_comparison(comparison: Comparison) -> None:
    """Print both sides and the ratios of their speed."""
    show_steps(comparison.rows)
    for name, ratio in comparison.ratios.items():
        say(f"gpt12 is {ratio:.2f} times as fast as {name}")


def show_profile(profile: Profile) -> None:
    """Print the slowest kernels and the rate of matrix products."""
    table = Table("kernel", "ms/step", "share")
    for kernel in profile.kernels:
        table.add(kernel.kernel[:80], f"{kernel.ms:,.2f}", f"{kernel.share:.1%}")
    table.print()
    say(
        f"matrix products take {profile.products_ms:,.1f} of {profile.total_ms:,.1f} ms, at "
        f"{profile.products_tflops:,.2f} TFLOP/s"
    )
    say(f"wrote {TRACE}: open it in chrome://tracing or https://ui.perfetto.dev")


def show_decoding(rows: Sequence[DecodingResult]) -> None:
    """Print the speed of generation for each number of texts."""
    table = Table("", "prompt ms", "ms/token", "tokens/s", "bound", "share")
    for row in rows:
        table.add(
            row.label,
            f"{row.prefill_ms:,.1f}",
            f"{row.ms:,.2f}",
            f"{row.tokens_per_s:,.0f}",
            _number(row.bound_tokens_per_s, 0),
            "" if row.bound_share is None else f"{row.bound_share:.0%}",
        )
    table.print()
    if any(row.bound_share is not None for row in rows):
        say("bound: reading the weights once per decoding step at the datasheet's bandwidth")


def show_plan(plan: Plan, config: BenchConfig, argv: Sequence[str]) -> None:
    """Print what fits the card, and the command that measures the best there.

    argv: the command line that asked for the plan.
    """
    method = f"all weights, {config.optimizer}"
    if config.lora_rank:
        method = f"LoRA of rank {config.lora_rank}"
    say(
        f"predicted for {plan.name} with {plan.room_gib:g} GiB for the step: "
        f"{config.n_layer} layers, {config.n_embd} wide, {method}"
    )
    if config.compile is False:
        say("the times are for a compiled step; uncompiled, it takes longer in the same memory")
    best = plan.best
    if best is None:
        say(NOTHING_FITS)
        return
    _plan_table(plan.candidates).print()
    keys = [f"--batch_size={best.batch_size}", f"--recompute={best.recompute}"]
    say(f"fastest: {' '.join(keys)}, {best.tokens_per_s:,.0f} tokens/s")
    kept = [word for word in argv if not _sets_one_of(KEYS_OF_A_PLAN, word)]
    command = shlex.join(["python", "bench.py", *kept, *keys])
    say(f"these are predictions; measure on that card with: {command}")


def _plan_table(candidates: Sequence[Prediction]) -> Table:
    kinds = list(candidates[0].memory_gib)
    table = Table("recompute", "micro-batch", *kinds, "GiB in all", "ms/step", "tokens/s")
    for row in candidates:
        table.add(
            row.recompute,
            str(row.batch_size),
            *[f"{row.memory_gib.get(kind, 0.0):.2f}" for kind in kinds],
            f"{row.gib:.2f}",
            f"{row.ms:,.1f}",
            f"{row.tokens_per_s:,.0f}",
        )
    return table


def _sets_one_of(keys: Sequence[str], word: str) -> bool:
    """Tell whether a word of the command line sets one of the keys."""
    name = word.partition("=")[0]
    return name.startswith("-") and name.lstrip("-").replace("-", "_") in keys


def _number(value: float | None, digits: int) -> str:
    """Return a number as text, nothing if it is not known."""
    return "" if value is None else f"{value:,.{digits}f}"


# --------------------------------------------------------------------------------------------------
# JSON


def describe(config: BenchConfig, device: str, results: dict[str, Any]) -> dict[str, Any]:
    """Return everything as one dictionary, ready for JSON.

    The step's figures stand at its top level, every other measurement under its own name. Keys of
    the configuration that have their default value are left out.
    """
    changed = {}
    for key in fields(config):
        value = getattr(config, key.name)
        if value != key.default:
            changed[key.name] = value
    facts: dict[str, Any] = {"device": device}
    for name, result in results.items():
        if name == "step":
            step = asdict(result)
            del step["label"]
            facts.update(step)
        elif isinstance(result, list):
            facts[name] = [asdict(row) for row in result]
        elif isinstance(result, Plan):
            facts[name] = _plan_as_dict(result)
        else:
            facts[name] = asdict(result)
    return describe_run(changed, **facts)


def _plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan without its candidates, which only the table lists."""
    return {
        "card": plan.name,
        **plan.card._asdict(),
        "room_gib": plan.room_gib,
        "rows": [asdict(row) for row in plan.rows],
        "best": None if plan.best is None else asdict(plan.best),
    }


def print_json(content: dict[str, Any]) -> None:
    """Print the results as one line."""
    say(json.dumps(content))


def save_json(content: dict[str, Any], file: Path = JSON_FILE) -> None:
    """Write the results to a file. Raises UserError if that is not possible."""
    text = json.dumps(content, indent=2) + "\n"
    try:
        write_atomically(file, text.encode())
    except OSError as error:
        raise UserError(
            f"{file} cannot be written here: {error.strerror or error}. Go to another folder, "
            "or print the figures with --json"
        ) from None
    say(f"wrote {file}: all figures, with versions and settings (--json prints them instead)")


def say_what_next(results: dict[str, Any]) -> None:
    """Print which command may follow. results: by the name of the measurement."""
    if "find_batch" in results:
        best = results["find_batch"].best
        keys = f"--batch_size={best.batch_size} --recompute={best.recompute}"
        say(f"next: train with it: python train.py config/... {keys}")
    elif set(results) == {"step"}:
        say(
            "next: --ladder shows what each technique gains, --find_batch finds the fastest "
            "micro-batch, --help lists more"
        )
    if {"step", "ladder", "sample"} <= set(results):
        say("next: publish bench.json and bench.png, for example as an issue of this project")
