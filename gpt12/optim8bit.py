"""AdamW with 8-bit state, through torchao, which is optional (Dettmers et al. 2021).

Weights are bfloat16 without a float32 copy: torchao rounds the updated weight up or down at random,
so that small updates are not lost. Weights, gradients and state together take 6 bytes per parameter
instead of 16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpt12.errors import UserError
from gpt12.optimizer import Optimizer, divide_gradients


class AdamW8bit(Optimizer):
    """torchao's AdamW8bit behind the interface of gpt12/optimizer.py."""

    def __init__(self, groups: list[dict[str, Any]], lr: Tensor, betas: tuple[float, float]):
        """groups: dictionaries with "params" and "weight_decay"."""
        try:
            from torchao.optim import AdamW8bit as TorchaoAdamW8bit
        except ImportError:
            raise UserError("optimizer=adamw8bit needs torchao: pip install torchao") from None
        parameters: list[nn.Parameter] = []
        for group in groups:
            parameters += group["params"]
        super().__init__(parameters, lr)
        self.inner = TorchaoAdamW8bit(groups, lr=lr, betas=betas, bf16_stochastic_round=True)
        self.state = self.inner.state

    def step(self, divide_by: Tensor, skip: Tensor) -> None:
        """Update. A skipped update leaves the weights, but decays the moments."""
        divide_gradients(self.parameters, divide_by, skip)
        self.lr.mul_(1 - skip)  # the training step sets it anew before the next update
        self.inner.step()


def is_8bit(value: Any) -> bool:
    """Tell whether a state is torchao's 8-bit tensor subclass, made of several tensors."""
    return hasattr(value, "__tensor_flatten__")


def parts(value: Any) -> dict[str, Tensor]:
    """Return the tensors that an 8-bit tensor consists of: codes, scale and table."""
    names = value.__tensor_flatten__()[0]
    return {name: getattr(value, name) for name in names}


def assemble_states(state: dict[Tensor, dict[str, Any]]) -> None:
    """Turn the parts that were read from a checkpoint back into 8-bit tensors, in place."""
    for parameter, values in state.items():
        for key, value in values.items():
            if isinstance(value, dict):
                values[key] = _assemble(value, signed=key == "exp_avg", like=parameter)


def _assemble(tensors: dict[str, Tensor], signed: bool, like: Tensor) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    attributes = [signed, like.dtype]
    return OptimState8bit.__tensor_unflatten__(tensors, attributes, like.shape, like.stride())
