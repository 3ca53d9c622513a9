"""Processes that start at once: forked from one that has imported torch and train.py already."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import gpt12.log
from gpt12.errors import run_main
from tests.helpers import ROOT

LIMIT_S = 180  # processes that do not agree wait for each other


class Started:
    """A process that start() has started."""

    def __init__(self, process: multiprocessing.Process, output: Connection):
        self.process = process
        self.stdout = open(os.dup(output.fileno()))  # what it prints, as a text file

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process.pid or 0, number)

    def end(self) -> tuple[int, str]:
        """Wait for its end. Return its exit status and the rest of what it printed.

        If a signal killed it, as after LIMIT_S seconds, the status is minus the signal's number.
        """
        watchdog = threading.Timer(LIMIT_S, self.process.kill)  # reading waits for its end
        watchdog.start()
        said = "" if self.stdout.closed else self.stdout.read()
        self.process.join()
        watchdog.cancel()
        assert self.process.exitcode is not None
        return self.process.exitcode, said


def start(
    main: Callable,
    *argv: str,
    environment: dict[str, str] | None = None,
    folder: str = ".",
    errors: Path | None = None,
) -> Started:
    """Run a script's main function in a process of its own, as `python script.py ARGV` does.

    main: a function at the top level of a file: the process finds it by its name. It is not the
    process that monkeypatch has changed; only os.environ is that of this process.
    environment: more variables. folder: its working directory, from this one's on. errors: a file
    for stderr, which else goes where stdout goes.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    everything = os.environ | (environment or {})
    arguments = (main, argv, theirs, Path(folder).absolute(), errors, everything)
    process = _server().Process(target=_run, args=arguments, daemon=True)
    process.start()
    theirs.close()
    return Started(process, ours)  # type: ignore[arg-type]


def start_ranks(
    main: Callable, *argv: str, folders: tuple[str, str] | None = None
) -> list[Started]:
    """Start two ranks of a script as torchrun does. One that is lost is not started again.

    folders: a working directory each; then every rank is on a machine of its own.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = []
    for rank, folder in zip("01", folders or (".", ".")):
        place = {"RANK": rank, "LOCAL_RANK": rank}
        if folders is not None:
            place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        ranks.append(start(main, *argv, environment=meeting | place, folder=folder))
    return ranks


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Start the process from which others are forked. It has no thread and has trained nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as m:
        m.chdir(ROOT)
        forkserver.ensure_running()
    return context


def _run(
    main: Callable,
    argv: list[str],
    output: Connection,
    folder: Path,
    errors: Path | None,
    environment: dict[str, str],
) -> None:
    os.dup2(output.fileno(), 1)
    output.close()
    os.dup2(1 if errors is None else os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    gpt12.log.draw_losses = lambda *arguments: None  # as in conftest.py
    sys.argv = [f"{main.__module__}.py", *argv]
    run_main(main)
