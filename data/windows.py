"""Decide which tokens each training step and each evaluation sees.

The order of training is a pure function of a seed and a position, so resuming a run needs no saved
order. What an evaluation sees is always the same.

A batch is the windows' inputs and targets. For instruction data (a split with a mask) a third array
gives the example starts: for each input token, the index in its window of the first token of the
example that it belongs to. A window of such data holds whole examples (data/prepare.py).

B: windows in a batch. T: block_size, tokens in a window.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from data.shards import EXAMPLE_START, TRAINED, Tokens
from gpt12.errors import UserError

FEISTEL_ROUNDS = 6
# The target that the loss ignores, as in nanoGPT. gpt12/loss.py names it IGNORE_INDEX.
NOT_TRAINED = -1


class TrainWindows:
    """The training windows in the order in which they are drawn.

    A position is the number of windows drawn before. It does not depend on the batch size or on
    the number of ranks.

    An epoch has `per_epoch` windows and draws each once, in a random order of its own. They lie T
    tokens apart. The first begins at the epoch's phase, a random number of tokens below T. So each
    epoch cuts a text at other places. Examples are packed into windows of T tokens, so there the
    phase is always 0.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int) -> None:
        if len(tokens) < block_size + 1:
            raise UserError(
                f"The training split has {len(tokens):,} tokens, and block_size={block_size} needs "
                f"{block_size + 1:,}. Give it more text, or use at most "
                f"--block_size={max(1, len(tokens) - 1)}."
            )
        self.tokens = tokens
        self.block_size = block_size
        self.seed = seed
        targets = len(tokens) - 1
        greatest_phase = 0 if tokens.mask is not None else block_size - 1
        # All epochs have equally many windows, as many as fit behind the greatest phase. T=4 and
        # 11 targets: phases 0 to 3, 2 windows.
        self.per_epoch = max(1, (targets - greatest_phase) // block_size)
        # A text shorter than two windows has one, and so fewer phases.
        self._last_phase = min(greatest_phase, targets - self.per_epoch * block_size)

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """Return the index of the first token of the window at each position, int64."""
        epochs, indices = np.divmod(positions, self.per_epoch)
        starts = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            key = _epoch_key(self.seed, epoch)
            phase = key % (self._last_phase + 1)  # where the epoch's first window begins
            places = permute(indices[in_epoch], self.per_epoch, key)
            starts[in_epoch] = phase + places * self.block_size
        return starts

    def batch(self, position: int, count: int) -> tuple[np.ndarray, ...]:
        """Return inputs, targets and, for instruction data, example starts of `count` windows.

        They are the windows from `position` on, int64 (count, T) each. They may belong to several
        epochs.
        """
        starts = self.starts(np.arange(position, position + count))
        return _read_windows(self.tokens, starts, self.block_size)


class EvalWindows:
    """Fixed windows, T tokens apart, that hold every target of a split exactly once.

    The last window may be short; what it lacks is 0 and no target.
    """

    def __init__(self, tokens: Tokens, block_size: int) -> None:
        if len(tokens) < 2:
            raise UserError(
                f"{tokens.paths[0]} holds {len(tokens)} tokens, and predicting needs at least two. "
                "Give it more text."
            )
        self.tokens = tokens
        self.block_size = block_size
        targets = len(tokens) - 1
        self.count = (targets + block_size - 1) // block_size  # rounded up

    def choose(self, n: int) -> np.ndarray:
        """Return the indices of n windows spread over the split, ascending and always the same.

        n: more windows than there are means all.
        """
        first = np.arange(min(n, self.count))
        return np.sort(permute(first, self.count, key=0))

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return inputs, targets and, for instruction data, example starts of some windows.

        They are the windows at `indices`, int64 (len(indices), T) each.
        """
        starts = np.asarray(indices) * self.block_size
        return _read_windows(self.tokens, starts, self.block_size)


def _read_windows(tokens: Tokens, starts: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """Return the windows at `starts` and the same shifted by one, int64 (len(starts), length).

    Past the end of the split targets are NOT_TRAINED. If the split has a mask, so are those that
    it does not name, and the example starts are returned, too.
    """
    windows = tokens.gather(starts, length + 1)
    inputs = np.ascontiguousarray(windows[:, :-1])
    targets = np.ascontiguousarray(windows[:, 1:])
    indices = np.arange(length, dtype=np.int64)
    room = len(tokens) - 1 - starts  # targets from each start on
    targets[indices >= room[:, None]] = NOT_TRAINED
    if tokens.mask is None:
        return inputs, targets
    mask = tokens.mask.gather(starts, length + 1)
    targets = np.where(mask[:, 1:] & TRAINED, targets, NOT_TRAINED)
    is_start = mask[:, :-1] & EXAMPLE_START
    # Each token's example starts at the last start up to the token, or at 0 before the first.
    example_starts = np.maximum.accumulate(np.where(is_start, indices, 0), axis=1)
    return inputs, targets, example_starts


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return where a permutation of 0..size-1, chosen by `key`, sends each index, int64.

    No array of length `size` is needed: an index is encrypted by a Feistel network. It is split
    into two halves, high and low, and each round adds a hash of one half to the other. A round can
    be undone, so no two indices meet. The halves' ranges multiply to a little over `size`; a result
    outside is encrypted again until it lies inside (cycle walking; Black and Rogaway 2002).
    """
    high_range = math.isqrt(size - 1) + 1
    low_range = (size + high_range - 1) // high_range  # rounded up
    digest = hashlib.sha512(str(key).encode()).digest()
    round_keys = np.frombuffer(digest, "<u8")[:FEISTEL_ROUNDS]
    image = indices.astype(np.uint64)
    outside = np.arange(len(image))  # the places in `image` that need another encryption
    while len(outside) > 0:
        image[outside] = _encrypt(image[outside], high_range, low_range, round_keys)
        outside = outside[image[outside] >= size]
    return image.astype(np.int64)


def _encrypt(
    numbers: np.ndarray, high_range: int, low_range: int, round_keys: np.ndarray
) -> np.ndarray:
    """Encrypt uint64 numbers below high_range * low_range by a Feistel network."""
    high, low = np.divmod(numbers, np.uint64(low_range))
    for number, round_key in enumerate(round_keys):
        if number % 2 == 0:
            low = (low + _mix(high, round_key)) % np.uint64(low_range)
        else:
            high = (high + _mix(low, round_key)) % np.uint64(high_range)
    return high * np.uint64(low_range) + low


def _mix(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """Hash uint64 numbers and a key to numbers below 2^62.

    This is MurmurHash3's finalizer (fmix64; Appleby 2011) with another last step: it keeps 62 bits,
    so that adding a half to a hash does not overflow.
    """
    mixed = numbers ^ key
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(multiplier)
    return mixed >> np.uint64(2)


def _epoch_key(seed: int, epoch: int) -> int:
    """Hash a seed and an epoch to the 64-bit number that chooses the epoch's phase and order."""
    digest = hashlib.sha256(repr((seed, epoch)).encode()).digest()
    return int.from_bytes(digest[:8], "little")
