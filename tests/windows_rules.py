"""Windows' rules for files, enforced on Linux: what is allowed here only is an error in a test.

    fsync of a descriptor that was opened for reading      OSError (EBADF)
    opening a folder as a file                             PermissionError
    renaming, replacing or deleting a file that is open
    or memory-mapped, or a folder that holds one           PermissionError
    renaming to a name that exists                         FileExistsError
    a name with one of < > : " | ? *                       OSError (EINVAL)

Use the fixture `windows` of tests/conftest.py. What is open and mapped is read from /proc, so files
that compiled libraries hold open count as well.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FORBIDDEN = set('<>:"|?*')
Call = Callable[..., Any]


def enforce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process follow the rules until monkeypatch is undone."""
    # Where folders cannot be opened, shutil works with paths.
    monkeypatch.setattr("shutil._use_fd_functions", False)
    monkeypatch.setattr("os.fsync", _checked(os.fsync, _check_writable))
    monkeypatch.setattr("os.open", _checked(os.open, _check_no_folder, _check_name))
    opening = _checked(io.open, _check_no_folder, _check_name)
    monkeypatch.setattr("io.open", opening)
    monkeypatch.setattr("builtins.open", opening)
    monkeypatch.setattr("os.mkdir", _checked(os.mkdir, _check_name))
    monkeypatch.setattr("os.rename", _checked(os.rename, _check_free, _check_new_target))
    monkeypatch.setattr("os.replace", _checked(os.replace, _check_free, _check_free_target))
    for name in ("unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, _checked(getattr(os, name), _check_free))


def _checked(call: Call, *checks: Call) -> Call:
    """Return the function with checks of its arguments before it."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        for check in checks:
            check(*args)
        return call(*args, **kwargs)

    return checked


def _check_writable(descriptor: int, *_: Any) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _check_no_folder(path: Any, *_: Any) -> None:
    if not isinstance(path, int) and os.path.isdir(path):  # noqa: PTH112 (any kind of name)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def _check_name(path: Any, *_: Any) -> None:
    if not isinstance(path, int) and FORBIDDEN & set(os.fsdecode(path)):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)


def _check_free(path: Any, *_: Any) -> None:
    """Raise PermissionError if this process has the file, or one in the folder, open or mapped."""
    target = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (any kind of name)
    for used in _files_in_use():
        if used == target or used.startswith(f"{target}/"):
            raise PermissionError(errno.EACCES, f"{used} is open or mapped", path)


def _check_free_target(_: Any, target: Any, *__: Any) -> None:
    _check_name(target)
    _check_free(target)


def _check_new_target(_: Any, target: Any, *__: Any) -> None:
    _check_name(target)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)


def _files_in_use() -> set[str]:
    """Return the paths of all files that this process has open or mapped."""
    used = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            used.add(str(descriptor.readlink()))
        except FileNotFoundError:  # the descriptor that listed the others
            continue
    for line in Path("/proc/self/maps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6:
            used.add(parts[5])
    return used
