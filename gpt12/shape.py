"""The model's shape among the settings: the one place that connects their keys with GPTConfig."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from gpt12.settings import TrainConfig
from model import GPTConfig

# Settings that decide the weights' shapes. A loaded model brings its own, and a run keeps them.
MODEL_KEYS = ("n_layer", "n_head", "n_embd", "bias")
# The context belongs to the shape too, but may be made shorter.
SHAPE_KEYS = ("block_size", *MODEL_KEYS)

Config = TypeVar("Config", bound=TrainConfig)


def model_shape(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """Return the shape of the model that the settings describe."""
    keys = {key: getattr(config, key) for key in SHAPE_KEYS}
    return GPTConfig(**keys, vocab_size=vocab_size, dropout=config.dropout)


def with_shape(config: Config, shape: TrainConfig | GPTConfig) -> Config:
    """Return the settings with the shape of a model, or of other settings."""
    return replace(config, **{key: getattr(shape, key) for key in SHAPE_KEYS})
