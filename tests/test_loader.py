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
    for rank in range(world):
        machine = Machine(CPU.device, CPU.dtype, compiled=False, rank=rank, world=world)
        batch = torch.zeros(2, 4 // world, 2, 5, dtype=torch.int64)  # 4 micro-batches of 2 in all
        loaders.append(Loader(windows, batch, machine))
    for epoch in range(3):
        drawn: list[int] = []
        for position in range(epoch * 48, (epoch + 1) * 48, 8):
            # Every position is a target.
            assert {loader.load(position) for loader in loaders} == {None}
            # Micro-batch m belongs to rank m % world.
            x, y = torch.stack([loader.on_device for loader in loaders], dim=2)
            assert torch.equal(y, x + 1)
            step = x.flatten()[::5].tolist()
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
    batch = torch.zeros(3, 4, 1, 5, dtype=torch.int64)  # each row is a micro-batch
    counts = Loader(windows, batch, CPU).load(0)
    assert sorted(counts) == [0, 0, 0, 3]
    second = counts.index(3)
    _, y, starts = batch
    assert y[second].tolist() == [[6, -1, 8, 9, -1]]
    assert starts[second].tolist() == [[0, 0, 2, 2, 2]]
    assert not starts[:second].any() and not starts[second + 1 :].any()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_host_waits_for_a_copy_and_on_cuda_only_before_it_fills_the_array_anew(
    dataset, monkeypatch, on_gpu
):
    """A Mac's GPU would copy after the host has filled the array: its copies are waited for."""
    calls = []

    class Event:
        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Machine, "on_gpu", on_gpu)
    zeros = torch.zeros

    def unpinned_zeros(*shape, pin_memory, **more):  # pinning needs a GPU
        return zeros(*shape, **more)

    monkeypatch.setattr(torch, "zeros", unpinned_zeros)
    windows = TrainWindows(Tokens.open(dataset, "train"), 8, seed=3)
    batch = windows.batch
    monkeypatch.setattr(windows, "batch", lambda *at: calls.append("fill") or batch(*at))
    device = SimpleNamespace(
        shape=(2, 1, 2, 8),
        copy_=lambda source, non_blocking: calls.append(("copy", non_blocking)),
    )
    loader = Loader(windows, device, CPU)
    loader.load(0)
    loader.load(2)
    if on_gpu:
        assert calls == ["wait", "fill", ("copy", True), "record"] * 2
    else:
        assert calls == ["fill", ("copy", False)] * 2
