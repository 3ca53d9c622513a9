"""Write text: choose tokens, keep the keys and values of past tokens, run the decoding loop.

    for ids in stream(model, prompts, max_new_tokens=100):   # one new id for each prompt
    texts = generate(model, prompts, max_new_tokens=100)     # all new ids at the end

Reading order: how a token is chosen (Sampling, sample_token), the cache (KVCache, LayerCache), one
decoding step (Decoder), and the loop (stream).

Shapes: B texts, T new tokens of each text, S slots of the cache, L layers, H heads, D head size,
C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt12.cuda_graph import record
from gpt12.errors import UserError
from model import GPT, GPTConfig, compute_dtype

# --------------------------------------------------------------------------------------------------
# Choosing a token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits."""

    # Divide the logits by this. 0: always take the most likely token (greedy).
    temperature: float = 1.0
    # Only the k most likely tokens. 0: all.
    top_k: int = 0
    # Only the most likely tokens that together have this probability (nucleus sampling, Holtzman et
    # al. 2019, arXiv:1904.09751, section 3.1). 1: all.
    top_p: float = 1.0
    # Only tokens with at least this fraction of the most likely token's probability (Nguyen et al.
    # 2024, arXiv:2407.01082, section 3). 0: all.
    min_p: float = 0.0
    # Divide positive and multiply negative logits of tokens that the text already contains (Keskar
    # et al. 2019, arXiv:1909.05858, section 4.1). 1: off.
    repetition_penalty: float = 1.0


def sample_token(
    logits: Tensor, draw: Tensor, sampling: Sampling, seen: Tensor | None = None
) -> Tensor:
    """Choose one token id for each row.

    logits: (B, vocab_size). draw: (B,) uniform in [0, 1). seen: (B, vocab_size) bool, the tokens
    that each text already contains. Returns (B,) int64.
    The same logits and the same draw give the same token, whatever the other rows are.
    """
    if seen is not None:
        logits = _penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    probs, ids = _candidates(logits, sampling)
    # Invert the cumulative distribution: count the candidates that end at or before the draw.
    cumulative = probs.cumsum(dim=1)
    chosen = (cumulative <= draw[:, None] * cumulative[:, -1:]).sum(dim=1, keepdim=True)
    # If rounding makes the draw 1, `chosen` points past the end. `last` is the last candidate whose
    # probability is not 0: there the running count of these first reaches its maximum.
    last = (probs > 0).cumsum(dim=1).argmax(dim=1, keepdim=True)
    return ids.gather(1, torch.minimum(chosen, last))[:, 0]


def _penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    logits = logits.float()
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the unnormalized probabilities (B, k) of the k candidates of each row, and their ids.

    Candidates that top_p or min_p exclude have probability 0.
    """
    vocab_size = logits.size(1)
    k = min(sampling.top_k or vocab_size, vocab_size)
    # Select in the logits' own dtype and without sorting, which is faster. Only top_p needs order.
    scores, ids = logits.topk(k, sorted=sampling.top_p < 1)
    scores = scores.float()
    # The largest score becomes 0, so that nothing overflows if the temperature is small.
    scores = scores - scores.amax(dim=1, keepdim=True)
    scores = scores / max(sampling.temperature, 1e-30)  # smaller ones would be 0 in float32
    probs = scores.softmax(dim=1)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if sampling.min_p > 0:
        keep = scores >= math.log(sampling.min_p)
    if sampling.top_p < 1:
        more_likely = probs.cumsum(dim=1) - probs  # the probability of all tokens before this one
        keep &= more_likely < sampling.top_p
        keep[:, 0] = True  # the most likely token (they are sorted) stays, whatever rounding says
    return probs * keep, ids


def uniform_draws(seed: int, count: int) -> Tensor:
    """Return (count,) numbers in [0, 1) that depend on the seed alone.

    They are drawn on the CPU, so that they are the same for every device.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(count, generator=generator)


# --------------------------------------------------------------------------------------------------
# The cache of keys and values


