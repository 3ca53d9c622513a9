"""LoRA: train small low-rank updates of frozen weights (Hu et al. 2021, arXiv:2106.09685).

    add_lora(model, rank=16, alpha=32)        # freeze the model and add adapters
    save_adapter(model, folder, base="gpt2")  # the adapters alone, as PEFT reads them

gpt12/weights.py merges the adapters into the weights when it saves the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt12.errors import UserError
from gpt12.linears import replace_linears
from model import GPT


class LoRALinear(nn.Module):
    """Compute W x + b + (alpha / rank) B A x with W and b frozen (Hu et al. 2021, section 4.1).

    It takes over the weight and the bias of the layer that it replaces, so their names stay.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        limit = min(base.in_features, base.out_features)
        if not 1 <= rank <= limit:
            raise UserError(f"lora_rank={rank} must lie between 1 and the layer's width, {limit}")
        self.weight = base.weight  # (out, in)
        self.bias = base.bias  # (out,) or None
        self.scale = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        # float32 even if the frozen weights are bf16, because the optimizer updates these.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * update

    def merged_weight(self) -> Tensor:
        """Return W + (alpha / rank) B A, of shape (out, in), in float32."""
        return self.weight.float() + self.scale * (self.lora_B @ self.lora_A)


def add_lora(
    model: GPT, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = ()
) -> None:
    """Freeze the model and add trainable adapters to the linear layers of its blocks.

    targets: names such as "c_attn"; empty means all linear layers. Raises UserError for a rank that
    the layers cannot have.
    """

    def adapt(linear: nn.Linear) -> LoRALinear:
        return LoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout)

    model.requires_grad_(False)
    replace_linears(model, adapt, targets)


def save_adapter(model: GPT, folder: Path, base: str) -> str | None:
    """Write the adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base: what the frozen weights were read from, a local path or a name on the Hugging Face hub.
    Returns a note for the user if PEFT cannot open the base, else None.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    base, note = _base_for_peft(base)
    modules = model.transformer.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, LoRALinear)}
    first = next(iter(layers.values()))
    rank = len(first.lora_A)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": first.lora_dropout.p,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "fan_in_fan_out": True,  # GPT-2's layers in `transformers` are Conv1D, (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, "utf-8")
    tensors = {}
    for name, layer in layers.items():
        prefix = f"base_model.model.transformer.{name}"
        tensors[f"{prefix}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return note


def _base_for_peft(base: str) -> tuple[str, str | None]:
    """Return the name that PEFT opens the base by, and a note if it cannot.

    A local path becomes absolute, so that the adapter can be opened from any working directory.
    """
    path = Path(base)
    if path.suffix == ".pt":
        note = (
            f"the adapter's base, {base}, is nanoGPT's ckpt.pt, which PEFT cannot open. Use the "
            "merged model beside the adapter, or save the base as a Hugging Face folder first: "
            f"save_pretrained(from_pretrained({base!r}), folder) of gpt12.weights"
        )
        return str(path.absolute()), note
    if path.is_dir():
        return str(path.absolute()), None
    return base, None
