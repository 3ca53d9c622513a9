"""A run's folder: what lies in it, how its checkpoints are replaced, and how a run is resumed.

    run.json        the configuration, what the user gave, versions, commit, GPU, data set's hash
    metrics.jsonl   one line per logged step and per evaluation
    loss.png        the curves
    best/           the model with the lowest validation loss after step 0
    last/           the newest model: when Saver.is_due() says so, at the end, on a signal, and at
                    evaluations if always_save_checkpoint
    previous/       the files of an earlier run, set aside when a new one starts

best/ and last/ are Hugging Face folders with the tokenizer's files and trainer.json, the run's
progress. last/ also has trainer.safetensors, everything else that resuming needs. In a LoRA run
best/ is the merged model, with the adapters beside it in best/adapter/; last/ holds only the
adapters and the name of their base model.

A folder cannot be renamed onto a full one, so a checkpoint X is replaced in steps:

    1. write X.tmp/ and fsync it
    2. rename X to X.prev
    3. rename X.tmp to X, and fsync the parent folder
    4. delete X.prev

A kill at any moment leaves a checkpoint that loads: between 2 and 3 there is no X, and readers take
X.prev.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from torch.optim import Optimizer

from gpt12 import optim8bit
from gpt12.device import Machine
from gpt12.errors import UserError, one_line
from gpt12.files import (
    exists,
    is_folder,
    lock_folder,
    remove,
    remove_link,
    sync,
    write_atomically,
)
from gpt12.lora import is_adapted, load_adapter, save_adapter
from gpt12.twin import is_gpt2
from gpt12.weights import save_config, save_pretrained
from model import GPT

# The version of trainer.json and trainer.safetensors. Version 1 has LoRA's matrices in
# trainer.safetensors, and a merged model in last/. Files without the number are of version 1.
FORMAT = 2
Kind = TypeVar("Kind")
Number = Annotated[int, Field(ge=0, lt=2**62)]  # NumPy counts windows in int64
PACKAGES = ("torch", "numpy", "tiktoken", "datasets", "safetensors")
# What a tensor of a wrong name, shape or type leads to.
TENSOR_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
RUN_FILES = ("run.json", "metrics.jsonl", "loss.png", "best", "last", "best.prev", "last.prev")


# --------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def lock_run(out_dir: Path) -> Iterator[None]:
    """Keep a second run out of out_dir.

    Raises UserError if there is one or if out_dir cannot be written.
    """
    busy = f"another run is writing to out_dir={out_dir}. Wait for it, or choose another --out_dir="
    with contextlib.ExitStack() as stack:
        with _user_error_if_unwritable(out_dir):
            stack.enter_context(lock_folder(out_dir, if_locked=UserError(busy)))
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
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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


def resumable_files(out_dir: Path) -> dict[str, Path]:
    """Return where the files lie that resuming reads, by their names in out_dir.

    Empty: out_dir holds no run with a checkpoint last/.
    """
    found = [folder for folder in _places(out_dir, "last") if is_folder(folder)]
    if not found or not is_run(out_dir):
        return {}
    files = {f"last/{file.name}": file for file in found[0].iterdir() if file.is_file()}
    return files | {"run.json": out_dir / "run.json"}


@dataclass
class SavedRun:
    """What resuming reads of run.json."""

    config: dict[str, Any]
    requested: dict[str, Any] = field(default_factory=dict)
    given: list[str] | None = None  # None: an earlier version wrote it
    data: dict[str, Any] = field(default_factory=dict)


def read_run(out_dir: Path) -> SavedRun:
    """Return what the run.json of a run says. Raises UserError if it is missing or damaged."""
    if not is_run(out_dir):
        raise UserError(f"no run in {out_dir}: name the folder of one with --out_dir=")
    return _read_json(out_dir / "run.json", SavedRun)


def _read_json(file: Path, kind: type[Kind]) -> Kind:
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}): restore it") from None


def set_aside(out_dir: Path) -> str | None:
    """Move an earlier run's files into out_dir/previous if it has a checkpoint; say so.

    They replace those of a still earlier run. run.json is moved first: where it is gone, a move was
    cut short and goes on.
    Raises UserError if a run is going on in out_dir/previous.
    """
    previous = out_dir / "previous"
    found = [out_dir / name for name in RUN_FILES if exists(out_dir / name)]
    if not any(path.is_dir() for path in found):
        return None
    replaced = ""
    with _user_error_if_unwritable(previous):
        remove_link(previous)
        if is_run(out_dir) and exists(previous):
            with lock_run(previous):
                replaced = ", in place of a still earlier run" if is_run(previous) else ""
            if exists(previous):  # the lock's folder is gone if it held nothing else
                shutil.rmtree(previous)
        previous.mkdir(exist_ok=True)
        for path in found:
            path.rename(previous / path.name)
    size = sum(file.stat().st_size for file in previous.rglob("*"))
    return f"the earlier run in {out_dir} was moved to {previous} ({size / 1e6:,.1f} MB){replaced}"


# --------------------------------------------------------------------------------------------------
# Replacing and finding checkpoints


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
    format: int = FORMAT


def save_checkpoint(folder: Path, write: Callable[[Path], None], progress: Progress) -> None:
    """Replace the checkpoint `folder`.

    write: writes the model's files into the folder that it is given.
    Raises OSError if the disk is full or cannot be written. The old checkpoint is untouched then.
    """
    from safetensors import SafetensorError

    temporary = folder.with_name(folder.name + ".tmp")
    previous = folder.with_name(folder.name + ".prev")
    remove(temporary)
    try:
        temporary.mkdir()
        write(temporary)
        text = json.dumps(asdict(progress) | {"format": FORMAT}, indent=2) + "\n"
        (temporary / "trainer.json").write_text(text, "utf-8")
        _force_to_disk(temporary)
    except (OSError, SafetensorError) as error:  # safetensors wraps the disk's error
        # Half a checkpoint would take the space that is missing.
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(str(error)) from None
    if exists(folder):
        remove(previous)
        folder.rename(previous)
    temporary.rename(folder)
    sync(folder.parent)
    remove(previous)


def _force_to_disk(folder: Path) -> None:
    """Fsync a checkpoint. Its files get one mode: safetensors lets only the owner read."""
    mode = (folder / "trainer.json").stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):  # a file system without permissions
                path.chmod(mode)
        sync(path)
    sync(folder)


def _places(out_dir: Path, name: str) -> tuple[Path, Path]:
    """Return the folders where a checkpoint may be: its own, and that of a save cut short."""
    return out_dir / name, out_dir / f"{name}.prev"


def find_checkpoint(out_dir: Path, names: tuple[str, ...]) -> tuple[Path, Progress]:
    """Return the first of out_dir's checkpoints with one of these names, and its progress.

    Raises UserError if there is none or if its trainer.json is damaged.
    """
    for name in names:
        for folder in _places(out_dir, name):
            if is_folder(folder):
                return folder, _read_progress(folder)
    where = " or ".join(str(out_dir / name) for name in names)
    raise UserError(
        f"no checkpoint in {where}: train a model first (python train.py), or name another run's "
        f"folder with --out_dir=. Where there is a best/, --init_from={out_dir / 'best'} starts a "
        "new run from it"
    )


def _read_progress(folder: Path) -> Progress:
    """Read trainer.json. What an older file lacks keeps its default."""
    file = folder / "trainer.json"
    progress = _read_json(file, Progress)
    if progress.format > FORMAT:
        raise UserError(
            f"{file} has format {progress.format}, written by a newer version; this one reads up "
            f"to {FORMAT}: update the program"
        )
    return progress


# --------------------------------------------------------------------------------------------------
# What resuming needs besides the weights. trainer.safetensors holds
#     optimizer.<parameter>.<key>          state of the optimizer, for example exp_avg
#     optimizer.<parameter>.<key>:<part>   a part of an 8-bit state (codes, scale, table)
#     scaler                               loss scale and growth counter, with float16
#     rng.cpu, rng.cuda                    states of torch's random generators on rank 0


class TrainerState(Protocol):
    """The objects whose tensors are saved: train.py's TrainStep holds them."""

    model: GPT
    optimizers: list[Optimizer]
    scaler: torch.amp.GradScaler
    machine: Machine

    def make_states(self) -> None:
        """Let the optimizers make their states, which change nothing yet."""


