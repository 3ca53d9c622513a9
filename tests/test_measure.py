"""The measured training step: what it runs, how its time is taken, and what is computed from it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt12 import measure
from gpt12.errors import UserError
from gpt12.loader import Loader
from gpt12.measure import (
    OutOfMemory,
    RandomWindows,
    attention_kernel,
    combine_ranks,
    measure_step,
    resolve,
    step_runner,
    tf32_allowed,
    time_calls,
    try_to_measure,
)
from gpt12.plan import count_work, predict_memory
from gpt12.settings import model_shape
from model import GPT, GPTConfig, parameter_count
from tests.bench_helpers import CPU, check_step, fake_result, make, prepare
from train import TrainStep

ON_A_CARD = {"dtype": "bfloat16", "peak_tflops": 0.5, "bandwidth_gbs": 20}

# --------------------------------------------------------------------------------------------------
# What is run


def test_the_measured_step_is_train_pys_own():
    with step_runner(make()) as runner:
        assert type(runner.step) is TrainStep
        assert type(runner.loader) is Loader
        before = [p.clone() for p in runner.model.parameters()]
        runner()
        after = list(runner.model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after))


def test_each_step_gets_the_next_windows():
    with step_runner(make(gradient_accumulation_steps=2)) as runner:
        first = runner.step.x.clone()
        runner()
        assert runner.position == 2 * 3
        assert not torch.equal(first, runner.step.x)


def test_random_windows_depend_on_the_position_only():
    windows = RandomWindows(vocab_size=50, block_size=16, seed=1)
    inputs, targets = windows.batch(7, 3)
    assert inputs.shape == targets.shape == (3, 16)
    assert inputs.dtype == np.int64
    assert 0 <= inputs.min() and inputs.max() < 50
    np.testing.assert_array_equal(windows.batch(7, 3)[0], inputs)
    assert not np.array_equal(windows.batch(8, 3)[0], inputs)
    assert windows.tokens.mask is None


def test_the_data_set_is_used_if_it_is_prepared(tmp_path):
    prepare(tmp_path, 50)
    on_data = measure_step(make(dataset=tmp_path, real_data="auto"))
    assert on_data.data == str(tmp_path)
    assert on_data.parameters == parameter_count(GPTConfig(16, 50, 2, 2, 32, bias=False))
    with step_runner(make(dataset=tmp_path, real_data=False)) as runner:
        assert runner.data == "random tokens"
    with step_runner(make(dataset="nowhere", real_data="auto")) as runner:
        assert runner.data == "random tokens"
    with (
        pytest.raises(UserError, match="nowhere"),
        step_runner(make(dataset="nowhere", real_data=True)),
    ):
        pass


def test_auto_is_decided_as_in_training():
    config = make(lora_rank=4, recompute="auto")
    resolved = resolve(config, model_shape(config, config.vocab_size), CPU)
    assert (resolved.lora_alpha, resolved.recompute, resolved.dtype) == (8.0, "none", "float32")
    assert (config.lora_alpha, config.recompute) == (None, "auto")  # untouched


def attention_kernels_used(config):
    """The operations of a step whose name tells the kernel of attention."""
    with step_runner(config) as runner:
        for _ in range(runner.step.warmup_calls + 1):
            runner()
        with torch.profiler.profile() as profiler:
            runner()
    return {event.key for event in profiler.key_averages() if "flash_attention" in event.key}


def test_the_attention_kernel_can_be_chosen():
    assert attention_kernels_used(make(attention="flash"))
    assert not attention_kernels_used(make(attention="math"))


def test_a_compiled_graph_is_not_reused_with_another_attention_kernel(tmp_path, monkeypatch):
    """torch keeps compiled graphs on the disk, and a kernel is fixed inside of them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def attend(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = torch.randn(1, 2, 16, 16)
    used = {}
    for name in ("flash", "math"):
        torch.compiler.reset()
        with attention_kernel(name):
            compiled = torch.compile(attend)
            compiled(q)
            with torch.profiler.profile() as profiler:
                compiled(q)
        used[name] = any("flash" in event.key for event in profiler.key_averages())
    torch.compiler.reset()
    assert used == {"flash": True, "math": False}


def test_tf32_is_switched_off_for_the_measurement_only():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True  # as open_machine sets it on a GPU
        with tf32_allowed(False):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
        with tf32_allowed(True):
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --------------------------------------------------------------------------------------------------
# Figures


def test_a_measurement_is_its_steps_median_and_outer_deciles(monkeypatch):
    """By a clock that only the steps move: seconds of warm-up, then steps of unequal length."""
    took = [0.001, 0.009, 0.002, 0.05, 0.004, 0.003, 0.006]
    now = [0.0]
    coming = iter([5.0, 2.0, *took])

    def step():
        now[0] += next(coming)

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    timed = time_calls(step, CPU, warmup=2, count=7, tokens=48)
    p10, p50, p90 = (1e3 * np.percentile(took, (10, 50, 90))).tolist()
    assert [timed.ms_p10, timed.ms, timed.ms_p90] == pytest.approx([p10, p50, p90])
    assert timed.tokens_per_s == pytest.approx(48 / np.median(took))
    assert timed.warmup_s == pytest.approx(7.0)
    assert timed.steps == 7


def test_a_step_reports_its_tokens_its_time_and_its_operations():
    result = measure_step(make(gradient_accumulation_steps=2))
    check_step(vars(result), 2 * 3 * 16)
    C, L, V, T = 32, 2, 64, 16
    weights = V * C + L * (12 * C * C + 2 * C) + C  # without positions; bias=False
    assert result.parameters == weights + T * C
    assert result.flops_per_token == 6 * weights + 12 * L * C * T
    assert result.mfu is None  # nobody knows what a CPU could do
    assert (result.batch_size, result.micro_steps, result.steps) == (3, 2, 2)
    assert (result.dtype, result.compile, result.cuda_graph) == ("float32", False, False)
    assert (result.recompute, result.data, result.ranks) == ("none", "random tokens", [])
    assert 3 < result.loss < 6


def test_mfu_and_roofline_follow_from_the_datasheet():
    result = measure_step(make(**ON_A_CARD))
    achieved = result.flops_per_token * result.tokens_per_s
    assert result.mfu == pytest.approx(achieved / 0.5e12)
    # At this size products are few: 6 a weight and token, 7 T C L for causal attention.
    C, L, V, T, tokens = 32, 2, 64, 16, 48
    products = tokens * (6 * (12 * C * C * L + C * V) + 7 * T * C * L) / 0.5e12
    moved = count_work(make(dtype="bfloat16"), "none").bytes / 20e9
    assert result.roofline == pytest.approx((products + moved) * 1e3 / result.ms)
    assert result.predicted_gib == pytest.approx(predict_memory(make(dtype="bfloat16"), "none").gib)


def test_lora_has_no_mfu_because_its_formula_trains_all_weights():
    result = measure_step(make(**ON_A_CARD, lora_rank=2))
    assert result.mfu is None
    assert result.roofline > 0


def test_the_figures_of_several_ranks_add_up():
    mine = fake_result(make(), 100.0)
    ranks = [
        {"tokens": 48, "tokens_per_s": 480.0, "ms_p10": 90.0, "ms_p90": 110.0},
        {"tokens": 48, "tokens_per_s": 320.0, "ms_p10": 80.0, "ms_p90": 190.0},
    ]
    both = combine_ranks(mine, ranks)
    assert (both.tokens, both.tokens_per_s) == (96, 800.0)
    assert (both.ms, both.ms_p10, both.ms_p90) == (120.0, 80.0, 190.0)


# --------------------------------------------------------------------------------------------------
# Out of memory


def fail_with(error):
    def measurement(config):
        raise error

    return measurement


def test_running_out_of_memory_is_a_result():
    row = try_to_measure("x", make(), fail_with(torch.OutOfMemoryError("CUDA out of memory")))
    assert row == OutOfMemory("x", batch_size=3)


def test_running_out_of_memory_while_a_graph_is_recorded_is_a_result():
    def record(config):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("capture was invalidated")

    assert isinstance(try_to_measure("x", make(), record), OutOfMemory)


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="a bug"):
        try_to_measure("x", make(), fail_with(RuntimeError("a bug")))


def test_a_measurement_gets_its_label():
    result = fake_result(make(), 1.0)
    assert try_to_measure("x", make(), lambda config: result) == replace(result, label="x")


def test_the_model_of_a_step_is_trained_on_the_device():
    with step_runner(make()) as runner:
        assert isinstance(runner.model, GPT)
        assert runner.model.training


def test_a_text_is_read_with_the_keys_that_say_how(monkeypatch):
    asked = {}

    def note(name, **options):
        asked.update(options, name=name)
        raise UserError("noted")

    monkeypatch.setattr(measure, "open_dataset", note)
    keys = {"tokenizer": "bytes", "val_fraction": 0.2, "text_column": "body"}
    with pytest.raises(UserError, match="noted"):
        measure.open_windows(make(dataset="my.csv", real_data=True, **keys))
    assert asked == {"name": "my.csv", "block_size": make().block_size, **keys}
