"""--check: green for the model as it is, and for each line a broken model that turns it red."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
import train
from gpt12 import check
from gpt12.check import check_start, results
from gpt12.errors import UserError
from gpt12.generate import refill
from gpt12.optimizer import OPTIMIZERS, Entry
from model import GPTConfig
from tests.helpers import CPU, config

SHAPE = {"block_size": 12, "n_layer": 1, "n_head": 2, "n_embd": 16}


def wrong_lines(machine=CPU, **keys) -> dict[str, str]:
    """Return what --check finds wrong."""
    found = results(config(**SHAPE | keys), machine, train.TrainStep)
    return {name: wrong for name, wrong in found if wrong is not None}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_model_as_it_is_passes(optimizer):
    assert wrong_lines(optimizer=optimizer, bias=True) == {}


def test_the_command_prints_a_line_each_and_says_by_its_status(capsys, monkeypatch):
    shape = [f"--{key}={value}" for key, value in SHAPE.items()]
    assert train.main(["--check", "--device=cpu", *shape]) == 0
    assert capsys.readouterr().out.count("ok     ") == 9
    a_token_lost_at_the_contexts_end(monkeypatch)
    assert train.main(["--check", "--device=cpu", *shape]) == 1
    assert "WRONG  with the cache as without" in capsys.readouterr().out


def state_beside_the_parameters(monkeypatch):
    """A tensor that is no parameter and no buffer."""
    init = model.MLP.__init__
    forward = model.MLP.forward

    def init_with_scale(self, config):
        init(self, config)
        self.scale = torch.rand(())

    monkeypatch.setattr(model.MLP, "__init__", init_with_scale)
    monkeypatch.setattr(model.MLP, "forward", lambda self, x: self.scale * forward(self, x))


def window_in_training_only(monkeypatch):
    attention = F.scaled_dot_product_attention

    def near(q, k, v, attn_mask, is_causal, **options):
        if is_causal:
            T = q.size(2)
            attn_mask = torch.ones(T, T, dtype=torch.bool).tril().triu(-4)
        return attention(q, k, v, attn_mask=attn_mask, **options)

    changed = types.SimpleNamespace(**vars(F))
    changed.scaled_dot_product_attention = near
    monkeypatch.setattr(model, "F", changed)


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
    forward = model.GPT.forward

    def with_penalty(self, idx, targets=None, *args, **kwargs):
        logits, loss = forward(self, idx, targets, *args, **kwargs)
        if loss is not None:
            x = self.transformer(idx)
            loss = loss + 1e-3 * self.logits(x).logsumexp(-1).square().mean()
        return logits, loss

    monkeypatch.setattr(model.GPT, "forward", with_penalty)


def a_parameter_without_use(monkeypatch):
    init = model.Block.__init__

    def init_with_more(self, config):
        init(self, config)
        self.gain = nn.Parameter(torch.ones(3))

    monkeypatch.setattr(model.Block, "__init__", init_with_more)


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
    init = model.GPT.__init__

    def untie(self, config):
        init(self, config)
        self.lm_head.weight = nn.Parameter(torch.empty_like(self.lm_head.weight))

    monkeypatch.setattr(model.GPT, "__init__", untie)


def a_layer_that_raises_when_it_is_recomputed(monkeypatch):
    monkeypatch.setattr(model, "recompute", lambda *arguments: 1 / 0)


def a_loss_that_ignores_the_divisor(monkeypatch):
    loss = model.linear_cross_entropy
    monkeypatch.setattr(
        model, "linear_cross_entropy", lambda *args, **keys: loss(*args, **keys | {"divisor": None})
    )


BROKEN = {
    a_cap_of_the_logits_alone: "the loss is the cross-entropy of the logits",
    a_cap_in_the_loss_alone: "the loss is the cross-entropy of the logits",
    a_head_that_nobody_draws: "a new model has all its values",
    a_layer_that_raises_when_it_is_recomputed: "recompute=block as none",
    a_loss_that_ignores_the_divisor: "an update moves every parameter, a skipped one none",
    state_beside_the_parameters: "saved and loaded, the model is the same",
    window_in_training_only: "with the cache as without, past the context's end, too",
    a_token_lost_at_the_contexts_end: "with the cache as without, past the context's end, too",
    positions_across_examples: "packed examples as single ones",
    a_layer_that_draws: "recompute=block as none",
    a_loss_for_each_micro_batch: "two micro-batches as one",
    a_parameter_without_use: "an update moves every parameter, a skipped one none",
    an_optimizer_that_never_skips: "an update moves every parameter, a skipped one none",
}


@pytest.mark.parametrize("break_it", BROKEN)
def test_a_broken_model_turns_its_line_red(break_it, monkeypatch):
    break_it(monkeypatch)
    assert BROKEN[break_it] in wrong_lines()


def test_a_compiled_model_that_computes_something_else_is_red(monkeypatch):
    def compile_wrong(gpt):
        gpt.transformer.h[0].mlp.c_proj.weight.data.mul_(1.01)

    monkeypatch.setattr(check, "compile_model", compile_wrong)
    machine = type(CPU)(CPU.device, CPU.dtype, compiled=True)
    assert list(wrong_lines(machine)) == ["compiled as not"]


@pytest.mark.parametrize(
    "break_it",
    [state_beside_the_parameters, window_in_training_only, a_token_lost_at_the_contexts_end],
)
def test_a_run_of_a_model_that_saving_or_sampling_would_change_does_not_start(
    break_it, monkeypatch
):
    shape = GPTConfig(**SHAPE)
    check_start(shape)
    break_it(monkeypatch)
    with pytest.raises(UserError, match=r"differs .*look at .*--check"):
        check_start(shape)
