"""GPT-2: the transformer, its loss, its generation of text, and its weights on disk.

Shapes are noted at the line with these letters:
    B batch   T time, the tokens of one row   C channels (n_embd)   H heads   D = C / H   V vocabulary, padded
    N = B * T rows   S slots of the key/value cache   L layers

Reading order: as it stands. One layer (attention, MLP, Block), the loss in chunks, the whole model (GPT), then what GPT's
methods call: adapters and int8 weights, generation (sample_token, KVCache, Decoder), weights on disk.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (the architecture);
Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1 (attention); Hendrycks and Gimpel 2016 (GELU).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gpt12.errors import UserError

try:  # comes with torch's CUDA builds; without it the loss is the same formula in several kernels
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LOSS_CHUNK_ROWS = 4096  # rows of logits alive at a time: 4096 x 50304 in bf16 is 0.4 GB, whatever the batch
MASKED = -1  # a target that is not trained
LINEARS = ("c_attn", "c_proj", "c_fc")  # the names of a block's linear layers


class WeightsError(UserError, ValueError):
    """Weights or a prompt that this model cannot take; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. `vocab_size` is the tokenizer's own; padding exists only in memory."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

    @property
    def padded_vocab_size(self) -> int:
        """V: vocab_size rounded up to a multiple of 64, for which matrix products have their fast kernels."""
        return -(-self.vocab_size // 64) * 64


# --------------------------------------------------------------------------------------------------------------------
# One layer


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision products run in: autocast's where autocast is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (Ba et al. 2016, arXiv:1607.06450) that keeps its input's precision, where autocast returns fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear; for a single row, as in decoding, the bias is added apart: only a bare product can be fused by the
    compiler into one pass over the weight, which is all that such a product costs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.size(-1) and self.bias is not None:
            y = F.linear(x, self.weight)
            return y + self.bias.to(y.dtype)  # autocast knows products, not sums
        return super().forward(x)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and the past (Vaswani et al. 2017, 3.2.2 and 3.2.3)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.shape
        # Strided views of one product: attention kernels take them as they are, so nothing is copied.
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.unbind(2)  # each (B, T, H, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(qkv[:, :, 1:])  # (B, S, H, D) twice, (B, 1, T, S)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),  # (B, H, T, D)
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers around GPT-2's tanh GELU, four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normalized copy of the residual stream and added back to it.

    `recompute` says what the backward pass computes again instead of keeping, which is also called gradient
    checkpointing (Chen et al. 2016, arXiv:1604.06174): 'none'; 'pointwise', GELU and LayerNorm only, which cost
    bandwidth but no matrix product; 'block', everything.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.recompute = "none"

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.residual(x, cache)
        # The checkpoint lies inside what is compiled: around a compiled block it could only recompute all of it.
        random = self.training and self.attn.dropout > 0  # then recomputing has to draw the same numbers again
        context: dict[str, Any] = {"context_fn": _keep_products} if self.recompute == "pointwise" else {}
        return checkpoint(self.residual, x, use_reentrant=False, preserve_rng_state=random, **context)

    def residual(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def _keep_products() -> tuple[Any, Any]:
    """Selective recomputation's policy: keep what a matrix product or attention made, compute the rest again."""
    ops = torch.ops.aten
    products = {ops.mm.default, ops.addmm.default, ops.bmm.default}
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        products.add(getattr(ops, f"_scaled_dot_product_{name}").default)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


# --------------------------------------------------------------------------------------------------------------------
# The loss


def cross_entropy_chunk(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Summed cross-entropy of one chunk, in fp32; the gradient with respect to the logits takes their place.

    logits: (n, V), overwritten; targets: (n,) ids below vocab_size, or MASKED. Columns from vocab_size on are padding
    and take no part (a zero row of the head would weigh in with exp(0)).
    d loss / d logits = softmax(logits) - onehot(target): the forward pass holds all that the gradient needs.
    """
    logits[:, vocab_size:] = -math.inf
    x = logits.float()  # (n, V), from here on in place: in fp32 a chunk is twice as large as its logits
    x -= x.amax(1, keepdim=True)
    masked, target = (targets == MASKED)[:, None], targets.clamp(min=0)[:, None]  # (n, 1) each
    picked = x.gather(1, target)
    total = x.exp_().sum(1, keepdim=True)
    x /= total
    x.scatter_(1, target, x.gather(1, target) - 1)
    logits.copy_(x.masked_fill_(masked, 0.0))
    return (total.log() - picked).masked_fill_(masked, 0.0).sum()


if triton is not None:

    @triton.jit
    # Triton reads annotations as its own types, so there are none but its own.
    def _cross_entropy_row(logits, targets, losses, vocab_size, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """One program a row: an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3), then the
        gradient in place. The second reading finds the row in the L2 cache, so memory is read once and written once."""
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        logits += row * V
        top = -float("inf")
        total = 0.0
        for start in range(0, vocab_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
            top = new_top
        normalizer = top + tl.log(total)
        picked = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
        tl.store(losses + row, tl.where(target >= 0, normalizer - picked, 0.0))
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - normalizer) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(target >= 0, gradient, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < V)


def fused_cross_entropy_chunk(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """cross_entropy_chunk as one kernel, for GPUs with Triton."""
    losses = torch.empty(len(logits), device=logits.device)
    # Found by measuring on an H200: larger blocks spill registers, smaller ones wait for memory.
    _cross_entropy_row[(len(logits),)](logits, targets, losses, vocab_size, logits.size(1), BLOCK=4096, num_warps=8)
    return losses.sum()


class LinearCrossEntropy(torch.autograd.Function):
    """Output head and cross-entropy in chunks of rows: logits, the largest tensor of all, never exist as a whole.

    Memory is LOSS_CHUNK_ROWS x V, not N x V. Gradients with respect to x and the weight are made in the forward pass
    and only scaled in the backward pass. Losses and the weight's gradient are summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: Any) -> Tensor:
        """x: (N, C) in the precision of the product; weight: (V, C); targets: (N,). Returns the sum over targets."""
        w = weight.to(x.dtype)
        loss = torch.zeros((), device=x.device)
        with_gradient = any(ctx.needs_input_grad)
        dx = torch.empty_like(x) if with_gradient else None
        dw = torch.zeros(w.shape, device=w.device) if ctx.needs_input_grad[1] else None
        buffer = x.new_empty(min(len(x), LOSS_CHUNK_ROWS), len(w))  # one for all chunks
        for part in range(0, len(x), LOSS_CHUNK_ROWS):
            rows = slice(part, min(part + LOSS_CHUNK_ROWS, len(x)))
            logits = torch.mm(x[rows], w.t(), out=buffer[: rows.stop - rows.start])  # (n, V)
            loss += chunk(logits, targets[rows], vocab_size)
            dlogits = logits  # chunk() has put the gradient in their place
            if dx is not None:
                torch.mm(dlogits, w, out=dx[rows])
            if dw is not None:
                accumulate_product(dw, dlogits.t(), x[rows])
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx, dw = ctx.saved_tensors
        # dw is this function's own and is not read again: scaling it in place spares a copy the size of the table.
        return dx * grad.to(dx.dtype), None if dw is None else dw.mul_(grad), None, None, None


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32, for a and b of lower precision without rounding the product first where CUDA can."""
    if total.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += a @ b


# --------------------------------------------------------------------------------------------------------------------
# The whole model


class GPT(nn.Module):
    """The whole model. Its modules bear the names of GPT-2's published checkpoint."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise WeightsError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # type: ignore[union-attr, assignment]  # tied: Press and Wolf 2017, arXiv:1608.05859
        self.loss_chunk = cross_entropy_chunk  # compile_parts() puts its fused form here
        self.init_weights()

    @property
    def blocks(self) -> list[Block]:
        return list(self.transformer.h)  # type: ignore[arg-type]

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02); what writes into the residual stream is scaled by 1/sqrt(2L) (Radford et al. 2019, 2.3)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and module is not self.lm_head:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj") else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Padding rows are never trained and never drawn: zero, so that dropping them on disk loses nothing.
        self.lm_head.weight[self.config.vocab_size :].zero_()

    def num_params(self) -> int:
        """Parameters of the model as it lies on disk: without padding rows, adapters merged, the tied head once."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        kept = (p for name, p in self.named_parameters() if "lora_" not in name)
        return sum(p.numel() for p in kept) - padding * self.config.n_embd

    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token, 6N + 12LCT (Chowdhery et al. 2022, PaLM, appendix B).

        N leaves out the position table, which is looked up and not multiplied; attention is counted in full.
        """
        c = self.config
        return 6 * (self.num_params() - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size

    def decode_bytes(self) -> int:
        """Bytes of weights that one decoding step reads: all but the embedding tables, which are looked up."""
        read = [*self.transformer["h"].state_dict().values(), *self.lm_head.state_dict().values()]
        return sum(t.numel() * t.element_size() for t in read)

    def set_recompute(self, recompute: str) -> None:
        for block in self.blocks:
            block.recompute = recompute

    def compile_parts(self) -> None:
        """Compile the blocks in place: equal blocks compile once, in a fraction of the time that the whole takes."""
        # torch warns of operations in place under a recomputation with a policy; a block has none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        for module in (*self.blocks, self.transformer["ln_f"]):
            module.compile(dynamic=False)
        if self.lm_head.weight.is_cuda and triton is not None:
            self.loss_chunk = fused_cross_entropy_chunk

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> the last layer's normalized output (B, T, C). A cache is read and extended."""
        x = self.embed(idx, cache)
        for i, block in enumerate(self.blocks):
            x = block(x) if cache is None else block(x, cache.layer(i))
        return self.transformer["ln_f"](x)

    def embed(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> the beginning of the residual stream (B, T, C)."""
        T = idx.size(1)
        if cache is None and self.config.block_size < T:
            raise WeightsError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        position = torch.arange(T, device=idx.device) if cache is None else cache.begin(T)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](position)  # (B, T, C)
        # One cast here keeps the residual stream, and all that is saved for backward, in autocast's precision.
        return self.transformer["drop"](x).to(compute_dtype(x))

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, divisor: Tensor | float | None = None, rows: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits without targets, the loss with them.

        idx: (B, T) token ids. targets: (B, T), the next token of each position, or MASKED.
        divisor: what the sum of the losses is divided by; by default the number of targets, which makes the mean in
            nats a token. A step of several micro-batches passes the number of targets of the whole step.
        rows: how many targets are not masked, if the caller knows: then masked rows never reach the head.
        Returns (logits (B, T, vocab_size), None), or (None, scalar loss in fp32).
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)[..., : self.config.vocab_size], None
        x, targets = x.view(-1, x.size(-1)), targets.reshape(-1)  # (N, C), (N,)
        if divisor is None:
            divisor = (targets != MASKED).sum().clamp(min=1)
        if rows is not None and rows < len(targets):
            # A stable sort brings the unmasked rows to the front without asking the device how many there are; a
            # multiple of 1,024 keeps the number of different shapes, and of compilations, small.
            kept = (targets == MASKED).argsort(stable=True)[: min(len(targets), -(-rows // 1024) * 1024)]
            x, targets = x[kept], targets[kept]
        x = x.to(compute_dtype(x))
        head = self.lm_head.dequantized() if isinstance(self.lm_head, Int8Linear) else self.lm_head.weight
        if not torch.is_grad_enabled():  # the function below asks its inputs, and knows nothing of no_grad
            head = head.detach()
        total = LinearCrossEntropy.apply(x, head, targets, self.config.vocab_size, self.loss_chunk)
        return None, total / divisor

    # ----------------------------------------------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seeds: Sequence[int] | None = None,
        compiled: bool = False,
    ) -> Iterator[list[int]]:
        """Yield one new token id per prompt, max_new_tokens times. Prompts may differ in length.

        seeds: one per prompt; a text depends on its prompt and its seed alone, not on its neighbours in the batch.
        compiled: compile the blocks for decoding, which pays off for long texts. On a GPU the decoding step is replayed
            as a CUDA graph in any case.
        A context that reaches block_size goes on from its last half, which is computed anew (positions are absolute
        in GPT-2, so cached keys cannot be moved). Raises WeightsError for an empty or too long prompt.
        """
        sampling = sampling or Sampling()
        limit, device = self.config.block_size, self.lm_head.weight.device
        for prompt in prompts:
            if not 0 < len(prompt) <= limit:
                raise WeightsError(f"a prompt has {len(prompt)} tokens; it needs 1 to block_size={limit}")
        if not prompts or not max_new_tokens:
            return
        texts = [[int(token) for token in prompt] for prompt in prompts]
        cache = KVCache(self.config, len(texts), max(map(len, texts)) + max_new_tokens, next(self.parameters()))
        draws = torch.stack([uniform(seed, max_new_tokens) for seed in seeds or range(len(texts))])  # (B, new)
        decoder = Decoder(self, cache, sampling, draws.to(device), compiled)
        decoder.start(texts)
        for step in range(max_new_tokens):
            arriving = decoder.read()
            full = [b for b, text in enumerate(texts) if len(text) == limit]
            last = step + 1 == max_new_tokens
            if not (full or last):
                decoder.advance()  # the device is at the next tokens while the host hands out these
            new = arriving()
            for text, token in zip(texts, new, strict=True):
                text.append(token)
            if full and not last:
                for b in full:
                    texts[b] = texts[b][-max(1, limit // 2) :]
                    with decoder.stance():
                        cache.refill(self, b, texts[b][:-1])
                decoder.advance()
            yield new

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """The new token ids of each prompt, all at once. Options as in `stream`."""
        texts: list[list[int]] = [[] for _ in prompts]
        for new in self.stream(prompts, max_new_tokens, **options):
            for text, token in zip(texts, new, strict=True):
                text.append(token)
        return texts

    def store_by_columns(self) -> None:
        """Lay out the linear layers' weights as GPT-2's files do, (in, out) in memory; values and shapes stay.

        A CPU reads a weight a sixth faster so in a product with a single row, which is what decoding is made of.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()

    # ----------------------------------------------------------------------------------------------------------------
    # Weights on disk: a Hugging Face GPT-2 directory

    def save_pretrained(self, path: str | Path, eot: int | None = None) -> None:
        """Write config.json and model.safetensors as `transformers` does. eot: the id of the end-of-text token.

        Weights keep their dtype; padding rows and the tied head are left out; LoRA's adapters are merged in; a model
        without biases gets zero biases and `"bias": false`, which other readers ignore at no loss.
        """
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(_huggingface_config(self.config, eot), indent=2) + "\n", "utf-8")
        # Copied before they are turned: on the device a second model would have no room.
        tensors = {f"transformer.{name}": t.cpu().contiguous() for name, t in self._published_weights()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    @torch.no_grad()
    def _published_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one by one, in the published layout: Conv1D keeps the transpose of a Linear's weight, (in, out)."""
        yield "wte.weight", self.lm_head.weight.detach()[: self.config.vocab_size]
        yield "wpe.weight", self.transformer["wpe"].weight.detach()  # type: ignore[operator]
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                weight = module.merged() if isinstance(module, LoRALinear) else module.weight.detach()
                bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
                yield f"{name}.weight", weight.t() if isinstance(module, nn.Linear) else weight
                yield f"{name}.bias", bias

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, block_size: int | None = None, dropout: float = 0.0) -> GPT:
        """Read a Hugging Face GPT-2 directory, a hub name (gpt2 ... gpt2-xl, owner/name), or nanoGPT's ckpt.pt.

        block_size: crop the context to this. dropout: this model's, whatever the file says. Nothing is unpickled.
        Raises WeightsError naming the file, the tensor or the setting that this model cannot represent.
        """
        path = Path(path_or_name)
        if path.suffix == ".pt":
            config, tensors = _read_nanogpt(path)
        else:
            folder = find_pretrained(path_or_name)
            config, tensors = _read_config(folder / "config.json"), _read_safetensors(folder)
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        _check_size(config, tensors, str(path_or_name))
        if block_size is not None and block_size > config.block_size:
            raise WeightsError(
                f"{path_or_name} has {config.block_size} positions: pass --block_size={config.block_size} or less"
            )
        with _without_drawing():
            model = cls(replace(config, dropout=dropout))
        model.load_published(tensors, str(path_or_name))
        return model if block_size is None else model.crop(block_size)

    @torch.no_grad()
    def load_published(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy tensors in the published layout into this model; every one must be there and have its shape."""
        for name, mine in self._published_weights():
            module_name, _, kind = name.rpartition(".")
            module = self.transformer.get_submodule(module_name)
            if kind == "bias" and module.bias is None:
                if name in tensors and tensors[name].any():
                    raise WeightsError(f'{source}: config.json says "bias": false, but {name} is not zero')
                continue
            # A view into the parameter, transposed where Conv1D is.
            mine.copy_(_take(tensors, name, tuple(mine.shape), source))
        head, tied = tensors.get("lm_head.weight"), tensors["wte.weight"]
        if head is not None and not (head[: len(tied)].shape == tied.shape and bool((head[: len(tied)] == tied).all())):
            raise WeightsError(f"{source}: lm_head.weight is another than wte.weight: an untied head is not supported")
        self.lm_head.weight[self.config.vocab_size :].zero_()

    @torch.no_grad()
    def crop(self, block_size: int) -> GPT:
        """Shorten the context: positions past block_size are dropped. Returns the model."""
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer["wpe"]
        wpe.weight = nn.Parameter(wpe.weight[:block_size].clone())  # type: ignore[index]
        wpe.num_embeddings = block_size  # type: ignore[assignment]
        return self

    # ----------------------------------------------------------------------------------------------------------------
    # Variants of the linear layers

    def replace_linears(self, make: Any, targets: Sequence[str] = LINEARS) -> None:
        """Put make(linear) in place of each of the blocks' linear layers whose name is among `targets`."""
        for block in self.blocks:
            for parent in (block.attn, block.mlp):
                for name in targets:
                    if hasattr(parent, name):
                        setattr(parent, name, make(getattr(parent, name)))

    def add_lora(self, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = ()) -> None:
        """Freeze the model and add trainable low-rank adapters to its linear layers (all, or those in `targets`)."""
        self.requires_grad_(False)
        self.replace_linears(lambda linear: LoRALinear(linear, rank, alpha, dropout), targets or LINEARS)

    def save_adapter(self, path: Path, base: str) -> None:
        """Write the adapters alone as PEFT does: adapter_config.json and adapter_model.safetensors."""
        from safetensors.torch import save_file

        path.mkdir(parents=True, exist_ok=True)
        layers = {name: m for name, m in self.transformer.named_modules() if isinstance(m, LoRALinear)}
        first = next(iter(layers.values()))
        content = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": len(first.lora_A),
            "lora_alpha": first.scale * len(first.lora_A),
            "lora_dropout": first.lora_dropout.p,
            "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
            "fan_in_fan_out": True,  # GPT-2's layers are Conv1D: (in, out)
            "bias": "none",
            "inference_mode": True,
        }
        (path / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        tensors = {
            f"base_model.model.transformer.{name}.{part}.weight": getattr(layer, part).detach().contiguous()
            for name, layer in layers.items()
            for part in ("lora_A", "lora_B")
        }
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})

    def quantize(self) -> None:
        """Weight-only int8 in the blocks and the head, for sampling and evaluation; the embedding stays as it is."""
        self.requires_grad_(False)
        self.replace_linears(Int8Linear)
        self.lm_head = Int8Linear(self.lm_head)  # type: ignore[assignment]


# --------------------------------------------------------------------------------------------------------------------
# Variants of the linear layers


class LoRALinear(Linear):
    """W x + (alpha / rank) B A x with W frozen (Hu et al. 2021, arXiv:2106.09685, section 4.1). B starts at zero."""

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        limit = min(base.in_features, base.out_features)
        if not 0 < rank <= limit:
            raise WeightsError(f"lora_rank={rank} must lie between 1 and the layer's width, {limit}")
        self.scale, self.lora_dropout = alpha / rank, nn.Dropout(dropout)
        # The adapters stay in fp32 whatever the frozen weights are: they are the master weights here.
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B)
        return super().forward(x) + self.scale * update

    def merged(self) -> Tensor:
        """(out, in) weight with the adapter in it, in fp32."""
        return self.weight.float() + self.scale * (self.lora_B @ self.lora_A)


