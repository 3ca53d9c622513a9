"""8-bit weights for sampling and evaluation: one scale for each row of a weight matrix.

A decoding step reads every weight once and waits for memory, so half the bytes take half the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt12.linears import replace_linears
from model import GPT, compute_dtype


class Int8Linear(nn.Module):
    """Compute (x Q^T) s + b, where Q holds the weight as int8 and s one scale for each output."""

    int8_weight: Tensor
    scale: Tensor

    def __init__(self, base: nn.Linear):
        super().__init__()
        largest = base.weight.abs().amax(dim=1).clamp(min=1e-8)  # (out,)
        scale = largest / 127
        int8_weight = (base.weight / scale[:, None]).round().to(torch.int8)
        self.register_buffer("int8_weight", int8_weight)  # (out, in)
        self.register_buffer("scale", scale)  # (out,)
        self.bias = base.bias

    @property
    def weight(self) -> Tensor:
        """Compute the weight (out, in) that the int8 values stand for."""
        return self.int8_weight * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        # The scales are applied to the result, which has fewer numbers than the weight.
        y = F.linear(x.to(dtype), self.int8_weight.to(dtype)) * self.scale.to(dtype)
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y


@torch.no_grad()
def quantize(model: GPT) -> None:
    """Turn the linear layers of the blocks and the output head into 8-bit weights, in place.

    The token embedding keeps its precision. The model cannot be trained or saved afterwards.
    """
    model.requires_grad_(False)
    replace_linears(model, Int8Linear)
    model.lm_head = Int8Linear(model.lm_head)  # type: ignore[assignment]
