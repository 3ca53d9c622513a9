"""What bench.py understands of its command line."""

import pytest

from gpt12 import bench_request
from gpt12.bench_request import GPT2_SHAPES, read_request, with_model_shape
from gpt12.errors import UserError
from tests.bench_helpers import request


@pytest.mark.parametrize(
    ("flags", "measurements"),
    [
        ([], {"step"}),
        (["--ladder"], {"ladder"}),
        (["--profile", "--sweep=seed:1,2"], {"profile", "sweep"}),
        (["--report"], {"step", "ladder", "sample"}),
        (["--compare=transformers"], {"compare"}),
        (["--sample", "--compare=transformers"], {"sample"}),  # then generation is compared
        (["--batch_size=auto", "--ladder"], {"find_batch", "ladder"}),
    ],
)
def test_what_is_measured_is_what_was_asked_for(flags, measurements):
    assert read_request(flags).measurements == measurements


def test_keys_on_the_command_line_are_told_from_those_in_a_file(tmp_path):
    preset = tmp_path / "preset.py"
    preset.write_text("optimizer = 'muon'\nbias = True")
    asked = request(str(preset), "--bias=False")
    assert {"optimizer", "bias"} <= asked.given
    assert "bias" in asked.typed
    assert "optimizer" not in asked.typed


def test_a_cpu_gets_a_small_model_unless_a_shape_is_given():
    asked = read_request([])
    small = with_model_shape(asked.asked, asked.given, on_cpu=True)
    assert (small.n_layer, small.n_embd, small.block_size, small.vocab_size) == (4, 128, 64, 65)
    assert with_model_shape(asked.asked, asked.given, on_cpu=False).n_embd == 768
    asked = read_request(["--n_layer=3"])
    given = with_model_shape(asked.asked, asked.given, on_cpu=True)
    assert (given.n_layer, given.n_embd, given.block_size) == (3, 768, 1024)


def test_init_from_gives_the_shape_and_biases():
    for name, shape in GPT2_SHAPES.items():
        asked = read_request([f"--init_from={name}"])
        config = with_model_shape(asked.asked, asked.given, on_cpu=True)
        assert (config.n_layer, config.n_head, config.n_embd) == shape
        assert config.bias
        assert config.block_size == 1024


def test_each_rank_gets_a_micro_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read_request([]).asked.gradient_accumulation_steps == 4
    with pytest.raises(UserError, match="gradient_accumulation_steps=6 .* pass .*=8"):
        read_request(["--gradient_accumulation_steps=6"])


def test_several_processes_measure_only_the_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_request([]).measurements == {"step"}
    with pytest.raises(UserError, match="leave out ladder, sample"):
        read_request(["--report"])


def test_without_transformers_there_is_no_comparison(monkeypatch):
    monkeypatch.setattr(bench_request.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="transformers is not installed"):
        read_request(["--compare=transformers"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_from=resume"], "gpt2-medium"),
        (["--plan", "--peak_tflops=40"], "datasheet"),
        (["--sample", "--max_new_tokens=1"], "it needs at least two"),
        (["--report", "--block_size=2"], "it needs at least two"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        read_request(flags)
