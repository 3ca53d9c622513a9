"""Checkpoints: what best/ and last/ hold, when they are written, and how a run is resumed.

    best/   the model with the lowest validation loss after step 0
    last/   the newest model: when Saver.is_due() says so, at the end, on a signal, on an error
            outside of a step, and at evaluations if always_save_checkpoint

Both are Hugging Face folders with the tokenizer's files and trainer.json, the run's Progress
(gpt12/folder.py). last/ also has trainer.safetensors, everything else that resuming needs but the
configuration, which is in run.json. In a LoRA run best/ is the merged model, with the adapters
beside it in best/adapter/; last/ holds only the adapters and the name of their base model.

A folder cannot be renamed onto a full one, so a checkpoint X is replaced in steps:

    1. write X.tmp/ and fsync it
    2. rename X to X.prev
    3. rename X.tmp to X, and fsync the parent folder
    4. delete X.prev

A kill at any moment leaves a checkpoint that loads: between 2 and 3 there is no X, and readers take
X.prev. A resumed run writes run.json after its first last/: until then run.json says what last/ was
made with.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt12.errors import UserError, say
from gpt12.files import exists, remove, sync
from gpt12.folder import (
    Progress,
    find_local,
    json_bytes,
    set_aside,
    write_file,
    write_json,
)
from gpt12.lora import is_adapted, load_adapter, save_adapter
from gpt12.weights import save_config, save_pretrained

# What a tensor of a wrong name, shape or type leads to.
TENSOR_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# --------------------------------------------------------------------------------------------------
# Saving: what is written, and when


class Saver:
    """Writes a run's folder: best/, last/ and run.json. All ranks call it; rank 0 writes."""

    def __init__(self, run: Any, train_step: Any):
        """run: the Run of gpt12/run.py. train_step: train.py's, for what resuming needs."""
        self.run = run
        self.progress: Progress = run.progress
        self.train_step = train_step
        self.model = run.model
        self.description: dict[str, Any] = run.description()  # what run.json holds
        self.due_at: float = time.monotonic() + run.config.save_interval_s
        self.last_holds = self._how_far() if run.request.resumed else None
        self.base: str = run.config.init_from  # adapters refer to it
        if is_adapted(self.model):
            self.base = str(find_local(self.base) or self.base)

    def open(self) -> None:
        """Make the folder that of this run: set an earlier run aside and write run.json.

        That of a resumed run is written with its first checkpoint. Until then last/ is what the
        earlier keys and data made, and resuming compares with these.
        """
        if self.run.machine.rank == 0 and not self.run.request.resumed:
            told = set_aside(self.run.out_dir)
            if told is not None:
                say(told)
            write_file(self.run.out_dir / "run.json", json_bytes(self.description))

    def is_due(self) -> bool:
        """Tell whether it is time to save last/: save_interval_s after the last save.

        Unless the user has set that key, saving takes at most 2% of the time: the interval is at
        least 50 times what the last save took.
        """
        return time.monotonic() >= self.due_at

    def save(self, name: str) -> bool:
        """Write the checkpoint "best" or "last" and tell whether that worked.

        If it did not, the older checkpoint stays and training can go on. Nothing is written if
        last/ already holds all that was trained and evaluated.
        """
        if name == "last" and self.last_holds == self._how_far():
            return True
        began = time.monotonic()
        saved = self._save(name)
        now = time.monotonic()
        if name == "last":
            least_s = 0 if "save_interval_s" in self.run.request.given else 50 * (now - began)
            self.due_at = now + max(self.run.config.save_interval_s, least_s)
            if saved:
                self.last_holds = self._how_far()
        return saved

    def _how_far(self) -> tuple[int, int]:
        """Return the number of finished steps, and the step of the last evaluation."""
        return self.progress.step, self.progress.evaluated_step

    def _save(self, name: str) -> bool:
        folder = self.run.out_dir / name
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            say(f"not saving {folder}: weights are not finite. Try a lower learning_rate")
            return False
        if self.run.machine.rank != 0:
            return True
        try:
            save_checkpoint(folder, partial(self._write, name), self.progress)
            if name == "last":
                write_json(self.run.out_dir / "run.json", self.description)
        except OSError as error:
            say(f"could not save {folder}: {error}. What was there before is untouched; make room")
            return False
        return True

    def _write(self, name: str, folder: Path) -> None:
        """Write what a checkpoint holds into its temporary folder, all but trainer.json."""
        from safetensors.torch import save_file

        end_of_text = None
        tokenizer = self.run.dataset.tokenizer
        if tokenizer is not None:
            tokenizer.save(folder, context=self.model.config.block_size)
            end_of_text = tokenizer.eot
        if name == "last":
            save_file(trainer_tensors(self.train_step), folder / "trainer.safetensors")
        if name == "last" and is_adapted(self.model):  # the model is its base and the adapters
            save_config(self.model, folder, end_of_text)
            save_adapter(self.model, folder, self.base)
            return
        save_pretrained(self.model, folder, end_of_text)  # adapters are merged
        if is_adapted(self.model):
            save_adapter(self.model, folder / "adapter", self.base)


