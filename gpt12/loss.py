"""The output head and cross-entropy in one function that never holds all logits in memory.

Logits are the largest tensor of a training step: B x T x V numbers, 0.8 GB in bf16 for 8,192 tokens
of GPT-2. Here they exist only in chunks of rows, and each chunk is turned into its own gradient in
place.

Shapes: N = B * T rows, C channels, V padded vocabulary, n rows of one chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # Triton comes with torch's CUDA builds
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Marks a position which is not a training target. It is nanoGPT's value; torch's default is -100.
# data/windows.py, which knows no loss, names it NOT_TRAINED.
IGNORE_INDEX = -1
CHUNK_ROWS = 4096  # rows of logits in memory at a time: 0.4 GB in bf16 at GPT-2's vocabulary


def plain_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Compute what linear_cross_entropy computes by default, with all logits in memory.

    Only tests call it: it says in three lines what the rest of this file does.
    """
    logits = (x @ weight.t())[..., :vocab_size]  # (B, T, vocab_size)
    logits = logits.flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    divisor: Tensor | float | None = None,
    batch_targets: int | None = None,
    fused: bool = False,
) -> Tensor:
    """Compute the cross-entropy of the logits x @ weight.T, summed and divided by `divisor`.

    x: (B, T, C) in the dtype of matrix products. weight: (V, C). targets: (B, T) ids below
    vocab_size, or IGNORE_INDEX.
    divisor: by default the number of targets that are not ignored here. In training it is N / world
    for the N targets of all micro-batches and ranks (TrainStep.set_divisor in train.py).
    batch_targets: the number of targets here that are not ignored, if the caller knows it. It only
    saves work: most ignored rows are then not multiplied with the weight.
    fused: use the Triton kernel (GPU only).
    Returns a scalar in float32.
    """
    x = x.view(-1, x.size(-1))  # (N, C)
    targets = targets.reshape(-1)  # (N,)
    if divisor is None:
        divisor = (targets != IGNORE_INDEX).sum().clamp(min=1)
    if batch_targets is not None and batch_targets < len(targets):
        x, targets = _drop_ignored_rows(x, targets, batch_targets)
    if not torch.is_grad_enabled():
        # An autograd.Function sees whether its inputs require a gradient, but not that no_grad is
        # on.
        x = x.detach()
        weight = weight.detach()
    total = LinearCrossEntropy.apply(x, weight, targets, vocab_size, fused)
    return total / divisor


def _drop_ignored_rows(x: Tensor, targets: Tensor, batch_targets: int) -> tuple[Tensor, Tensor]:
    """Move the rows with a target to the front and cut off most of the others.

    The sort needs no answer from the GPU, so the host does not wait. The number of rows is rounded
    up to a multiple of 1,024, so that there are few different shapes. Ignored rows among them add
    nothing.
    """
    order = (targets == IGNORE_INDEX).argsort(stable=True)  # False comes before True
    rounded = (batch_targets + 1023) // 1024 * 1024
    kept = order[: min(len(targets), rounded)]
    return x[kept], targets[kept]


class LinearCrossEntropy(torch.autograd.Function):
    """The summed loss, with its gradients computed in the forward pass while the logits exist.

    The backward pass only scales them. The loss and the weight's gradient are summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, fused: bool
    ) -> Tensor:
        """x: (N, C); weight: (V, C); targets: (N,)."""
        w = weight.to(x.dtype)
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if needs_dx else None
        dw = torch.zeros(w.shape, device=w.device) if needs_dw else None  # float32
        buffer = x.new_empty(min(len(x), CHUNK_ROWS), len(w))  # (n, V), shared by all chunks
        turn_into_gradient = (
            fused_loss_and_gradient_in_place if fused else loss_and_gradient_in_place
        )
        for start in range(0, len(x), CHUNK_ROWS):
            rows = slice(start, min(start + CHUNK_ROWS, len(x)))
            logits = torch.mm(x[rows], w.t(), out=buffer[: rows.stop - rows.start])  # (n, V)
            loss += turn_into_gradient(logits, targets[rows], vocab_size)
            dlogits = logits  # changed in place
            if dx is not None:
                torch.mm(dlogits, w, out=dx[rows])
            if dw is not None:
                add_product(dw, dlogits.t(), x[rows])
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Scale the saved gradients by `grad`, a scalar, in place: they are used only once."""
        dx, dw = ctx.saved_tensors
        if dx is not None:
            for start in range(0, len(dx), CHUNK_ROWS):
                chunk = dx[start : start + CHUNK_ROWS]
                # torch rounds a scalar factor to the tensor's dtype. In bf16 that would change
                # every gradient below the head by up to 0.4%, so the product is computed in
                # float32.
                torch.mul(chunk.float(), grad, out=chunk)
        if dw is not None:
            dw.mul_(grad)
        return dx, dw, None, None, None


def loss_and_gradient_in_place(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the summed cross-entropy of one chunk and replace the logits by their gradient.

    logits: (n, V), overwritten. targets: (n,) ids below vocab_size, or IGNORE_INDEX.
    The gradient of a row is softmax(logits) - onehot(target). Columns from vocab_size on are
    padding and take no part.
    """
    logits[:, vocab_size:] = -math.inf  # a padding logit of 0 would count as exp(0)
    ignored = (targets == IGNORE_INDEX)[:, None]  # (n, 1)
    target = targets.clamp(min=0)[:, None]  # (n, 1); ignored rows get any legal index here
    # To save memory, the lines below change one float32 tensor (n, V) in place.
    shifted = logits.float()
    shifted -= shifted.amax(dim=1, keepdim=True)
    target_logit = shifted.gather(1, target)
    exponentials = shifted.exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    probs = exponentials.div_(total)  # softmax
    gradient = probs.scatter_(1, target, probs.gather(1, target) - 1)
    logits.copy_(gradient.masked_fill_(ignored, 0.0))  # an ignored row has no gradient
    losses = total.log() - target_logit
    return losses.masked_fill_(ignored, 0.0).sum()


def fused_loss_and_gradient_in_place(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Do what loss_and_gradient_in_place does, in one Triton kernel."""
    n, V = logits.shape
    losses = torch.empty(n, device=logits.device)
    # Larger blocks need more registers than there are; smaller ones wait for memory.
    _cross_entropy_row[(n,)](logits, targets, losses, vocab_size, V, BLOCK=4096, num_warps=8)
    return losses.sum()


if triton is not None:

    @triton.jit
    # Triton reads annotations as types of its own, so the parameters have none.
    def _cross_entropy_row(  # type: ignore[no-untyped-def]  # noqa: ANN202
        logits,  # noqa: ANN001
        targets,  # noqa: ANN001
        losses,  # noqa: ANN001
        vocab_size,  # noqa: ANN001
        V,  # noqa: ANN001
        BLOCK: tl.constexpr,
    ):
        """Compute loss and gradient of one row; each program works on one row.

        The first loop is an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867,
        algorithm 3). The second writes the gradient; it finds the row in the L2 cache, so memory is
        read once and written once.
        """
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        logits += row * V
        # Read before the second loop overwrites it: the sums below make all threads wait.
        target_logit = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
        largest = -float("inf")
        total = 0.0
        for start in range(0, vocab_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocab_size
            x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
            new_largest = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), 0)
            largest = new_largest
        log_total = largest + tl.log(total)
        tl.store(losses + row, tl.where(target >= 0, log_total - target_logit, 0.0))
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocab_size
            x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - log_total) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(target >= 0, gradient, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < V)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which is float32.

    On a GPU the product of bf16 matrices is not rounded to bf16 before it is added.
    """
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
