"""Muon: momentum made orthogonal, for the matrices of the layers.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with the step size of each neuron
adapted as in NorMuon (Li et al. 2025, arXiv:2510.05491). Embeddings, LayerNorms and biases use
AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ_ITERATIONS = 4
MEAN_SQUARE_DECAY = 0.95  # NorMuon's second beta: the mean goes over about 20 updates


class Muon(torch.optim.Optimizer):
    """Momentum whose update matrix is replaced by the nearest orthogonal one, then evened out.

    The orthogonal matrix moves some neurons further than others. Each neuron is divided by the
    root of its mean square over the last updates, so that all move equally far.

    The update has AdamW's usual size, 0.2 per weight (Liu et al. 2025, arXiv:2502.16982, section
    2.2), so that one learning rate serves both optimizers.

    Matrices of equal shape are stacked and computed as one batch. The stack's state is kept as the
    state of its first parameter: "momentum" and "mean_square".

    Like torch's fused AdamW, step() divides the gradients by `grad_scale` and changes nothing if
    `found_inf` is 1. Both are tensors on the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: Tensor | float,
        momentum: float,
        weight_decay: float = 0.0,
    ):
        """groups: of matrices. "stacked" tells how many matrices each holds, one above another.

        For query, key and value it is 3. They are orthogonalized separately.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stacked": 1}
        super().__init__(groups, defaults)
        self.grad_scale = torch.ones(())
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every stack."""
        for group in self.param_groups:
            stacks: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                stacks.setdefault(parameter.shape, []).append(parameter)
            for parameters in stacks.values():
                self._update_stack(parameters, group)

    def _update_stack(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        keep = 1 - self.found_inf  # 0 skips the update: neither momentum nor weights change
        lr = group["lr"]
        # The gradients may be infinite or not a number if the update is skipped.
        g = torch.stack([p.grad for p in parameters if p.grad is not None])  # (n, rows, columns)
        g.div_(self.grad_scale).masked_fill_(self.found_inf > 0, 0.0)
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(g)
        # Older checkpoints keep another shape of the same numbers.
        momentum = state["momentum"].view_as(g)
        momentum.lerp_(g, keep * (1 - group["momentum"]))
        g.lerp_(momentum, group["momentum"])  # Nesterov's look-ahead
        decay = 1 - keep * lr * group["weight_decay"]
        direction = orthogonalize(g.view(-1, g.size(1) // group["stacked"], g.size(2)))
        if "mean_square" not in state:  # the first update, or a run that began without it
            state["mean_square"] = torch.zeros_like(neuron_mean_square(direction))
        scale = neuron_scale(direction, state["mean_square"], keep)
        length = (keep * lr * 0.2 * scale).expand_as(direction).reshape(g.shape)
        direction = direction.reshape(g.shape)
        for i, parameter in enumerate(parameters):
            parameter.mul_(decay).addcmul_(direction[i], length[i], value=-1)


def neuron_scale(direction: Tensor, mean_square: Tensor, keep: Tensor) -> Tensor:
    """Return what each neuron of direction (n, rows, columns) is multiplied by, (n, rows, 1).

    Afterwards the mean square of a matrix is 1. A matrix that is wider than tall is scaled by
    columns: (n, 1, columns).
    mean_square: the running mean of each neuron's mean square; updated in place. It starts at 0,
    which needs no correction: only the neurons' ratios matter.
    """
    now = neuron_mean_square(direction)
    mean_square.lerp_(now, keep * (1 - MEAN_SQUARE_DECAY))
    scale = mean_square.clamp(min=1e-16).rsqrt()
    size = (now * scale.square()).mean(dim=(1, 2), keepdim=True).sqrt()
    return scale / size.clamp(min=1e-8)


def neuron_mean_square(direction: Tensor) -> Tensor:
    """Return the mean square of each row, (n, rows, 1), or of each column if these are more."""
    rows, columns = direction.shape[1:]
    dim = 2 if rows >= columns else 1
    norm = torch.linalg.vector_norm(direction, dim=dim, keepdim=True, dtype=torch.float32)
    return norm.square() / direction.size(dim)


def orthogonalize(g: Tensor) -> Tensor:
    """Return roughly the nearest semi-orthogonal matrix to each of g, (n, rows, columns).

    Newton-Schulz iterations with a quintic polynomial that is steep at 0 (Jordan et al. 2024, who
    make five). After four, singular values over 0.006 of the matrix's norm lie between 0.67 and
    1.21. On a GPU bf16 is precise enough, and is the type of the result.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    tall = g.size(1) > g.size(2)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_ITERATIONS):
        # a x + (b xx + c xx xx) x. Adding a to the small matrix's diagonal saves passes over x.
        xx = x @ x.mT
        polynomial = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = polynomial @ x
    return x.mT if tall else x
