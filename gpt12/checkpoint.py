"""Checkpoints: folders that are replaced so that a crash at any moment leaves one that loads.

A run's two checkpoints, and when gpt12/saver.py writes them (called by train.py, Trainer):

    best/   at an evaluation with a new lowest validation loss, never at step 0 (evaluate)
    last/   when the save timer says so (train), at every evaluation after step 0 if
            always_save_checkpoint (evaluate), at the end and on Ctrl-C (finish)

    both    config.json, generation_config.json, model.safetensors, the tokenizer's files:
            a Hugging Face GPT-2 folder; and trainer.json: the run's progress and the SHA-256 of
            every other file
    last/   also trainer.safetensors: optimizer state, LoRA's matrices, loss scale, states of
            the random generators (gpt12/trainer_state.py)
    best/   in a LoRA run also adapter/, in PEFT's format

A folder cannot be renamed onto a full one, so a checkpoint X is replaced in steps:

    1. write X.tmp/ and fsync it
    2. rename X to X.prev
    3. rename X.tmp to X, and fsync the parent folder
    4. delete X.prev

Between 2 and 3 there is no X; readers then take X.prev.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gpt12.errors import UserError
from gpt12.files import exists, remove_link, sha256, sync

# The version of trainer.json and trainer.safetensors. Files without this number are older and read
# the same way.
FORMAT = 1


@dataclass
class Progress:
    """How far a run has come: the values in trainer.json besides `format` and the checksums."""

    step: int = 0  # finished updates
    position: int = 0  # training windows consumed
    tokens: int = 0  # training tokens consumed
    elapsed_s: float = 0.0  # seconds of training; evaluation, saving and compiling do not count
    best_val_loss: float | None = None
    best_step: int = 0
    worse_evaluations: int = 0  # evaluations in a row without a new best, for `patience`
    evaluated_step: int = -1  # the step of the last evaluation
    wandb_id: str | None = None

    @classmethod
    def from_trainer_json(cls, content: dict[str, Any]) -> Progress:
        """Take the values from a trainer.json; what an older file lacks keeps its default."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in content.items() if key in known})


# --------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    folder: Path, write: Callable[[Path], None], progress: Progress, size: int
) -> None:
    """Replace the checkpoint `folder`.

    write: writes the model's files into the folder that it is given.
    size: about how many bytes it will write; less free space than that is an error before anything
    is written.
    Raises OSError if the disk is full or cannot be written. The old checkpoint is untouched then.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    previous = folder.with_name(folder.name + ".prev")
    remove_link(temporary)
    remove_link(previous)
    shutil.rmtree(temporary, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise OSError(f"{size / 1e9:.2f} GB are needed for {folder}, {free / 1e9:.2f} GB are free")
    _write_folder(temporary, write, progress)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _write_folder(folder: Path, write: Callable[[Path], None], progress: Progress) -> None:
    """Write all files of a checkpoint and fsync them; on an error nothing is left."""
    from safetensors import SafetensorError

    try:
        folder.mkdir()
        write(folder)
        _write_trainer_json(folder, progress)
        _copy_mode(folder)
        for path in folder.rglob("*"):
            sync(path)
        sync(folder)
    except (OSError, SafetensorError) as error:
        # Half a checkpoint would take the space that is missing.
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(str(error)) from None  # safetensors wraps the disk's error


def _write_trainer_json(folder: Path, progress: Progress) -> None:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [file.relative_to(folder).as_posix() for file in files]
    with ThreadPoolExecutor() as threads:  # the two large files at the same time
        checksums = dict(zip(names, threads.map(sha256, files)))
    content: dict[str, Any] = {"format": FORMAT, **asdict(progress), "sha256": checksums}
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=2) + "\n"
    (folder / "trainer.json").write_text(text, "utf-8")


def _checksum(content: dict[str, Any]) -> str:
    """Return the checksum of trainer.json itself, over all its other values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _copy_mode(folder: Path) -> None:
    """Give every file the permissions of trainer.json: safetensors lets only the owner read."""
    mode = (folder / "trainer.json").stat().st_mode & 0o777
    for file in folder.rglob("*"):
        if file.is_file():
            with contextlib.suppress(OSError):  # a file system without permissions
                file.chmod(mode)


# --------------------------------------------------------------------------------------------------
# Reading


