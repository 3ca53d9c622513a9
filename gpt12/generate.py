"""Write text: choose tokens, keep the keys and values of past tokens, run the decoding loop.

    for ids in stream(model, prompts, SampleConfig(top_k=50)):   # one new id for each prompt
    texts = generate(model, prompts, top_k=50)                   # all new ids at the end

In one step the newest token of each text goes through the model. Its layers add the token's keys
and values to the cache and read those of all tokens before it there, so that nothing is computed
twice. The last layer's output gives a logit for each id, and from these the next token is drawn.

Reading order: how a token is chosen (sample_token), the cache (KVCache), one decoding step
(Decoder), the loop (stream), and from ids to shown text (TextStream).

Shapes: B texts, T new tokens of each text, S slots of the cache, C channels, V vocabulary.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt12.device import record
from gpt12.settings import SampleConfig
from model import GPT

# Attention kernels would copy a mask whose rows are no multiple of 16 bytes, once a layer.
SLOTS_MULTIPLE = 64
ALMOST_GREEDY = 1e-5  # temperatures below this choose like 0, and dividing by them may overflow
LARGEST_DRAW = 1 - 1e-6  # so that a sum's rounding cannot lead past the last candidate


# --------------------------------------------------------------------------------------------------
# Choosing a token


def sample_token(
    logits: Tensor, draw: Tensor, config: SampleConfig, seen: Tensor | None = None
) -> Tensor:
    """Choose one token id for each row.

    logits: (B, V). draw: (B,) uniform in [0, LARGEST_DRAW]. seen: (B, V) bool, the tokens that each
    text already contains. Returns (B,) int64.
    The same logits and the same draw give the same token, whatever the other rows are.
    """
    if seen is not None:
        # Keskar et al. 2019, arXiv:1909.05858, section 4.1.
        logits = logits.float()
        penalty = config.repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalized, logits)
    if config.temperature < ALMOST_GREEDY:
        return logits.argmax(dim=1)
    k = min(config.top_k or logits.size(1), logits.size(1))
    # Select in the logits' own dtype and without sorting, which is faster. Only top_p needs order.
    scores, ids = logits.topk(k, sorted=config.top_p < 1)
    probs = (scores.float() / config.temperature).softmax(dim=1)  # (B, k)
    allowed = probs  # min_p and top_p look at the probabilities among the top k
    if config.min_p > 0:  # Nguyen et al. 2024, arXiv:2407.01082, section 3
        least = config.min_p * probs.amax(dim=1, keepdim=True)
        allowed = allowed.masked_fill(probs < least, 0)
    if config.top_p < 1:  # nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751, section 3.1
        more_likely = probs.cumsum(dim=1) - probs  # the probability of all tokens before this one
        allowed = allowed.masked_fill(more_likely >= config.top_p, 0)
    # Invert the cumulative distribution.
    cumulative = allowed.cumsum(dim=1)
    target = draw[:, None] * cumulative[:, -1:]
    # Weights that are not finite give no order at all, and must not end the run here.
    chosen = torch.searchsorted(cumulative, target, right=True).clamp_(max=k - 1)
    return ids.gather(1, chosen)[:, 0]


def uniform_draws(seed: int, count: int) -> Tensor:
    """Return (count,) numbers from 0 to LARGEST_DRAW that depend on the seed alone.

    They are drawn on the CPU, so that they are the same for every device.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    return LARGEST_DRAW * torch.rand(count, generator=generator)


# --------------------------------------------------------------------------------------------------
# The cache of keys and values


