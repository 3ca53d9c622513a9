"""--check: green for the model as it is, and for each line a broken model that turns it red."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import model
import train
from gpt12 import check
from gpt12.check import check_model, check_start
from gpt12.errors import UserError
from gpt12.generate import refill
from model import GPTConfig
from tests.helpers import CPU, config
from tests.models import extend, use_window

SHAPE = {"block_size": 12, "n_layer": 1, "n_head": 2, "n_embd": 16}


def wrong_lines(capsys, machine=CPU, **keys) -> list[str]:
    """Return what --check finds wrong."""
    status = check_model(config(**SHAPE | keys), machine, train.TrainStep)
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if not line.startswith("ok  ")]
    assert len(lines) == 9 + machine.compiled
    assert status == (1 if wrong else 0)
    return wrong


def test_the_command_finds_the_model_as_it_is_in_order(capsys):
    shape = [f"--{key}={value}" for key, value in SHAPE.items()]
    assert train.main(["--check", "--device=cpu", "--bias", *shape]) == 0
    assert capsys.readouterr().out.count("ok     ") == 9
    assert wrong_lines(capsys, optimizer="muon") == []


def use_scale(monkeypatch, make_scales):
    """Multiply what the MLPs add by the first of some scales."""
    forward = model.MLP.forward
    extend(monkeypatch, model.MLP, lambda mlp: setattr(mlp, "scales", make_scales()))
    monkeypatch.setattr(model.MLP, "forward", lambda self, x: self.scales[0] * forward(self, x))


def state_beside_the_parameters(monkeypatch):
    """A tensor that is no parameter and no buffer."""
    use_scale(monkeypatch, lambda: [torch.rand(())])


def a_token_lost_at_the_contexts_end(monkeypatch):
    monkeypatch.setattr(
        check, "refill", lambda model, cache, b, tokens: refill(model, cache, b, tokens[1:])
    )


def positions_across_examples(monkeypatch):
    def sees(self, query, key, example=None):
        return key[:, None, :] <= query[:, :, None]

    monkeypatch.setattr(model.Transformer, "sees", sees)


def a_layer_that_draws(monkeypatch):
    layer = model.Block.layer

    def noisy(self, x, shared):
        return layer(self, x, shared) * (1 + 0.1 * torch.rand(()) * self.training)

    monkeypatch.setattr(model.Block, "layer", noisy)


def a_loss_for_each_micro_batch(monkeypatch):
    loss = model.linear_cross_entropy

    def with_z_loss(x, weight, *args, **options):
        z_loss = 1e-3 * (x @ weight.t()).logsumexp(-1).square().mean()
        return loss(x, weight, *args, **options) + z_loss

    monkeypatch.setattr(model, "linear_cross_entropy", with_z_loss)


def parameters_in_a_plain_list(monkeypatch):
    use_scale(monkeypatch, lambda: [nn.Parameter(torch.ones(16))])


def a_parameter_without_use(monkeypatch):
    extend(
        monkeypatch, model.Block, lambda block: setattr(block, "gain", nn.Parameter(torch.ones(3)))
    )


def a_cap_of_the_logits_alone(monkeypatch):
    logits = model.GPT.logits
    monkeypatch.setattr(model.GPT, "logits", lambda self, x: 300 * (logits(self, x) / 300).tanh())


def a_head_that_nobody_draws(monkeypatch):
    def untie(gpt):
        gpt.lm_head.weight = nn.Parameter(torch.empty_like(gpt.lm_head.weight))

    extend(monkeypatch, model.GPT, untie)


def a_layer_that_raises_when_it_is_recomputed(monkeypatch):
    monkeypatch.setattr(model, "recompute", lambda *arguments: 1 / 0)


def a_loss_that_ignores_the_divisor(monkeypatch):
    loss = model.linear_cross_entropy
    monkeypatch.setattr(
        model, "linear_cross_entropy", lambda *args, **keys: loss(*args, **keys | {"divisor": None})
    )


SAVED = "saved and loaded, the model is the same"
CACHE = "with the cache as without, past the context's end, too"
UPDATE = "an update moves every parameter, a skipped one none"


@pytest.mark.parametrize(
    ("line", "break_it"),
    [
        ("a new model has all its values", a_head_that_nobody_draws),
        (SAVED, state_beside_the_parameters),
        (SAVED, parameters_in_a_plain_list),
        (CACHE, use_window),
        (CACHE, a_token_lost_at_the_contexts_end),
        ("packed examples as single ones", positions_across_examples),
        ("the loss is the cross-entropy of the logits", a_cap_of_the_logits_alone),
        ("recompute=pointwise as none", a_layer_that_draws),
        ("recompute=block as none", a_layer_that_raises_when_it_is_recomputed),
        ("two micro-batches as one", a_loss_for_each_micro_batch),
        (UPDATE, a_loss_that_ignores_the_divisor),
        (UPDATE, a_parameter_without_use),
    ],
)
def test_a_broken_model_turns_its_line_red(line, break_it, monkeypatch, capsys):
    break_it(monkeypatch)
    wrong = wrong_lines(capsys)
    assert any(found.startswith(f"WRONG  {line}: ") for found in wrong), wrong
    if line in (SAVED, CACHE):  # which every run tries when it starts
        with pytest.raises(UserError, match=r"; look at .*--check"):
            check_start(GPTConfig(**SHAPE))


def test_a_compiled_model_that_computes_something_else_is_red(monkeypatch, capsys):
    def compile_wrong(gpt):
        gpt.transformer.h[0].mlp.c_proj.weight.data.mul_(1.01)

    monkeypatch.setattr(check, "compile_model", compile_wrong)
    (wrong,) = wrong_lines(capsys, replace(CPU, compiled=True))
    assert wrong.startswith("WRONG  compiled as not: ")
