"""Replace the linear layers of the blocks, for LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from model import GPT, GPTConfig, layer_matrices


def linear_names(config: GPTConfig) -> list[str]:
    """Return the names that a block's linear layers have: c_attn, c_proj and c_fc."""
    names: list[str] = []
    for matrix in layer_matrices(config):
        name = matrix.name.rpartition(".")[2]
        if name not in names:
            names.append(name)
    return names


def replace_linears(
    model: GPT, make: Callable[[nn.Linear], nn.Module], names: Sequence[str] = ()
) -> None:
    """Put make(layer) in the place of each nn.Linear in the blocks. The output head stays.

    names: replace only layers with these names, such as "c_attn"; empty means all. The order of the
    names decides in which order make is called.
    """
    for parent in list(model.transformer.h.modules()):
        children = dict(parent.named_children())
        for name in names or linear_names(model.config):
            child = children.get(name)
            # A layer that was replaced before is no nn.Linear and is left alone.
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child))
