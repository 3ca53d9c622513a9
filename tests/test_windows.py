"""The order of training windows and the cover of evaluation windows, counted one by one."""

from pathlib import Path

import numpy as np
import pytest

from data.shards import UINT8, UINT16, Tokens
from data.windows import EvalWindows, TrainWindows, permute
from tests.helpers import refused, write_shard

pytestmark = pytest.mark.usefixtures("here")


def split(size, mask=None, folder="."):
    """Tokens 0, 1, 2, ... in three shards: each says where it stands."""
    ids = np.arange(size, dtype=UINT16)
    for i, part in enumerate(np.array_split(ids, 3)):
        write_shard(f"{folder}/train_{i:06d}.bin", part)
        if mask is not None:
            write_shard(f"{folder}/train_mask_{i:06d}.bin", np.array(mask, UINT8)[part])
    return Tokens(Path(folder), "train")


@pytest.mark.parametrize("size", [*range(1, 20), 255, 256, 257, 99991])
def test_permute_sends_every_index_to_another_place(size):
    for key in (0, 1, 2**64 - 1):
        image = permute(np.arange(size), size, key)
        assert np.array_equal(np.sort(image), np.arange(size))
        np.testing.assert_array_equal(permute(np.arange(size)[::-3], size, key), image[::-3])


def test_permute_looks_random():
    """Over many keys each index goes to each place about equally often, and so do neighbours.

    Both are chi-square tests, with 81 and 8 degrees of freedom and limits far in the tail.
    """
    images = np.array([permute(np.arange(10), 10, key) for key in range(1500)])
    counts = np.array([np.bincount(column, minlength=10) for column in images.T])
    assert ((counts - 150) ** 2 / 150).sum() < 150
    steps = np.bincount((images[:, 1] - images[:, 0]) % 10, minlength=10)[1:]
    assert ((steps - 1500 / 9) ** 2 / (1500 / 9)).sum() < 30


@pytest.mark.parametrize(
    "size, block",
    [(9, 8), (16, 8), (17, 8), (24, 8), (1003, 8), (640, 1)],
)
def test_an_epoch_draws_every_window_once(size, block):
    windows = TrainWindows(split(size), block, seed=1)
    ranks = set()
    phases = set()
    for epoch in range(40):
        x, y = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        np.testing.assert_array_equal(x, x[:, :1] + np.arange(block))
        np.testing.assert_array_equal(y, x + 1)
        phase = x.min()
        assert sorted(x[:, 0]) == [phase + i * block for i in range(windows.per_epoch)]
        assert x.dtype == y.dtype == np.int64
        ranks.add(tuple(np.argsort(x[:, 0])))
        phases.add(phase)
    assert phases == set(range(min(block, size - windows.per_epoch * block)))
    # All windows that fit are drawn, but for less than two blocks at the ends.
    assert size - windows.per_epoch * block <= 2 * block
    assert len(ranks) == 40 or windows.per_epoch <= 20


def test_a_position_means_the_same_window_at_every_batch_size():
    windows = TrainWindows(split(200), 8, seed=3)
    one_by_one = np.concatenate([windows.batch(i, 1)[0] for i in range(120)])
    # Most batches below span two epochs, and the largest one spans six.
    assert windows.per_epoch == 24
    for size in (2, 5, 7, 40, 120):
        batches = np.concatenate([windows.batch(i, size)[0] for i in range(0, 120, size)])[:120]
        np.testing.assert_array_equal(batches, one_by_one)
    far = 10**15
    np.testing.assert_array_equal(windows.batch(far, 3)[0][2], windows.batch(far + 2, 1)[0][0])


def test_the_tokens_of_a_packed_window_know_where_their_example_starts():
    """Marked by 2 in the mask, at any place in the row, and across the borders of shards."""
    firsts = {0, 3, 4, 8, 17, 23, 25}
    mask = [2 if i in firsts else i % 2 for i in range(27)]
    tokens = split(27, mask)
    evaluation = EvalWindows(tokens, 8)
    trained = TrainWindows(tokens, 8, seed=0).batch(0, 3)
    for batch in (trained, evaluation.batch(evaluation.choose(evaluation.count))):
        for x, y, starts in zip(*batch, strict=True):
            length = min(8, 26 - x[0])  # the last window of an evaluation is short
            for t in range(length):
                before = [first - x[0] for first in firsts if x[0] <= first <= x[t]]
                assert starts[t] == max(before, default=0)
                assert y[t] == (x[t] + 1 if mask[x[t] + 1] == 1 else -1)


@pytest.mark.parametrize("size", [2, 8, 9, 10, 101])
def test_evaluation_covers_every_target_once(size):
    windows = EvalWindows(split(size), 8)
    everything = np.arange(windows.count)
    for count in (windows.count, windows.count + 1):
        assert windows.choose(count).tolist() == everything.tolist()
    for order in (everything, everything[::-1]):
        x, y = windows.batch(order)
        assert x.shape == y.shape == (windows.count, 8)
        assert sorted(y[y >= 0]) == list(range(1, size))
        np.testing.assert_array_equal(x[y >= 0], y[y >= 0] - 1)


def test_chosen_evaluation_windows_are_fixed_and_spread_over_the_split():
    windows = EvalWindows(split(8001), 8)
    few = windows.choose(20).tolist()
    more = windows.choose(100).tolist()
    assert few == sorted(set(few)) == windows.choose(20).tolist() and len(few) == 20
    assert set(few) < set(more)
    assert min(more) < 50 and max(more) > 950


def test_too_little_text_names_the_largest_block_size_that_fits():
    tokens = split(8)
    assert TrainWindows(tokens, 7, 0).per_epoch == 1
    refused("at most --block_size=7", TrainWindows, tokens, 8, 0)
    one = split(1, folder="one")
    refused("more text", TrainWindows, one, 8, 0)
    refused("holds 1 tokens", EvalWindows, one, 8)


def test_the_order_for_a_seed_never_changes():
    """A later version that resumes a run has to draw the same windows as this one."""
    windows = TrainWindows(split(1000), 8, seed=1337)
    assert windows.starts(np.arange(6)).tolist() == [754, 10, 394, 522, 338, 946]
    assert windows.starts(np.array([123, 124, 5000, 10**12])).tolist() == [762, 910, 367, 39]
    assert EvalWindows(windows.tokens, 8).choose(6).tolist() == [12, 14, 41, 60, 63, 105]
