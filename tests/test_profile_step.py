"""The profile of a training step."""

import json
from pathlib import Path

import pytest

from gpt12.profile_step import profile_step
from tests.bench_helpers import CPU, make


def test_a_profile_lists_the_slowest_kernels_and_counts_the_products(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = profile_step(make(), CPU)
    times = [kernel.ms for kernel in found.kernels]
    assert len(times) == 10
    assert times == sorted(times, reverse=True)
    for kernel in found.kernels:
        assert kernel.share == pytest.approx(kernel.ms / found.total_ms)
    # 6 operations for each weight and token.
    flops = 48 * 6 * (12 * 32 * 32 * 2 + 64 * 32)
    assert found.products_tflops * found.products_ms * 1e9 == pytest.approx(flops)
    assert json.loads(Path("trace.json").read_text())["traceEvents"]
