"""Measure how fast this machine trains GPT-2 and writes text, and how much memory that takes.

    python bench.py                                    # one training step
    python bench.py --ladder                           # what each technique gains
    python bench.py --sweep=batch_size:4,8,16          # the step at several values of a key
    python bench.py --find_batch                       # the fastest micro-batch in this memory
    python bench.py --sample                           # generation
    python bench.py --compare=transformers             # the same work in another library
    python bench.py --plan --init_from=gpt2-xl --lora_rank=16   # what fits a card, without a GPU
    python bench.py --report                           # step, ladder and generation, to publish
    torchrun --nproc_per_node=2 bench.py               # the step on several GPUs

This file decides what is measured and in which order. How it is measured:
    gpt12/measure.py                a training step: train.py's own TrainStep and Loader
    gpt12/measure_decoding.py       generation as in sample.py
    gpt12/ladder.py, sweep.py       several steps, one after the other
    gpt12/versus_transformers.py    the same work in transformers
    gpt12/profile_step.py           the kernels of a step
    gpt12/plan.py                   predictions
    gpt12/bench_report.py           tables and JSON; bench_picture.py draws bench.png
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gpt12.errors import require_packages, run_main, say

require_packages()
# As in train.py, before torch is imported: let memory segments grow.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from gpt12 import bench_report
from gpt12.bench_picture import draw
from gpt12.bench_request import BenchRequest, read_request, say_if_small, with_model_shape
from gpt12.device import Machine
from gpt12.distributed import process_group, reported_by_rank_0, torchrun_ranks
from gpt12.gpu_state import imitate_card
from gpt12.ladder import climb_ladder
from gpt12.measure import machine_for_training, measure_step
from gpt12.measure_decoding import BATCH_SIZES, DecodingResult, measure_decoding
from gpt12.memory import out_of_memory_advice, ran_out_of_memory
from gpt12.plan import make_plan
from gpt12.profile_step import profile_step
from gpt12.settings import BenchConfig
from gpt12.sweep import find_batch, sweep, swept_configs
from gpt12.versus_transformers import TheirGeneration, compare_training, match_settings


def plan(request: BenchRequest) -> None:
    """Predict memory and speed on a card. Needs no GPU."""
    config = with_model_shape(request.asked, request.given, on_cpu=False)
    result = make_plan(config)
    bench_report.show_plan(result, config, request.argv)
    finish(config, result.name, {"plan": result})


def measure(request: BenchRequest) -> None:
    """Measure what was asked for, and show it."""
    machine = machine_for_training(request.asked)
    say(f"{machine.name}, torch {torch.__version__}")
    for note in machine.notes:
        say(note)
    config = decide(request, machine)
    if config.sweep is not None:  # find mistakes in it before anything is timed
        swept_configs(config, request, on_cpu=machine.device.type == "cpu")
    if config.vram_gb is not None:
        imitate_card(config.vram_gb, machine)
    config, results = measure_in_order(config, request, machine)
    steps = results.get("ladder") or results.get("sweep", [])
    draw(steps, results.get("sample", []), config, machine.name)
    finish(config, machine.name, results)


def decide(request: BenchRequest, machine: Machine) -> BenchConfig:
    """Return the configuration with the model's shape and what "auto" means on this machine."""
    on_cpu = machine.device.type == "cpu"
    config = with_model_shape(request.asked, request.given, on_cpu)
    say_if_small(config, request.asked)
    config = replace(
        config,
        compile=machine.compiled,
        dtype=str(machine.dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )
    if config.compare != "none":
        config = match_settings(config, request)
    return config


def measure_in_order(
    config: BenchConfig, request: BenchRequest, machine: Machine
) -> tuple[BenchConfig, dict[str, Any]]:
    """Return the configuration that was measured, and the result of each measurement by name."""
    asked = request.measurements
    results: dict[str, Any] = {}
    if "find_batch" in asked:
        found = find_batch(config, machine)
        bench_report.show_found_batch(found)
        results["find_batch"] = found
        # What is measured after this uses the fastest.
        best = found.best
        config = replace(config, batch_size=best.batch_size, recompute=best.recompute)
    if "step" in asked:
        say("measuring a training step ...")
        results["step"] = measure_step(config)
        bench_report.show_step(results["step"])
    if "sweep" in asked:
        results["sweep"] = sweep(config, request, on_cpu=machine.device.type == "cpu")
        bench_report.show_steps(results["sweep"])
    if "ladder" in asked:
        results["ladder"] = climb_ladder(config, machine)
        bench_report.show_steps(results["ladder"])
    if "compare" in asked:
        results["compare"] = compare_training(config, machine)
        bench_report.show_comparison(results["compare"])
    if "profile" in asked:
        results["profile"] = profile_step(config, machine)
        bench_report.show_profile(results["profile"])
    if "sample" in asked:
        results["sample"] = measure_generation(config, machine)
        bench_report.show_decoding(results["sample"])
    return config, results


def measure_generation(config: BenchConfig, machine: Machine) -> list[DecodingResult]:
    """Measure generation for several numbers of texts, beside transformers if asked for."""
    theirs = None
    if config.compare != "none":
        theirs = TheirGeneration(config, machine)
    rows = []
    for batch in BATCH_SIZES:
        say(f"measuring generation, batch {batch} ...")
        rows.append(measure_decoding(config, machine, batch))
        if theirs is not None:
            rows += theirs.measure(batch)
    return rows


def finish(config: BenchConfig, device: str, results: dict[str, Any]) -> None:
    """Print the results as JSON if asked for, else write them to bench.json or plan.json.

    --report always writes the file, because it is meant to be published. Only rank 0 does this.
    """
    if torchrun_ranks().rank != 0:
        return
    content = bench_report.describe(config, device, results)
    if config.report or not config.json:
        file = bench_report.PLAN_FILE if config.plan else bench_report.JSON_FILE
        bench_report.save_json(content, file)
    bench_report.say_what_next(results)
    if config.json:
        bench_report.print_json(content)


def main(argv: Sequence[str] | None = None) -> None:
    """Read what was asked for, then predict or measure."""
    with reported_by_rank_0():
        request = read_request(sys.argv[1:] if argv is None else argv)
    config = request.asked
    if config.plan:
        plan(request)
        return
    try:
        with reported_by_rank_0(), process_group(config.device, config.backend):
            measure(request)
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise out_of_memory_advice(config) from None
        raise


if __name__ == "__main__":
    run_main(main)
