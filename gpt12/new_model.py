"""Build a model and draw each weight at most once.

torch's layers draw random weights of their own when they are built. For 124M parameters this takes
seconds, and nobody uses these numbers: init_weights draws GPT-2's, or a file holds the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig


def new_model(config: GPTConfig) -> GPT:
    """Return a model with GPT-2's random weights."""
    model = uninitialized_model(config)
    model.init_weights()
    return model


def uninitialized_model(config: GPTConfig) -> GPT:
    """Return a model whose matrices hold whatever was in memory, for weights that are loaded."""
    with _SkipRandomInit():
        return GPT(config)


class _SkipRandomInit(TorchFunctionMode):
    """Let torch's functions that draw weights do nothing.

    The meta device would do it, too, but importing what that needs takes as long as drawing.
    """

    random_inits = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.random_inits:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
