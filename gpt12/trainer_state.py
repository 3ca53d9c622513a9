"""What resuming needs besides the weights: optimizer state, adapters, loss scale, random numbers.

trainer.safetensors holds them under these names:
    optimizer.<parameter>.<key>   state of the optimizer, for example exp_avg
    optimizer.<parameter>.<key>:<part>   a part of an 8-bit state (codes, scale, table)
    adapter.<parameter>           LoRA's matrices
    scaler                        loss scale and growth counter, with float16
    rng.cpu, rng.cuda             states of torch's random generators on rank 0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from gpt12 import optim8bit
from gpt12.device import Machine
from model import GPT


@dataclass(frozen=True)
class TrainerState:
    """The objects whose tensors are saved."""

    model: GPT
    optimizers: list[Optimizer]
    scaler: torch.amp.GradScaler
    machine: Machine

    def owner(self, parameter: Tensor) -> Optimizer:
        """Return the optimizer that updates a parameter."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(parameter is p for p in group["params"]):
                    return optimizer
        raise KeyError("no optimizer updates this parameter")


def save_trainer_state(folder: Path, trainer: TrainerState) -> None:
    """Write trainer.safetensors."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in trainer_tensors(trainer).items():
        tensors[name] = tensor.detach().contiguous()
    save_file(tensors, folder / "trainer.safetensors")


def trainer_tensors(trainer: TrainerState) -> dict[str, Tensor]:
    """Return all tensors of trainer.safetensors by name."""
    tensors: dict[str, Tensor] = {}
    names: dict[Tensor, str] = {}
    for name, parameter in trainer.model.named_parameters():
        names[parameter] = name
        if "lora_" in name:
            tensors[f"adapter.{name}"] = parameter
    for optimizer in trainer.optimizers:
        for owner, state in optimizer.state.items():
            for key, value in state.items():
                name = f"optimizer.{names[owner]}.{key}"
                if optim8bit.is_8bit(value):
                    for part, tensor in optim8bit.parts(value).items():
                        tensors[f"{name}:{part}"] = tensor
                else:
                    tensors[name] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if trainer.machine.on_gpu:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if trainer.scaler.is_enabled():
        state = trainer.scaler.state_dict()
        values = [state["scale"], state["_growth_tracker"]]
        tensors["scaler"] = torch.tensor(values, dtype=torch.float64)
    return tensors


def state_bytes(trainer: TrainerState) -> int:
    """Return the size of trainer.safetensors in bytes."""
    return sum(t.numel() * t.element_size() for t in trainer_tensors(trainer).values())


@torch.no_grad()
def load_trainer_state(folder: Path, trainer: TrainerState) -> None:
    """Read trainer.safetensors back into model, optimizers, loss scale and random generators.

    The file is memory-mapped and copied tensor by tensor, so resuming needs no more memory than
    training. Nothing keeps the map: Windows could not replace the checkpoint then.
    """
    import safetensors

    with safetensors.safe_open(folder / "trainer.safetensors", framework="pt") as content:
        for name in content.keys():
            tensor = content.get_tensor(name)
            kind, _, rest = name.partition(".")
            if kind == "adapter":
                trainer.model.get_parameter(rest).copy_(tensor)
            elif kind == "optimizer":
                _load_optimizer_tensor(trainer, rest, tensor)
            elif kind == "scaler":
                _load_scaler(trainer, tensor)
            elif kind == "rng":
                _load_random_state(trainer, rest, tensor)
    for optimizer in trainer.optimizers:
        optim8bit.assemble_states(optimizer.state)


def _load_optimizer_tensor(trainer: TrainerState, name: str, tensor: Tensor) -> None:
    """name: <parameter>.<key> or <parameter>.<key>:<part>."""
    parameter_name, _, key = name.rpartition(".")
    key, _, part = key.partition(":")
    parameter = trainer.model.get_parameter(parameter_name)
    state = trainer.owner(parameter).state.setdefault(parameter, {})
    if part:
        state.setdefault(key, {})[part] = tensor.to(trainer.machine.device, copy=True)
        return
    if parameter_name.endswith("wpe.weight") and tensor.ndim == parameter.ndim:
        # The run may have been resumed with a smaller block_size, which has fewer positions.
        tensor = tensor[: len(parameter)]
    state[key] = tensor.to(trainer.machine.device, copy=True)


def _load_scaler(trainer: TrainerState, tensor: Tensor) -> None:
    if trainer.scaler.is_enabled():
        state = trainer.scaler.state_dict()
        state["scale"] = tensor[0].item()
        state["_growth_tracker"] = int(tensor[1])
        trainer.scaler.load_state_dict(state)


def _load_random_state(trainer: TrainerState, generator: str, tensor: Tensor) -> None:
    """Only rank 0 saved its state. The other ranks keep the state that they started with."""
    if trainer.machine.rank != 0:
        return
    if generator == "cpu":
        torch.set_rng_state(tensor)
    elif trainer.machine.on_gpu:
        torch.cuda.set_rng_state(tensor)
