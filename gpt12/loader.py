"""Bring training windows from the shards into the training step's buffers on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from data.windows import TrainWindows
from gpt12.device import Machine
from gpt12.loss import IGNORE_INDEX

BUFFERS = 2  # the host fills one while the GPU copies from the other


class Loader:
    """Loads the windows of a step. On a GPU the copy runs while the host goes on."""

    def __init__(
        self,
        windows: TrainWindows,
        x: Tensor,
        y: Tensor,
        machine: Machine,
        example_starts: Tensor | None = None,
    ):
        """x, y, and example_starts for instruction data: the step's buffers on the device.

        Each is (micro-steps, B, T) int64.
        """
        self.windows = windows
        self.on_device = [x, y]
        if example_starts is not None:
            self.on_device.append(example_starts)
        self.machine = machine
        # Page-locked memory, which the GPU can copy from without the host's help.
        shape = (BUFFERS, len(self.on_device), *x.shape)
        self.buffers = torch.zeros(shape, dtype=torch.int64, pin_memory=machine.on_gpu)
        self.copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self.turn = 0

    def load(self, position: int) -> list[int] | None:
        """Load the windows of the step that begins at `position`.

        Micro-batch m of a step belongs to rank m % world, so a step has the same windows with any
        number of ranks.
        The GPU may still be computing the previous step: the copy waits behind it in the stream.
        Returns the number of targets in each micro-batch, or None if every position is a target.
        """
        self.turn = (self.turn + 1) % BUFFERS
        event = self.copied[self.turn]
        if event is not None:
            event.synchronize()  # the GPU may still be reading this buffer
        on_host = self.buffers[self.turn]  # (arrays, micro-steps, B, T)
        _, micro_steps, batch_size, _ = on_host.shape
        for m in range(micro_steps):
            micro_batch = m * self.machine.world + self.machine.rank
            start = position + micro_batch * batch_size
            batch = self.windows.batch(start, batch_size)
            for buffer, array in zip(on_host, batch, strict=True):
                buffer[m].copy_(torch.from_numpy(array))
        # Only CUDA has events that tell when a copy is over. Other devices finish it in copy_().
        for device_buffer, host_buffer in zip(self.on_device, on_host, strict=True):
            device_buffer.copy_(host_buffer, non_blocking=self.machine.on_gpu)
        if self.machine.on_gpu:
            event = torch.cuda.Event()
            event.record()
            self.copied[self.turn] = event
        if self.windows.tokens.mask is None:
            return None
        targets = on_host[1]
        return (targets != IGNORE_INDEX).sum((1, 2)).tolist()