def find_checkpoint(out_dir: Path, names: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """Return the first of out_dir's checkpoints with one of these names, and its trainer.json.

    Every file's checksum is verified. Raises UserError if there is none or if it is damaged.
    """
    folder = locate_checkpoint(out_dir, names)
    if folder is None:
        raise UserError(_no_checkpoint(out_dir, names))
    # A folder gets this name only when it is complete, so a missing trainer.json is damage.
    return folder, read_checkpoint(folder)


def locate_checkpoint(out_dir: Path, names: tuple[str, ...]) -> Path | None:
    """Return the folder of the first checkpoint with one of these names, without reading it."""
    for name in names:
        for folder in (out_dir / name, out_dir / f"{name}.prev"):
            if exists(folder):
                return folder
    return None


def _no_checkpoint(out_dir: Path, names: tuple[str, ...]) -> str:
    """Say that there is no checkpoint, and what to do instead."""
    where = " or ".join(str(out_dir / name) for name in names)
    best = out_dir / "best"
    if "best" not in names and (best / "trainer.json").exists():
        step = read_checkpoint(best)["step"]
        options = shlex.join([f"--init_from={best}", f"--out_dir={out_dir}-2"])
        return (
            f"no checkpoint in {where}, so this run cannot be resumed exactly. {best} has the "
            f"weights of step {step}; the optimizer's state is lost. To train on from these "
            f"weights as a new run: python train.py {options}"
        )
    if exists(out_dir / "run.json"):
        return f"the run in {out_dir} has not saved a checkpoint. If it has ended, start it again"
    runs = resumable_runs()
    if runs:
        return f"no checkpoint in {where}. There are some in {', '.join(runs)}: --out_dir={runs[0]}"
    return f"no checkpoint in {where}. Train a model first: python train.py"


def resumable_runs() -> list[str]:
    """Return up to three run folders in the working directory that can be resumed, newest first."""
    found = []
    for file in Path().glob("*/last/trainer.json"):
        found.append((file.stat().st_mtime, str(file.parent.parent)))
    found.sort(reverse=True)
    return [name for _, name in found[:3]]


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's trainer.json after verifying every file's checksum.

    Raises UserError that names the damaged file.
    """
    content = _read_trainer_json(folder)
    for name, expected in content["sha256"].items():
        if not _is_intact(folder, name, expected):
            raise UserError(
                f"{folder / name} is damaged or missing: it is not what was saved. "
                f"{_advice(folder)}"
            )
    return content


def _read_trainer_json(folder: Path) -> dict[str, Any]:
    file = folder / "trainer.json"
    try:
        content = json.loads(file.read_text("utf-8"))
        checksum = content.pop("checksum")
        if checksum != _checksum(content):
            raise ValueError("its checksum does not match")
        _check_values(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}). {_advice(folder)}") from None
    if content.get("format", FORMAT) > FORMAT:
        raise UserError(
            f"{file} has format {content['format']}, written by a newer version; this one reads "
            f"up to {FORMAT}: update the program"
        )
    return content


def _check_values(content: dict[str, Any]) -> None:
    """Raise ValueError if a value has the wrong type, however it came into the file."""
    if not isinstance(content["sha256"], dict):
        raise ValueError("sha256 is not a list of files")
    if type(content["step"]) is not int:
        raise ValueError("step is not a whole number")
    if type(content.get("format", FORMAT)) is not int:
        raise ValueError("format is not a whole number")
    for key, value in content.items():
        if key not in ("sha256", "wandb_id") and not is_number_or_none(value):
            raise ValueError(f"{key} is not a number")


def is_number_or_none(value: Any) -> bool:
    """Tell whether a JSON value is a number of a size that we write, or null."""
    if type(value) is int:
        return abs(value) < 2**63
    return value is None or type(value) is float


def _is_intact(folder: Path, name: str, expected: str) -> bool:
    """Tell whether a file of the checkpoint has this SHA-256 and lies inside the folder."""
    file = folder / name
    try:
        inside = file.is_file() and file.resolve().is_relative_to(folder.resolve())
        return inside and sha256(file) == expected
    except (OSError, ValueError):  # an unreadable disk, or a name that no file can have
        return False


def _advice(folder: Path) -> str:
    """Say what to do about a damaged checkpoint."""
    previous = folder.with_name(folder.name.removesuffix(".prev") + ".prev")
    if previous != folder and previous.exists():
        return f"Delete {folder} to use the one before it, {previous}"
    other = folder.with_name("best" if folder.name.startswith("last") else "last")
    if other.exists():
        return f"Restore it or delete {folder}; {other} may still be good"
    return f"Restore it or delete {folder}"
