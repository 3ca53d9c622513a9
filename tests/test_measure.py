"""How times are taken, and what is said about a GPU that spoils them."""

import subprocess
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt12 import measure
from gpt12.generate import Sampling
from gpt12.measure import RandomWindows, memory_warnings, time_calls, time_decoding
from model import GPT, GPTConfig
from tests.bench_helpers import CPU, fake_gpu_memory

GIB = 2**30


def test_random_windows_depend_on_the_position_only():
    windows = RandomWindows(vocab_size=50, block_size=16, seed=1)
    inputs, targets = windows.batch(7, 3)
    assert inputs.shape == targets.shape == (3, 16)
    assert inputs.dtype == np.int64
    assert 0 <= inputs.min() and inputs.max() < 50
    np.testing.assert_array_equal(windows.batch(7, 3)[0], inputs)
    assert not np.array_equal(windows.batch(8, 3)[0], inputs)
    assert windows.tokens.mask is None


def test_a_timing_is_its_calls_median_and_outer_deciles(monkeypatch):
    """By a clock that only the calls move: seconds of warm-up, then calls of unequal length."""
    took = [0.001, 0.009, 0.002, 0.05, 0.004, 0.003, 0.006]
    now = [0.0]
    coming = iter([5.0, 2.0, *took])

    def call():
        now[0] += next(coming)

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    timed = time_calls(call, CPU, warmup=2, count=7)
    p10, p50, p90 = (1e3 * np.percentile(took, (10, 50, 90))).tolist()
    assert [timed.ms_p10, timed.ms, timed.ms_p90] == pytest.approx([p10, p50, p90])
    assert timed.warmup_s == pytest.approx(7.0)
    assert timed.steps == 7
    assert (timed.peak_gib, timed.warnings) == (None, [])


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
    monkeypatch.setattr(measure.time, "perf_counter", clock)
    timed = time_decoding(model, [[1, 2, 3, 4]] * 3, asked, Sampling())
    began, *tokens = arrivals[: asked + 1]
    assert {after - before for before, after in pairwise(tokens)} == {1.0}
    assert (timed.texts, timed.ms, timed.tokens_per_s) == (3, 1e3, 3.0)
    # The first token comes after the prompt's pass, and while the second is computed.
    assert timed.first_s == tokens[0] - began == 2
    assert timed.prompt_ms == 1e3  # one pass, and no second token


def test_a_compiled_graph_is_not_reused_with_another_attention_kernel(tmp_path, monkeypatch):
    """torch keeps compiled graphs on the disk, and a kernel is fixed inside of them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def attend(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = torch.randn(1, 2, 16, 16)
    used = {}
    for name in ("flash", "math"):
        torch.compiler.reset()
        with measure.attention_kernel(name):
            compiled = torch.compile(attend)
            compiled(q)
            with torch.profiler.profile() as profiler:
                compiled(q)
        used[name] = any("flash" in event.key for event in profiler.key_averages())
    torch.compiler.reset()
    assert used == {"flash": True, "math": False}


# --------------------------------------------------------------------------------------------------
# Warnings, with torch and the driver made up


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 11.7 GiB, of which torch holds 0.5."""
    fake_gpu_memory(monkeypatch, 11.7)
    for name in ("memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: GIB // 2)


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
    def run(*args, **options):
        if answer is None:
            raise FileNotFoundError
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    properties = SimpleNamespace(uuid="1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert measure.clock_is_held() == held


@pytest.mark.usefixtures("gpu")
def test_memory_of_other_programs_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: -3 * GIB)  # 3 GiB more in use
    (warning,) = memory_warnings(world=1)
    assert "other programs hold 3.2 GiB" in warning
    assert memory_warnings(world=2) == []  # the other ranks' memory would look like theirs


@pytest.mark.usefixtures("gpu")
def test_more_memory_than_the_card_has_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 12 * GIB)
    (warning,) = memory_warnings(world=1)
    assert "spills" in warning
