"""Several processes, one per GPU, as torchrun starts them; and the signals that stop a run.

If a process dies, torchrun notices it, names the rank, sends SIGTERM to the others and kills them
after 30 seconds. The others wait inside a collective operation until then, so they cannot save: a
run continues from its last checkpoint, with `--init_from=resume`.

On several machines the first process of each prepares the data that are missing there. Rank 0 alone
writes the run's folder. Machines that do not see it get run.json and last/ when the run is resumed,
so that torchrun's own restarts work, with `--init_from=auto`.

Ctrl-C (SIGINT), a scheduler's SIGTERM and a closed terminal (SIGHUP) all mean: finish the step,
save last/, and end with exit status 128 + the signal's number. With several ranks that is one step
later. A running evaluation is given up and done again after resuming; with several ranks it is
finished first. A second signal ends the program at once with status 130 and saves nothing; so does
Ctrl-C before the loop begins.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gpt12.errors import UserError, say
from gpt12.files import exists, sha256

# Rank 0 may prepare data for hours. NCCL's barrier would give up after 10 minutes.
PREPARATION_TIMEOUT = timedelta(days=7)
# `timeout` sends its signal to the process and to its group, so it arrives twice. That is not a
# second Ctrl-C.
SAME_SIGNAL_SECONDS = 0.3
SENT_BYTES = 1 << 26  # of a file at a time, from one machine to the others


@dataclass(frozen=True)
class Ranks:
    """This process's place among all processes of the run."""

    rank: int = 0
    world: int = 1  # number of processes
    local: int = 0  # rank on this machine, which is the index of its GPU


def torchrun_ranks() -> Ranks:
    """Read the ranks from torchrun's environment variables; without torchrun there is one."""
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        local=int(os.environ.get("LOCAL_RANK", "0")),
    )


@contextlib.contextmanager
def process_group(device: str, backend: str, before: bool = False) -> Iterator[None]:
    """Join the other processes for the duration of the block. Does nothing for a single process.

    device: the `device` key of the configuration. backend: torch.distributed's backend for GPUs.
    before: this group ends before the run's own group begins. Each has its own part of the store,
        so that neither reads the other's addresses.
    """
    ranks = torchrun_ranks()
    if ranks.world == 1:
        yield
        return
    on_gpu = torch.cuda.is_available() and device not in ("cpu", "mps")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    if on_gpu and processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes were started, but this machine has "
            f"{torch.cuda.device_count()} GPU(s): --nproc_per_node={torch.cuda.device_count()}"
        )
    if on_gpu:
        torch.cuda.set_device(ranks.local)
    store = dist.PrefixStore("before" if before else "run", _meeting_place())
    dist.init_process_group(
        backend if on_gpu else "gloo", store=store, rank=ranks.rank, world_size=ranks.world
    )
    try:
        yield
    finally:
        # DistributedDataParallel may be part of a reference cycle. If it outlives its process
        # group, gloo's threads can abort Python at exit.
        gc.collect()
        dist.destroy_process_group()


@functools.cache
def _meeting_place() -> dist.Store:
    """Return the store in which the ranks find each other.

    All groups share one store. If rank 0 serves it and opened a second one, ranks that still use
    the first would lose their connection. If torchrun serves it, it holds the addresses of
    processes that have ended, so each restart gets its own part of the store.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return store


@contextlib.contextmanager
def reported_by_rank_0() -> Iterator[None]:
    """Let the first rank of a machine report a user's mistake, which every rank there meets.

    The others end with the same exit status and say nothing.
    """
    try:
        yield
    except UserError:
        if torchrun_ranks().local == 0:
            raise
        raise SystemExit(2) from None


@contextlib.contextmanager
def first_ranks_first() -> Iterator[None]:
    """Let rank 0 run the block, then the first rank of every other machine, then all others.

    They prepare data or download weights, and the others find them ready. The machines may share a
    disk or not.
    """
    if not dist.is_initialized():
        yield
        return
    # A gloo group with a timeout of its own. All ranks have to create it together.
    group = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    ranks = torchrun_ranks()
    turn = min(ranks.rank, 1) + min(ranks.local, 1)
    for _ in range(turn):
        dist.barrier(group)
    yield
    for _ in range(2 - turn):
        dist.barrier(group)


def copy_from_rank_0(folder: Path, files: dict[str, Path]) -> bool:
    """Copy files of rank 0 into the folder of each machine where they differ.

    files: where they lie, by their names in the folder. Only those of rank 0 count.
    Returns whether rank 0 has any. On a single machine, and on a shared disk, nothing is written.
    """
    ranks = torchrun_ranks()
    if ranks.world == int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world)):
        return bool(files)
    with process_group("cpu", "gloo", before=True):
        box = [{name: sha256(file) for name, file in files.items()}]
        dist.broadcast_object_list(box)
        for name, digest in box[0].items():
            source = files[name] if ranks.rank == 0 else None
            target = folder / name
            missing = False
            if source is None and ranks.local == 0:
                missing = not exists(target) or sha256(target) != digest
            if least_of_ranks(-int(missing), torch.device("cpu")) < 0:
                _send_file(source, target if missing else Path(os.devnull))
        return bool(box[0])


def _send_file(source: Path | None, target: Path) -> None:
    """Write rank 0's file, a part at a time, to the targets of the others. source: on rank 0."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") if source is None else source.open("rb") as file:
        part = [b"a first part"]
        while part[0]:
            part = [b"" if source is None else file.read(SENT_BYTES)]
            dist.broadcast_object_list(part)
            if source is None:
                file.write(part[0])


