"""gpt12/muon.py: against torch's own Muon and against the singular value decomposition."""

import torch
from torch import nn

from gpt12.lora import add_lora
from gpt12.muon import Muon, orthogonalize
from tests.helpers import fill, random_rows, small_gpt, small_step
from train import AdamW


def test_orthogonalize_brings_all_singular_values_near_one_and_keeps_the_singular_vectors():
    g = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for x in (g, g.mT.contiguous()):
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        out = orthogonalize(x)
        values = torch.linalg.svdvals(out)
        assert values.min() > 0.5
        assert values.max() < 1.3
        # In the input's own singular basis the result is diagonal.
        inner = u.mT @ out @ vh.mT
        diagonal = torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
        assert torch.allclose(inner, diagonal, atol=1e-4)


def split(matrix: torch.Tensor) -> list[torch.Tensor]:
    """Return query, key and value of a stacked matrix, or the matrix itself."""
    return list(matrix.chunk(3)) if len(matrix) == 24 else [matrix]


def test_muon_makes_the_update_of_torchs_muon_on_each_matrix():
    """Our stacked update equals torch.optim.Muon on q, k, v and every other matrix in turn."""
    step = small_step(optimizer="muon", weight_decay=0.1, grad_clip=0.0)
    muon = step.optimizers[0]
    assert isinstance(muon, Muon)
    shapes = sorted({tuple(p.shape) for p in muon.parameters})
    assert shapes == [(8, 8), (8, 32), (24, 8), (32, 8)]
    theirs = [part.detach().clone() for p in muon.parameters for part in split(p)]
    theirs = [nn.Parameter(part) for part in theirs]
    torch_muon = torch.optim.Muon(
        theirs,
        lr=1e-2,
        weight_decay=0.1,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
        eps=1e-7,
    )
    muon.lr.fill_(1e-2)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for p in muon.parameters:
            # Far from singular, where torch's bf16 would amplify its rounding; q, k, v of unlike
            # sizes, each of which has to count as much as the others.
            gradients = []
            for i, part in enumerate(split(p)):
                gradients.append(nn.init.orthogonal_(torch.empty_like(part)) * 9.0**i)
            p.grad = torch.cat(gradients)
        gradients = [part for p in muon.parameters for part in split(p.grad)]
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient.clone()
        muon.step(divide_by=torch.ones(()), skip=torch.zeros(()))
        torch_muon.step()
    ours = [part for p in muon.parameters for part in split(p)]
    for a, b in zip(ours, theirs, strict=True):
        # torch's works in bf16; the two updates moved each number by up to 2e-2.
        assert (a - b).abs().max() < 4e-4


def test_gradients_are_divided_before_they_enter_the_momentum():
    momenta = []
    for clip in (0.0, 0.01):
        step = small_step(optimizer="muon", grad_clip=clip)
        step(1e-2, fill(step, *random_rows()))
        muon = step.optimizers[0]
        momenta.append([state["momentum"] for state in muon.state.values()])
    scale = 0.01 / step.grad_norm
    for free, clipped in zip(*momenta, strict=True):
        assert torch.allclose(clipped, free * scale, rtol=1e-4, atol=1e-9)


def test_embeddings_norms_and_biases_are_left_to_adamw():
    step = small_step(optimizer="muon")
    muon, adamw = step.optimizers
    assert isinstance(adamw, AdamW)
    names = {p: name for name, p in step.model.named_parameters()}
    rest = {names[p] for p in adamw.parameters}
    assert {names[p] for p in muon.parameters} | rest == set(names.values())
    for name in rest:
        assert "wte" in name or "wpe" in name or "ln_" in name or name.endswith("bias")


def test_adapters_are_left_to_adamw():
    model = small_gpt()
    add_lora(model, rank=2, alpha=4.0)
    [optimizer] = small_step(model=model, optimizer="muon").optimizers
    assert isinstance(optimizer, AdamW)
