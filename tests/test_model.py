"""model.py against `transformers`, against the reference written with loops, and for causality."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from gpt12.loss import IGNORE_INDEX
from gpt12.weights import from_pretrained
from model import GPT, GPTConfig, parameter_count
from tests.models import PACKED, SHAPE, largest_error, relative, small_model, starts_of


def published_gradients(model: GPT) -> dict[str, torch.Tensor]:
    """Our gradients by GPT-2's published names and layout."""
    grads = {}
    for name, p in model.transformer.named_parameters():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        grad = torch.as_tensor(p.grad)
        grads[f"transformer.{name}"] = grad.t() if linear else grad
    grads["transformer.wte.weight"] = grads["transformer.wte.weight"][: SHAPE["vocab_size"]]
    return grads


@pytest.mark.gpt2
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["none", "pointwise", "block"])
def test_logits_loss_and_every_gradient_equal_transformers(theirs, batch, recompute, dropout):
    """From one seed both drop the same values at the same places. Recomputing drops them again."""
    model, folder = theirs
    model = copy.deepcopy(model).train(dropout > 0)  # its own dropout is 0.1
    ours = from_pretrained(folder, dropout=dropout).train(dropout > 0)
    ours.set_recompute(recompute)
    x, y = batch
    torch.manual_seed(6)
    logits = model(x).logits
    expected = cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE_INDEX)
    expected.backward()
    torch.manual_seed(6)
    assert relative(ours(x)[0], logits) < 1e-5
    torch.manual_seed(6)
    _, loss = ours(x, y)
    loss.backward()
    assert relative(loss, expected) < 1e-5
    theirs = {name: p.grad for name, p in model.named_parameters()}
    grads = published_gradients(ours)
    assert theirs.keys() == grads.keys()
    for name, grad in grads.items():
        assert relative(grad, theirs[name]) < 1e-5, name


@pytest.mark.gpt2
@pytest.mark.parametrize("context_length", [32, 8])
@pytest.mark.parametrize("rows", [PACKED, ((32,),) * 3], ids=["packed", "whole"])
def test_packed_examples_are_computed_as_if_each_were_alone(theirs, batch, rows, context_length):
    """`transformers` computes each alone, and in a short context each part at its own positions."""
    model, folder = theirs
    x, _ = batch
    starts = starts_of(rows) if rows is PACKED else None
    ours = from_pretrained(folder)
    hidden = ours.transformer(x, example_starts=starts, context_length=context_length)
    logits = ours.lm_head(hidden)[..., : SHAPE["vocab_size"]]
    for row, lengths in enumerate(rows):
        first = 0
        for length in lengths:
            end = first + length
            for start in sorted({first, *range(0, 32, context_length)} & set(range(first, end))):
                stop = min(end, (start // context_length + 1) * context_length)
                positions = torch.arange(start - first, stop - first)[None]
                expected = model(x[row, start:stop][None], position_ids=positions).logits
                assert relative(logits[row, start:stop], expected[0]) < 1e-5
            first = end


@pytest.mark.gpt2
def test_our_models_have_the_published_numbers_of_parameters():
    assert parameter_count(GPTConfig()) == 124_439_808
    assert parameter_count(GPTConfig(n_layer=48, n_head=25, n_embd=1600)) == 1_557_611_200


@pytest.mark.parametrize("bias", [False, True])
def test_the_counted_parameters_are_those_of_a_model(bias):
    config = GPTConfig(block_size=32, bias=bias, **SHAPE)
    count = sum(parameter.numel() for parameter in GPT(config).parameters())
    assert parameter_count(config, padded=True) == count
    assert parameter_count(config) == count - (128 - 97) * 48  # the padding rows of the vocabulary


def test_initial_weights_have_gpt2s_standard_deviations():
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 1000, 8, 4, 256))
    block = model.transformer.h[3]
    for weight, expected in (
        (model.transformer.wte.weight[:1000], 0.02),
        (model.transformer.wpe.weight, 0.02),
        (block.attn.c_attn.weight, 0.02),
        (block.mlp.c_proj.weight, 0.02 / 4),
        (block.attn.c_proj.weight, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not model.transformer.wte.weight[1000:].any()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    # A fresh model knows nothing: its loss is that of a uniform guess.
    x = torch.randint(0, 1000, (4, 64))
    assert model(x, x.roll(1, 1))[1].item() == pytest.approx(math.log(1000), abs=0.1)


def test_no_position_sees_the_future():
    model = small_model()
    x = torch.randint(0, 13, (1, 8))
    embedded = model.transformer.wte.weight[x].detach().requires_grad_()
    model.transformer.wte.register_forward_hook(lambda *_: embedded)
    for t in range(8):
        (grad,) = torch.autograd.grad(model(x)[0][0, t].sum(), embedded)
        seen = grad[0].abs().sum(1) > 0
        assert seen.tolist() == [True] * (t + 1) + [False] * (7 - t)


def test_dropout_acts_only_while_training():
    model = small_model(dropout=0.5)
    x = torch.randint(0, 13, (4, 8))
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.usefixtures("fresh_compiler")
def test_a_traced_model_has_the_gradients_of_the_plain_one():
    """Traced as torch.compile does. The kernels are torch's, and tests/test_gpu.py has them."""
    model = small_model()
    x, y = torch.randint(0, 13, (2, 4, 8))
    plain = torch.autograd.grad(model(x, y)[1], [*model.parameters()])
    for module in (*model.transformer.h, model.transformer.ln_f):
        module.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    traced = torch.autograd.grad(model(x, y)[1], [*model.parameters()])
    assert largest_error(traced, plain) < 1e-4
    assert all("_orig_mod" not in name for name in model.state_dict())
