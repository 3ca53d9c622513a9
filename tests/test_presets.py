"""The presets in config/: each is accepted, and fine-tuning fits short and long texts."""

import math
from pathlib import Path

import pytest

from gpt12.config import load
from gpt12.settings import TrainConfig

CONFIG = Path(__file__).parents[1] / "config"
PRESETS = sorted(path.name for path in CONFIG.glob("*.py"))
FINETUNE = [name for name in PRESETS if name.startswith("finetune_gpt2")]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_accepted_and_its_head_says_what_to_expect(name):
    load(TrainConfig, [str(CONFIG / name)])
    head = (CONFIG / name).read_text("utf-8").split("\n\n")[0]
    assert f"config/{name}" in head
    for word in ("Result", "Time", "VRAM"):
        assert f"\n# {word}  " in head


@pytest.mark.parametrize("name", [*FINETUNE, "finetune_instruct.py"])
@pytest.mark.parametrize(("tokens", "at_least"), [(3_000, 5), (25_000, 100), (250_000, 1_000)])
def test_fine_tuning_makes_enough_steps_at_the_asked_rate(name, tokens, at_least):
    config, _ = load(TrainConfig, [str(CONFIG / name)])
    windows = (tokens * (1 - config.val_fraction) - config.block_size) // config.block_size
    per_step = config.batch_size * config.gradient_accumulation_steps
    assert math.ceil(config.num_epochs * windows / per_step) >= at_least
    assert config.warmup_iters == 0
