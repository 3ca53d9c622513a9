"""Muon: momentum made orthogonal, for the matrices of the layers.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with the step size of each neuron
adapted as in NorMuon (Li et al. 2025, arXiv:2510.05491). Embeddings, LayerNorms and biases use
AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt12.optimizer import Optimizer
from model import GPT, layer_matrices

NEWTON_SCHULZ_ITERATIONS = 4
MEAN_SQUARE_DECAY = 0.95  # NorMuon's second beta: the mean goes over about 20 updates


def trained_matrices(model: GPT) -> tuple[list[nn.Parameter], list[int]]:
    """Return the layers' matrices that are trained, and how many are stacked in each."""
    matrices: list[nn.Parameter] = []
    stacked: list[int] = []
    for block in model.transformer.h:
        for matrix in layer_matrices(model.config):
            weight = block.get_parameter(f"{matrix.name}.weight")
            if weight.requires_grad:
                matrices.append(weight)
                stacked.append(matrix.stacked)
    return matrices, stacked


class Muon(Optimizer):
    """Momentum whose update matrix is replaced by the nearest orthogonal one, then evened out.

    The orthogonal matrix moves some neurons further than others. Each neuron is divided by the
    root of its mean square over the last updates, so that all move equally far.

    The update has AdamW's usual size, 0.2 per weight (Liu et al. 2025, arXiv:2502.16982, section
    2.2), so that one learning rate serves both optimizers.

    Matrices of equal shape are stacked and computed as one batch. The stack's state is kept as the
    state of its first parameter: "momentum" and "mean_square".
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
        g = stack_gradients(parameters, divide_by, skip)
        g = g.view(-1, rows // parts, columns)  # one matrix after another
        state = self.state.setdefault(parameters[0], {})
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(g)
        # 0 for a skipped update: then the new gradient has no weight and the step no length.
        keep = 1 - skip
        momentum = state["momentum"]
        momentum.lerp_(g, keep * (1 - self.momentum))
        direction = orthogonalize(g.lerp_(momentum, self.momentum))  # Nesterov's look-ahead
        if "mean_square" not in state:  # the first update, or a run that began without it
            state["mean_square"] = torch.zeros_like(neuron_mean_square(direction))
        scale = neuron_scale(direction, state["mean_square"], keep)
        length = (keep * self.lr * 0.2 * scale).expand_as(direction)
        decay = 1 - keep * self.lr * self.weight_decay
        direction = direction.reshape(-1, rows, columns)
        length = length.reshape(-1, rows, columns)
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


def stack_gradients(parameters: list[nn.Parameter], divide_by: Tensor, skip: Tensor) -> Tensor:
    """Return the gradients divided by `divide_by` as one tensor (n, rows, columns); 0 if skipped.

    The gradients may be infinite or not a number if the update is skipped.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    g = gradients[0].new_empty((len(gradients), *gradients[0].shape))
    for divided, gradient in zip(g, gradients):
        torch.div(gradient, divide_by, out=divided)
    return g.masked_fill_(skip > 0, 0.0)


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
