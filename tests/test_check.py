"""--check: green for the model as it is, and for each line a broken model that turns it red."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
import train
from gpt12 import check
from gpt12.check import check_model, check_start
from gpt12.errors import UserError
from gpt12.generate import refill
from gpt12.optimizer import OPTIMIZERS, Entry
from model import GPTConfig
from tests.helpers import CPU, config
from tests.models import extend, use_function

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


def window_in_training_only(monkeypatch):
    def near(q, k, v, attn_mask, is_causal, **options):
        if is_causal:
            T = q.size(2)
            attn_mask = torch.ones(T, T, dtype=torch.bool).tril().triu(-4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)

    use_function(monkeypatch, scaled_dot_product_attention=near)


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


def add_to_the_loss(monkeypatch, penalty):
    """Add penalty(model, logits, divisor) to the loss."""
    forward = model.GPT.forward

    def with_penalty(self, idx, targets=None, starts=None, divisor=None, *args, **kwargs):
        logits, loss = forward(self, idx, targets, starts, divisor, *args, **kwargs)
        if loss is not None:
            loss = loss + penalty(self, self.logits(self.transformer(idx)), divisor)
        return logits, loss

    monkeypatch.setattr(model.GPT, "forward", with_penalty)


def a_loss_for_each_micro_batch(monkeypatch):
    def z_loss(gpt, logits, divisor):
        return 1e-3 * logits.logsumexp(-1).square().mean() if gpt.training else 0.0

    add_to_the_loss(monkeypatch, z_loss)


def a_loss_that_evaluation_counts(monkeypatch):
    def z_loss(gpt, logits, divisor):
        return 1e-3 * logits.logsumexp(-1).square().sum() / divisor

    add_to_the_loss(monkeypatch, z_loss)


def parameters_in_a_plain_list(monkeypatch):
    use_scale(monkeypatch, lambda: [nn.Parameter(torch.ones(16))])


def a_parameter_without_use(monkeypatch):
    extend(
        monkeypatch, model.Block, lambda block: setattr(block, "gain", nn.Parameter(torch.ones(3)))
    )


def an_optimizer_that_never_skips(monkeypatch):
    entry = Entry(lambda groups, lr, betas: [torch.optim.SGD(groups, float(lr))], on_device=True)

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad.sign(), alpha=1e-2)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setitem(OPTIMIZERS, "adamw", entry)


def a_cap_of_the_logits_alone(monkeypatch):
    logits = model.GPT.logits
    monkeypatch.setattr(model.GPT, "logits", lambda self, x: 30 * (logits(self, x) / 30).tanh())


def a_cap_in_the_loss_alone(monkeypatch):
    loss = model.linear_cross_entropy

    def capped(x, weight, targets, vocab_size, **options):
        logits = 30 * ((x @ weight.t())[..., :vocab_size] / 30).tanh()
        return loss(logits, torch.eye(vocab_size), targets, vocab_size, **options)

    monkeypatch.setattr(model, "linear_cross_entropy", capped)


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
LOSS = "the loss is the cross-entropy of the logits"
UPDATE = "an update moves every parameter, a skipped one none"


@pytest.mark.parametrize(
    ("line", "break_it"),
    [
        ("a new model has all its values", a_head_that_nobody_draws),
        (SAVED, state_beside_the_parameters),
        (SAVED, parameters_in_a_plain_list),
        (CACHE, window_in_training_only),
        (CACHE, a_token_lost_at_the_contexts_end),
        ("packed examples as single ones", positions_across_examples),
        (LOSS, a_cap_of_the_logits_alone),
        (LOSS, a_cap_in_the_loss_alone),
        (LOSS, a_loss_that_evaluation_counts),
        ("recompute=pointwise as none", a_layer_that_draws),
        ("recompute=block as none", a_layer_that_raises_when_it_is_recomputed),
        ("two micro-batches as one", a_loss_for_each_micro_batch),
        (UPDATE, a_loss_that_ignores_the_divisor),
        (UPDATE, a_parameter_without_use),
        (UPDATE, an_optimizer_that_never_skips),
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
