"""gpt12/cuda_graph.py: which steps are recorded. tests/test_gpu.py records them."""

import pytest
import torch

from gpt12.cuda_graph import MAX_LAYERS, use_graph_for_training
from gpt12.device import Machine
from tests.helpers import CPU, config

GPU = torch.device("cuda")
PLAIN = Machine(GPU, torch.bfloat16, compiled=False)
COMPILED = Machine(GPU, torch.bfloat16, compiled=True)
HALF = Machine(GPU, torch.float16, compiled=False)
TWO_RANKS = Machine(GPU, torch.bfloat16, compiled=False, world=2)
MANY = MAX_LAYERS // 2  # micro-batches of two layers


@pytest.mark.parametrize(
    ("expected", "changes", "machine"),
    [
        (True, {}, PLAIN),
        (False, {}, CPU),
        # A graph may not become too large.
        (True, {"gradient_accumulation_steps": MANY}, PLAIN),
        (False, {"gradient_accumulation_steps": MANY + 1}, PLAIN),
        # A recorded step can ask the host for nothing.
        (False, {}, HALF),
        (False, {}, TWO_RANKS),
        (False, {"optimizer": "adamw8bit"}, PLAIN),
        (True, {"dropout": 0.1}, PLAIN),
        (False, {"dropout": 0.1, "recompute": "block"}, PLAIN),
        (False, {"dropout": 0.1, "recompute": "block"}, COMPILED),
        (True, {"recompute": "block"}, PLAIN),
    ],
)
def test_only_a_small_step_that_asks_the_host_for_nothing_is_recorded(expected, changes, machine):
    assert use_graph_for_training(config(**changes), n_layer=2, machine=machine) == expected
