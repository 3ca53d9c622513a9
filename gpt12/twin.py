"""Tell what model.py computes: whether it is GPT-2, and a fingerprint of it.

Whoever changes model.py gets another model, perhaps with the same names and shapes. Names do not
show that, results do. Both answers come from the logits of small twins: models of the same code and
configuration, but with few ids, narrow heads and, in one of them, few layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, GPTConfig

HEAD_SIZE = 8
VOCAB_SIZE = 64
TOLERANCE = 1e-4  # of the largest logit
FINGERPRINT_LOGITS = 24  # of each twin
# Machines round differently, by 1e-6. The exact GELU in place of GPT-2's changes logits by 1e-4.
FINGERPRINT_TOLERANCE = 2e-5
OLD_FINGERPRINTS = (48, 16)  # so many numbers at the start are those of earlier versions


@torch.no_grad()
def make_twin(config: GPTConfig, n_layer: int = 2) -> GPT:
    """Return a small model of the same kind in float32 on the CPU, always with the same parameters.

    Every parameter is drawn anew: zeros would hide what they are multiplied with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what GPT(...) draws
        twin = GPT(small_config(config, n_layer)).float().eval()
        torch.manual_seed(0)  # whatever GPT(...) has drawn
        for parameter in twin.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter.size(-1) ** 0.5)
            else:
                parameter.add_(0.2 * noise)  # a gain stays near 1, a bias near 0
    return twin


def small_config(config: GPTConfig, n_layer: int = 2) -> GPTConfig:
    """Return the configuration of a model's twin with at most so many layers."""
    return replace(
        config,
        n_layer=min(config.n_layer, n_layer),
        n_embd=HEAD_SIZE * config.n_head,
        vocab_size=VOCAB_SIZE,
        dropout=0.0,
    )


def sample_ids(length: int) -> Tensor:
    """Return one row of ids for a twin, (1, length), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB_SIZE, (1, length), generator=generator)


def twins(config: GPTConfig) -> Iterator[tuple[GPT, Tensor]]:
    """Yield two small models and the ids that each is given, (1, T).

    One has two layers and reads the whole context: it shows what depends on the distance of tokens.
    One has all layers and reads few tokens.
    """
    yield make_twin(config), sample_ids(config.block_size)
    yield make_twin(config, config.n_layer), sample_ids(min(config.block_size, 64))


def is_gpt2(config: GPTConfig) -> bool:
    """Tell whether model.py computes GPT-2 with this configuration, over its whole context."""
    return examine(config)[0]


def fingerprint(config: GPTConfig) -> list[float]:
    """Return some logits of the twins at the end of what they read, and their losses.

    They differ as soon as model.py computes something else. Dropout and the vocabulary take no
    part.
    """
    return examine(config)[1]


@functools.lru_cache
@torch.no_grad()
def examine(config: GPTConfig) -> tuple[bool, list[float]]:
    """Run the twins once, and return whether both compute GPT-2, and their fingerprint."""
    all_gpt2 = True
    logits_at_end: list[float] = []
    losses: list[float] = []
    for twin, idx in twins(config):
        logits = twin(idx)[0]
        all_gpt2 = all_gpt2 and _has_gpt2_logits(twin, idx, logits)
        logits_at_end += logits[0, -1, :FINGERPRINT_LOGITS].tolist()
        losses.append(twin(idx, targets=idx)[1].item())
    return all_gpt2, logits_at_end + losses


def _has_gpt2_logits(twin: GPT, idx: Tensor, logits: Tensor) -> bool:
    state = twin.state_dict()
    if len(set(twin.parameters())) < len(state) - 1:
        return False  # more is tied than the embedding and the head
    try:
        expected = gpt2_logits(state, twin.config.n_head, idx)
    except (KeyError, RuntimeError):  # a tensor is missing or has another shape
        return False
    return bool((logits - expected).abs().max() <= TOLERANCE * expected.abs().max())


def has_fingerprint(config: GPTConfig, saved: list[float]) -> bool:
    """Tell whether model.py still has a fingerprint that was saved."""
    now = fingerprint(config)
    for count in (len(now), *OLD_FINGERPRINTS):
        if count <= len(saved):
            difference = max(abs(a - b) for a, b in zip(now[:count], saved))
            return difference <= FINGERPRINT_TOLERANCE * max(map(abs, now))
    return False


def unread_fields(config: GPTConfig) -> set[str]:
    """Return the fields of GPTConfig that model.py reads neither to build a model nor to run it."""
    read: set[str] = set()
    kind: Any = type(config)

    class Recorded(kind):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    with torch.random.fork_rng(devices=[]):
        twin = GPT(Recorded(**asdict(small_config(config))))
        idx = sample_ids(min(8, config.block_size))
        twin(idx, targets=idx)
    return {field.name for field in fields(kind)} - read


def gpt2_logits(state: dict[str, Tensor], n_head: int, idx: Tensor) -> Tensor:
    """Compute GPT-2's logits (B, T, V) from its tensors, step by step as in the paper.

    Radford et al. 2019, section 2.3; Vaswani et al. 2017. It is written apart from model.py and
    shares no code with it. state: the tensors of model.py's GPT, biases optional.
    Raises KeyError for a tensor that GPT-2 does not have, or that is missing.
    """
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    B, T = idx.shape

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None))

    def layer_norm(x: Tensor, name: str) -> Tensor:
        gain = tensors.pop(f"{name}.weight")
        return F.layer_norm(x, gain.shape, gain, tensors.pop(f"{name}.bias", None), eps=1e-5)

    def heads(x: Tensor) -> Tensor:
        return x.view(B, T, n_head, -1).transpose(1, 2)  # (B, H, T, D)

    head = tensors.pop("wte.weight")
    if not torch.equal(tensors.pop("lm_head.weight"), head):
        raise KeyError("the head is not tied")
    x = head[idx] + tensors.pop("wpe.weight")[:T]  # (B, T, C)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    layer = 0
    while f"h.{layer}.ln_1.weight" in tensors:
        name = f"h.{layer}"
        q, k, v = linear(layer_norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, dim=-1)
        scores = heads(q) @ heads(k).mT / (x.size(-1) / n_head) ** 0.5  # (B, H, T, T)
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        y = (weights @ heads(v)).transpose(1, 2).reshape(x.shape)
        x = x + linear(y, f"{name}.attn.c_proj")
        hidden = linear(layer_norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        x = x + linear(F.gelu(hidden, approximate="tanh"), f"{name}.mlp.c_proj")
        layer += 1
    x = layer_norm(x, "ln_f")
    if tensors:
        raise KeyError(f"GPT-2 has no {next(iter(tensors))}")
    return F.linear(x, head)
