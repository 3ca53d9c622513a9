"""The comparison with transformers: the same model, the same work, in turns."""

from dataclasses import replace

import pytest
import torch

from gpt12.measure import OutOfMemory
from gpt12.settings import model_shape
from gpt12.versus_transformers import (
    TheirGeneration,
    build_model,
    compare_training,
    match_settings,
    speed_ratios,
)
from model import GPT, parameter_count
from tests.bench_helpers import CPU, check_step, fake_result, make, prepare, request

COMPARE = "--compare=transformers"


def test_both_sides_are_measured_in_turns(tmp_path):
    prepare(tmp_path, 50)
    config = make(dataset=tmp_path, real_data="auto", bias=True)
    comparison = compare_training(config, CPU)
    rows = comparison.rows
    assert [row.label for row in rows] == ["gpt12", "transformers, eager"] * 2
    for row in rows:
        check_step(vars(row), 48)
    speeds = [row.tokens_per_s for row in rows]
    ratio = (speeds[0] + speeds[2]) / (speeds[1] + speeds[3])
    assert comparison.ratios == {"transformers, eager": pytest.approx(ratio)}
    # The data set's vocabulary, but random tokens on both sides.
    assert rows[0].data == "random tokens"
    theirs = build_model(make(vocab_size=50, bias=True), use_cache=False)
    assert rows[0].parameters == sum(p.numel() for p in theirs.parameters())


def test_their_model_is_ours():
    """The same weights give the same loss in both."""
    config = make(bias=True)
    shape = model_shape(config, config.vocab_size)
    ours = GPT(shape).eval()
    theirs = build_model(config, use_cache=False).eval()
    assert parameter_count(shape) == sum(p.numel() for p in theirs.parameters())
    weights = {}
    for name, tensor in ours.state_dict().items():
        linear = name.startswith("transformer.h.") and tensor.ndim == 2
        weights[name] = tensor.t() if linear else tensor[: len(tensor)]
    theirs.load_state_dict(weights)
    x = torch.arange(16)[None]
    torch.testing.assert_close(theirs(x).logits, ours(x)[0])


def test_speed_ratios_leave_out_what_did_not_fit():
    ours = [fake_result(make(), speed) for speed in (300.0, 100.0)]
    theirs = fake_result(make(), 50.0)
    rows = [
        *(replace(row, label="gpt12") for row in ours),
        replace(theirs, label="eager"),
        OutOfMemory("eager", 3),
        OutOfMemory("compiled", 3),
    ]
    assert speed_ratios(rows) == {"eager": 4.0}
    assert speed_ratios(rows[2:]) == {}


def test_a_presets_settings_become_those_of_transformers(tmp_path, capsys):
    """Biases, which no one asked not to have, and AdamW in place of the preset's optimizer."""
    preset = tmp_path / "preset.py"
    preset.write_text("optimizer = 'muon'")
    asked = request(str(preset), COMPARE)
    config = match_settings(asked.asked, asked)
    assert (config.bias, config.optimizer) == (True, "adamw")
    assert (asked.asked.bias, asked.asked.optimizer) == (False, "muon")  # untouched
    said = capsys.readouterr().out
    assert "optimizer=adamw in place of muon" in said
    assert "not the same work" not in said


def test_what_the_user_asked_for_stays_and_is_said_to_differ(tmp_path, capsys):
    preset = tmp_path / "preset.py"
    preset.write_text("bias = False")
    asked = request(str(preset), COMPARE, "--optimizer=muon", "--lora_rank=2")
    config = match_settings(asked.asked, asked)
    assert (config.bias, config.optimizer) == (False, "muon")
    said = [line for line in capsys.readouterr().out.splitlines() if "not the same work" in line]
    assert len(said) == 3
    for line, word in zip(said, ("biases", "muon", "LoRA")):
        assert word in line


def test_their_generation_makes_the_same_number_of_tokens():
    config = make(bias=True, max_new_tokens=5)
    (result,) = TheirGeneration(config, CPU).measure(batch=4)
    assert result.label == "transformers, dynamic cache"
    assert result.tokens_per_s * result.ms / 1e3 == pytest.approx(4)
    assert result.prefill_tokens_per_s * result.prefill_ms / 1e3 == pytest.approx(4 * 4)
    assert result.bound_share is None


def test_their_bound_counts_their_weights():
    config = make(bias=True, max_new_tokens=3, peak_tflops=1, bandwidth_gbs=10)
    (result,) = TheirGeneration(config, CPU).measure(batch=1)
    C, L, V = 32, 2, 64
    read = 4 * (L * (12 * C * C + 13 * C) + V * C)
    assert result.bound_tokens_per_s == pytest.approx(10e9 / read)
