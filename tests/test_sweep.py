"""--sweep and --find_batch: what is measured, and which result is chosen."""

from types import SimpleNamespace

import pytest

from gpt12 import sweep as sweep_module
from gpt12.errors import UserError
from gpt12.gpu_state import MARGIN_GIB
from gpt12.measure import OutOfMemory
from gpt12.plan import predict_memory
from gpt12.sweep import find_batch, sweep, swept_configs
from tests.bench_helpers import (
    CPU,
    check_step,
    fake_gpu_memory,
    fake_result,
    make,
    out_of_memory_above,
    request,
)


def test_a_sweep_measures_every_value_of_the_key():
    asked = request("--sweep=batch_size:1,2")
    rows = sweep(asked.asked, asked, on_cpu=True)
    assert [(row.label, row.batch_size) for row in rows] == [
        ("batch_size=1", 1),
        ("batch_size=2", 2),
    ]
    for row in rows:
        check_step(vars(row), row.batch_size * 16)


def test_a_sweep_changes_only_its_key():
    asked = request("--sweep=n_layer:1,3", n_embd=64)
    configs = swept_configs(asked.asked, asked)
    assert list(configs) == ["n_layer=1", "n_layer=3"]
    assert [config.n_layer for config in configs.values()] == [1, 3]
    assert [config.n_embd for config in configs.values()] == [64, 64]


def test_a_sweep_over_init_from_measures_each_models_own_shape():
    """The first model's shape must not stay for the others."""
    asked = request("--sweep=init_from:gpt2,gpt2-medium,scratch")
    configs = swept_configs(asked.asked, asked).values()
    assert [(c.n_layer, c.n_head, c.n_embd) for c in configs] == [
        (12, 12, 768),
        (24, 16, 1024),
        (2, 2, 32),
    ]
    assert [c.bias for c in configs] == [True, True, False]


def test_a_sweep_goes_on_after_a_row_that_does_not_fit(monkeypatch):
    out_of_memory_above(2, monkeypatch, sweep_module)
    asked = request("--sweep=batch_size:1,4,2")
    rows = sweep(asked.asked, asked, on_cpu=True)
    assert [isinstance(row, OutOfMemory) for row in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("batch_sise:1,2", "batch_size"),
        ("batch_size:1,none", "batch_size=none"),
        ("batch_size", "KEY:VALUE"),
        ("recompute:", "KEY:VALUE"),
        ("init_from:gpt2,gpt3", "init_from=gpt3"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(value, message):
    asked = request(f"--sweep={value}")
    with pytest.raises(UserError, match=message):
        swept_configs(asked.asked, asked)


def test_find_batch_measures_what_the_plan_allows(monkeypatch):
    cap = predict_memory(make(batch_size=40), "none").gib
    out_of_memory_above(39, monkeypatch, sweep_module)  # the prediction is a little too high
    fake_gpu_memory(monkeypatch, 139.8)
    config = make(recompute="none", vram_gb=cap + MARGIN_GIB + 1e-9)
    found = find_batch(config, SimpleNamespace(on_gpu=True))
    sizes = {row.batch_size: isinstance(row, OutOfMemory) for row in found.rows}
    assert sizes == {20: False, 30: False, 38: False, 40: True}
    assert found.best.batch_size == 38
    assert found.room_gib == pytest.approx(cap)


def test_find_batch_tries_every_recomputation_in_the_free_memory(monkeypatch):
    out_of_memory_above(10**6, monkeypatch, sweep_module)
    fake_gpu_memory(monkeypatch, 2)  # of which 1 GiB is free
    found = find_batch(make(recompute="auto"), SimpleNamespace(on_gpu=True))
    assert found.room_gib == pytest.approx(1)
    assert {row.recompute for row in found.rows} == {"none", "pointwise", "block"}


def test_the_fastest_batch_is_found_and_not_the_largest(monkeypatch):
    speed = {1: 1, 2: 2, 4: 9, 8: 8, 16: 7, 32: 8}

    def measure_step(config):
        return fake_result(config, speed[config.batch_size])

    monkeypatch.setattr(sweep_module, "measure_step", measure_step)
    config = make(recompute="none")
    assert find_batch(config, CPU).best.batch_size == 4
    assert config.batch_size == 3  # untouched


def test_find_batch_says_when_nothing_fits(monkeypatch):
    out_of_memory_above(0, monkeypatch, sweep_module)
    with pytest.raises(UserError, match="lora_rank"):
        find_batch(make(), CPU)
