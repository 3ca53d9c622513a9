"""LoRA: train small low-rank updates of frozen weights (Hu et al. 2021, arXiv:2106.09685).

    add_lora(model, rank=16, alpha=32)        # freeze the model and add adapters
    save_adapter(model, folder, base="gpt2")  # the adapters alone, as PEFT reads them

gpt12/weights.py merges the adapters into the weights when it saves the model.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, FiniteFloat
from torch import Tensor, nn

from gpt12.errors import UserError
from gpt12.folder import json_bytes, read_json


class LoRALinear(nn.Module):
    """Compute W x + b + (alpha / rank) B A x with W and b frozen (Hu et al. 2021, section 4.1).

    It takes over the weight and the bias of the layer that it replaces, so their names stay.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        limit = min(base.in_features, base.out_features)
        if not 1 <= rank <= limit:
            raise UserError(f"lora_rank={rank} must lie between 1 and the layer's width, {limit}")
        self.weight = base.weight  # (out, in)
        self.bias = base.bias  # (out,) or None
        self.scale = alpha / rank
        self.base_hash = hash_of(base.weight)  # before it is rounded to 16 bits
        # float32 even if the frozen weights are bf16, because the optimizer updates these.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * update

    def merged_weight(self) -> Tensor:
        """Return W + (alpha / rank) B A, of shape (out, in), in float32."""
        return self.weight.float() + self.scale * (self.lora_B @ self.lora_A)


def add_lora(model: nn.Module, rank: int, alpha: float, dtype: torch.dtype | None = None) -> None:
    """Freeze the model and add a trainable adapter to each nn.Linear of its blocks.

    dtype: what the frozen weights are kept in. Raises UserError for a rank that the layers cannot
    have.
    """
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(parameter, name)
        if other != name and "transformer.h." in name + other and parameter.ndim == 2:
            raise UserError(f"lora_rank cannot adapt {name} and {other}, which are one matrix")
    model.requires_grad_(False)
    # This order decides which random numbers an adapter gets. It is that of earlier versions, so a
    # seed still gives the same adapters.
    names = dict.fromkeys(name.rpartition(".")[2] for name in linears(model))
    for parent in list(model.get_submodule("transformer.h").modules()):
        children = dict(parent.named_children())
        for name in names:
            child = children.get(name)
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))
    for parameter in model.parameters():
        if dtype is not None and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def linears(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers of the blocks by name, adapted or not."""
    blocks = model.get_submodule("transformer.h").named_modules(prefix="transformer.h")
    return {name: layer for name, layer in blocks if isinstance(layer, nn.Linear | LoRALinear)}


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a model has adapters."""
    return any(isinstance(layer, LoRALinear) for layer in linears(model).values())


# --------------------------------------------------------------------------------------------------
# Files


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write the adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base: what the frozen weights were read from: a local path, which becomes absolute, so that the
    adapter can be opened from any working directory, or a name on the Hugging Face hub.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    layers = linears(model)
    first = next(iter(layers.values()))
    rank = len(first.lora_A)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).absolute()) if Path(base).exists() else base,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "fan_in_fan_out": True,  # GPT-2's layers in `transformers` are Conv1D, (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_bytes(json_bytes(content))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    metadata = {"format": "pt", "base": hash_of_base(model)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)


@dataclass
class AdapterConfig:
    """What we read of an adapter_config.json."""

    base_model_name_or_path: str
    r: Annotated[int, Field(ge=1)]
    lora_alpha: FiniteFloat


def base_of_adapter(folder: Path) -> str | None:
    """Return the base model's folder or hub name; None for a folder that holds no adapters."""
    file = folder / "adapter_config.json"
    return read_json(file, AdapterConfig).base_model_name_or_path if file.exists() else None


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read adapters of save_adapter into a model with adapters, or add them to a model's weights.

    Raises UserError if they are damaged, or belong to another base model.
    """
    import safetensors

    config = read_json(folder / "adapter_config.json", AdapterConfig)
    scale = config.lora_alpha / config.r
    file = folder / "adapter_model.safetensors"
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            if (content.metadata() or {}).get("base") != hash_of_base(model):
                raise UserError(
                    f"{config.base_model_name_or_path} is not the base model of the adapters in "
                    f"{folder}, or its weights are others now. Restore it, or start a new run from "
                    "the merged model in best/"
                )
            for name, layer in linears(model).items():
                A = content.get_tensor(f"base_model.model.{name}.lora_A.weight")
                B = content.get_tensor(f"base_model.model.{name}.lora_B.weight")
                if isinstance(layer, LoRALinear):
                    layer.lora_A.copy_(A)
                    layer.lora_B.copy_(B)
                else:
                    layer.weight += scale * (B @ A)
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def hash_of_base(model: nn.Module) -> str:
    """Return a hash of the weights that adapters adapt, as they were read from the base model."""
    digest = hashlib.sha256()
    for layer in linears(model).values():
        own = layer.base_hash if isinstance(layer, LoRALinear) else hash_of(layer.weight)
        digest.update(own.encode())
    return digest.hexdigest()


def hash_of(weight: Tensor) -> str:
    """Return a hash of a matrix. It hashes only the sum of each column's bits, to be fast."""
    bits = weight.detach().float().cpu().contiguous().view(torch.int32)
    return hashlib.sha256(bits.sum(0).numpy().tobytes()).hexdigest()