# --------------------------------------------------------------------------------------------------
# Replacing and finding checkpoints


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
        (temporary / "trainer.json").write_bytes(json_bytes(asdict(progress)))
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


# --------------------------------------------------------------------------------------------------
# What resuming needs besides the weights. trainer.safetensors holds
#     optimizer.<parameter>.<key>          state of the optimizer, for example exp_avg
#     optimizer.<parameter>.<key>:<part>   a part of an 8-bit state (codes, scale, table)
#     scaler                               loss scale and growth counter, with float16
#     rng.cpu, rng.cuda                    states of torch's random generators on rank 0
#         (a step seeds them itself; they are for code of yours that draws between two steps)


def trainer_tensors(train_step: Any) -> dict[str, Tensor]:
    """Return all tensors of trainer.safetensors by name. train_step: train.py's TrainStep."""
    tensors = optimizer_tensors(train_step)
    tensors["rng.cpu"] = torch.get_rng_state()
    if train_step.machine.on_gpu:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if train_step.scaler.is_enabled():
        state = train_step.scaler.state_dict()
        values = [state["scale"], state["_growth_tracker"]]
        tensors["scaler"] = torch.tensor(values, dtype=torch.float64)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def optimizer_tensors(train_step: Any) -> dict[str, Tensor]:
    """Return the tensors of the optimizers' states by name, without copying them."""
    tensors: dict[str, Tensor] = {}
    for parameter_name, parameter in train_step.model.named_parameters():
        for optimizer in train_step.optimizers:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                name = f"optimizer.{parameter_name}.{key}"
                if hasattr(value, "__tensor_flatten__"):  # torchao's 8-bit tensor
                    for part in value.__tensor_flatten__()[0]:
                        tensors[f"{name}:{part}"] = getattr(value, part)
                elif value is not None:  # SGD without momentum has None
                    state[key] = torch.as_tensor(value)  # it may be a plain number
                    tensors[name] = state[key]
    return tensors


@torch.no_grad()
def load_trainer_state(folder: Path, train_step: Any) -> None:
    """Read the checkpoint's state back into model, optimizers, loss scale and random generators.

    The file is memory-mapped and copied tensor by tensor into the states that the optimizers
    themselves have made, so resuming needs no more memory than training. Nothing keeps the map:
    Windows could not replace the checkpoint then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if exists(folder / "adapter_config.json"):
        load_adapter(train_step.model, folder)
    train_step.make_states()
    train_step.model.zero_grad()
    places = optimizer_tensors(train_step)
    file = folder / "trainer.safetensors"
    try:
        saved = load_file(file)
        for name, tensor in saved.items():
            _load_tensor(train_step, places, name, tensor)
        _forget_states_not_saved(train_step, places.keys() - saved.keys(), saved.keys())
    except (*TENSOR_ERRORS, SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}). Restore it or delete {folder}") from None


def _load_tensor(train_step: Any, places: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Copy a saved tensor to where it belongs. places: the optimizers' tensors by name."""
    kind, _, rest = name.partition(".")
    if kind == "optimizer":
        place = places[name]
        if name.startswith("optimizer.transformer.wpe.") and tensor.ndim == place.ndim > 0:
            tensor = tensor[: len(place)]  # with a smaller block_size than before
        if place.ndim == 3 and tensor.numel() == place.numel():
            tensor = tensor.view_as(place)  # older checkpoints have another shape of Muon's numbers
        if tensor.shape != place.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(place.shape)}")
        place.copy_(tensor)
    elif kind == "adapter":  # of format 1
        train_step.model.get_parameter(rest).copy_(tensor)
    elif name == "rng.cpu" and train_step.machine.rank == 0:  # the others keep that of their start
        torch.set_rng_state(tensor)
    elif name == "rng.cuda" and train_step.machine.rank == 0 and train_step.machine.on_gpu:
        torch.cuda.set_rng_state(tensor)
    elif kind == "scaler" and train_step.scaler.is_enabled():
        scale = {"scale": tensor[0].item(), "_growth_tracker": int(tensor[1])}
        train_step.scaler.load_state_dict(train_step.scaler.state_dict() | scale)


def _forget_states_not_saved(
    train_step: Any, lacking: Collection[str], saved: Collection[str]
) -> None:
    """Take the state of a parameter that was never updated away from the optimizers again."""
    updated = {name.rpartition(".")[0] for name in saved}
    for name in lacking:
        owner = name.rpartition(".")[0]
        if owner not in updated:
            parameter = train_step.model.get_parameter(owner.removeprefix("optimizer."))
            for optimizer in train_step.optimizers:
                optimizer.state.pop(parameter, None)
        elif not name.endswith(".mean_square"):  # older versions of Muon have none
            raise ValueError(f"it has no {name}")
