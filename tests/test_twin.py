"""The twin against transformers' GPT-2, and changed models that it must not take for GPT-2."""

import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

import model
from gpt12 import twin
from model import GPTConfig

CONFIG = GPTConfig(block_size=320, n_layer=3, n_head=3, n_embd=48)


@pytest.mark.gpt2
@pytest.mark.parametrize("bias", [True, False])
def test_the_reference_is_transformers_gpt2(bias):
    small = twin.make_twin(replace(CONFIG, bias=bias))
    state = small.state_dict()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=twin.VOCAB_SIZE, n_positions=320, n_layer=2, n_head=3, n_embd=24
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in state:
                is_matrix = ".h." in name and parameter.ndim == 2  # Conv1D is transposed
                parameter.copy_(state[name].T if is_matrix else state[name])
            else:
                parameter.zero_()
        idx = twin.sample_ids(320)
        expected = theirs(idx).logits
        torch.testing.assert_close(twin.gpt2_logits(state, 3, idx), expected)


@pytest.mark.gpt2
@pytest.mark.parametrize(("bias", "n_head"), [(True, 1), (False, 5)])
def test_the_model_as_it_is_is_gpt2(bias, n_head):
    assert twin.is_gpt2(replace(CONFIG, bias=bias, n_head=n_head, n_embd=8 * n_head))


def exact_gelu(monkeypatch):
    changed = types.SimpleNamespace(**vars(F))
    changed.gelu = lambda x, approximate: F.gelu(x)
    monkeypatch.setattr(model, "F", changed)


def window_of_256(monkeypatch):
    def attention(q, k, v, **options):
        T = q.size(2)
        near = torch.ones(T, T, dtype=torch.bool).tril().triu(-255)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near)

    changed = types.SimpleNamespace(**vars(F))
    changed.scaled_dot_product_attention = attention
    monkeypatch.setattr(model, "F", changed)


def change_from_layer_2(monkeypatch, change):
    """Change what the layers from the third on are made of."""
    init = model.Transformer.__init__

    def changed(self, config):
        init(self, config)
        change(self.h)

    monkeypatch.setattr(model.Transformer, "__init__", changed)


def no_mlp_from_layer_2(monkeypatch):
    def change(blocks):
        for block in blocks[2:]:
            block.mlp.forward = torch.zeros_like

    change_from_layer_2(monkeypatch, change)


def one_matrix_from_layer_2(monkeypatch):
    def change(blocks):
        for block in blocks[2:]:
            block.mlp.c_fc.weight = blocks[1].mlp.c_fc.weight

    change_from_layer_2(monkeypatch, change)


@pytest.mark.parametrize(
    "change", [exact_gelu, window_of_256, no_mlp_from_layer_2, one_matrix_from_layer_2]
)
def test_a_changed_model_is_not_gpt2_and_has_another_fingerprint(change, monkeypatch):
    before = torch.tensor(twin.fingerprint(CONFIG))
    twin.is_gpt2.cache_clear()
    twin.fingerprint.cache_clear()
    change(monkeypatch)
    assert not twin.is_gpt2(CONFIG)
    after = torch.tensor(twin.fingerprint(CONFIG))
    assert not torch.allclose(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.gpt2
def test_a_deep_model_and_one_of_many_heads_are_gpt2_and_have_small_twins():
    deep = GPTConfig(block_size=16, n_layer=48, n_head=2000, n_embd=2000)
    assert twin.is_gpt2(deep)
    assert twin.make_twin(deep).config.n_embd == 8 * 25


def test_the_shorter_fingerprint_of_older_versions_is_known():
    now = twin.fingerprint(CONFIG)
    assert len(now) == 32
    assert twin.has_fingerprint(CONFIG, now[:16])
    assert not twin.has_fingerprint(CONFIG, [*now[:16], *now[:16]])


def test_a_twin_moves_no_random_numbers_and_is_always_the_same():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = twin.fingerprint(CONFIG)
    assert torch.equal(torch.rand(3), expected)
    twin.fingerprint.cache_clear()
    assert twin.fingerprint(CONFIG) == first
