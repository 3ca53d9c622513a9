"""The order of training windows and the cover of evaluation windows, counted one by one."""

import numpy as np
import pytest

from data.shards import UINT8, UINT16, Tokens
from data.windows import EvalWindows, TrainWindows, permute
from gpt12.errors import UserError
from tests.helpers import write_shard


def split(folder, size, shard=100, mask=None):
    """Tokens 0, 1, 2, ...: each says where it stands."""
    ids = np.arange(size, dtype=UINT16)
    for i, start in enumerate(range(0, size, shard)):
        write_shard(folder / f"train_{i:06d}.bin", ids[start : start + shard])
        if mask is not None:
            part = np.array(mask[start : start + shard], UINT8)
            write_shard(folder / f"train_mask_{i:06d}.bin", part)
    return Tokens(folder, "train")


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
def test_an_epoch_draws_every_window_once(tmp_path, size, block):
    windows = TrainWindows(split(tmp_path, size), block, seed=1)
    orders = []
    phases = set()
    for epoch in range(40):
        x, y = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        np.testing.assert_array_equal(x, x[:, :1] + np.arange(block))
        np.testing.assert_array_equal(y, x + 1)
        phase = x.min()
        assert sorted(x[:, 0]) == [phase + i * block for i in range(windows.per_epoch)]
        assert x.dtype == y.dtype == np.int64
        orders.append(x[:, 0].tolist())
        phases.add(phase)
    assert phases <= set(range(block))
    assert len(phases) == min(block, size - windows.per_epoch * block)
    # All windows that fit are drawn, but for less than two blocks at the ends.
    assert size - windows.per_epoch * block <= 2 * block
    if windows.per_epoch > 20:
        ranks = {tuple(np.argsort(order)) for order in orders}
        assert len(ranks) == 40


def test_a_position_means_the_same_window_at_every_batch_size(tmp_path):
    windows = TrainWindows(split(tmp_path, 200), 8, seed=3)
    one_by_one = np.concatenate([windows.batch(i, 1)[0] for i in range(120)])
    # Most batches below span two epochs, and the largest one spans six.
    assert windows.per_epoch == 24
    for size in (2, 5, 7, 40, 120):
        batches = np.concatenate([windows.batch(i, size)[0] for i in range(0, 120, size)])[:120]
        np.testing.assert_array_equal(batches, one_by_one)
    far = 10**15
    np.testing.assert_array_equal(windows.batch(far, 3)[0][2], windows.batch(far + 2, 1)[0][0])


def test_the_tokens_of_a_packed_window_know_where_their_example_starts(tmp_path):
    """Marked by 2 in the mask, at any place in the row, and across the borders of shards."""
    firsts = {0, 3, 4, 8, 17, 23, 25}
    mask = [2 if i in firsts else i % 2 for i in range(27)]
    tokens = split(tmp_path, 27, shard=10, mask=mask)
    for windows in (TrainWindows(tokens, 8, seed=0), EvalWindows(tokens, 8)):
        if isinstance(windows, TrainWindows):
            batch = windows.batch(0, 3)
        else:
            batch = windows.batch(windows.choose(windows.count))
        for x, y, starts in zip(*batch, strict=True):
            length = min(8, 26 - x[0])  # the last window of an evaluation is short
            for t in range(length):
                before = [first - x[0] for first in firsts if x[0] <= first <= x[t]]
                assert starts[t] == max(before, default=0)
                assert y[t] == (x[t] + 1 if mask[x[t] + 1] == 1 else -1)


@pytest.mark.parametrize("size", [2, 8, 9, 10, 101])
def test_evaluation_covers_every_target_once(tmp_path, size):
    windows = EvalWindows(split(tmp_path, size), 8)
    everything = list(range(windows.count))
    assert windows.choose(windows.count).tolist() == everything
    assert windows.choose(windows.count + 1).tolist() == everything
    for order in (np.arange(windows.count), np.arange(windows.count)[::-1]):
        x, y = windows.batch(order)
        assert x.shape == y.shape == (windows.count, 8)
        assert sorted(y[y >= 0]) == list(range(1, size))
        np.testing.assert_array_equal(x[y >= 0], y[y >= 0] - 1)


def test_chosen_evaluation_windows_are_fixed_and_spread_over_the_split(tmp_path):
    windows = EvalWindows(split(tmp_path, 8001), 8)
    few = windows.choose(20).tolist()
    more = windows.choose(100).tolist()
    assert few == sorted(set(few)) == windows.choose(20).tolist() and len(few) == 20
    assert set(few) < set(more)
    assert min(more) < 50 and max(more) > 950


def test_too_little_text_names_the_largest_block_size_that_fits(tmp_path):
    tokens = split(tmp_path, 8)
    assert TrainWindows(tokens, 7, 0).per_epoch == 1
    with pytest.raises(UserError, match="at most --block_size=7"):
        TrainWindows(tokens, 8, 0)
    (tmp_path / "one").mkdir()
    with pytest.raises(UserError, match="more text"):
        TrainWindows(split(tmp_path / "one", 1), 8, 0)
    with pytest.raises(UserError, match="holds 1 tokens"):
        EvalWindows(split(tmp_path / "one", 1), 8)


def test_the_order_for_a_seed_never_changes(tmp_path):
    """A later version that resumes a run has to draw the same windows as this one."""
    windows = TrainWindows(split(tmp_path, 1000), 8, seed=1337)
    assert windows.starts(np.arange(6)).tolist() == [754, 10, 394, 522, 338, 946]
    assert windows.starts(np.array([123, 124, 5000, 10**12])).tolist() == [762, 910, 367, 39]
    assert EvalWindows(windows.tokens, 8).choose(6).tolist() == [12, 14, 41, 60, 63, 105]
