"""Muon: momentum made orthogonal, for the matrices of the layers.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Embeddings, LayerNorms and biases use
AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt12.optimizer import Optimizer


class Muon(Optimizer):
    """Momentum whose update matrix is replaced by the nearest orthogonal one.

    The update has AdamW's usual size, 0.2 sqrt(max(rows, columns)) (Liu et al. 2025,
    arXiv:2502.16982, section 2.2), so that one learning rate serves both optimizers.

    Matrices of equal shape are stacked and computed as one batch. The stack's momentum is kept as
    the state of its first parameter.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        stacked: list[int],
        lr: Tensor,
        momentum: float,
        weight_decay: float,
    ):
        """stacked: for each parameter the number of matrices in it, 3 for c_attn.

        They are orthogonalized separately.
        """
        super().__init__(parameters, lr)
        self.momentum = momentum
        self.weight_decay = weight_decay
        # Parameters of equal shape that hold the same number of matrices.
        self.stacks: dict[tuple[torch.Size, int], list[nn.Parameter]] = {}
        for parameter, count in zip(parameters, stacked):
            self.stacks.setdefault((parameter.shape, count), []).append(parameter)

    @torch.no_grad()
    def step(self, divide_by: Tensor, skip: Tensor) -> None:
        """Update every stack."""
        for (_, parts), parameters in self.stacks.items():
            self._update_stack(parameters, parts, divide_by, skip)

    def _update_stack(
        self, parameters: list[nn.Parameter], parts: int, divide_by: Tensor, skip: Tensor
    ) -> None:
        rows, columns = parameters[0].shape
        gradients = [p.grad for p in parameters if p.grad is not None]
        g = torch.stack(gradients).view(-1, rows // parts, columns)
        g /= divide_by
        g = torch.where(skip > 0, 0.0, g)
        state = self.state.setdefault(parameters[0], {})
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(g)
        # 0 for a skipped update: then the new gradient has no weight and the step no length.
        keep = 1 - skip
        momentum = state["momentum"]
        momentum.lerp_(g, keep * (1 - self.momentum))
        update = orthogonalize(g.lerp(momentum, self.momentum))  # Nesterov's look-ahead
        length = keep * self.lr * 0.2 * max(g.shape[1:]) ** 0.5
        decay = 1 - keep * self.lr * self.weight_decay
        for parameter, direction in zip(parameters, update.view(-1, rows, columns)):
            parameter.mul_(decay).sub_(length * direction)


def orthogonalize(g: Tensor) -> Tensor:
    """Return roughly the nearest semi-orthogonal matrix to each of g, (n, rows, columns).

    Five Newton-Schulz iterations with a quintic polynomial that is steep at 0 (Jordan et al. 2024).
    Singular values end between 0.7 and 1.2. On a GPU bf16 is precise enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    tall = g.size(1) > g.size(2)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = a * x + torch.baddbmm(xx, xx, xx, beta=b, alpha=c) @ x
    if tall:
        x = x.mT
    return x.to(g.dtype)
