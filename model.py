"""The GPT-2 transformer: one layer, the whole model, and counts of its size and work.

Shapes are noted at the line with these letters:
    B batch   T time (tokens in a row)   C channels (n_embd)   H heads   D = C / H (head size)
    V vocabulary, padded   S slots of the key/value cache

What is not here: reading and writing weights (from_pretrained, save_pretrained) is in
gpt12/weights.py, writing text (generate) in gpt12/generate.py, LoRA in gpt12/lora.py, the loss in
gpt12/loss.py.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3
(the architecture); Vaswani et al. 2017, "Attention Is All You Need" (attention); Hendrycks and
Gimpel 2016 (GELU).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt12.errors import UserError
from gpt12.loss import linear_cross_entropy
from gpt12.recompute import recompute


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The defaults are GPT-2 small (124M parameters)."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # the tokenizer's own size; padding exists only in memory
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2

    @property
    def padded_vocab_size(self) -> int:
        """V: vocab_size rounded up to a multiple of 64, because matrix products are faster then."""
        return (self.vocab_size + 63) // 64 * 64


class Shared(NamedTuple):
    """What all layers of one forward pass share. Whatever else a layer needs can be added here.

    A layer only reads it: with recompute a layer runs twice.
    """

    # (B, T), counted from the start of the text or example; (1, T) if equal for all rows.
    position: Tensor
    # (B, 1, T, S), added to the attention scores: 0 where a token sees another one, else -inf.
    # None: each token sees itself and all before it.
    mask: Tensor | None
    # What layers keep of earlier tokens while text is written: KVCache in gpt12/generate.py. Each
    # layer gives what is to be kept of the new tokens, (B, T, ...), and gets all, (B, S, ...).
    cache: Any


class LayerNorm(nn.LayerNorm):
    """Normalize each token's channels and keep the input's dtype (Ba et al. 2016).

    Under autocast torch computes LayerNorm in float32 and would also return float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class StackedLinear(nn.Linear):
    """Several equally large linear layers that read the same input, computed as one product.

    Muon updates the matrix of each by itself.
    """

    def __init__(self, inputs: int, outputs: int, layers: int, bias: bool):
        super().__init__(inputs, layers * outputs, bias=bias)
        self.layers = layers