class KVCache:
    """What the layers keep of past tokens of B texts: their keys and values.

    The memory has a fixed number of slots for each text, one for each position. Each text has its
    own length. What lies in slots past it is overwritten as the text grows; until then
    Transformer.sees hides them, because they are later than the newest token.

    A forward pass calls take_positions() once, then each layer calls extend().
    """

    def __init__(self, texts: int, slots: int, device: torch.device):
        """slots: at least this many for each text."""
        rounded = (slots + SLOTS_MULTIPLE - 1) // SLOTS_MULTIPLE * SLOTS_MULTIPLE
        self.slots = torch.arange(rounded, device=device)[None]  # (1, S), the positions
        # (B, 1), where each text's slots begin if all are counted as one row
        self.first_slot = rounded * torch.arange(texts, device=device)[:, None]
        self.length = torch.zeros(texts, dtype=torch.int64, device=device)  # (B,), tokens stored
        # Of the forward pass under way: where its tokens go, (B * T,), and the layer whose turn it
        # is. Slot s of text b is row b * S + s.
        self.new_slots = self.length
        self.layer = 0
        # (B, S, ...) for each layer, made from what the layers give in the first pass.
        self.kept: list[Tensor] = []

    def take_positions(self, T: int) -> Tensor:
        """Begin a forward pass over T more tokens of each text; return their positions, (B, T)."""
        position = self.length[:, None] + self.slots[:, :T]
        self.new_slots = (self.first_slot + position).flatten()
        self.length.add_(T)
        self.layer = 0
        return position

    def extend(self, new: Tensor) -> Tensor:
        """Store what the next layer keeps of the new tokens, (B, T, ...).

        Returns what it keeps of all tokens, (B, S, ...). Layers call this in the same order in
        every forward pass.
        """
        if self.layer == len(self.kept):
            shape = (len(new), self.slots.size(1), *new.shape[2:])
            self.kept.append(new.new_zeros(shape))
        kept = self.kept[self.layer]
        # Indexing with rows and positions would need a slower kernel.
        kept.flatten(0, 1).index_copy_(0, self.new_slots, new.flatten(0, 1))
        self.layer += 1
        return kept


def refill(model: GPT, cache: KVCache, b: int, tokens: list[int]) -> None:
    """Make the cache of text b hold exactly these tokens, when the text has filled its context."""
    alone = KVCache(1, cache.slots.size(1), cache.slots.device)
    if tokens:
        model.transformer(torch.tensor([tokens], device=cache.slots.device), alone)
    for kept, new in zip(cache.kept, alone.kept):
        kept[b] = new[0]
    cache.length[b] = len(tokens)


# --------------------------------------------------------------------------------------------------
# One decoding step


class Decoder:
    """Advance B texts by one token at a time.

    A step reads and writes tensors in place and never waits for the device.
    """

    def __init__(self, model: GPT, cache: KVCache, config: SampleConfig, draws: Tensor):
        """draws: (B, max_new_tokens), on the model's device; see sample_token."""
        B = len(draws)
        self.model = model
        self.cache = cache
        self.config = config
        self.draws = draws
        self.draw_index = torch.zeros(1, dtype=torch.int64, device=draws.device)  # the next column
        self.token = torch.zeros(B, dtype=torch.int64, device=draws.device)  # newest of each text
        self.seen: Tensor | None = None  # (B, vocab_size), the tokens of each text
        if config.repetition_penalty != 1:
            self.seen = draws.new_zeros((B, model.config.vocab_size), dtype=torch.bool)

    def read_prompts(self, prompts: list[list[int]]) -> None:
        """Run the prompts through the model in one pass and choose the first token of each text.

        Shorter prompts are padded on the right, and each text's logits are taken at its own end.
        """
        device = self.token.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        rows = [torch.tensor(prompt) for prompt in prompts]
        idx = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)
        if self.seen is not None:
            for seen, prompt in zip(self.seen, prompts, strict=True):
                seen[torch.tensor(prompt, device=device)] = True
        hidden = self.model.transformer(idx, self.cache)  # (B, T, C)
        self.cache.length.copy_(lengths)  # the pass has counted the padding, too
        self.choose_next(hidden[torch.arange(len(prompts)), lengths - 1])

    def advance(self) -> None:
        """Append the newest token of each text to the cache and choose the next one."""
        hidden = self.model.transformer(self.token[:, None], self.cache)  # (B, 1, C)
        self.choose_next(hidden[:, 0])

    def choose_next(self, hidden: Tensor) -> None:
        """Choose the next token of each text from its last hidden state (B, C), and store it."""
        draw = self.draws.index_select(1, self.draw_index)[:, 0]
        self.draw_index.add_(1)
        logits = self.model.logits(hidden)
        self.token.copy_(sample_token(logits, draw, self.config, self.seen))
        if self.seen is not None:
            self.seen.scatter_(1, self.token[:, None], True)


# --------------------------------------------------------------------------------------------------
# The loop


