"""Bring training windows from the shards into the training step's buffers on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from data.windows import TrainWindows
from gpt12.device import Machine
from gpt12.loss import IGNORE_INDEX


class Loader:
    """Loads the windows of a step. On a GPU the copy runs while the host goes on."""

    def __init__(self, windows: TrainWindows, batch: Tensor, machine: Machine):
        """batch: the step's arrays on the device, (arrays, micro-steps, B, T) int64.

        Inputs, targets, and for instruction data the starts of examples.
        """
        self.windows = windows
        self.on_device = batch
        self.machine = machine
        # Page-locked memory, which the GPU can copy from without the host's help.
        self.on_host = torch.zeros(batch.shape, dtype=torch.int64, pin_memory=machine.on_gpu)
        # Only CUDA has events that tell when a copy is over. Other devices finish it in copy_().
        self.copied = torch.cuda.Event() if machine.on_gpu else None

    def load(self, position: int) -> list[int] | None:
        """Load the windows of the step that begins at `position`.

        Micro-batch m of a step belongs to rank m % world, so a step has the same windows with any
        number of ranks.
        The GPU may still be computing the previous step: the copy waits behind it in the stream.
        Returns the number of targets in each micro-batch, or None if every position is a target.
        """
        if self.copied is not None:
            self.copied.synchronize()  # the GPU may still be reading the host's array
        _, micro_steps, batch_size, _ = self.on_host.shape
        for m in range(micro_steps):
            micro_batch = m * self.machine.world + self.machine.rank
            arrays = self.windows.batch(position + micro_batch * batch_size, batch_size)
            for buffer, array in zip(self.on_host[:, m], arrays, strict=True):
                buffer.copy_(torch.from_numpy(array))
        self.on_device.copy_(self.on_host, non_blocking=self.machine.on_gpu)
        if self.copied is not None:
            self.copied.record()
        if self.windows.tokens.mask is None:
            return None
        return (self.on_host[1] != IGNORE_INDEX).sum((1, 2)).tolist()
