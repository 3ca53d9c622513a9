"""How times are taken, and what is said about a GPU that spoils them."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.compiler import config as compiler_config

from data.windows import TrainWindows
from gpt12 import measure
from gpt12.measure import RandomTokens, time_calls, time_decoding, warnings_about
from gpt12.memory import GIB
from gpt12.settings import SampleConfig
from model import GPT, GPTConfig
from tests.bench_helpers import GPU
from tests.helpers import CPU, let_answer


def test_random_tokens_depend_on_the_position_only():
    windows = TrainWindows(RandomTokens(vocab_size=50), block_size=16, seed=1)
    inputs, targets = windows.batch(7, 3)
    assert inputs.shape == (3, 16)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert 0 <= inputs.min() < 10 < 40 < inputs.max() < 50
    np.testing.assert_array_equal(windows.batch(7, 3)[0], inputs)
    assert not np.array_equal(windows.batch(8, 3)[0], inputs)


def test_a_timing_is_its_calls_median_and_outer_deciles(monkeypatch):
    """By a clock that only the calls move: seconds of warm-up, then calls of unequal length."""
    took = [0.001, 0.009, 0.002, 0.05, 0.004, 0.003, 0.006]
    now = [0.0]
    coming = iter([5.0, 2.0, *took])

    def call():
        now[0] += next(coming)

    monkeypatch.setattr("gpt12.measure.time", SimpleNamespace(perf_counter=lambda: now[0]))
    timed = time_calls(call, CPU, warmup=2, count=7)
    p10, p50, p90 = (1e3 * np.percentile(took, (10, 50, 90))).tolist()
    expected = {"ms": p50, "ms_p10": p10, "ms_p90": p90, "steps": 7, "warmup_s": 7.0}
    assert timed.pop("warnings") == []
    assert timed == pytest.approx(expected)


@pytest.mark.parametrize("asked", [2, 12])
def test_every_timed_interval_computes_a_token(monkeypatch, asked):
    """Time counts forward passes: each interval between two timed tokens holds exactly one.

    stream() computes ahead, so the last token comes without a pass and is not timed.
    """
    passes = [0]
    arrivals = []

    def clock():
        arrivals.append(float(passes[0]))
        return arrivals[-1]

    def count(*_):
        passes[0] += 1

    model = GPT(GPTConfig(16, 13, 1, 2, 8)).eval()
    model.transformer.register_forward_pre_hook(count)
    monkeypatch.setattr("time.perf_counter", clock)
    timed = time_decoding(model, [[1, 2, 3, 4]] * 3, SampleConfig(max_new_tokens=asked))
    tokens = arrivals[2 * measure.PROMPT_RUNS + 1 : -1]
    assert {after - before for before, after in pairwise(tokens)} == {1.0}
    # The time of the first token is one pass, without a second token.
    expected = {"texts": 3, "ms": 1e3, "tokens_per_s": 3.0, "first_ms": 1e3, "prompt_ms": 1e3}
    assert timed == expected


def test_the_attention_kernel_can_be_chosen_and_compiled_graphs_keep_to_it():
    """torch keeps compiled graphs on the disk: the tag is part of a graph's key there."""
    q = torch.randn(1, 2, 16, 16)
    tags = []
    for name in ("auto", "flash", "math"):
        with measure.attention_kernel(name), torch.profiler.profile() as profiler:
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
            tags.append(compiler_config.cache_key_tag)
        used = any("flash" in event.key for event in profiler.key_averages())
        assert used == (name != "math")
    assert len(set(tags)) == 3
    assert compiler_config.cache_key_tag == tags[0]


# --------------------------------------------------------------------------------------------------
# Warnings, with torch and the driver made up


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        ("0x0000000000000004\n", False),
        ("0x0000000000000020\n", True),
        ("N/A\n", False),
        (None, False),
    ],
)
def test_a_clock_is_held_if_nvidia_smi_says_that_heat_or_power_hold_it(monkeypatch, answer, held):
    run = Mock(return_value=Mock(stdout=answer), side_effect=None if answer else FileNotFoundError)
    monkeypatch.setattr("subprocess.run", run)
    let_answer(monkeypatch, {"torch.cuda.get_device_properties": Mock(uuid="1")})
    assert measure.clock_is_held() == held


@pytest.mark.parametrize(
    ("others_gib", "most_gib", "held", "world", "words"),
    [
        (0, 9, False, 1, None),
        (0, 9, True, 1, "holds the clock down"),
        (3, 9, False, 1, "3.5 GiB are not ours"),
        (3, 9, False, 2, None),  # the other rank's memory would look like theirs
        (0, 13, False, 1, "spills"),
    ],
)
def test_what_spoils_the_figures_is_a_warning(
    monkeypatch, others_gib, most_gib, held, world, words
):
    """On a GPU of 12 GiB, where torch holds 6 and our own context 0.5."""
    free = (12 - 6 - 0.5 - others_gib) * GIB
    answers = {
        "torch.cuda.mem_get_info": (free, 12 * GIB),
        "torch.cuda.memory_reserved": 6 * GIB,
        "torch.cuda.max_memory_reserved": most_gib * GIB,
    }
    let_answer(monkeypatch, answers)
    warnings = warnings_about(replace(GPU, world=world), held)
    assert len(warnings) == (words is not None)
    assert all(words in warning for warning in warnings)
