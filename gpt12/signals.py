"""Stop a run after its current step when a signal arrives; with several ranks one step later.

Ctrl-C (SIGINT), a scheduler's SIGTERM and a closed terminal (SIGHUP) all mean: finish the step,
save last/, and end with exit status 128 + the signal's number. A running evaluation is given up and
done again after resuming; with several ranks it is finished first. A second signal ends the program
at once with status 130 and saves nothing; so does Ctrl-C before the loop begins.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from gpt12.device import Machine

# `timeout` sends its signal to the process and to its group, so it arrives twice. That is not a
# second Ctrl-C.
SAME_SIGNAL_SECONDS = 0.3


class StopSignal:
    """Remembers the signal that asked the run to stop. `number` is 0 until one arrives."""

    def __init__(self, machine: Machine, say: Callable[[str], None]):
        self.machine = machine
        self.say = say
        self.number = 0
        self.arrived_at = 0.0
        self.flag = torch.zeros((), dtype=torch.int64, device=machine.device)

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Handle the signals for the duration of the block, then restore the previous handlers."""
        previous = {}
        for number in stop_signals():
            previous[number] = signal.signal(number, self.handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        """Note the first signal; a second one ends the program at once (run_main in errors.py)."""
        if self.number:
            if time.monotonic() - self.arrived_at < SAME_SIGNAL_SECONDS:
                return
            raise KeyboardInterrupt
        self.number = number
        self.arrived_at = time.monotonic()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.say(f"\n{name}: finishing this step, then saving (press again to quit at once)")

    def agreed(self) -> bool:
        """Tell whether to stop now. Call it once per step, on all ranks.

        With several ranks the largest flag is found now and read in the next call, so that the host
        does not wait for the GPU. All ranks read the same one, so all stop after the same step.
        """
        if self.machine.world == 1:
            return self.number > 0
        previous = self.flag
        self.flag = torch.full_like(self.flag, self.number)
        dist.all_reduce(self.flag, dist.ReduceOp.MAX)
        agreed = int(previous)
        self.number = max(self.number, agreed)
        return agreed > 0


def stop_signals() -> list[int]:
    """Return the signals that stop a run. Windows has no SIGHUP, and under nohup it is ignored."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers
