"""A run's folder: run.json, metrics.jsonl, loss.png, best/ and last/, written so that a kill at any instant loses nothing.

A folder cannot be renamed onto a full one, so a checkpoint X is replaced in three steps: X.tmp is written and synced,
X becomes X.prev, X.tmp becomes X. Between the last two there is no X, and readers take X.prev.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from config import UserError
from gpt12.files import write_atomically as write_whole

REPOSITORY = Path(__file__).parent.parent
KEPT_ROWS = 4000  # training steps that loss.png shows: it is 770 pixels wide


@contextlib.contextmanager
def lock(out_dir: Path) -> Iterator[None]:
    """Hold out_dir for one run. The operating system drops the lock with the process, so a crash leaves none."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        _unlink_link(out_dir / ".lock")
        file = open(out_dir / ".lock", "a+")  # noqa: SIM115 (closed below, when the run ends)
    except OSError as e:
        raise UserError(f"out_dir={out_dir} cannot be written: {e.strerror}. Choose another with --out_dir=") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # native Windows has no flock; two runs in one folder are not noticed there
            pass
        except BlockingIOError:
            raise UserError(f"another run is writing to out_dir={out_dir}. Wait for it, or choose another") from None
        except OSError:  # a network disk may have no locks either
            pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the user may have deleted the folder meanwhile
                # The run was refused before it began: nothing is left of it.
                if [path.name for path in out_dir.iterdir()] == [".lock"]:
                    (out_dir / ".lock").unlink()
                    out_dir.rmdir()


def _unlink_link(path: Path) -> None:
    """Remove a symbolic link that stands where we write: a stranger's run may hold one that leads out of its folder."""
    if path.is_symlink():
        path.unlink()


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    """A file without which a run cannot begin: UserError where the disk does not take it."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{file} cannot be written: {e.strerror or e}. Make room, or choose another --out_dir="
        ) from None


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, write: Callable[[Path], None], state: dict[str, Any], size: int) -> None:
    """Replace the checkpoint `folder` by what write(X.tmp) writes and trainer.json, which holds `state` and checksums.

    size: bytes that will be written, about. Raises OSError, with the old checkpoint untouched, when the disk is full
    or cannot be written.
    """
    from safetensors import SafetensorError

    temporary, previous = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".prev")
    _unlink_link(temporary)
    _unlink_link(previous)
    shutil.rmtree(temporary, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise OSError(f"{size / 1e9:.2f} GB are needed for {folder}, {free / 1e9:.2f} GB are free")
    try:
        temporary.mkdir()
        write(temporary)
        files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
        state = state | {"sha256": {file.relative_to(temporary).as_posix(): sha256(file) for file in files}}
        state["checksum"] = _checksum(state)  # of trainer.json itself
        (temporary / "trainer.json").write_text(json.dumps(state, indent=2) + "\n", "utf-8")
        for file in files:
            with contextlib.suppress(OSError):  # a disk without modes
                # As trainer.json, by the umask: safetensors lets nobody else read what it writes.
                file.chmod((temporary / "trainer.json").stat().st_mode & 0o777)
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
    except (OSError, SafetensorError) as e:  # safetensors wraps what the disk said
        shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint would take the room that is wanting
        raise e if isinstance(e, OSError) else OSError(str(e)) from None
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    temporary.rename(folder)
    _sync(folder.parent)


def find_checkpoint(out_dir: Path, names: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """The first of out_dir's checkpoints by these names, and its trainer.json. Every file's checksum is verified."""
    for name in names:
        for folder in (out_dir / name, out_dir / f"{name}.prev"):
            if folder.exists():  # without a trainer.json it is damaged: it never was renamed before it was whole
                return folder, read_checkpoint(folder)
    where = " or ".join(str(out_dir / name) for name in names)
    others = sorted({str(file.parent.parent) for file in Path().glob("*/*/trainer.json")})
    hint = (
        f"There are some in {', '.join(others)}: --out_dir={others[0]}"
        if others
        else "Train one first: python train.py"
    )
    raise UserError(f"no checkpoint in {where}. {hint}")


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint whose files are all as they were written; UserError names the damaged one."""
    previous = folder.with_name(folder.name.removesuffix(".prev") + ".prev")
    other = previous != folder and previous.exists()
    hint = f"Its forerunner is in {previous}: rename it to {folder} to use it" if other else "Delete it or restore it"
    try:
        state = json.loads((folder / "trainer.json").read_text("utf-8"))
        sums = dict(state["sha256"].items())
        if state.pop("checksum") != _checksum(state):
            raise ValueError("its checksum is another")
        figures = {key: value for key, value in state.items() if key not in ("sha256", "wandb_id")}
        if type(state["step"]) is not int or not all(map(_is_figure, figures.values())):
            raise ValueError("a figure is no number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{folder / 'trainer.json'} is damaged ({e}). {hint}") from None
    for name, expected in sums.items():
        file = folder / name
        try:
            inside = file.is_file() and file.resolve().is_relative_to(folder.resolve())
            same = inside and sha256(file) == expected
        except (OSError, ValueError):  # a disk that cannot read it any more, or no name that a file can have
            same = False
        if not same:
            raise UserError(f"{file} is damaged or missing: it is not what was saved. {hint}")
    return state


# --------------------------------------------------------------------------------------------------------------------
# What a run tells: run.json, metrics.jsonl, loss.png


def describe(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What run.json holds: enough to explain the run later, and nothing secret (no environment, no command line)."""
    packages = ("torch", "numpy", "tiktoken", "datasets", "safetensors")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):  # not every run needs all of them
            versions[package] = metadata.version(package)
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {"config": config, "commit": commit, "versions": versions, "platform": platform.platform(), **more}


def set_aside(out_dir: Path) -> Path | None:
    """Move an earlier run's files into out_dir/previous, what is there into previous-2 and so on; returns the folder."""
    names = ("run.json", "metrics.jsonl", "loss.png", "best", "last", "best.prev", "last.prev")
    found = [out_dir / name for name in names if (out_dir / name).exists()]
    previous, temporary = out_dir / "previous", out_dir / "previous.tmp"
    # Without a checkpoint there is nothing to lose.
    if not any(path.is_dir() for path in found) and not temporary.exists():
        return None
    with _writing(previous):
        _unlink_link(temporary)
        temporary.mkdir(exist_ok=True)  # it exists where a kill came between two of these renames
        for path in found:
            path.rename(temporary / path.name)
        if previous.exists():
            numbered = (out_dir / f"previous-{n}" for n in itertools.count(2))
            previous.rename(next(path for path in numbered if not path.exists()))
        temporary.rename(previous)
    return previous


def write_json(file: Path, content: dict[str, Any]) -> None:
    _replace(file, json.dumps(content, indent=2) + "\n")


def _replace(file: Path, text: str) -> None:
    with _writing(file):
        _unlink_link(file.with_name(file.name + ".tmp"))
        write_whole(file, text.encode())


def _is_figure(value: Any) -> bool:
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def read_run(out_dir: Path) -> dict[str, Any]:
    """run.json of a folder that is to be resumed."""
    file = out_dir / "run.json"
    try:
        content = json.loads(file.read_text("utf-8"))
        dict(content.get("data", {}))
        if missing := {"init_from", "batch_size", "gradient_accumulation_steps"} - content["config"].keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except FileNotFoundError:
        raise UserError(f"nothing to resume in {out_dir}: {file} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{file} is damaged ({e}); without it the run's configuration is not known") from None
    return content


class Metrics:
    """metrics.jsonl: one JSON object a line. A torn last line, as a power cut leaves it, is dropped."""

    def __init__(self, file: Path, resume_step: int | None):
        """resume_step: keep the lines up to this step; None starts anew."""
        rows = [] if resume_step is None else [r for r in self.read(file) if r["step"] <= resume_step]
        _replace(file, "".join(json.dumps(row) + "\n" for row in rows))
        self.rows: list[dict[str, Any]] = []  # for the picture: all evaluations, training steps evenly thinned
        self.count, self.stride = 0, 1
        for row in rows:
            self._remember(row)
        self.file: TextIO = open(file, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self.told = False

    @staticmethod
    def read(file: Path) -> list[dict[str, Any]]:
        rows = []
        for line in file.read_text("utf-8", errors="replace").splitlines() if file.is_file() else []:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and type(row.get("step")) is int and all(map(_is_figure, row.values())):
                    rows.append(row)
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Write one line. A full disk costs no run: what it does not take is written with a later line."""
        if "val_loss" in row and any(r["step"] == row["step"] and "val_loss" in r for r in self.rows[-2:]):
            return  # a run that was killed between an evaluation and its checkpoint evaluates once more
        # JSON has no NaN: a figure that is none becomes null, so that every reader can read the file.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._remember(row)
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as e:
            if not self.told:
                print(f"could not write {self.file.name}: {e.strerror or e}. Make room", file=sys.stderr)
            self.told = True

    def _remember(self, row: dict[str, Any]) -> None:
        """Keep a row for the picture. Of the training steps at most KEPT_ROWS, or a long run's memory would grow."""
        if "val_loss" in row:
            self.rows.append(row)
            return
        if self.count % self.stride == 0:
            self.rows.append(row)
        self.count += 1
        if self.count == KEPT_ROWS * self.stride:
            self.stride *= 2
            goes = {id(r) for r in [r for r in self.rows if "val_loss" not in r][1::2]}
            self.rows = [r for r in self.rows if id(r) not in goes]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # told above
            self.file.close()


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """Free at once what ends here: a figure is a knot of references, and Python would leave dozens of them lying.

    Collections that come meanwhile would make it old, and only a search of everything finds old garbage.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect(1)


@_collected()
def draw_losses(rows: list[dict[str, Any]], file: Path) -> None:
    """loss.png: the losses over the tokens seen, the learning rate beneath."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: half the import time
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    steps = [r for r in rows if r.get("loss") is not None]
    evaluations = [r for r in rows if r.get("val_loss") is not None]
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    tokens = [r.get("tokens") for r in steps]
    top.plot(tokens, [r["loss"] for r in steps], ".-", color="0.75", lw=1, ms=2, label="training step")
    # Blue and orange of Okabe and Ito's palette, told apart by the colour-blind, and by their markers.
    for key, color, marker, label in (
        ("train_loss", "#0072B2", "o", "train"),
        ("val_loss", "#D55E00", "s", "validation"),
    ):
        points = [(r.get("tokens"), r[key]) for r in evaluations if r.get(key) is not None]
        top.plot(
            *zip(*points, strict=True) if points else ((), ()), color=color, marker=marker, ms=4, lw=1.5, label=label
        )
    if trained := [r for r in evaluations if r["step"] > 0]:  # as best/ does, which leaves the beginning out
        best = min(trained, key=lambda r: r["val_loss"])
        label = f"best {best['val_loss']:.4f} at step {best['step']:,}"
        top.axhline(best["val_loss"], color="#D55E00", lw=0.8, ls=":", label=label)
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False)
    bottom.plot(tokens, [r.get("lr") for r in steps], ".-", color="#009E73", lw=1.5, ms=2)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("tokens")
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1.5G
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    temporary = file.with_name(file.name + ".tmp")
    with contextlib.suppress(OSError):  # a full disk costs the picture, not the run
        _unlink_link(temporary)
        figure.savefig(temporary, format="png")
        temporary.replace(file)
