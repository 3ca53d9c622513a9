"""What a training step and a checkpoint expect of an optimizer.

There are three: AdamW in train.py, Muon in gpt12/muon.py, and AdamW with 8-bit state in
gpt12/optim8bit.py. They are not subclasses of torch.optim.Optimizer, because its constructor
imports torch's compiler, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Optimizer:
    """Base class of the optimizers. A subclass implements `step`.

    parameters: what this optimizer updates.
    lr: the learning rate as a tensor of one number on the device. All optimizers of a run share it:
        a recorded CUDA graph reads the new value from it.
    state: for each parameter its tensors by name, for example {"exp_avg": ...}. The checkpoint
        saves exactly these, so every value has to be a tensor (or torchao's 8-bit tensor, which
        gpt12/optim8bit.py takes apart). An optimizer that computes several parameters as one stack
        keeps the stack's state under its first parameter, as Muon does.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: Tensor):
        self.parameters = parameters
        self.lr = lr
        self.state: dict[Tensor, dict[str, Any]] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the parameters in the form that torch's GradScaler asks for."""
        return [{"params": self.parameters}]

    def step(self, divide_by: Tensor, skip: Tensor) -> None:
        """Update the parameters from their gradients.

        divide_by: a number by which all gradients are divided first (clipping).
        skip: 1.0 if the parameters and the state must stay as they are, because a gradient is not
        finite; else 0.0. (AdamW8bit keeps its parameters only: torchao's moments still decay.)
        Both are tensors on the device, so that nothing waits for it.
        """
        raise NotImplementedError


def divide_gradients(parameters: list[nn.Parameter], divide_by: Tensor, skip: Tensor) -> None:
    """Divide the gradients in place, and set them to zero if the update is skipped.

    For optimizers that cannot divide while they read the gradients. Zeros alone do not skip an
    update: momentum and weight decay still act. So the caller makes the step itself 0, too.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            divided = parameter.grad / divide_by
            parameter.grad.copy_(torch.where(skip > 0, 0.0, divided))