class LayerCache(NamedTuple):
    """The part of the cache that one layer uses during one forward pass over T tokens."""

    keys: Tensor  # (B, S, H, D)
    values: Tensor  # (B, S, H, D)
    rows: Tensor  # (B, 1), the indices 0 ... B - 1
    position: Tensor  # (B, T), the slots of the new tokens
    mask: Tensor  # (B, 1, T, S), 0 where a new token sees a slot, else -inf

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the keys and values of the new tokens, each (B, T, H, D).

        Returns all keys, all values, and the mask to add to the attention scores.
        """
        self.keys[self.rows, self.position] = k
        self.values[self.rows, self.position] = v
        return self.keys, self.values, self.mask


class KVCache:
    """The keys and values of past tokens of B texts, in memory of fixed size.

    Each text has its own length. Slots past it are masked and overwritten as the text grows.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor):
        """keys, values: (L, B, S, H, D). length: (B,) int64, the tokens stored for each text."""
        self.keys = keys
        self.values = values
        self.length = length
        self.rows = torch.arange(len(length), device=length.device)[:, None]  # (B, 1)
        # take_positions() sets these two for each forward pass, and then the layers read them.
        self.position: Tensor
        self.mask: Tensor

    @classmethod
    def empty(cls, config: GPTConfig, batch: int, slots: int, like: Tensor) -> KVCache:
        """Allocate a cache for `batch` texts of up to `slots` tokens, but not over block_size.

        like: a parameter of the model, which decides the device and the dtype.
        """
        slots = min(slots, config.block_size)
        shape = (config.n_layer, batch, slots, config.n_head, config.n_embd // config.n_head)
        dtype = compute_dtype(like)
        return cls(
            keys=torch.zeros(shape, dtype=dtype, device=like.device),
            values=torch.zeros(shape, dtype=dtype, device=like.device),
            length=torch.zeros(batch, dtype=torch.int64, device=like.device),
        )

    def row(self, b: int) -> KVCache:
        """Return a view of text b: a cache with a batch of one that shares this cache's memory."""
        rows = slice(b, b + 1)
        return KVCache(self.keys[:, rows], self.values[:, rows], self.length[rows])

    def take_positions(self, T: int) -> Tensor:
        """Prepare for T more tokens of each text and return their positions, (B, T)."""
        slots = self.keys.size(2)
        self.position, self.mask = take_slots(self.length, T, slots, self.keys.dtype)
        return self.position

    def layer(self, i: int) -> LayerCache:
        """Return the part that layer i reads and writes in the present forward pass."""
        return LayerCache(self.keys[i], self.values[i], self.rows, self.position, self.mask)


def take_slots(length: Tensor, T: int, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Take the next T slots: add T to length (B,) in place, and return their positions and mask.

    Positions: (B, T). Mask: (B, 1, T, S), 0 for a token's own slot and earlier ones, -inf for later
    ones.
    """
    position = length[:, None] + torch.arange(T, device=length.device)  # (B, T)
    slot = torch.arange(slots, device=length.device)  # (S,)
    later = (slot > position[:, :, None])[:, None]  # (B, 1, T, S)
    mask = torch.zeros_like(later, dtype=dtype).masked_fill_(later, -math.inf)
    length.add_(T)
    return position, mask


# --------------------------------------------------------------------------------------------------
# One decoding step


class DecodingState(NamedTuple):
    """What choosing a token reads and updates in place on the device."""

    token: Tensor  # (B,) int64, the newest token of each text
    draws: Tensor  # (B, max_new_tokens), uniform in [0, 1)
    draw_index: Tensor  # (1,) int64, the next column of `draws`
    seen: Tensor | None  # (B, vocab_size) bool, the tokens of each text; None without a penalty


def head_and_sample(
    hidden: Tensor, head: nn.Module, state: DecodingState, vocab_size: int, sampling: Sampling
) -> None:
    """Choose the next token of each text from its last hidden state (B, C), and store it."""
    logits = head(hidden)[:, :vocab_size]
    draw = state.draws.index_select(1, state.draw_index)[:, 0]
    state.token.copy_(sample_token(logits, draw, sampling, state.seen))
    if state.seen is not None:
        state.seen.scatter_(1, state.token[:, None], True)
    state.draw_index.add_(1)


class Decoder:
    """Advance B texts by one token at a time.

    A step reads and writes tensors in place and never waits for the device. On a GPU it is recorded
    once as a CUDA graph and replayed, because a step consists of hundreds of kernels of a few
    microseconds each, and launching them one by one takes longer than running them.
    """

    def __init__(self, model: GPT, cache: KVCache, sampling: Sampling, draws: Tensor):
        """draws: (B, max_new_tokens), uniform in [0, 1), on the model's device."""
        B = len(draws)
        device = draws.device
        vocab_size = model.config.vocab_size
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros((B, vocab_size), dtype=torch.bool, device=device)
        self.model = model
        self.cache = cache
        self.sampling = sampling
        self.state = DecodingState(
            token=torch.zeros(B, dtype=torch.int64, device=device),
            draws=draws,
            draw_index=torch.zeros(1, dtype=torch.int64, device=device),
            seen=seen,
        )
        self.graph: torch.cuda.CUDAGraph | None = None

    def read_prompts(self, prompts: list[list[int]]) -> None:
        """Run the prompts through the model in one pass and choose the first token of each text.

        Shorter prompts are padded on the right, and each text's logits are taken at its own end.
        """
        device = self.state.token.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        rows = [torch.tensor(prompt) for prompt in prompts]
        idx = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)
        if self.state.seen is not None:
            for seen, prompt in zip(self.state.seen, prompts, strict=True):
                seen[torch.tensor(prompt, device=device)] = True
        hidden = self.model.transformer(idx, self.cache)  # (B, T, C)
        self.cache.length.copy_(lengths)  # the pass has counted the padding, too
        self.choose_next(hidden[torch.arange(len(prompts)), lengths - 1])

    def refill(self, b: int, tokens: list[int]) -> None:
        """Make the cache of text b hold exactly these tokens."""
        row = self.cache.row(b)
        row.length.zero_()
        if tokens:
            self.model.transformer(torch.tensor([tokens], device=row.length.device), row)

    def advance(self) -> None:
        """Append the newest token of each text to the cache and choose the next one."""
        if not self.state.token.is_cuda:
            self.compute_step()
            return
        if self.graph is None:
            self.graph = self.record_step()
        self.graph.replay()

    def compute_step(self) -> None:
        """Compute one decoding step, without a CUDA graph."""
        hidden = self.model.transformer(self.state.token[:, None], self.cache)  # (B, 1, C)
        self.choose_next(hidden[:, 0])

    def choose_next(self, hidden: Tensor) -> None:
        """Choose the next token of each text from hidden, (B, C)."""
        vocab_size = self.model.config.vocab_size
        head_and_sample(hidden, self.model.lm_head, self.state, vocab_size, self.sampling)

    def start_copy(self) -> Callable[[], list[int]]:
        """Start to copy the newest tokens to the host. Returns a function that waits for them."""
        token = self.state.token
        if not token.is_cuda:
            tokens = token.tolist()
            return lambda: tokens
        host = torch.empty(token.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(token, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[int]:
            copied.synchronize()
            return host.tolist()

        return wait

    def record_step(self) -> torch.cuda.CUDAGraph:
        """Record one step as a CUDA graph. The state is afterwards as it was before."""
        state = [self.state.token, self.state.draw_index, self.cache.length]
        if self.state.seen is not None:
            state.append(self.state.seen)
        saved = [tensor.clone() for tensor in state]
        # Warm up, so that nothing is compiled or set up while recording. CUDA graphs want another
        # stream for that. Both steps start from the same state, because the cache may have room for
        # one token only.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.compute_step()
                for tensor, before in zip(state, saved, strict=True):
                    tensor.copy_(before)
        torch.cuda.current_stream().wait_stream(side)
        return record(self.compute_step)


# --------------------------------------------------------------------------------------------------
# The loop


@torch.no_grad()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seeds: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Yield a list with one new token id for each prompt, max_new_tokens times.

    prompts: lists of ids, which may differ in length.
    seeds: one for each prompt. A text depends on its prompt and its seed, not on the other texts.
    A text that reaches block_size continues from its last half, which is computed anew: positions
    are absolute in GPT-2, so cached keys cannot be moved.
    Raises UserError for an empty prompt and for one that is longer than block_size.
    """
    limit = model.config.block_size
    for prompt in prompts:
        if not 1 <= len(prompt) <= limit:
            raise UserError(f"a prompt has {len(prompt)} tokens; it needs 1 to block_size={limit}")
    if not prompts or max_new_tokens == 0:
        return
    texts = [[int(token) for token in prompt] for prompt in prompts]
    like = model.transformer.wte.weight
    longest = max(len(text) for text in texts)
    cache = KVCache.empty(model.config, len(texts), longest + max_new_tokens, like)
    if seeds is None:
        seeds = range(len(texts))
    draws = torch.stack([uniform_draws(seed, max_new_tokens) for seed in seeds])
    decoder = Decoder(model, cache, sampling or Sampling(), draws.to(like.device))
    decoder.read_prompts(texts)
    for remaining in range(max_new_tokens, 0, -1):
        wait_for_tokens = decoder.start_copy()
        full = [b for b, text in enumerate(texts) if len(text) == limit]
        # Each turn calls advance() once. Normally it does so before waiting, so that the device
        # computes the next tokens while the host hands out these. If a text is full, it does so
        # after waiting: the text is first cut to its last half, which ends with the newest token.
        if not full and remaining > 1:
            decoder.advance()
        new = wait_for_tokens()
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        if full and remaining > 1:
            for b in full:
                texts[b] = texts[b][-max(1, limit // 2) :]
                decoder.refill(b, texts[b][:-1])  # advance() appends the newest token
            decoder.advance()
        yield new


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """Return the new token ids of each prompt. Options as for `stream`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, **options):
        for text, token in zip(texts, new, strict=True):
            text.append(token)
    return texts


def decode_bytes(model: GPT) -> int:
    """Return the bytes of weights that one decoding step reads.

    The embedding tables are only looked up, but the head, which is tied to one, is read.
    """
    total = 0
    for module in (model.transformer.h, model.lm_head):
        for tensor in module.state_dict().values():
            total += tensor.numel() * tensor.element_size()
    return total


@torch.no_grad()
def store_by_columns(model: GPT) -> None:
    """Store the weights of all nn.Linear layers transposed in memory; values and shapes stay.

    A CPU reads a weight faster this way in a product with a single row, as in decoding.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
