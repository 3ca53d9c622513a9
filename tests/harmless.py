"""What a stranger's file may do to us: be read or be refused. It may not hang, write elsewhere, or run anything."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import settings

# Where an example costs milliseconds, the usual search is a short one.
FEW = settings(max_examples=60 if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci" else settings().max_examples)
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
RUNS = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}
watched: list[Path] = []  # the folder that may be written, while somebody watches
deeds: list[str] = []


def hook(event: str, args: tuple) -> None:
    """Python's audit hooks see every file that is opened, and cannot be taken out again: this one looks away."""
    if not watched or event not in CHANGES | RUNS | {"open"}:
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & WRITE):
        return
    paths = args[:2] if event in ("os.rename", "os.symlink", "os.link") else args[:1]
    for path in paths if event not in RUNS else ():
        if isinstance(path, int):
            continue
        where = Path(os.fsdecode(path))
        # Only opening follows a link; removing or renaming one means the link itself.
        if (where.resolve() if event == "open" else where.parent.resolve() / where.name).is_relative_to(watched[0]):
            continue
        if str(path) != os.devnull and "__pycache__" not in str(path):
            deeds.append(f"{event} {path}")
    if event in RUNS:
        deeds.append(f"{event} {args}")


sys.addaudithook(hook)


class HangError(BaseException):
    """Too slow: no `except Exception` of ours shall swallow it."""


# A loop ends by the time that this process itself has computed: another process on the machine does not count. Only what
# computes nothing, as waiting for a pipe, needs the clock on the wall, and that one is far away.
COMPUTED = (signal.ITIMER_PROF, signal.SIGPROF, 30.0)
WAITED = (signal.ITIMER_REAL, signal.SIGALRM, 600.0)


@contextlib.contextmanager
def harmless(folder: Path | str) -> Iterator[None]:
    """Within this, nothing outside of `folder` is written, nothing is run, no pickle names a class, and nothing hangs."""

    def late(number, frame):
        raise HangError(f"it hangs: {signal.Signals(number).name}")

    deeds.clear()
    before = {}
    for timer, number, seconds in (COMPUTED, WAITED):
        before[number] = signal.signal(number, late)
        signal.setitimer(timer, seconds)
    watched.append(Path(folder).resolve())
    try:
        yield
    finally:
        watched.clear()
        for timer, number, _ in (COMPUTED, WAITED):
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    assert not deeds, deeds
