"""A run's folder: run.json, where its checkpoints lie, and how an earlier run makes room for it.

run.json        the configuration, what the user gave, versions, commit, GPU, data set's hash
metrics.jsonl   one line per logged step and per evaluation (gpt12/log.py)
loss.png        the curves
best/, last/    checkpoints (gpt12/checkpoint.py)
previous/       the files of an earlier run, set aside when a new one starts
.lock           keeps a second run out
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from gpt12.errors import UserError
from gpt12.files import exists, is_folder, lock_folder, remove_link, write_atomically

PACKAGES = ("torch", "numpy", "tiktoken", "datasets", "safetensors")
RUN_FILES = ("run.json", "metrics.jsonl", "loss.png", "best", "last", "best.prev", "last.prev")


def lock_run(out_dir: Path) -> contextlib.ExitStack:
    """Keep a second run out of out_dir, until the end of the `with` that takes what is returned.

    Raises UserError if there is one or if out_dir cannot be written.
    """
    busy = f"another run is writing to out_dir={out_dir}. Wait for it, or choose another --out_dir="
    lock = contextlib.ExitStack()
    with user_error_if_unwritable(out_dir):
        lock.enter_context(lock_folder(out_dir, if_locked=UserError(busy)))
    return lock


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
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run."""
    return exists(folder / "run.json")


@dataclass
class SavedRun:
    """What resuming reads of run.json."""

    config: dict[str, Any]  # every key decided
    requested: dict[str, Any] = field(default_factory=dict)  # read it as `asked`
    given: list[str] | None = None  # None: an earlier version wrote it
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, Any]:
        """Return what the user asked of the run, when it began and on resuming since.

        An earlier version wrote values that mean nothing now: what became of them stands for them.
        """
        if self.given is not None:
            return self.config | self.requested
        usable = self.requested.keys() & {"lr_decay_iters"}
        return self.config | {key: self.requested[key] for key in usable}


def read_run(out_dir: Path) -> SavedRun:
    """Return what the run.json of a run says. Raises UserError if it is missing or damaged."""
    if not is_run(out_dir):
        raise UserError(f"no run in {out_dir}: name the folder of one with --out_dir=")
    found: SavedRun = read_json(out_dir / "run.json", SavedRun)
    return found


def set_aside(out_dir: Path) -> str | None:
    """Move an earlier run's files into out_dir/previous if it has a checkpoint; say so.

    They replace those of a still earlier run. run.json is moved first: where it is gone, a move was
    cut short and goes on.
    """
    previous = out_dir / "previous"
    found = [out_dir / name for name in RUN_FILES if exists(out_dir / name)]
    if not any(path.is_dir() for path in found):
        return None
    replaced = ""
    with user_error_if_unwritable(previous):
        remove_link(previous)
        if is_run(out_dir) and exists(previous):
            replaced = ", in place of a still earlier run" if is_run(previous) else ""
            shutil.rmtree(previous)
        previous.mkdir(exist_ok=True)
        for path in found:
            path.rename(previous / path.name)
    size = sum(file.stat().st_size for file in previous.rglob("*"))
    return f"the earlier run in {out_dir} was moved to {previous} ({size / 1e6:,.1f} MB){replaced}"


# --------------------------------------------------------------------------------------------------
# Its checkpoints. gpt12/checkpoint.py writes them.

# The version of trainer.json and trainer.safetensors. Version 1 has LoRA's matrices in
# trainer.safetensors, and a merged model in last/. Files without the number are of version 1.
TRAINER_FORMAT = 2
Number = Annotated[int, Field(ge=0, lt=2**62)]  # NumPy counts windows in int64


@dataclass
class Progress:
    """How far a run has come: what trainer.json holds."""

    step: Number = 0  # finished updates
    position: Number = 0  # training windows consumed
    tokens: Number = 0  # training tokens consumed
    elapsed_s: float = 0.0  # seconds of training; evaluation, saving and compiling do not count
    best_val_loss: float | None = None
    best_step: Number = 0
    worse_evaluations: Number = 0  # evaluations in a row without a new best, for `patience`
    evaluated_step: int = -1  # the step of the last evaluation
    wandb_id: str | None = None
    format: int = TRAINER_FORMAT


def _folder_of(out_dir: Path, name: str) -> Path | None:
    """Return where a checkpoint X lies: in X.prev if a save was cut short; None if nowhere."""
    for folder in (out_dir / name, out_dir / f"{name}.prev"):
        if is_folder(folder):
            return folder
    return None


def find_checkpoint(
    out_dir: Path, names: tuple[str, ...] = ("best", "last")
) -> tuple[Path, Progress]:
    """Return the first of out_dir's checkpoints with one of these names, and its progress.

    Raises UserError if there is none or if its trainer.json is damaged.
    """
    for name in names:
        folder = _folder_of(out_dir, name)
        if folder is not None:
            return folder, _read_progress(folder)
    where = " or ".join(str(out_dir / name) for name in names)
    raise UserError(
        f"no checkpoint in {where}: train a model first (python train.py), or name another run's "
        "folder with --out_dir=. A run that was killed before it first saved begins again by the "
        f"line that began it. Where there is a best/, --init_from={out_dir / 'best'} starts a new "
        "run from it"
    )


def find_local(name: str | Path) -> Path | None:
    """Return a local folder or file of a model; None if there is none of this name.

    Of a run it is the folder of its best checkpoint, or of its last.
    """
    if is_run(Path(name)):
        return find_checkpoint(Path(name))[0]
    return Path(name) if exists(name) else None


def resumable_files(out_dir: Path) -> dict[str, Path]:
    """Return where the files lie that resuming reads, by their names in out_dir.

    Empty: out_dir holds no run with a checkpoint last/.
    """
    last = _folder_of(out_dir, "last")
    if last is None or not is_run(out_dir):
        return {}
    files = {f"last/{file.name}": file for file in last.iterdir() if file.is_file()}
    return files | {"run.json": out_dir / "run.json"}


def _read_progress(folder: Path) -> Progress:
    """Read trainer.json. What an older file lacks keeps its default."""
    file = folder / "trainer.json"
    progress: Progress = read_json(file, Progress)
    if progress.format > TRAINER_FORMAT:
        raise UserError(
            f"{file} has format {progress.format}, written by a newer version; this one reads up "
            f"to {TRAINER_FORMAT}: update the program"
        )
    progress.format = TRAINER_FORMAT  # of the next save
    return progress


# --------------------------------------------------------------------------------------------------
# JSON files, also of models and adapters; and what happens if one cannot be written


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(file, json_bytes(content))


def json_bytes(content: dict[str, Any]) -> bytes:
    """Return a JSON file's content."""
    return (json.dumps(content, indent=2) + "\n").encode()


def read_json(file: Path, kind: Any = dict[str, Any]) -> Any:
    """Return what a JSON file holds as a value of this type, by default an object of any keys.

    Raises UserError that names the file, and the key that is wrong.
    """
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): restore it") from None
    return validated(kind, value, file)


def validated(kind: Any, value: Any, file: Path) -> Any:
    """Return a value that a file holds as one of this type.

    Raises UserError that names the file, and the first key that is wrong.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise UserError(f"{file} is damaged or of another kind ({wrong}): restore it") from None


def write_file(file: Path, content: bytes) -> None:
    """Write a file atomically. Raises UserError if the disk does not accept it."""
    with user_error_if_unwritable(file):
        write_atomically(file, content)


@contextlib.contextmanager
def user_error_if_unwritable(path: Path) -> Iterator[None]:
    """Turn the disk's refusal in the block into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Free some space, or choose another --out_dir="
        ) from None
