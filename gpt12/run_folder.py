"""A run's folder out_dir: run.json, its lock, and what happens to an earlier run's files.

run.json        the configuration, what the user gave, versions, commit, GPU, data set's hash
metrics.jsonl   one line per logged step and per evaluation (gpt12/log.py)
loss.png        the curves
best/  last/    checkpoints (gpt12/checkpoint.py)
previous/       the files of an earlier run, set aside when a new one starts
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from gpt12.checkpoint import resumable_runs
from gpt12.errors import UserError
from gpt12.files import exists, lock_folder, remove_link, write_atomically

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("torch", "numpy", "tiktoken", "datasets", "safetensors")
RUN_FILES = ("run.json", "metrics.jsonl", "loss.png", "best", "last", "best.prev", "last.prev")


@contextlib.contextmanager
def lock_run(out_dir: Path) -> Iterator[None]:
    """Keep a second run out of out_dir.

    Raises UserError if there is one or if out_dir cannot be written.
    """
    busy = f"another run is writing to out_dir={out_dir}. Wait for it, or choose another --out_dir="
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(out_dir, if_locked=busy))
        except OSError as error:
            raise UserError(
                f"out_dir={out_dir} cannot be written: {error.strerror or error}. "
                "Choose another with --out_dir="
            ) from None
        yield


def describe_run(config: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Return what run.json holds: enough to explain the run later, and nothing secret.

    Environment variables and the command line are left out, because they may hold passwords.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # not every run needs all of them
            versions[package] = metadata.version(package)
    return {
        "config": config,
        "commit": _commit(),
        "versions": versions,
        "platform": platform.platform(),
        **facts,
    }


def _commit() -> str | None:
    """Return the git commit, with "-dirty" if files were changed; None outside of git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically. Raises UserError if the disk does not accept it."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically. Raises UserError if the disk does not accept it."""
    with _user_error_if_unwritable(file):
        write_atomically(file, text.encode())


@contextlib.contextmanager
def _user_error_if_unwritable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Free some space, or choose another --out_dir="
        ) from None


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run."""
    return exists(folder / "run.json")


def read_run(out_dir: Path) -> dict[str, Any]:
    """Return the run.json of a run to resume. Raises UserError if it is missing or damaged."""
    file = out_dir / "run.json"
    try:
        content = json.loads(file.read_text("utf-8"))
        _check_run(content)
    except FileNotFoundError:
        message = f"nothing to resume in {out_dir}: {file} does not exist"
        runs = resumable_runs()
        if runs:
            message += f". These can be resumed: {', '.join(runs)}. Try --out_dir={runs[0]}"
        raise UserError(message) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({error}); without it the run's configuration is not known"
        ) from None
    return content


def _check_run(content: dict[str, Any]) -> None:
    """Raise an error if run.json lacks what resuming reads first."""
    for section in ("data", "requested"):
        if not isinstance(content.get(section, {}), dict):
            raise ValueError(f"{section} is not an object")
    needed = {"init_from", "batch_size", "gradient_accumulation_steps"}
    missing = needed - content["config"].keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")


def set_aside(out_dir: Path) -> Path | None:
    """Move an earlier run's files into out_dir/previous if it has a checkpoint; return the folder.

    What is already in previous/ moves to previous-2/ and so on. Nothing is ever deleted.
    """
    previous = out_dir / "previous"
    temporary = out_dir / "previous.tmp"
    found = [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]
    has_checkpoint = any(path.is_dir() for path in found)
    # A previous.tmp is left if the program was killed between two of the renames below.
    if not has_checkpoint and not temporary.exists():
        return None
    with _user_error_if_unwritable(previous):
        remove_link(temporary)
        temporary.mkdir(exist_ok=True)
        for path in found:
            path.rename(temporary / path.name)
        if previous.exists():
            previous.rename(_free_name(out_dir))
        temporary.rename(previous)
    return previous


def _free_name(out_dir: Path) -> Path:
    """Return the first of previous-2, previous-3, ... that does not exist."""
    for number in itertools.count(2):
        path = out_dir / f"previous-{number}"
        if not path.exists():
            return path
    raise AssertionError("count() does not end")