def data_parallel(model: nn.Module, ranks: int, device: torch.device) -> nn.Module:
    """Return the model, wrapped so that the gradients of several ranks are averaged."""
    if ranks == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Few large messages disturb the computation beside them less than many small ones.
        bucket_cap_mb=100,
    )


def is_lost_rank(error: RuntimeError) -> bool:
    """Tell whether an error means that another process has ended."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return "by peer" in str(error)  # gloo raises a plain RuntimeError: "Connection closed by peer"


def least_of_ranks(value: float, device: torch.device) -> float:
    """Return the smallest of the ranks' values. All ranks have to ask for it together.

    If only rank 0 knows the value, the others must give one that is at least as large.
    """
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return shared.item()


def lost_rank_advice(out_dir: Path) -> str:
    """Say that another process has ended, and how the run goes on."""
    told = (
        f"rank {torchrun_ranks().rank} has lost the others: one of them has ended. torchrun names "
        "it below; if it printed an error message, look for it above. "
    )
    started_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if started_again < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return told + (
            "torchrun starts all of them again: with --init_from=auto they go on from the last "
            "checkpoint"
        )
    return told + (
        "Continue from the last checkpoint with the same torchrun line and --init_from=resume "
        f"--out_dir={shlex.quote(out_dir.as_posix())}"
    )


# --------------------------------------------------------------------------------------------------
# Signals


class StopSignal:
    """Remembers the signal that asked the run to stop. `number` is 0 until one arrives.

    Before the loop begins, while nothing is trained, Ctrl-C ends the program at once.
    """

    def __init__(self, device: torch.device):
        """device: where the ranks exchange what they got."""
        self.number = 0
        self.arrived_at = 0.0
        self.flag = torch.zeros((), dtype=torch.int64, device=device)

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Handle the signals for the duration of the block, then restore the previous handlers."""
        numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP. Under nohup it is ignored, and stays so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self.handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        """Note the first signal. A later one ends the program at once, and nothing is saved.

        One that follows within SAME_SIGNAL_SECONDS is the same, sent twice.
        """
        if self.number:
            if time.monotonic() - self.arrived_at < SAME_SIGNAL_SECONDS:
                return
            raise KeyboardInterrupt
        self.number = number
        self.arrived_at = time.monotonic()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        say(f"\n{name}: finishing this step, then saving (press again to quit at once)")

    def arrived_in_one_process(self) -> bool:
        """Tell whether a signal has arrived in a run of one process."""
        return torchrun_ranks().world == 1 and self.number > 0

    def agreed(self) -> bool:
        """Tell whether to stop now. Call it once per step, on all ranks.

        With several ranks, a call begins to compute the largest flag, and the next call reads it.
        So the host does not wait for the GPU, and all ranks stop after the same step, one step
        later than a single process.
        """
        if torchrun_ranks().world == 1:
            return self.number > 0
        flag_of_last_call = self.flag
        self.flag = torch.full_like(self.flag, self.number)
        dist.all_reduce(self.flag, dist.ReduceOp.MAX)
        agreed = int(flag_of_last_call)
        if agreed > self.number:
            self.number = agreed
            self.arrived_at = time.monotonic()  # the signal itself may be on its way to this rank
        return agreed > 0
