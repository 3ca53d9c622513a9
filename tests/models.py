"""Models and comparisons that several test files share."""

import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt12.loss import IGNORE_INDEX
from model import GPT, GPTConfig

SHAPE = {"vocab_size": 97, "n_layer": 3, "n_head": 4, "n_embd": 48}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest error of a, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def largest_error(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the largest of the tensors' relative errors; NaN if one of them is."""
    return torch.tensor([relative(a, b) for a, b in zip(ours, theirs, strict=True)]).max()


def random_transformers_model() -> Any:
    """A random GPT-2 in which every tensor matters: no bias is 0 and no norm is 1."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_positions=32, bos_token_id=0, eos_token_id=0, **SHAPE)  # type: ignore[arg-type]
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 32 tokens for SHAPE and their targets, 16 of which are ignored."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, SHAPE["vocab_size"], (2, 3, 32), generator=generator)
    y[0, 5:20] = IGNORE_INDEX
    y[2, 31] = IGNORE_INDEX
    return x, y


# The lengths of the examples in each of three packed rows of 32 tokens.
PACKED = ((5, 15, 12), (32,), (1, 15, 16))


def starts_of(rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Return the example starts (B, T) of rows whose examples have the given lengths."""
    starts = []
    for lengths in rows:
        row: list[int] = []
        for length in lengths:
            row += [len(row)] * length
        starts.append(row)
    return torch.tensor(starts)


def small_model(dropout: float = 0.0) -> GPT:
    """A random model of two layers and 13 tokens (64 with padding)."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(8, 13, 2, 2, 8, dropout, bias=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def save_nanogpt(file: Path, model: GPT, vocab_size: int, dataset: str | None = None) -> None:
    """Write a model as nanoGPT's train.py does, which has no tokenizer."""
    state = {}
    for name, tensor in model.state_dict().items():
        has_padding = name.endswith(("wte.weight", "lm_head.weight"))
        state[name] = tensor[:vocab_size].clone() if has_padding else tensor
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias")
    arguments = {key: getattr(model.config, key) for key in keys}
    arguments["vocab_size"] = vocab_size
    content = {"model": state, "model_args": arguments, "config": {}}
    if dataset is not None:
        content["config"] = {"dataset": dataset}
    torch.save(content, file)


# --------------------------------------------------------------------------------------------------
# Changing model.py


def extend(
    monkeypatch: pytest.MonkeyPatch, owner: type, change: Callable, method: str = "__init__"
) -> None:
    """Let change(self) run after a method of a class of model.py."""
    original = getattr(owner, method)

    def extended(self, *args, **kwargs):
        original(self, *args, **kwargs)
        change(self)

    monkeypatch.setattr(owner, method, extended)


def use_function(monkeypatch: pytest.MonkeyPatch, **functions: Callable) -> None:
    """Replace functions of torch.nn.functional in model.py alone."""
    changed = types.SimpleNamespace(**vars(torch.nn.functional) | functions)
    monkeypatch.setattr("model.F", changed)


def use_window(monkeypatch: pytest.MonkeyPatch, size: int = 5) -> None:
    """Let a token see the last tokens alone, but not where the cache is used."""

    def near(q, k, v, attn_mask=None, is_causal=False, **options):
        if is_causal:
            T = q.size(2)
            attn_mask = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - size)
        return attention(q, k, v, attn_mask=attn_mask, **options)

    attention = torch.nn.functional.scaled_dot_product_attention
    use_function(monkeypatch, scaled_dot_product_attention=near)


def use_exact_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change what is computed from the same parameters."""
    use_function(monkeypatch, gelu=lambda x, approximate: torch.nn.functional.gelu(x))
