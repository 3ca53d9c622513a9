"""Measure training time: evaluation, saving and compiling do not count."""

from __future__ import annotations

import time

from gpt12.device import Machine


class Clock:
    """Counts seconds and steps of training. Starting and stopping wait for the device."""

    def __init__(self, machine: Machine, total: float):
        """total: seconds of training before this process, when a run is resumed."""
        self.machine = machine
        self.total = total
        self.lap_seconds = 0.0
        self.lap_steps = 0
        self._running_since: float | None = None

    @property
    def running(self) -> bool:
        """Tell whether time counts now."""
        return self._running_since is not None

    def start(self) -> None:
        """Let time count from now on."""
        self.machine.synchronize()
        self._running_since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting, if the clock runs."""
        if self.running:
            self.machine.synchronize()
            self._take()
            self._running_since = None

    def count_step(self) -> None:
        """Count a finished step, if the clock runs."""
        if self.running:
            self.lap_steps += 1

    def steps_per_second(self) -> float | None:
        """Return the speed since the last call, None if no step was counted.

        Call it after something has waited for the device; otherwise unfinished steps are
        counted.
        """
        if self.running:
            self._take()
        speed = None
        if self.lap_steps > 0 and self.lap_seconds > 0:
            speed = self.lap_steps / self.lap_seconds
        self.lap_seconds = 0.0
        self.lap_steps = 0
        return speed

    def _take(self) -> None:
        assert self._running_since is not None
        now = time.perf_counter()
        self.lap_seconds += now - self._running_since
        self.total += now - self._running_since
        self._running_since = now