@torch.no_grad()
def stream(
    model: GPT, prompts: Sequence[Sequence[int]], config: SampleConfig
) -> Iterator[list[int]]:
    """Yield a list with one new token id for each prompt, max_new_tokens times.

    prompts: lists of 1 to block_size ids, which may differ in length.
    config: max_new_tokens, seed, and the keys that choose a token (temperature, top_k ...) count.
    A text depends on its prompt, its place among the prompts and the seed, not on other texts.
    A text that fills the context goes on with its last half, which is computed anew: positions are
    absolute in GPT-2, so cached keys cannot be moved.
    """
    limit = model.config.block_size
    max_new_tokens = config.max_new_tokens
    texts = [list(prompt) for prompt in prompts]
    device = model.transformer.wte.weight.device
    on_gpu = device.type == "cuda"
    longest = max(len(text) for text in texts)
    cache = KVCache(len(texts), min(longest + max_new_tokens, limit), device)
    # Far apart, so that no two texts of different seeds share their random numbers.
    seeds = [config.seed * 1_000_003 + b for b in range(len(texts))]
    draws = torch.stack([uniform_draws(seed, max_new_tokens) for seed in seeds])
    decoder = Decoder(model, cache, config, draws.to(device))
    advance = decoder.advance
    decoder.read_prompts(texts)
    for step in range(1, max_new_tokens + 1):
        # The device computes the next tokens while the host hands out the newest ones.
        # decoder.token holds the newest ones; `texts` and the cache hold all tokens before them.
        newest = decoder.token.to("cpu", copy=True, non_blocking=on_gpu)
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        if step < max_new_tokens:
            for b, text in enumerate(texts):
                if len(text) == limit:  # no place for the newest token
                    keep = max(0, limit // 2 - 1)  # the newest token makes it half a context
                    texts[b] = text[limit - keep :]
                    refill(model, cache, b, texts[b])
            if step == 2 and on_gpu:  # the first step has set up what cannot be recorded
                advance = record(decoder.advance).replay
            advance()
        if copied is not None:
            copied.synchronize()
        tokens = newest.tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        yield tokens


def generate(model: GPT, prompts: Sequence[Sequence[int]], **keys: Any) -> list[list[int]]:
    """Return the new token ids of each prompt. keys: of SampleConfig, see `stream`."""
    steps = list(stream(model, prompts, SampleConfig(**keys)))
    return [[step[b] for step in steps] for b in range(len(prompts))]


# --------------------------------------------------------------------------------------------------
# For sample.py and bench.py on a CPU


@torch.no_grad()
def store_by_columns(model: GPT) -> None:
    """Store the weights of all nn.Linear layers transposed in memory; values and shapes stay.

    A CPU reads a weight faster this way in a product with a single row, as in decoding.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


# --------------------------------------------------------------------------------------------------
# From ids to shown text


class TextStream:
    """One text in the making.

    Characters whose bytes are spread over several tokens are held back until they are complete, and
    so is a possible beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        """tokenizer: one of data/tokenizers.py. stops: the text ends before the first of these."""
        self.tokenizer = tokenizer
        self.stops = stops
        self.ids: list[int] = []  # all tokens, including those of a stop string
        self.shown = ""  # the text so far
        self.finish_reason: str | None = None  # "stop", "end" (end-of-text token) or "length"
        self._held = ""  # decoded, but not shown yet
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Take the next token and return the text that can be shown now."""
        if self.finish_reason is not None:
            return ""
        if token in self.tokenizer.end_ids:
            return self.finish("end")
        self.ids.append(token)
        self._held += self._decoder.decode(self.tokenizer.token_bytes(token))
        found = [self._held.find(stop) for stop in self.stops if stop in self._held]
        if found:
            self._held = self._held[: min(found)]
            return self.finish("stop")
        return self._show(len(self._held) - self._length_of_possible_stop())

    def finish(self, reason: str) -> str:
        """End the text, if it has not ended yet, and return what was held back."""
        if self.finish_reason is not None:
            return ""
        self.finish_reason = reason
        if reason != "stop":
            self._held += self._decoder.decode(b"", final=True)
        return self._show(len(self._held))

    def _length_of_possible_stop(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        lengths = [0]
        for stop in self.stops:
            lengths += [n for n in range(len(stop)) if self._held.endswith(stop[:n])]
        return max(lengths)

    def _show(self, length: int) -> str:
        new = self._held[:length]
        self._held = self._held[length:]
        self.shown += new
        return new
