"""gpt12/new_model.py: models without weights, and with random ones."""

import torch

from gpt12.new_model import new_model, uninitialized_model
from model import GPT, GPTConfig

SHAPE = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=8, bias=True)


def test_a_new_model_draws_each_weight_once_in_the_order_of_the_layers():
    torch.manual_seed(5)
    model = new_model(SHAPE)
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
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


def test_a_model_without_weights_draws_nothing_and_is_tied():
    before = torch.get_rng_state()
    model = uninitialized_model(SHAPE)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [p.shape for p in model.parameters()] == [p.shape for p in GPT(SHAPE).parameters()]
