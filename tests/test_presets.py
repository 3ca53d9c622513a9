"""The fine-tuning presets suit short and long texts."""

import math
from pathlib import Path

import pytest

from gpt12.config import load_config
from gpt12.settings import TrainConfig

CONFIG = Path(__file__).parents[1] / "config"
FINETUNE = sorted(path.name for path in CONFIG.glob("finetune_gpt2*.py"))


@pytest.mark.parametrize("name", [*FINETUNE, "finetune_instruct.py"])
@pytest.mark.parametrize(("tokens", "at_least"), [(3_000, 5), (25_000, 100), (250_000, 1_000)])
def test_fine_tuning_makes_enough_steps_at_the_asked_rate(name, tokens, at_least):
    config = load_config(TrainConfig, [str(CONFIG / name)]).config
    windows = (tokens * (1 - config.val_fraction) - config.block_size) // config.block_size
    per_step = config.batch_size * config.gradient_accumulation_steps
    assert math.ceil(config.num_epochs * windows / per_step) >= at_least
    assert config.warmup_iters == 0
