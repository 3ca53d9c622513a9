"""AdamW with 8-bit state, through torchao, which is optional (Dettmers et al. 2021).

Weights are bfloat16 without a float32 copy: torchao rounds the updated weight up or down at random,
so that small updates are not lost. Weights, gradients and state together take 6 bytes per parameter
instead of 16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gpt12.errors import UserError


def adamw8bit(
    groups: list[dict[str, Any]], lr: Tensor | float, betas: tuple[float, float]
) -> list[Optimizer]:
    """Return torchao's AdamW8bit."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("optimizer=adamw8bit needs torchao: pip install torchao") from None
    return [AdamW8bit(groups, lr=lr, betas=betas, bf16_stochastic_round=True)]


def is_8bit(value: Any) -> bool:
    """Tell whether a state is torchao's 8-bit tensor subclass, made of several tensors."""
    return hasattr(value, "__tensor_flatten__")


def parts(value: Any) -> dict[str, Tensor]:
    """Return the tensors that an 8-bit tensor consists of: codes, scale and table."""
    names = value.__tensor_flatten__()[0]
    return {name: getattr(value, name) for name in names}
