"""File helpers: atomic writes, checksums, fsync, and one writer per folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

BLOCK_BYTES = 1 << 20  # read this much at a time when hashing
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    except OSError:  # half a file would take the space that is missing
        temporary.unlink(missing_ok=True)
        raise


def exists(path: str | Path) -> bool:
    """Tell whether a path exists. Path.exists raises for a name that no file can have."""
    return os.path.exists(path)  # noqa: PTH110


def is_folder(path: str | Path) -> bool:
    """Tell whether a path is that of a folder. Path.is_dir raises for such names, too."""
    return os.path.isdir(path)  # noqa: PTH112


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to the disk.

    On Windows fsync needs a file that was opened for writing, and a folder cannot be opened: it is
    skipped there.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_link(path: Path) -> None:
    """Remove `path` if it is a symbolic link, or a file that has another name, too.

    A run folder from a stranger may contain links that lead out of it; we must not write through
    them.
    """
    if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
        path.unlink()


def remove(path: Path) -> None:
    """Remove a link, a file or, as far as that is possible, a folder."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder: Path, if_locked: Exception) -> Iterator[None]:
    """Let only one process write to a folder. A crash releases the lock.

    if_locked: what to raise if another process holds the lock.
    Raises OSError if the folder cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder / ".lock"
    remove_link(lock_file)
    lock = filelock.FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise if_locked from None
    except (NotImplementedError, OSError) as error:
        # A network disk may have no locks. There a second writer is not noticed.
        if getattr(error, "errno", errno.ENOLCK) not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()
        if [path.name for path in folder.glob("*")] == [".lock"]:  # nothing was written
            shutil.rmtree(folder, ignore_errors=True)
