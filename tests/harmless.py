"""Check that reading a stranger's file does no harm: no write elsewhere, no program run, an end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import settings

# A shorter search for tests whose examples cost milliseconds.
_profile = settings()
_few = 60 if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci" else _profile.max_examples
FEW = settings(max_examples=_few)

WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("os.symlink", "os.link", "os.truncate", "os.chmod"),
}
RUNS = {
    *("pickle.find_class", "subprocess.Popen", "os.system", "os.exec"),
    *("os.posix_spawn", "os.fork", "socket.connect"),
}
watched: list[Path] = []  # the folder that may be written, while harmless() is active
found: list[str] = []  # what was done that is not allowed


def hook(event: str, args: tuple) -> None:
    """Note a forbidden event. Python calls this for each audit event, and it cannot be removed."""
    if not watched:
        return
    if event in RUNS:
        found.append(f"{event} {args}")
    elif event == "open" and isinstance(args[2], int) and args[2] & WRITE:
        note_outside(event, args[0], follow_link=True)
    elif event in ("os.rename", "os.symlink", "os.link"):
        note_outside(event, args[0], follow_link=False)
        note_outside(event, args[1], follow_link=False)
    elif event in CHANGES:
        note_outside(event, args[0], follow_link=False)


def note_outside(event: str, path: object, follow_link: bool) -> None:
    """Note a change to a path outside of the watched folder.

    follow_link: opening a link opens what it points to; removing or renaming it means the link.
    """
    if isinstance(path, int):  # a file descriptor, whose opening was seen
        return
    where = Path(os.fsdecode(path))  # type: ignore[arg-type]
    place = where.resolve() if follow_link else where.parent.resolve() / where.name
    if place.is_relative_to(watched[0]):
        return
    if str(path) != os.devnull and "__pycache__" not in str(path):
        found.append(f"{event} {path}")


sys.addaudithook(hook)


class HangError(BaseException):
    """It takes too long. Not an Exception, so that no `except Exception` of ours swallows it."""


# A loop is found by the time that this process itself has computed; another process on the machine
# does not count. Waiting, for example for a pipe, computes nothing and needs the clock on the wall,
# which gets a very long time.
COMPUTED = (signal.ITIMER_PROF, signal.SIGPROF, 30.0)
WAITED = (signal.ITIMER_REAL, signal.SIGALRM, 600.0)


@contextlib.contextmanager
def harmless(folder: Path | str) -> Iterator[None]:
    """Fail if the block writes outside of `folder`, runs a program, unpickles a class, or hangs."""

    def give_up(number, frame):
        raise HangError(f"it hangs: {signal.Signals(number).name}")

    found.clear()
    before = {}
    for timer, number, seconds in (COMPUTED, WAITED):
        before[number] = signal.signal(number, give_up)
        signal.setitimer(timer, seconds)
    watched.append(Path(folder).resolve())
    try:
        yield
    finally:
        watched.clear()
        for timer, number, _ in (COMPUTED, WAITED):
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    assert not found, found