def save_trainer_state(folder: Path, trainer: TrainerState) -> None:
    """Write trainer.safetensors."""
    from safetensors.torch import save_file

    save_file(trainer_tensors(trainer), folder / "trainer.safetensors")


def trainer_tensors(trainer: TrainerState) -> dict[str, Tensor]:
    """Return all tensors of trainer.safetensors by name."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    for parameter_name, parameter in trainer.model.named_parameters():
        for optimizer in trainer.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                name = f"optimizer.{parameter_name}.{key}"
                if optim8bit.is_8bit(value):
                    for part, tensor in optim8bit.parts(value).items():
                        tensors[f"{name}:{part}"] = tensor
                elif value is not None:  # as a momentum that is switched off
                    tensors[name] = torch.as_tensor(value)
    if trainer.machine.on_gpu:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if trainer.scaler.is_enabled():
        state = trainer.scaler.state_dict()
        values = [state["scale"], state["_growth_tracker"]]
        tensors["scaler"] = torch.tensor(values, dtype=torch.float64)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def load_trainer_state(folder: Path, trainer: TrainerState) -> None:
    """Read the checkpoint's state back into model, optimizers, loss scale and random generators.

    The file is memory-mapped and copied tensor by tensor, so resuming needs no more memory than
    training. Nothing keeps the map: Windows could not replace the checkpoint then.
    """
    import safetensors

    if exists(folder / "adapter_config.json"):
        load_adapter(trainer.model, folder)
    trainer.make_states()
    trainer.model.zero_grad()
    file = folder / "trainer.safetensors"
    read: set[str] = set()
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            for name in content.keys():
                _load_tensor(trainer, name, content.get_tensor(name))
                read.add(name.partition(":")[0])
    except (*TENSOR_ERRORS, safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}). Restore it or delete {folder}") from None
    for name, parameter in trainer.model.named_parameters():
        for optimizer in trainer.optimizers:
            state = optimizer.state.get(parameter, {})
            saved = {key for key, value in state.items() if value is not None}
            lacking = {key for key in saved if f"optimizer.{name}.{key}" not in read}
            if lacking == saved:
                optimizer.state.pop(parameter, None)  # it was never updated
            elif lacking - {"mean_square"}:  # older versions of Muon have none
                raise UserError(f"{file} is damaged: {name} has no {min(lacking)}")


def _load_tensor(trainer: TrainerState, name: str, tensor: Tensor) -> None:
    kind, _, rest = name.partition(".")
    if kind == "optimizer":
        _load_optimizer_tensor(trainer, rest, tensor)
    elif kind == "adapter":  # of format 1
        trainer.model.get_parameter(rest).copy_(tensor)
    elif name == "rng.cpu" and trainer.machine.rank == 0:  # the others keep that of their start
        torch.set_rng_state(tensor)
    elif name == "rng.cuda" and trainer.machine.rank == 0 and trainer.machine.on_gpu:
        torch.cuda.set_rng_state(tensor)
    elif kind == "scaler" and trainer.scaler.is_enabled():
        scale = {"scale": tensor[0].item(), "_growth_tracker": int(tensor[1])}
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | scale)


def _load_optimizer_tensor(trainer: TrainerState, name: str, tensor: Tensor) -> None:
    """Copy a tensor to its place in a state that the optimizer itself has made.

    name: <parameter>.<key> or <parameter>.<key>:<part>.
    """
    parameter_name, _, key = name.rpartition(".")
    key, _, part = key.partition(":")
    parameter = trainer.model.get_parameter(parameter_name)
    states = [o.state[parameter] for o in trainer.optimizers if key in o.state.get(parameter, {})]
    if not states:
        raise ValueError(f"no optimizer has a state {name}")
    value = states[0][key]
    place = optim8bit.parts(value)[part] if part else torch.as_tensor(value)
    if parameter_name.endswith("wpe.weight") and tensor.ndim == place.ndim > 0:
        tensor = tensor[: len(place)]  # with a smaller block_size than before
    if tensor.numel() == place.numel() and place.ndim == 3:
        tensor = tensor.view_as(place)  # older checkpoints have another shape of Muon's numbers
    same_kind = tensor.is_floating_point() == place.is_floating_point()
    if tensor.shape != place.shape or not same_kind:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {tuple(place.shape)}"
        )
    place.copy_(tensor)
    if not part:
        states[0][key] = place


# --------------------------------------------------------------------------------------------------
# Saving


@dataclass
class Saver:
    """Writes a run's checkpoints best/ and last/. All ranks call it; rank 0 writes."""

    out_dir: Path
    progress: Progress
    state: TrainerState  # what resuming needs besides the weights
    tokenizer: Any
    base: str  # what the model was started from; adapters refer to it
    say: Callable[[str], None]  # prints a line
    interval_s: float  # seconds between two saves of last/
    interval_is_exact: bool  # else it is at least 50 times what the last save took

    def __post_init__(self) -> None:
        self.model = self.state.model
        self.seconds = 0.0  # what the last save of last/ took
        self.total_s = 0.0  # what all saves took
        self.saved_at = time.monotonic()
        self.last_holds = self._how_far() if self.progress.step > 0 else None
        self.is_lora = is_adapted(self.model)
        if not is_gpt2(self.model.config):
            self.say(
                "model.py does not compute what GPT-2 computes: this program opens the saved "
                "models, others cannot"
            )
        if self.is_lora and is_run(Path(self.base)):
            self.base = str(find_checkpoint(Path(self.base), ("best", "last"))[0])

    def is_due(self) -> bool:
        """Tell whether it is time to save last/."""
        interval = self.interval_s
        if not self.interval_is_exact:
            interval = max(interval, 50 * self.seconds)
        return time.monotonic() - self.saved_at >= interval

    def is_saved(self) -> bool:
        """Tell whether last/ holds all that was trained and evaluated."""
        return self.last_holds == self._how_far()

    def _how_far(self) -> tuple[int, int]:
        """Return the number of finished steps, and the step of the last evaluation."""
        return self.progress.step, self.progress.evaluated_step

    def save(self, name: str) -> bool:
        """Write the checkpoint "best" or "last" and tell whether that worked.

        If it did not, the older checkpoint stays and training can go on.
        """
        began = time.monotonic()
        saved = self._save(name)
        seconds = time.monotonic() - began
        self.total_s += seconds
        if name == "last":
            self.seconds = seconds
            self.saved_at = began + seconds
            if saved:
                self.last_holds = self._how_far()
        return saved

    def _save(self, name: str) -> bool:
        folder = self.out_dir / name
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()])
        if not finite.all():
            self.say(f"not saving {folder}: weights are not finite. Try a lower learning_rate")
            return False
        if self.state.machine.rank != 0:
            return True
        write = self._write_best if name == "best" else self._write_last
        try:
            save_checkpoint(folder, write, self.progress)
        except OSError as error:
            self.say(
                f"could not save {folder}: {error}. What was there before is untouched; make room"
            )
            return False
        return True

    def _write_best(self, folder: Path) -> None:
        """Write the model, with LoRA's adapters merged, and the adapters beside it."""
        save_pretrained(self.model, folder, self._write_tokenizer(folder))
        if self.is_lora:
            save_adapter(self.model, folder / "adapter", self.base)

    def _write_last(self, folder: Path) -> None:
        """Write what resuming needs. The model of a LoRA run is its base and the adapters."""
        save_trainer_state(folder, self.state)
        end_of_text = self._write_tokenizer(folder)
        if self.is_lora:
            save_config(self.model, folder, end_of_text)
            save_adapter(self.model, folder, self.base)
        else:
            save_pretrained(self.model, folder, end_of_text)

    def _write_tokenizer(self, folder: Path) -> int | None:
        """Write the tokenizer's files and return the id of its end-of-text token."""
        if self.tokenizer is None:
            return None
        self.tokenizer.save(folder, context=self.model.config.block_size)
        return self.tokenizer.eot
