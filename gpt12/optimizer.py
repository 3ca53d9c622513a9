"""The optimizers that --optimizer can name, and how train.py updates the weights with them.

Each is a torch.optim.Optimizer. To add one, add an entry to OPTIMIZERS, for example:

    "sgd": Entry(lambda groups, lr, betas: [SGD(groups, lr, momentum=betas[0])])

The groups are those of train.py: "params", "weight_decay", and "stacked" for the matrices of the
blocks. A checkpoint saves the tensors in the optimizer's `state` by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gpt12.errors import UserError
from gpt12.muon import Muon

Groups = list[dict[str, Any]]
Betas = tuple[float, float]  # beta1 and beta2


@dataclass(frozen=True)
class Entry:
    """How an optimizer is built, and who clips and skips.

    on_device=False: any optimizer. update_all clips and skips, on the host: it divides the
    gradients before step(), or does not call it, and waits for the device to know which. The rate
    is a float.
    on_device=True: step() clips and skips, and the host never waits. step() divides the gradients
    by the tensor in its attribute `grad_scale`, changes nothing if the tensor `found_inf` is 1, and
    takes its rate from one float32 tensor. The names are those of torch's fused AdamW.
    recordable: step() asks the device for nothing, so that a CUDA graph can hold it.

    The first step() must make all state: a resumed run makes a step of rate 0 before it loads it.
    """

    build: Callable[[Groups, Tensor | float, Betas], list[Optimizer]]
    on_device: bool = False
    recordable: bool = False


def adamw(groups: Groups, lr: Tensor | float, betas: Betas) -> list[Optimizer]:
    """Return AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2) as one kernel."""
    device = groups[0]["params"][0].device
    # Apple's fused kernel ignores grad_scale and found_inf.
    fused = device.type != "mps"
    # The step counts lie on the GPU, as a CUDA graph needs.
    capturable = device.type == "cuda"
    return [AdamW(groups, lr, betas, fused=fused, capturable=capturable)]


def muon(groups: Groups, lr: Tensor | float, betas: Betas) -> list[Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = [group for group in groups if "stacked" in group]
    rest = [group for group in groups if "stacked" not in group]
    if not matrices:  # with LoRA they are frozen
        return adamw(rest, lr, betas)
    return [Muon(matrices, lr, momentum=betas[0]), *adamw(rest, lr, betas)]


def adamw8bit(groups: Groups, lr: Tensor | float, betas: Betas) -> list[Optimizer]:
    """Return torchao's AdamW with 8-bit state (Dettmers et al. 2021). torchao is optional.

    Weights are bfloat16 without a float32 copy: torchao rounds the updated weight up or down at
    random, so that small updates are not lost. Weights, gradients and state together take 6 bytes
    per parameter instead of 16.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("optimizer=adamw8bit needs torchao: pip install torchao") from None
    return [AdamW8bit(groups, lr=lr, betas=betas, bf16_stochastic_round=True)]


# --optimizer takes these names. They are listed nowhere else.
OPTIMIZERS = {
    "adamw": Entry(adamw, on_device=True, recordable=True),
    "muon": Entry(muon, on_device=True, recordable=True),
    "adamw8bit": Entry(adamw8bit),
}


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    """Set the rate of the next update."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def update_all(
    optimizers: list[Optimizer],
    gradients: list[Tensor],
    divide_by: Tensor,
    skip: Tensor,
    on_device: bool,
) -> None:
    """Update the weights with the gradients divided by `divide_by`; if `skip` is 1, change nothing.

    on_device: as in Entry.
    """
    if not on_device:
        if skip > 0:  # waits for the device
            return
        divisor = divide_by.item()
        for gradient in gradients:
            gradient.div_(divisor)
    for optimizer in optimizers:
        if on_device:
            # It divides as it reads the gradients: clipping costs no pass.
            optimizer.grad_scale = divide_by  # type: ignore[attr-defined]
            optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
