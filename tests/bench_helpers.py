"""What the tests of bench.py and of what it is built from share: settings of a tiny model."""

import torch

import bench
from gpt12.device import Machine
from gpt12.settings import BenchConfig, model_shape
from model import GPTConfig

SHAPE = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "vocab_size": 64,
    "batch_size": 3,
}
PLAIN = {"device": "cpu", "dtype": "float32", "compile": False, "real_data": False, "steps": 2}
GPU = Machine(torch.device("cuda"), torch.bfloat16, compiled=True)


def arguments(**keys: object) -> list[str]:
    """The command line for the tiny model."""
    return [f"--{key}={value}" for key, value in (SHAPE | PLAIN | keys).items()]


def make(**keys: object) -> BenchConfig:
    """The settings for the tiny model."""
    return bench.read(arguments(**keys))[0]


def make_124m(line: str = "") -> BenchConfig:
    """Settings whose model is GPT-2 124M without biases, in bfloat16, or that of --init_from."""
    return bench.read(["--dtype=bfloat16", "--n_layer=12", *line.split()])[0]


def shape_of(options: BenchConfig) -> GPTConfig:
    """The shape of a model of random tokens."""
    return model_shape(options, options.vocab_size)
