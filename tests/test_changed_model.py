"""A model that somebody has changed in model.py: nothing is lost, and nothing is pretended."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import model
import sample
from gpt12 import twin
from gpt12.errors import UserError
from gpt12.folder import write_json
from gpt12.twin import unread_fields
from gpt12.weights import from_pretrained, new_model, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import OUT, check_resuming, read_json, refused, resume, run
from tests.models import extend, use_exact_gelu

pytestmark = pytest.mark.usefixtures("own_folder")
SHAPE = GPTConfig(block_size=16, vocab_size=13, n_layer=1, n_head=2, n_embd=16)


def forget() -> None:
    """Forget what an earlier model.py of this process computed."""
    twin.examine.cache_clear()
    model.meta_model.cache_clear()


def use_rms_norm(monkeypatch):
    monkeypatch.setattr(model, "LayerNorm", lambda width, bias: nn.RMSNorm(width))


def use_scale(monkeypatch):
    """A learned scale in every block."""
    layer = model.Block.layer

    def add_scale(block):
        block.scale = nn.Parameter(torch.ones(()))

    extend(monkeypatch, model.Block, add_scale)
    monkeypatch.setattr(model.Block, "layer", lambda self, *args: self.scale * layer(self, *args))


def use_untied_head(monkeypatch):
    def untie(gpt):
        gpt.lm_head.weight = nn.Parameter(torch.empty_like(gpt.lm_head.weight))
        nn.init.normal_(gpt.lm_head.weight, std=0.02)

    extend(monkeypatch, model.GPT, untie)


def use_buffer(monkeypatch):
    """A running mean of the stream, which is not trained."""
    forward = model.Transformer.forward

    def add_buffer(transformer):
        transformer.register_buffer("mean", torch.zeros(SHAPE.n_embd))

    def forward_and_count(self, *args, **kwargs):
        x = forward(self, *args, **kwargs)
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return x + self.mean

    extend(monkeypatch, model.Transformer, add_buffer)
    monkeypatch.setattr(model.Transformer, "forward", forward_and_count)


CHANGES = {
    use_rms_norm: "transformer.h.0.ln_1.weight",
    use_scale: "transformer.h.0.scale",
    use_untied_head: "lm_head.weight",
    use_buffer: "transformer.mean",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_adds_is_saved_and_a_resumed_run_is_the_unbroken_one(monkeypatch, change):
    change(monkeypatch)
    forget()
    before, after = check_resuming(steps=6)
    name = CHANGES[change]
    assert not torch.equal(before[name], after[name])
    assert read_json("whole/last/config.json")["model_type"] == "gpt12"


@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_that_the_file_or_the_model_lacks_is_named(tmp_path, monkeypatch, change):
    save_pretrained(new_model(SHAPE), tmp_path / "plain")
    with monkeypatch.context() as m:
        change(m)
        forget()
        save_pretrained(new_model(SHAPE), tmp_path / "changed")
        if change is not use_rms_norm:  # whose gains have the names of LayerNorm's
            with pytest.raises(UserError, match=f"tensor {CHANGES[change]} is missing"):
                from_pretrained(tmp_path / "plain", new_run=True)
    forget()
    lacks = "ln_1.bias is missing" if change is use_rms_norm else CHANGES[change]
    with pytest.raises(UserError, match=lacks):
        from_pretrained(tmp_path / "changed", new_run=True)


def test_a_checkpoint_of_another_model_py_is_refused(monkeypatch):
    run("--out_dir=old", "--max_iters=1", "--eval_iters=1")
    run("--out_dir=adapters", "--lora_rank=2", "--init_from=old", "--max_iters=1")
    monkeypatch.setattr("sys.argv", ["sample.py", "--out_dir=old"])
    with monkeypatch.context() as m:
        use_exact_gelu(m)
        forget()
        other = r"model\.py computes something else"
        refused(other, sample.main)
        refused(other, resume, "--out_dir=old", "--max_iters=2")
        refused(other, resume, "--out_dir=adapters", "--max_iters=2")
    forget()
    resume("--out_dir=old", "--max_iters=2")


def test_a_new_run_from_other_code_and_from_a_foreign_gpt2_is_warned(monkeypatch, capsys):
    run("--out_dir=old", "--max_iters=1", "--eval_iters=1")
    use_exact_gelu(monkeypatch)
    forget()
    start = ["--init_from=old/best", "--max_iters=1"]
    run("--out_dir=new", *start)
    said, warned = capsys.readouterr()
    assert "warning: model.py computes something else than when" in warned
    assert said.count("others cannot") == 1
    content = read_json("old/best/config.json")
    del content["fingerprint"]
    write_json(Path("old/best/config.json"), content)
    run("--out_dir=newer", *start)
    assert "is a GPT-2, and model.py computes something else" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["--max_iters=1", "--check"])
def test_a_shape_key_that_the_model_does_not_read_is_refused(monkeypatch, key):
    monkeypatch.setattr("gpt12.run.unread_fields", lambda shape: {"n_head"})
    refused("n_head=1 would change nothing", run, "--n_head=1", key)


@dataclass(frozen=True)
class Wider(GPTConfig):
    """With a field that nobody reads."""

    base: float = 1e4


def test_fields_that_nobody_reads_are_found():
    assert unread_fields(SHAPE) == set()
    assert unread_fields(Wider(**vars(SHAPE))) == {"base"}


@pytest.mark.parametrize("drawn", [False, True])
def test_a_parameter_that_init_weights_does_not_set_is_named_before_training(monkeypatch, drawn):
    """Also one that the layer itself draws: that is not done, because it would take seconds."""

    def add(block):
        block.scale = nn.Parameter(torch.zeros(3) if drawn else torch.empty(3))
        if drawn:
            nn.init.normal_(block.scale)

    extend(monkeypatch, model.Block, add)
    refused(r"h\.0\.scale has no value: GPT\.init_weights", run, "--max_iters=1")
    assert not (OUT / "run.json").exists()


def test_memory_that_nobody_sets_is_named_wherever_it_is_made(monkeypatch):
    def add(gpt):  # after what GPT.__init__ does
        gpt.scale = nn.Parameter(torch.empty(3))

    extend(monkeypatch, model.GPT, add)
    with pytest.raises(UserError, match="^scale has no value"):
        new_model(SHAPE)


def test_what_follows_init_weights_counts(monkeypatch):
    def zero(gpt):
        nn.init.zeros_(gpt.transformer.h[0].attn.c_proj.weight)

    extend(monkeypatch, model.GPT, zero)
    assert not new_model(SHAPE).transformer.h[0].attn.c_proj.weight.any()


def test_padding_rows_of_a_loaded_model_are_zeros_whoever_draws_them(tmp_path, monkeypatch):
    def draw(gpt):  # after the padding rows were set to zeros
        with torch.no_grad():
            nn.init.normal_(gpt.transformer.wte.weight)

    extend(monkeypatch, model.GPT, draw, "init_weights")
    save_pretrained(new_model(SHAPE), tmp_path)
    assert not from_pretrained(tmp_path).transformer.wte.weight[SHAPE.vocab_size :].any()


def test_a_new_model_draws_each_weight_once_in_the_order_of_the_layers():
    torch.manual_seed(5)
    gpt = new_model(SHAPE)
    torch.manual_seed(5)
    for name, weight in gpt.named_parameters():
        if weight.ndim < 2:
            expected = torch.ones_like(weight) if ".weight" in name else torch.zeros_like(weight)
        else:
            std = 0.02
            if "c_proj" in name:
                std /= (2 * SHAPE.n_layer) ** 0.5
            expected = torch.empty_like(weight).normal_(0.0, std)
        if name.endswith("wte.weight"):
            expected[SHAPE.vocab_size :] = 0.0
        assert torch.equal(weight, expected), name


def test_a_field_that_somebody_adds_to_the_configuration_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt12.weights.GPTConfig", Wider)
    shape = Wider(**vars(SHAPE), base=9.0)
    save_pretrained(GPT(shape), tmp_path)
    assert from_pretrained(tmp_path).config == shape


def test_cropping_at_equal_size_changes_nothing_and_frozen_positions_stay_frozen():
    gpt = new_model(SHAPE)
    table = gpt.transformer.wpe.weight
    gpt.crop_block_size(16)
    assert gpt.transformer.wpe.weight is table
    table.requires_grad_(False)
    gpt.crop_block_size(8)
    assert not gpt.transformer.wpe.weight.requires_grad
    assert torch.equal(gpt.transformer.wpe.weight, table[:8])
    assert gpt.config.block_size == 8
