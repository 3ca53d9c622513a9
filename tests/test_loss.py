"""gpt12/loss.py: the loss against float64, its memory, ignored targets, vocabulary padding."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt12.loss import (
    IGNORE_INDEX,
    linear_cross_entropy,
    loss_and_gradient_in_place,
    plain_cross_entropy,
)
from model import GPT, GPTConfig
from tests.helpers import DEVICES
from tests.models import SHAPE, largest_error, random_batch, small_model


class LargeTensors(TorchDispatchMode):
    """Keep every storage of so many numbers that is made inside, so that no address comes twice."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numel:
                self.made[t.untyped_storage().data_ptr()] = t
        return out


@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, 0), (torch.bfloat16, 4)])
def test_the_loss_holds_its_logits_in_fp32_and_nothing_else_so_large(dtype, more):
    logits = torch.randn(64, 128).to(dtype)
    targets = torch.randint(100, (64,))
    with LargeTensors(64 * 100) as large:
        loss_and_gradient_in_place(logits, targets, 100)
    large.made.pop(logits.data_ptr(), None)
    assert sum(t.untyped_storage().nbytes() for t in large.made.values()) == more * logits.numel()


def test_the_loss_and_its_gradient_are_those_of_float64():
    """GPT-2's number of columns: sums of so many have to be summed well."""
    logits = torch.randn(64, 50304) * 30
    targets = torch.randint(50257, (64,))
    targets[::7] = IGNORE_INDEX
    exact = logits.double()[:, :50257].requires_grad_()
    wanted = cross_entropy(exact, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    wanted.backward()
    logits[3, 50257:] = math.inf  # whatever stands in the padding
    logits[7] = math.inf  # and in an ignored row
    loss = loss_and_gradient_in_place(logits, targets, 50257)
    assert loss.item() == pytest.approx(wanted.item(), rel=3e-7)
    assert (logits[:, :50257] - exact.grad).abs().max() < 3e-7
    assert not logits[:, 50257:].any()


@pytest.mark.parametrize("chunk", [5, 64])
def test_in_chunks_of_any_size_loss_and_gradients_are_those_of_the_plain_formula(
    monkeypatch, chunk
):
    monkeypatch.setattr("gpt12.loss.CHUNK_ROWS", chunk)
    x = torch.randn(2, 8, 6)
    weight = torch.randn(64, 6)  # 13 ids and padding
    y = torch.randint(0, 13, (2, 8))
    y[1, :3] = IGNORE_INDEX
    found = []
    for function, dtype in ((plain_cross_entropy, torch.float64), (linear_cross_entropy, None)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        loss = function(*inputs, y, 13)
        found.append([loss, *torch.autograd.grad(loss, inputs)])
    assert largest_error(found[1], found[0]) < 1e-6


def test_evaluating_makes_no_gradient(monkeypatch):
    model = GPT(GPTConfig(64, 97, 2, 2, 32))
    idx = torch.arange(120).view(2, 60) % 97
    with_gradient = model(idx, idx)[1]
    monkeypatch.setattr(
        "gpt12.loss.add_product", lambda *args: pytest.fail("a product for the head's gradient")
    )
    with torch.no_grad():
        assert torch.equal(model(idx, idx)[1], with_gradient)


@pytest.mark.parametrize(("targets", "known"), [(0, False), (0, True), (7, True), (32, True)])
def test_the_loss_is_the_mean_over_however_few_targets(targets, known):
    """Mean over the targets there are, 0 and not NaN without any; both ends of the vocabulary."""
    model = small_model()
    x = torch.randint(0, 13, (4, 8))
    y = torch.full((32,), IGNORE_INDEX)
    chosen = torch.randperm(32)[:targets]
    y[chosen] = torch.tensor([0, 12] * 16)[:targets]
    _, loss = model(x, y.view(4, 8), batch_targets=targets if known else None)
    loss.backward()
    total = cross_entropy(model(x)[0].view(-1, 13)[chosen], y[chosen], reduction="sum")
    assert loss.item() == pytest.approx(total.item() / max(1, targets), rel=1e-5)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("targets", [1024, 1025])
def test_masked_rows_that_are_left_out_of_many_change_nothing(targets):
    model = small_model()
    x, y = torch.randint(0, 13, (2, 256, 8))
    y.view(-1)[torch.randperm(2048)[targets:]] = IGNORE_INDEX
    losses = [model(x, y, batch_targets=count)[1] for count in (targets, None)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    few, all_rows = (torch.autograd.grad(loss, [*model.parameters()]) for loss in losses)
    assert largest_error(few, all_rows) < 1e-4


def test_lower_precision_stays_near_fp32(monkeypatch):
    """Under bf16 autocast every parameter's gradient is within 3% of fp32's in norm."""
    monkeypatch.setattr("gpt12.loss.CHUNK_ROWS", 40)  # of 96: all three chunks count
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, **SHAPE))
    batch = random_batch()
    names, parameters = zip(*model.named_parameters())
    exact = torch.autograd.grad(model(*batch)[1], parameters)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.autograd.grad(model(*batch)[1], parameters)
    for name, a, b in zip(names, rounded, exact):
        assert (a - b).norm() < 0.03 * b.norm(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divisor", [12_288, 491_520])
def test_the_gradients_below_the_head_are_scaled_in_float32(device, divisor):
    """In bf16, 1/divisor would be rounded: every gradient would be 0.2% or 0.3% too large.

    The gradients' own rounding averages out over many numbers; a wrong factor does not.
    """
    x = torch.randn(8, 64, 32).to(device)
    weight = torch.randn(256, 32).to(device)
    targets = torch.randint(0, 256, (8, 64)).to(device)
    exact = x.bfloat16().double().requires_grad_()  # a GPU's float32 products may cut digits off
    rounded = x.bfloat16().requires_grad_()
    weight = weight.bfloat16().float()
    for inputs in (exact, rounded):
        scale = torch.tensor(float(divisor), device=device)
        linear_cross_entropy(inputs, weight, targets, 256, divisor=scale).backward()
    ours = rounded.grad.double()
    theirs = exact.grad
    factor = (ours * theirs).sum() / (theirs * theirs).sum()
    assert abs(factor.item() - 1) < 3e-4
