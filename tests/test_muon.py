"""gpt12/muon.py: against torch's own Muon, the singular value decomposition, and plain loops."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from gpt12.lora import add_lora
from gpt12.muon import Muon, neuron_scale, orthogonalize
from gpt12.optimizer import set_learning_rate
from tests.helpers import fill, random_rows, small_gpt, small_step


def test_orthogonalize_brings_all_singular_values_near_one_and_keeps_the_singular_vectors():
    g = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for x in (g, g.mT.contiguous()):
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        # In the input's own singular basis the result is diagonal.
        inner = u.mT @ orthogonalize(x) @ vh.mT
        values = inner.diagonal(dim1=1, dim2=2)
        assert values.min() > 0.5
        assert values.max() < 1.3
        assert torch.allclose(inner, torch.diag_embed(values), atol=1e-4)


def matrices(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def split(matrix: torch.Tensor) -> list[torch.Tensor]:
    """Return query, key and value of a stacked matrix, or the matrix itself."""
    return list(matrix.chunk(3)) if len(matrix) == 24 else [matrix]


def torchs_scale(direction, mean_square, keep):
    """Scale as torch's match_rms_adamw: by the matrix's longer side, all neurons alike."""
    return torch.full((len(direction), 1, 1), max(direction.shape[1:]) ** 0.5)


def test_without_scaled_neurons_the_update_is_that_of_torchs_muon_on_each_matrix(monkeypatch):
    """Our stacked update equals torch.optim.Muon on q, k, v and every other matrix in turn."""
    monkeypatch.setattr("gpt12.muon.neuron_scale", torchs_scale)
    step = small_step(optimizer="muon", weight_decay=0.1, grad_clip=0.0)
    muon, adamw = step.optimizers
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    assert {*matrices(muon), *matrices(adamw)} == set(step.model.parameters())
    shapes = sorted({tuple(p.shape) for p in matrices(muon)})
    assert shapes == [(8, 8), (8, 32), (24, 8), (32, 8)]
    theirs = {p: [nn.Parameter(part.detach().clone()) for part in split(p)] for p in matrices(muon)}
    torch_muon = torch.optim.Muon(
        [part for parts in theirs.values() for part in parts],
        lr=1e-2,
        weight_decay=0.1,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
        ns_steps=4,
        eps=1e-7,
    )
    set_learning_rate(step.optimizers, 1e-2)
    muon.grad_scale = torch.tensor(1.0)  # as the training step sets them
    muon.found_inf = torch.tensor(0.0)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for p, parts in theirs.items():
            # Far from singular, where torch's bf16 would amplify its rounding; q, k, v of unlike
            # sizes, each of which has to count as much as the others.
            for i, part in enumerate(parts):
                part.grad = nn.init.orthogonal_(torch.empty_like(part)) * 9.0**i
            p.grad = torch.cat([part.grad for part in parts])
        muon.step()
        torch_muon.step()
    for p, parts in theirs.items():
        # torch's works in bf16; the two updates moved each number by up to 2e-2.
        assert (p - torch.cat(parts)).abs().max() < 4e-4


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_neurons_are_scaled_as_in_the_papers_loop(shape):
    """NorMuon (arXiv:2510.05491), algorithm 1, one neuron after another in float64.

    Its neurons are the rows; ours are the columns if there are more of these.
    """
    generator = np.random.default_rng(0)
    wide = shape[0] < shape[1]
    mean_square = torch.zeros(1, 1, shape[1]) if wide else torch.zeros(1, shape[0], 1)
    running = np.zeros(max(shape))
    for _ in range(3):
        direction = generator.normal(size=shape) * np.linspace(1, 9, shape[1])
        neurons = direction.T if wide else direction
        expected = np.zeros_like(neurons)
        for i, neuron in enumerate(neurons):
            running[i] = 0.95 * running[i] + 0.05 * np.mean(neuron**2)
            expected[i] = neuron / np.sqrt(running[i])
        expected *= np.sqrt(expected.size) / np.linalg.norm(expected)
        ours = torch.tensor(direction[None]).float()
        ours = (ours * neuron_scale(ours, mean_square, keep=torch.ones(())))[0]
        np.testing.assert_allclose(ours.T if wide else ours, expected, rtol=1e-4)
    np.testing.assert_allclose(mean_square.flatten(), running, rtol=1e-5)


def test_a_step_moves_the_weights_by_a_fifth_of_the_rate():
    """In the root of the mean square, as AdamW does; decay comes on top."""
    step = small_step(optimizer="muon", weight_decay=0.0, grad_clip=0.0)
    muon = step.optimizers[0]
    before = [p.detach().clone() for p in matrices(muon)]
    fill(step, *random_rows())
    step(1e-2)
    for old, p in zip(before, matrices(muon), strict=True):
        for moved in split(p.detach() - old):
            assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=1e-3)


def test_adapters_are_left_to_adamw():
    model = small_gpt()
    add_lora(model, rank=2, alpha=4.0)
    [optimizer] = small_step(model=model, optimizer="muon").optimizers
    assert isinstance(optimizer, AdamW)
