"""gpt12/loader.py: each rank gets its windows, and a buffer is not overwritten while it is read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.shards import Tokens
from data.windows import TrainWindows
from gpt12.device import Machine
from gpt12.loader import Loader
from tests.helpers import CPU, write_shard


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_draw_every_window_of_an_epoch_once(tmp_path, world):
    """A step has the same windows with any number of ranks."""
    write_shard(tmp_path / "train_000000.bin", np.arange(48 * 5 + 5, dtype=np.uint16))
    windows = TrainWindows(Tokens.open(tmp_path, "train"), 5, seed=3)
    assert windows.per_epoch == 48
    loaders = []
    buffers = []
    for rank in range(world):
        x = torch.zeros(4 // world, 2, 5, dtype=torch.int64)  # 4 micro-batches of 2 in all
        y = torch.zeros_like(x)
        machine = Machine(CPU.device, CPU.dtype, compiled=False, rank=rank, world=world)
        loaders.append(Loader(windows, x, y, machine))
        buffers.append((x, y))
    for epoch in range(3):
        drawn: list[int] = []
        for position in range(epoch * 48, (epoch + 1) * 48, 8):
            for loader, (x, y) in zip(loaders, buffers, strict=True):
                assert loader.load(position) is None  # every position is a target
                assert torch.equal(y, x + 1)
            # Micro-batch m belongs to rank m % world.
            step = torch.stack([x for x, _ in buffers], dim=1).flatten()[::5].tolist()
            assert step == windows.starts(np.arange(position, position + 8)).tolist()
            drawn += step
        assert sorted(drawn) == [min(drawn) + i * 5 for i in range(48)]


def test_of_masked_data_the_examples_are_loaded_and_the_targets_of_a_micro_batch_counted(tmp_path):
    tokens = np.arange(4 * 5 + 1, dtype=np.uint16)
    mask = np.zeros(len(tokens), np.uint8)
    mask[5] = mask[7] = 2  # two examples in the second row
    mask[[6, 8, 9]] = 1  # with three targets
    write_shard(tmp_path / "train_000000.bin", tokens)
    write_shard(tmp_path / "train_mask_000000.bin", mask)
    windows = TrainWindows(Tokens.open(tmp_path, "train"), 5, seed=3)
    x = torch.zeros(4, 1, 5, dtype=torch.int64)  # each row is a micro-batch
    y = torch.zeros_like(x)
    starts = torch.zeros_like(x)
    counts = Loader(windows, x, y, CPU, starts).load(0)
    assert sorted(counts) == [0, 0, 0, 3]
    second = counts.index(3)
    assert y[second].tolist() == [[6, -1, 8, 9, -1]]
    assert starts[second].tolist() == [[0, 0, 2, 2, 2]]
    assert not starts[:second].any() and not starts[second + 1 :].any()


def test_a_batch_is_copied_without_waiting_only_on_cuda_where_an_event_marks_its_end(dataset):
    """A Mac's GPU would copy after the host has filled the buffer anew."""
    waits = []

    def copy(source, non_blocking):
        waits.append(not non_blocking)

    buffer = SimpleNamespace(shape=(1, 2, 8), copy_=copy)
    windows = TrainWindows(Tokens.open(dataset, "train"), 8, seed=3)
    Loader(windows, buffer, buffer, CPU).load(0)
    assert waits == [True, True]


def test_a_buffer_is_filled_again_only_after_the_gpu_has_copied_it(dataset, monkeypatch):
    """With two buffers, the third load waits for the copy of the first."""
    events = []

    class Event:
        def __init__(self):
            self.waited = False
            events.append(self)

        def record(self):
            pass

        def synchronize(self):
            self.waited = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    zeros = torch.zeros

    def unpinned_zeros(*shape, pin_memory=False, **more):  # pinning needs a GPU
        return zeros(*shape, **more)

    monkeypatch.setattr(torch, "zeros", unpinned_zeros)
    gpu = Machine(torch.device("cuda"), torch.bfloat16, compiled=False)
    windows = TrainWindows(Tokens.open(dataset, "train"), 8, seed=3)
    x = torch.zeros(1, 2, 8, dtype=torch.int64)
    loader = Loader(windows, x, torch.zeros_like(x), gpu)
    loader.load(0)
    loader.load(2)
    assert [event.waited for event in events] == [False, False]
    loader.load(4)
    assert [event.waited for event in events] == [True, False, False]