class CausalSelfAttention(nn.Module):
    """Multi-head attention: each token reads from itself and from earlier tokens.

    Vaswani et al. 2017, sections 3.2.1 and 3.2.2.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        C = config.n_embd
        self.c_attn = StackedLinear(C, C, layers=3, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.unbind(dim=2)  # each (B, T, H, D)
        if shared.cache is not None:
            # One call stores both, because each call costs a kernel. If you change k or v above,
            # store torch.stack((k, v), dim=2).
            kv = shared.cache.extend(qkv[:, :, 1:])  # (B, S, 2, H, D)
            k, v = kv.unbind(dim=2)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),  # (B, H, T, D)
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=shared.mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=shared.mask is None,
        )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # put the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with GPT-2's GELU between them; the inside is four times as wide."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")
        x = self.c_proj(x)  # (B, T, C)
        return self.dropout(x)


class Block(nn.Module):
    """One layer: attention, then the MLP.

    Each reads a normalized copy of the residual stream and adds its result to the stream.

    `recompute` is what the backward pass computes again instead of keeping it in memory:
        "none"       keep everything
        "pointwise"  compute GELU and LayerNorm again, which costs no matrix product
        "block"      keep only the layer's input and compute everything again
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.recompute = "none"

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.layer(x, shared)
        drops = self.training and self.has_dropout()
        return recompute(self.layer, self.recompute, drops, x, shared)

    def has_dropout(self) -> bool:
        """Tell whether anything in this layer drops values."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    def layer(self, x: Tensor, shared: Shared) -> Tensor:
        x = x + self.attn(self.ln_1(x), shared)  # (B, T, C)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Everything below the output head, with the module names of GPT-2's published checkpoint."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.block_size = config.block_size
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # token embedding
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embedding
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)

    def sees(self, query: Tensor, key: Tensor, example: Tensor | None = None) -> Tensor:
        """Decide which tokens see which, in training and in decoding: (B, T, S) bool.

        query, key: the positions of those who see, (B, T), and of those who are seen, (B, S). 1
            stands for B if they are equal for all rows.
        example: (B, T), a number for each token's example, if rows hold several examples; queries
        and keys are then the same tokens.
        """
        seen = key[:, None, :] <= query[:, :, None]
        if example is not None:
            seen = seen & (example[:, None, :] == example[:, :, None])
        return seen

    @functools.cached_property
    def is_causal(self) -> bool:
        """Tell whether sees() says that each token sees itself and all before it.

        Attention has this built in, and is faster with it than with a mask.
        """
        position = torch.arange(self.block_size, device="cpu")[None]
        seen = self.sees(position, position)[0]
        return torch.equal(seen, torch.ones_like(seen).tril())

    def forward(
        self,
        idx: Tensor,
        cache: Any = None,
        example_starts: Tensor | None = None,
        context_length: int | None = None,
    ) -> Tensor:
        """Turn token ids (B, T) into the normalized output of the last layer (B, T, C).

        cache: keys and values of earlier tokens, for decoding; the new ones are added to it.
        example_starts: (B, T) int64, for sequences that hold several examples: for each token, the
        index at which its example starts. A token then reads from its own example only, and its
        position counts from that index.

        context_length: cut the sequences into parts of this many tokens. A token then reads from
        its own part only; its position still counts from the start of the sequence or example.
        """
        B, T = idx.shape
        if cache is not None:
            position = cache.take_positions(T)  # (B, T): each row continues at its own length
        elif T <= self.block_size:
            position = torch.arange(T, device=idx.device)[None]  # (1, T)
        else:
            raise UserError(f"{T} tokens do not fit into block_size={self.block_size}")
        if example_starts is not None:
            position = position - example_starts  # (B, T)
        x = self.wte(idx) + self.wpe(position)  # (B, T, C)
        x = self.drop(x)
        # Keep the residual stream in autocast's dtype, not in the embedding's float32: half the
        # memory.
        x = x.to(compute_dtype(x))
        if context_length is not None:  # more and shorter sequences
            x = x.view(-1, context_length, x.size(-1))
            position = position.expand(B, T).reshape(x.shape[:2])
            if example_starts is not None:
                example_starts = example_starts.view(x.shape[:2])
        mask = None
        if cache is not None or example_starts is not None or not self.is_causal:
            key = position if cache is None else cache.slots
            seen = self.sees(position, key, example_starts)[:, None]  # (B, 1, T, S)
            # All layers share this mask of floats. Every layer would turn a boolean mask into one
            # of its own and keep it for the backward pass.
            mask = torch.full_like(seen, -torch.inf, dtype=x.dtype).masked_fill_(seen, 0)
        shared = Shared(position, mask, cache)
        for block in self.h:
            x = block(x, shared)
        return self.ln_f(x.view(B, T, -1))


class GPT(nn.Module):
    """GPT-2: the transformer and an output head whose weights are the token embedding's."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise UserError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        with NothingDrawn():  # init_weights draws all that is drawn
            self.transformer = Transformer(config)
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # Tied weights: Press and Wolf 2017, arXiv:1608.05859.
        self.lm_head.weight = self.transformer.wte.weight
        self.fused_loss = False  # use the loss's Triton kernel, on GPUs that have Triton
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights with standard deviation 0.02, zero the biases (Radford et al. 2018, GPT).

        What needs a random first value gets it here; what a layer draws for itself does not count.
        In layers that write into the residual stream std is divided by sqrt(2 n_layer), because
        2 n_layer of them add up there (Radford et al. 2019, GPT-2, section 2.3).
        """
        for name, module in self.named_modules():
            if module is self.lm_head:
                continue  # the same tensor as wte
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 0.02
                if name.endswith("c_proj"):
                    std *= (2 * self.config.n_layer) ** -0.5
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Padding rows are never trained and never sampled. As zeros they can be left out on disk.
        self.lm_head.weight[self.config.vocab_size :].zero_()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        example_starts: Tensor | None = None,
        divisor: Tensor | float | None = None,
        batch_targets: int | None = None,
        context_length: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the logits, or the loss if targets are given.

        idx: (B, T) token ids.
        targets: (B, T), the next token of each position; IGNORE_INDEX (-1) where it is not trained.
        example_starts: see Transformer.forward.
        divisor: what the summed loss is divided by. The default is the number of targets, which
            gives the mean in nats per token. In training it is N / world for the N targets of
            all micro-batches and ranks.
        batch_targets: the number of targets that are not ignored, if the caller knows it. It saves
            computing the head for ignored positions.
        context_length: see Transformer.forward.
        Returns (logits (B, T, vocab_size), None) or (None, loss), the loss a scalar in float32.
        """
        x = self.transformer(
            idx, example_starts=example_starts, context_length=context_length
        )  # (B, T, C)
        if targets is None:
            return self.logits(x), None
        loss = linear_cross_entropy(
            x,
            self.lm_head.weight,
            targets,
            vocab_size=self.config.vocab_size,
            divisor=divisor,
            batch_targets=batch_targets,
            fused=self.fused_loss,
        )
        return None, loss

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., vocab_size) of the transformer's output x (..., C).

        The loss does not go through this: gpt12/loss.py multiplies with lm_head.weight itself.
        """
        return self.lm_head(x)[..., : self.config.vocab_size]

    @torch.no_grad()
    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context in place: drop the embeddings of the later positions."""
        table = self.transformer.wpe.weight
        table.data = table[:block_size].clone()
        self.transformer.block_size = block_size
        self.config = replace(self.config, block_size=block_size)

    def set_recompute(self, recompute: str) -> None:
        """Set the `recompute` of every block: "none", "pointwise" or "block"."""
        for block in self.transformer.h:
            assert isinstance(block, Block)
            block.recompute = recompute


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: autocast's if autocast is on, else the tensor's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


