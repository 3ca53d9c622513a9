"""What bench.py was asked for: settings, the model's shape, and which measurements."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpt12.config import load_config, read
from gpt12.distributed import torchrun_ranks
from gpt12.errors import UserError
from gpt12.settings import BenchConfig
from gpt12.terminal import say

# Layers, heads and width of the published models.
GPT2_SHAPES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
# On a CPU a step of GPT-2 takes half a minute. Unless a shape is given, the model is that of
# nanoGPT's command for CPUs.
CPU_SHAPE: dict[str, Any] = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 64,
    "vocab_size": 65,
}


@dataclass(frozen=True)
class BenchRequest:
    """What the user asked for."""

    asked: BenchConfig  # as it was read; "auto" and the model's shape are not decided
    given: set[str]  # the keys that the user set, in a file or on the command line
    typed: set[str]  # the keys on the command line
    argv: list[str]
    measurements: set[str]  # names of BenchConfig's keys, and "step"


def read_request(argv: Sequence[str]) -> BenchRequest:
    """Read the command line. Raises UserError for what cannot be measured."""
    config, given = load_config(BenchConfig, argv)
    typed = set(read(BenchConfig, argv).typed)
    if config.init_from not in ("scratch", *GPT2_SHAPES):
        raise UserError(
            f"init_from={config.init_from}: only a model's shape matters here, so it must be "
            f"one of scratch, {', '.join(GPT2_SHAPES)}"
        )
    if config.compare != "none" and importlib.util.find_spec("transformers") is None:
        raise UserError(
            "transformers is not installed, so there is nothing to compare with: "
            "pip install transformers"
        )
    config = _share_among_ranks(config, given)
    measurements = _measurements(config)
    world = torchrun_ranks().world
    if world > 1 and measurements != {"step"}:
        names = ", ".join(sorted(measurements - {"step"}))
        raise UserError(f"with several processes only the step is measured: leave out {names}")
    return BenchRequest(config, given, typed, list(argv), measurements)


def _share_among_ranks(config: BenchConfig, given: set[str]) -> BenchConfig:
    """Return the configuration with at least one micro-batch for each rank."""
    world = torchrun_ranks().world
    if "gradient_accumulation_steps" not in given:
        return replace(config, gradient_accumulation_steps=world)
    count = config.gradient_accumulation_steps
    if count % world != 0:
        raise UserError(
            f"gradient_accumulation_steps={count} is not a multiple of {world} ranks: "
            f"pass --gradient_accumulation_steps={(count // world + 1) * world}"
        )
    return config


def _measurements(config: BenchConfig) -> set[str]:
    """Return what is to be measured; by default the step."""
    names = set()
    for name in ("ladder", "find_batch", "sample", "profile"):
        if getattr(config, name):
            names.add(name)
    if config.sweep is not None:
        names.add("sweep")
    if config.report:
        names |= {"step", "ladder", "sample"}
    if config.compare != "none" and not config.sample:  # else generation is compared
        names.add("compare")
    return names or {"step"}


def with_model_shape(config: BenchConfig, given: set[str], on_cpu: bool) -> BenchConfig:
    """Return the configuration with the shape that init_from means, or a small one on a CPU.

    given: the keys that the user set. Raises UserError for an unknown init_from.
    """
    if config.init_from == "scratch":
        if on_cpu and not given & CPU_SHAPE.keys():
            return replace(config, **CPU_SHAPE)
        return config
    if config.init_from not in GPT2_SHAPES:
        raise UserError(f"init_from={config.init_from} must be one of {', '.join(GPT2_SHAPES)}")
    n_layer, n_head, n_embd = GPT2_SHAPES[config.init_from]
    return replace(config, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True)


def say_if_small(config: BenchConfig, asked: BenchConfig) -> None:
    """Say so if the model became the small one for CPUs."""
    if config.n_layer != asked.n_layer and config.init_from == "scratch":
        say(
            "on a CPU the model is a small one, that of nanoGPT's command for CPUs; give a shape "
            "or --init_from=gpt2 for another"
        )
