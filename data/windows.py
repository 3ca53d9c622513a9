"""Which tokens a step sees: pure functions of a seed and a position, so that resuming is arithmetic.

B windows in a batch, T = block_size tokens in a window. Targets are the inputs shifted by one; -1 is a target that is
not trained.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from data.shards import Tokens
from gpt12.errors import UserError

ROUNDS = 6
IGNORE = -1


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each index goes in a permutation of [0, size) that `key` picks, computed without an array of that size.

    A Feistel network over pairs (i // b, i % b) with a*b just over `size`: every round adds to one half, modulo its
    range, a hash of the other, which can be undone and so is a bijection. An index sent outside [0, size) is sent on
    until it falls inside (cycle walking; Black and Rogaway 2002), which keeps it one.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = np.frombuffer(hashlib.sha512(str(key).encode()).digest(), "<u8")[:ROUNDS]
    out = index.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        high, low = np.divmod(out[walking], np.uint64(b))
        for i, k in enumerate(keys):
            if i % 2:
                high = (high + _mix(low, k)) % np.uint64(a)
            else:
                low = (low + _mix(high, k)) % np.uint64(b)
        out[walking] = high * np.uint64(b) + low
        walking = walking[out[walking] >= size]
    return out.astype(np.int64)


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of x and key below 2^62, by the finalizer of MurmurHash3 (fmix64; Appleby 2011)."""
    x = x ^ key
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(multiplier)
    return x >> np.uint64(2)


def _hash(*words: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little")


def _inputs_and_targets(tokens: Tokens, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y, int64 (len(starts), length); y is -1 where the split's mask is 0."""
    window = tokens.gather(starts, length + 1).astype(np.int64)
    x, y = window[:, :-1], window[:, 1:]
    if tokens.mask is not None:
        y = np.where(tokens.mask.gather(starts + 1, length), y, IGNORE)
    return np.ascontiguousarray(x), np.ascontiguousarray(y)


class TrainWindows:
    """The training windows in the order they are drawn. A position is the number of windows drawn before.

    An epoch has `per_epoch` windows, every one drawn once: stride T from a phase below T that the epoch picks, in an
    order it picks. Packed instruction data (a split with a mask) are rows of T tokens, without a phase.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int):
        if len(tokens) < block_size + 1:
            raise UserError(
                f"The training split has {len(tokens):,} tokens, and block_size={block_size} needs {block_size + 1:,}: "
                "give it more text" + (f", or use --block_size={len(tokens) - 1} at most." if len(tokens) > 1 else ".")
            )
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        if tokens.mask is not None:
            self.per_epoch, self._phases = (len(tokens) - 1) // block_size, 1
        else:
            self.per_epoch = max(1, (len(tokens) - block_size) // block_size)
            self._phases = min(block_size, len(tokens) - self.per_epoch * block_size)

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """The first token of the window at each position, int64."""
        epochs, index = np.divmod(positions, self.per_epoch)
        starts = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            key, here = _hash(self.seed, epoch), epochs == epoch
            starts[here] = permute(index[here], self.per_epoch, key) * self.block_size + key % self._phases
        return starts

    def batch(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """x and y, int64 (count, T), of the `count` windows from `position` on; they may span epochs."""
        return _inputs_and_targets(self.tokens, self.starts(np.arange(position, position + count)), self.block_size)


class EvalWindows:
    """Fixed windows of stride T that have every target of a split once; the last may be short, and is padded."""

    def __init__(self, tokens: Tokens, block_size: int):
        if len(tokens) < 2:
            raise UserError(
                f"{tokens.paths[0]} holds {len(tokens)} tokens; two are needed to predict one. Give it more text."
            )
        self.tokens, self.block_size = tokens, block_size
        self.count = -(-(len(tokens) - 1) // block_size)

    def choose(self, n: int) -> np.ndarray:
        """The indices of n windows spread over the split, always the same, ascending; 0 or too many means all."""
        if n == 0 or n >= self.count:
            return np.arange(self.count)
        return np.sort(permute(np.arange(n), self.count, key=0))

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x and y, int64 (len(indices), T), padded with 0 and -1."""
        x = np.zeros((len(indices), self.block_size), np.int64)
        y = np.full_like(x, IGNORE)
        starts = np.asarray(indices) * self.block_size
        lengths = np.minimum(self.block_size, len(self.tokens) - 1 - starts)
        for length in np.unique(lengths).tolist():
            rows = lengths == length
            x[rows, :length], y[rows, :length] = _inputs_and_targets(self.tokens, starts[rows], length)
        return x, y
