"""Save memory by computing activations again in the backward pass (gradient checkpointing).

Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def recompute(layer: Callable[..., Any], what: str, drops: bool, *inputs: Any) -> Any:
    """Return layer(*inputs), which keeps little for the backward pass.

    what: "pointwise" keeps the results of matrix products and of attention, "block" only the
    inputs. drops: whether the layer drops values. It then draws the same random numbers again.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": drops}
    kept = []
    if what == "pointwise":
        aten = torch.ops.aten
        kept += [aten.mm.default, aten.addmm.default, aten.bmm.default]
    # Attention that is kept does not draw its random numbers again. Dropout after it would then
    # draw those in place of its own. Compiled, each dropout has a seed of its own, and attention
    # that is computed again would draw others.
    if drops:
        keep_attention = torch.compiler.is_compiling()
    else:
        keep_attention = what == "pointwise"
    if keep_attention:
        kept += attention_operations()
    if kept:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept)
    return checkpoint(layer, *inputs, **options)


def attention_operations() -> list[Any]:
    """Return the operations that compute attention. torch has only internal names for them."""
    aten = torch.ops.aten
    return [
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
