"""The twin against transformers' GPT-2, and changed models that it must not take for GPT-2."""

from dataclasses import replace

import pytest
import torch

import model
from gpt12 import twin
from gpt12.weights import from_pretrained
from model import GPTConfig
from tests.models import SHAPE, extend, relative, use_exact_gelu, use_window

CONFIG = GPTConfig(block_size=320, n_layer=3, n_head=3, n_embd=48)


@pytest.mark.gpt2
def test_the_reference_is_transformers_gpt2(theirs, batch):
    model, folder = theirs
    state = from_pretrained(folder).state_dict()
    idx, _ = batch
    logits = twin.gpt2_logits(state, SHAPE["n_head"], idx)
    assert relative(logits[..., : SHAPE["vocab_size"]], model(idx).logits) < 1e-5


@pytest.mark.gpt2
@pytest.mark.parametrize(
    ("bias", "n_head", "n_layer"), [(True, 1, 3), (False, 5, 3), (True, 2, 48)]
)
def test_the_model_as_it_is_is_gpt2(bias, n_head, n_layer):
    shape = {"bias": bias, "n_head": n_head, "n_embd": 12 * n_head, "n_layer": n_layer}
    assert twin.is_gpt2(replace(CONFIG, **shape))


def window_of_256(monkeypatch):
    use_window(monkeypatch, 256)


def no_mlp_in_layer_2(monkeypatch):
    def change(transformer):
        for block in transformer.h[2:]:
            block.mlp.forward = torch.zeros_like

    extend(monkeypatch, model.Transformer, change)


def one_matrix_in_layers_1_and_2(monkeypatch):
    def change(transformer):
        for block in transformer.h[2:]:
            block.mlp.c_fc.weight = transformer.h[1].mlp.c_fc.weight

    extend(monkeypatch, model.Transformer, change)


@pytest.mark.parametrize(
    "change", [use_exact_gelu, window_of_256, no_mlp_in_layer_2, one_matrix_in_layers_1_and_2]
)
def test_a_changed_model_is_not_gpt2_and_has_another_fingerprint(change, monkeypatch):
    before = twin.fingerprint(CONFIG)
    assert twin.has_fingerprint(CONFIG, before)
    twin.examine.cache_clear()
    change(monkeypatch)
    assert not twin.is_gpt2(CONFIG)
    assert not twin.has_fingerprint(CONFIG, before)


def test_the_fingerprints_of_older_versions_are_known():
    now = twin.fingerprint(CONFIG)
    for older in (16, 32):  # the second half of the longer one was that of another twin
        assert twin.has_fingerprint(CONFIG, [*now[:16], *[0.0] * (older - 16)])
    assert twin.has_fingerprint(CONFIG, now[:48])  # without the losses
    assert not twin.has_fingerprint(CONFIG, [*now[:24], *now[:24]])
    assert not twin.has_fingerprint(CONFIG, now[:5])  # of no version


@pytest.mark.parametrize("draws", [False, True])
def test_a_twin_moves_no_random_numbers_and_is_always_the_same(monkeypatch, draws):
    def draw(block):
        block.gain = torch.nn.Parameter(1 + 0.1 * torch.randn(3))
        block.ln_1.weight.data[:3] = block.gain.detach()

    if draws:
        extend(monkeypatch, model.Block, draw)
    twin.examine.cache_clear()
    state = torch.get_rng_state()
    first = twin.fingerprint(CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    twin.examine.cache_clear()
    assert twin.fingerprint(CONFIG) == first


def test_a_loss_that_computes_something_else_gives_another_fingerprint(monkeypatch):
    before = twin.fingerprint(CONFIG)
    twin.examine.cache_clear()
    loss = model.linear_cross_entropy

    def half(*args, **options):
        return loss(*args, **options) / 2

    monkeypatch.setattr(model, "linear_cross_entropy", half)
    assert not twin.has_fingerprint(CONFIG, before)
