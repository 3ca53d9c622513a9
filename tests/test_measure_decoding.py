"""The measured speed of generation."""

from itertools import pairwise

import pytest

from gpt12 import measure_decoding as module
from gpt12.measure_decoding import decoding_result, measure_decoding, new_tokens
from tests.bench_helpers import CPU, make


def test_generation_reports_its_speed_and_what_the_memory_allows():
    config = make(peak_tflops=1, bandwidth_gbs=10, max_new_tokens=5)
    # The blocks and the head are read once per token, 4 bytes a number.
    read = 4 * (2 * (12 * 32 * 32 + 2 * 32) + 64 * 32)
    for batch in (1, 4):
        result = measure_decoding(config, CPU, batch)
        assert (result.label, result.batch) == (f"batch {batch}", batch)
        assert result.tokens_per_s * result.ms / 1e3 == pytest.approx(batch)
        assert result.prefill_tokens_per_s * result.prefill_ms / 1e3 == pytest.approx(batch * 4)
        assert result.bound_tokens_per_s == pytest.approx(batch * 10e9 / read)
        share = result.tokens_per_s / result.bound_tokens_per_s
        assert result.bound_share == pytest.approx(share)


def test_the_time_per_token_is_the_median_after_compiling():
    arrivals = [0.0, 9.0, 10.0, 11.0, 13.0, 14.0]  # the first steps compile
    result = decoding_result(make(), "x", batch=2, prefill_s=0.5, arrivals=arrivals)
    assert (result.ms, result.tokens_per_s) == (1e3, 2.0)
    assert result.prefill_ms == 500
    assert decoding_result(make(), "x", 2, 0.5, [0.0, 3.0]).ms == 3e3


@pytest.mark.parametrize(("asked", "timed"), [(2, 2), (5, 5), (500, 12)])
def test_every_timed_interval_computes_a_token(monkeypatch, asked, timed):
    """Time counts forward passes: each interval between two tokens holds exactly one.

    stream() computes ahead, so the last token comes without a pass and is not timed. At most a
    context's worth is made, of which a quarter is the prompt.
    """
    passes = [0]
    given = []
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(passes[0]))
    build = module.build_model

    def counting(config, machine):
        model = build(config, machine)

        def count(*_):
            passes[0] += 1

        model.transformer.register_forward_pre_hook(count)
        return model

    def result(config, label, batch, prefill_s, arrivals):
        given.extend(arrivals)
        return decoding_result(config, label, batch, prefill_s, arrivals)

    monkeypatch.setattr(module, "build_model", counting)
    monkeypatch.setattr(module, "decoding_result", result)
    config = make(max_new_tokens=asked)
    assert new_tokens(config) == timed
    measure_decoding(config, CPU, 1)
    assert len(given) == timed
    assert {after - before for before, after in pairwise(given)} == {1.0}
