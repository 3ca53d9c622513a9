"""The ladder: every rung does the same work with one technique more."""

import pytest
import torch

from gpt12 import ladder
from gpt12.bench_report import describe
from gpt12.device import Machine
from gpt12.ladder import CUDA_GRAPH, SWITCHED_OFF, choose_techniques, climb_ladder
from gpt12.measure import machine_for_training
from gpt12.settings import BenchConfig
from tests.bench_helpers import CPU, check_step, make, out_of_memory_above


def test_every_rung_does_the_same_work():
    config = make(dtype="bfloat16", seed=3, vocab_size=50)
    rows = climb_ladder(config, machine_for_training(config))
    assert [row.label for row in rows] == [
        "fp32, eager",
        "+ 16-bit autocast",
        "+ flash attention",
        "+ recomputation",
    ]
    for row in rows:
        check_step(vars(row), 48)
        assert row.loss == pytest.approx(rows[0].loss, abs=0.02)
    assert [row.dtype for row in rows] == ["float32", "bfloat16", "bfloat16", "bfloat16"]
    assert [row.attention for row in rows] == ["math", "math", "auto", "auto"]
    assert [row.recompute for row in rows] == ["none", "none", "none", "pointwise"]


def test_techniques_are_switched_off_by_keys_that_users_have():
    for keys in SWITCHED_OFF.values():
        assert keys.keys() <= vars(BenchConfig()).keys()


def test_on_a_gpu_all_techniques_are_used(capsys):
    gpu = Machine(torch.device("cuda"), torch.bfloat16, compiled=True)
    config = make(recompute="pointwise", cuda_graph="auto")
    assert choose_techniques(config, gpu) == list(SWITCHED_OFF)
    assert capsys.readouterr().out == ""


def test_techniques_that_change_nothing_are_left_out_and_named(capsys):
    assert choose_techniques(make(), CPU) == ["flash attention", "recomputation"]
    said = capsys.readouterr().out
    for reason in ("16-bit autocast (float32)", "torch.compile (off)", "CUDA graph (no GPU)"):
        assert reason in said
    gpu = Machine(torch.device("cuda"), torch.bfloat16, compiled=True)
    choose_techniques(make(cuda_graph=False, attention="math"), gpu)
    said = capsys.readouterr().out
    assert "CUDA graph (not used for this step)" in said
    assert "flash attention (attention=math)" in said


def test_a_ladder_that_does_not_fit_is_climbed_with_half_the_batch(monkeypatch):
    out_of_memory_above(3, monkeypatch, ladder)
    rows = climb_ladder(make(batch_size=8), CPU)
    assert {row.batch_size for row in rows} == {2}
    assert len(rows) == 3


@pytest.mark.gpu
def test_every_rung_does_the_same_work_on_a_gpu():
    config = make(
        device="cuda", dtype="auto", compile="auto", n_embd=128, block_size=256, vocab_size=50
    )
    rows = climb_ladder(config, machine_for_training(config))
    labels = ["fp32, eager", *(f"+ {name}" for name in SWITCHED_OFF)]
    assert [row.label for row in rows] == labels
    # With a CUDA graph three steps more are made before the clock starts, so the last loss is that
    # of a later step.
    recorded = labels.index(f"+ {CUDA_GRAPH}")
    for group in (rows[:recorded], rows[recorded:]):
        for row in group:
            assert row.loss == pytest.approx(group[0].loss, abs=0.02)
    assert describe(config, "gpu", {"ladder": rows})