class Int8Linear(nn.Module):
    """y = (x Wq^T) s + b with int8 Wq and one scale a row: half of bf16's bytes, which is what decoding waits for."""

    weight: Tensor
    scale: Tensor

    def __init__(self, base: nn.Linear):
        super().__init__()
        scale = base.weight.abs().amax(1).clamp(min=1e-8) / 127  # (out,)
        self.register_buffer("weight", (base.weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        y = F.linear(x.to(dtype), self.weight.to(dtype)) * self.scale.to(dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def dequantized(self) -> Tensor:
        return self.weight * self.scale[:, None]  # (out, in)


# --------------------------------------------------------------------------------------------------------------------
# Generation


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and penalty 1 mean off.

    top_p: the smallest set of tokens whose probability reaches it (Holtzman et al. 2019, arXiv:1904.09751, 3.1).
    min_p: tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082, 3).
    repetition_penalty: divides positive and multiplies negative logits of tokens already in the text (Keskar et al.
    2019, arXiv:1909.05858, 4.1).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def sample_token(logits: Tensor, draw: Tensor, how: Sampling, seen: Tensor | None = None) -> Tensor:
    """Choose one id a row. logits: (B, vocab_size); draw: (B,) uniform in [0, 1); seen: (B, vocab_size) bool.

    The draw picks from the cumulative distribution over the tokens of its row, so equal draws give equal tokens
    whatever else is in the batch. Returns (B,) int64.
    """
    if seen is not None:
        logits = logits.float()
        penalized = torch.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if how.temperature == 0:
        return logits.argmax(1)
    k = min(how.top_k or logits.size(1), logits.size(1))
    # Selecting is cheapest in the logits' own precision and without sorting, which only the nucleus asks for.
    scores, ids = logits.topk(k, sorted=how.top_p < 1)  # (B, k)
    scores = scores.float()
    # At most 0, so that nothing overflows when the temperature is small; smaller ones would be 0 in fp32.
    scores = (scores - scores.amax(1, keepdim=True)) / max(how.temperature, 1e-30)
    probs = scores.softmax(1)
    keep = scores >= math.log(how.min_p) if how.min_p else torch.ones_like(probs, dtype=torch.bool)
    if how.top_p < 1:
        keep &= probs.cumsum(1) - probs < how.top_p  # the probability of everything likelier
        keep[:, 0] = True  # the likeliest always stays, also when rounding says otherwise
    probs = probs * keep
    cumulative = probs.cumsum(1)
    chosen = (cumulative <= draw[:, None] * cumulative[:, -1:]).sum(1, keepdim=True)
    last = (probs > 0).cumsum(1).argmax(1, keepdim=True)  # a draw that rounds up to 1 must not fall off the end
    return ids.gather(1, torch.minimum(chosen, last))[:, 0]


def uniform(seed: int, count: int) -> Tensor:
    """(count,) numbers in [0, 1) that depend on the seed alone: drawn on the CPU, so alike on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed % 2**63))


class LayerCache(NamedTuple):
    """One layer's part of the cache during one forward pass over T tokens."""

    kv: Tensor  # (B, S, 2, H, D), keys and values
    position: Tensor  # (B, T), where the new tokens go
    mask: Tensor  # (B, 1, T, S), added to the scores: 0 where a key may be seen, else -inf

    def update(self, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write the new keys and values, (B, T, 2, H, D); return all keys, all values, and who may see what."""
        row = torch.arange(len(kv), device=kv.device)[:, None]
        self.kv[row, self.position] = kv
        keys, values = self.kv.unbind(2)
        return keys, values, self.mask


class KVCache:
    """Keys and values of past tokens, in place and of fixed size: decoding a token costs no recomputation.

    Each row has its own length, so prompts may be ragged: what lies past a row's length is never seen and is
    overwritten as the row grows.
    """

    def __init__(self, config: GPTConfig, batch: int, slots: int, like: Tensor):
        slots = min(-(-slots // 128) * 128, config.block_size)  # few different sizes, each of which is compiled anew
        shape = (config.n_layer, batch, slots, 2, config.n_head, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, dtype=compute_dtype(like), device=like.device)  # (L, B, S, 2, H, D)
        self.length = torch.zeros(batch, dtype=torch.int64, device=like.device)  # (B,) tokens in the cache

    def begin(self, T: int) -> Tensor:
        """Prepare for T more tokens a row; returns their positions, (B, T)."""
        self.position = self.length[:, None] + torch.arange(T, device=self.length.device)
        slot = torch.arange(self.kv.size(2), device=self.length.device)
        hidden = (slot > self.position[..., None])[:, None]  # (B, 1, T, S)
        # Added to the scores, which is what every layer's attention would make out of a mask of booleans.
        self.mask = torch.zeros_like(hidden, dtype=self.kv.dtype).masked_fill_(hidden, -math.inf)
        return self.position

    def layer(self, i: int) -> LayerCache:
        return LayerCache(self.kv[i], self.position, self.mask)

    def refill(self, model: GPT, b: int, tokens: Sequence[int]) -> None:
        """Make row b hold exactly these tokens."""
        row = object.__new__(KVCache)  # a view of one row: same memory, batch of one
        row.kv, row.length = self.kv[:, b : b + 1], self.length[b : b + 1]
        row.length.zero_()
        if tokens:
            model.hidden(torch.tensor([tokens], device=self.length.device), row)
        row.length.fill_(len(tokens))


class Decoder:
    """The state of one decoding loop on the device, and the step that advances it by a token a row.

    The step reads and writes tensors in place and never asks the device anything, so that on a GPU it can be
    captured once as a CUDA graph and replayed: a decoding step is hundreds of kernels of a few microseconds each,
    and launching them one by one would take longer than running them.
    """

    def __init__(self, model: GPT, cache: KVCache, sampling: Sampling, draws: Tensor, compiled: bool):
        self.model, self.cache, self.sampling, self.draws = model, cache, sampling, draws
        self.token = torch.zeros(len(draws), dtype=torch.int64, device=draws.device)  # (B,) the newest tokens
        self.step = torch.zeros(1, dtype=torch.int64, device=draws.device)
        penalized = sampling.repetition_penalty != 1
        shape = (len(draws), model.config.vocab_size)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=draws.device) if penalized else None
        self.compiled = compiled
        self.embed = model.embed
        self.graph: torch.cuda.CUDAGraph | None = None

    def stance(self, prompt: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Blocks that training has compiled run plainly: they would be compiled again for every length of a prompt."""
        if (self.compiled and not prompt) or self.model.blocks[0]._compiled_call_impl is None:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def start(self, texts: list[list[int]]) -> None:
        """Read the prompts in one pass (right-padded, each row's logits taken at its own end) and choose."""
        device, lengths = self.token.device, torch.tensor([len(t) for t in texts])
        idx = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True).to(device)  # (B, T)
        if self.seen is not None:
            for row, text in zip(self.seen, texts, strict=True):
                row[torch.tensor(text, device=device)] = True
        with self.stance():
            x = self.model.hidden(idx, self.cache)  # (B, T, C)
        self.cache.length.copy_(lengths)
        self.choose(x[torch.arange(len(texts)), lengths - 1])

    def choose(self, x: Tensor) -> None:
        """x: (B, C), the last hidden state of each row -> the next token, in place."""
        logits = self.model.lm_head(x)[:, : self.model.config.vocab_size]
        draw = self.draws.index_select(1, self.step)[:, 0]
        self.token.copy_(sample_token(logits, draw, self.sampling, self.seen))
        if self.seen is not None:
            self.seen.scatter_(1, self.token[:, None], True)
        self.step.add_(1)

    def forward(self) -> None:
        x = self.embed(self.token[:, None], self.cache)  # (B, 1, C)
        for i, block in enumerate(self.model.blocks):
            x = block(x, self.cache.layer(i))
        self.finish(x)

    def finish(self, x: Tensor) -> None:
        """x: (B, 1, C), what comes out of the last block."""
        self.cache.length.add_(1)
        self.choose(self.model.transformer["ln_f"](x)[:, 0])

    def advance(self) -> None:
        """Feed the newest tokens and choose the next ones."""
        with self.stance(prompt=False):
            if self.graph is None and self.token.is_cuda:
                self.capture()
            if self.graph is None:
                self.forward()
            else:
                self.graph.replay()

    def read(self) -> Callable[[], list[int]]:
        """Start copying the newest tokens to the host; call the result to wait for them."""
        if not self.token.is_cuda:
            tokens = self.token.tolist()
            return lambda: tokens
        host = torch.empty(self.token.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(self.token, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> list[int]:
            arrived.synchronize()
            return host.tolist()

        return wait

    def capture(self) -> None:
        """Run the step so that nothing is compiled or allocated later, undo it, and record it."""
        if self.compiled:
            options = {
                "coordinate_descent_tuning": True,  # a product with one row is a fused reduction, no call to cuBLAS
                "realize_opcount_threshold": 8,  # GELU is computed once, not again for every output of the next product
                "realize_reads_threshold": 1,  # so is a sum with a bias, in the product's own kernel
            }
            how: dict[str, Any] = {"dynamic": False, "options": options}
            for block in self.model.blocks:
                block.compile(**how)
            self.embed = torch.compile(self.embed, **how)
            self.finish = torch.compile(self.finish, **how)  # type: ignore[method-assign]
        state = [self.token, self.step, self.cache.length] + ([] if self.seen is None else [self.seen])
        saved = [t.clone() for t in state]
        side = torch.cuda.Stream()  # warming up on another stream is what capturing asks for
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # both from the same place: there may be none after it
                self.forward()
                for t, before in zip(state, saved, strict=True):
                    t.copy_(before)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # while recording, memory that is only kept in store could not be given back
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward()
        self.graph = graph


# --------------------------------------------------------------------------------------------------------------------
# Weights on disk


@contextlib.contextmanager
def _without_drawing() -> Iterator[None]:
    """Build modules without random weights: they come from disk, and drawing 124M of them takes two seconds."""
    names = ("normal_", "uniform_", "kaiming_uniform_")
    drawing = {name: getattr(nn.init, name) for name in names}
    vars(nn.init).update(dict.fromkeys(names, lambda tensor, *args, **options: tensor))
    try:
        yield
    finally:
        vars(nn.init).update(drawing)


def _huggingface_config(config: GPTConfig, eot: int | None) -> dict[str, Any]:
    """config.json as `transformers` writes it, and `bias`, which only our reader knows."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "bias": config.bias,
    }


# What a config.json may say that this model does not do: key -> the values that mean "as GPT-2 does".
_FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "layer_norm_epsilon": (1e-5,),
}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{file} does not exist: {file.parent} is no Hugging Face GPT-2 directory") from None
    except (OSError, ValueError, RecursionError) as e:
        raise WeightsError(f"{file} cannot be read as JSON: {e}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file} does not hold a JSON object")
    return content


def _check_shape(shape: dict[str, int], file: Path) -> None:
    if not all(1 <= size < 2**31 for size in shape.values()) or shape["n_embd"] % shape["n_head"]:
        raise WeightsError(f"{file}: impossible shape {shape}")


def _check_size(config: GPTConfig, tensors: dict[str, Tensor], source: str) -> None:
    """Refuse a model whose file does not hold what its configuration asks for, before memory is asked for it."""
    _take(tensors, "wte.weight", (config.vocab_size, config.n_embd), source)
    _take(tensors, "wpe.weight", (config.block_size, config.n_embd), source)
    for i in range(config.n_layer):
        _take(tensors, f"h.{i}.mlp.c_proj.weight", (4 * config.n_embd, config.n_embd), source)


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], source: str) -> Tensor:
    if name not in tensors:
        raise WeightsError(f"{source}: tensor {name} is missing")
    if tensors[name].shape != shape:
        raise WeightsError(
            f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}, config.json asks for {shape}"
        )
    return tensors[name]


def _read_config(file: Path) -> GPTConfig:
    content = _read_json(file)
    for key, allowed in _FIXED.items():
        if content.get(key, allowed[0]) not in allowed:
            raise WeightsError(f"{file}: {key}={content[key]!r} is not supported, only {allowed[0]!r}")
    try:
        shape = {key: int(content[key]) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        block_size = int(content.get("n_positions", content.get("n_ctx", 1024)))
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise WeightsError(f"{file}: {e} is missing or not a number") from None
    _check_shape(shape | {"n_positions": block_size}, file)
    if content.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise WeightsError(f"{file}: n_inner={content['n_inner']} is not supported, only 4 * n_embd")
    return GPTConfig(**shape, block_size=block_size, bias=bool(content.get("bias", True)))


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, memory-mapped: model.safetensors, or the shards its index names."""
    import safetensors

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise WeightsError(f"{index} has no weight_map")
        names = set(map(str, weight_map.values()))
    if outside := [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]:
        raise WeightsError(f"{index}: {outside[0]!r:.80} does not name a safetensors file of its own folder")
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        file = folder / name
        if not os.path.isfile(file):  # noqa: PTH113 (unlike Path.is_file, False for a name that no system allows)
            pickles = [p.name for p in folder.glob("*.bin")]
            hint = f"; {pickles[0]} is a pickle, which can run code and is never read" if pickles else ""
            raise WeightsError(f"{str(file)!a:.200} does not exist{hint}. Save the model as safetensors and try again")
        try:
            with safetensors.safe_open(file, framework="pt") as content:
                tensors |= {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a dict)
        except (safetensors.SafetensorError, OSError, ValueError) as e:
            raise WeightsError(f"{file} is damaged or no safetensors file: {e}") from None
    return tensors


def find_pretrained(path_or_name: str | Path) -> Path:
    """A folder as it is; else the hub's model of this name, fetched or cached: only its JSON, text and safetensors."""
    name = str(path_or_name)
    if Path(name).is_dir():
        return Path(name)
    if os.path.isfile(name):  # noqa: PTH113 (as above)
        folder = Path(name).parent
        raise WeightsError(f"{name} is a file, and a model is a folder with its config.json: try --init_from={folder}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"], etag_timeout=5))
    except Exception as e:  # the hub's client raises many kinds: no network, no such name, a private repository
        raise WeightsError(
            f"{name!r} is no local folder and could not be fetched ({type(e).__name__}).\nDownload config.json, "
            f"model.safetensors, vocab.json and merges.txt from https://huggingface.co/{name} into a folder and pass its "
            "path as --init_from=FOLDER"
        ) from None


def _read_nanogpt(file: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """nanoGPT's ckpt.pt, through torch's reader that refuses everything but tensors and plain values."""
    if not os.path.exists(file):  # noqa: PTH110 (unlike Path.exists, False for a name that no system allows)
        raise WeightsError(f"{str(file)!a:.200} does not exist: pass the path of a ckpt.pt as --init_from=")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        args, weights = content["model_args"], content["model"]
        shape = {key: int(args[key]) for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
        if shape["vocab_size"] == 50304:  # nanoGPT's padded GPT-2 vocabulary: ids from 50257 on do not exist
            shape["vocab_size"] = 50257
        tensors = {}
        for name, t in weights.items():
            name = name.removeprefix("_orig_mod.")
            if isinstance(t, Tensor):
                tensors[name] = t.t() if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)) else t
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][: shape["vocab_size"]]
    except Exception as e:  # torch raises many kinds, UnpicklingError where the file asks to run something
        raise WeightsError(
            f"{file} is no nanoGPT checkpoint that loads without running code ({type(e).__name__})"
        ) from None
    _check_shape(shape, file)
    return GPTConfig(**shape, bias=bool(args.get("bias", True))), tensors