# --------------------------------------------------------------------------------------------------
# Models without values, and what they are counted by


class NaNMemory(TorchFunctionMode):
    """Let new memory be NaN. Unlike whatever was there, it shows what is forgotten."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like) and result.is_floating_point():
            result.fill_(math.nan)
        return result


class NothingDrawn(NaNMemory):
    """Let torch's layers not draw weights of their own, either: they stay NaN.

    For 124M parameters that would take seconds, and nobody would use them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return nn.init.constant_(kwargs["tensor"], math.nan)
        return super().__torch_function__(func, types, args, kwargs)


@functools.cache
def meta_model(config: GPTConfig) -> GPT:
    """Return the model without memory for its weights, to count what it consists of."""
    with torch.device("meta"), NothingDrawn():
        return GPT(config)


def parameter_count(config: GPTConfig, padded: bool = False) -> int:
    """Count the parameters; the tied head counts once.

    padded: count the padding rows of the vocabulary too, which exist only in memory.
    """
    model = meta_model(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if padded:
        return count
    tables = {model.transformer.wte.weight, model.lm_head.weight}
    padding = config.padded_vocab_size - config.vocab_size
    return count - padding * sum(table.size(1) for table in tables)


def flops_per_token(config: GPTConfig) -> int:
    """Count the floating-point operations of training on one token: 6N + 12LCT.

    Chowdhery et al. 2022 (PaLM), appendix B, with L layers and N parameters.
    N leaves out tables that are only looked up, as that of the positions. Attention is counted in
    full, not halved for causality.
    """
    modules = list(meta_model(config).modules())
    tables = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    multiplied = {module.weight for module in modules if isinstance(module, nn.Linear)}
    looked_up = sum(table.numel() for table in tables - multiplied)
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    return 6 * (parameter_count(config) - looked_up) + attention
