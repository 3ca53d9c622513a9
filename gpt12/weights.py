"""Read and write models: a Hugging Face GPT-2 folder both ways, and nanoGPT's ckpt.pt one way.

    model = from_pretrained("gpt2")   # a hub name, a folder, or a ckpt.pt
    save_pretrained(model, folder)    # config.json, generation_config.json, model.safetensors

On disk weights have the published names ("h.0.attn.c_attn.weight") and the layout of Conv1D, which
is the transpose of nn.Linear's. Nothing is unpickled except tensors and plain values by torch's
safe reader.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt12.errors import UserError
from gpt12.files import exists
from gpt12.linears import linear_names
from gpt12.lora import LoRALinear
from gpt12.new_model import uninitialized_model
from model import GPT, GPTConfig, layer_matrices

# Settings in config.json that change the architecture, and the values that this model has. The
# first value is the default of a missing key.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "layer_norm_epsilon": (1e-5,),
}
# OpenAI's upload holds the causal masks under names that look like biases.
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
NANOGPT_PADDED_VOCAB_SIZE = 50304  # GPT-2's 50,257 tokens, rounded up


def from_pretrained(
    path_or_name: str | Path, block_size: int | None = None, dropout: float = 0.0
) -> GPT:
    """Load a Hugging Face GPT-2 folder, a hub name (gpt2 ... gpt2-xl, owner/name) or a ckpt.pt.

    block_size: shorten the context to this. dropout: the model's dropout, whatever the file says.
    Raises UserError naming the file, the tensor or the setting that this model cannot represent.
    """
    source = str(path_or_name)
    if Path(path_or_name).suffix == ".pt":
        checkpoint = read_nanogpt(Path(path_or_name))
        config = checkpoint.config
        tensors = checkpoint.tensors
    else:
        folder = find_pretrained(path_or_name)
        config = read_config(folder / "config.json")
        tensors = _read_safetensors(folder)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if _has_biases(tensors):
        # Another program may have trained a model of ours that had none: the tensors are right.
        config = replace(config, bias=True)
    _check_shapes(config, tensors, source)
    if block_size is not None and block_size > config.block_size:
        raise UserError(
            f"the model in {source} has a context of {config.block_size} tokens: "
            f"pass --block_size={config.block_size} or less"
        )
    model = uninitialized_model(replace(config, dropout=dropout))
    _load_tensors(model, tensors, source)
    if block_size is not None:
        crop_block_size(model, block_size)
    return model


@torch.no_grad()
def crop_block_size(model: GPT, block_size: int) -> None:
    """Shorten the model's context in place: drop the embeddings of the later positions."""
    wpe = model.transformer.wpe
    wpe.weight = nn.Parameter(wpe.weight[:block_size].clone())
    wpe.num_embeddings = block_size
    model.config = replace(model.config, block_size=block_size)


@torch.no_grad()
def _load_tensors(model: GPT, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a model of their shape. Raises UserError for one that is missing."""
    for name, parameter in _published_weights(model):
        parameter.copy_(_get(tensors, name, tuple(parameter.shape), source))
    embedding = tensors["wte.weight"]
    head = tensors.get("lm_head.weight")
    if head is not None:
        head = head[: len(embedding)]  # nanoGPT's may have padding rows
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise UserError(
                f"{source}: lm_head.weight differs from wte.weight: "
                "an output head with weights of its own is not supported"
            )


def save_pretrained(model: GPT, folder: str | Path, eot: int | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors as `transformers` does.

    eot: the id of the end-of-text token, which ends a text in `transformers`.
    Weights keep their dtype. Padding rows and the tied head are left out. LoRA adapters are merged.
    A model without biases gets zero biases and "bias": false, which only our reader looks at.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    dtype = model.transformer.wte.weight.dtype
    with torch.no_grad():
        for name, tensor in _weights_to_save(model):
            # Move it first: a transposed copy of the whole model may not fit on the GPU.
            tensors[f"transformer.{name}"] = tensor.cpu().contiguous()
            dtype = torch.promote_types(dtype, tensor.dtype)  # merged LoRA weights are float32
    _write_json(folder / "config.json", _huggingface_config(model.config, eot, dtype))
    _write_json(folder / "generation_config.json", _generation_config(eot))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _published_weights(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's published name and the parameter as a view in the published layout."""
    yield "wte.weight", model.transformer.wte.weight.detach()[: model.config.vocab_size]
    yield "wpe.weight", model.transformer.wpe.weight.detach()
    for name, module in model.transformer.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | LoRALinear):
            weight = module.weight
            if isinstance(module, LoRALinear):
                weight = module.merged_weight()
            weight = weight.detach()
            yield f"{name}.weight", weight if isinstance(module, nn.LayerNorm) else weight.t()
            if module.bias is not None:
                yield f"{name}.bias", module.bias.detach()


def _weights_to_save(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Yield what _published_weights yields, and zeros for the biases that the model does not have.

    One by one, so that only one merged weight at a time is in memory.
    """
    for name, tensor in _published_weights(model):
        yield name, tensor
        is_layer = name.startswith(("h.", "ln_f."))
        if is_layer and name.endswith(".weight") and not model.config.bias:
            # The outputs are the last dimension in the published layout.
            yield f"{name.removesuffix('weight')}bias", tensor.new_zeros(tensor.shape[-1])


def _huggingface_config(config: GPTConfig, eot: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Build config.json as `transformers` writes it, plus `bias`, which only our reader knows."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": str(dtype).removeprefix("torch."),
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # an old name that llama.cpp's converter reads
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "bias": config.bias,
    }


def _generation_config(eot: int | None) -> dict[str, Any]:
    """Build generation_config.json: where `transformers` ends a text."""
    content: dict[str, Any] = {"_from_model_config": True}
    if eot is not None:
        content["bos_token_id"] = eot
        content["eos_token_id"] = eot
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


# --------------------------------------------------------------------------------------------------
# Checks


def _get(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], source: str) -> Tensor:
    """Return a tensor; UserError if it is missing or has another shape."""
    if name not in tensors:
        raise UserError(f"{source}: tensor {name} is missing")
    found = tuple(tensors[name].shape)
    if found != shape:
        raise UserError(
            f"{source}: tensor {name} has shape {found}, its configuration asks for {shape}"
        )
    return tensors[name]


def _check_shapes(config: GPTConfig, tensors: dict[str, Tensor], source: str) -> None:
    """Check the matrices against the configuration before memory for the model is allocated."""
    _get(tensors, "wte.weight", (config.vocab_size, config.n_embd), source)
    _get(tensors, "wpe.weight", (config.block_size, config.n_embd), source)
    for i in range(config.n_layer):
        for matrix in layer_matrices(config):
            shape = (matrix.inputs, matrix.outputs)
            _get(tensors, f"h.{i}.{matrix.name}.weight", shape, source)


def _has_biases(tensors: dict[str, Tensor]) -> bool:
    """Return whether any bias is not zero."""
    for name, tensor in tensors.items():
        if name.endswith(".bias") and not CAUSAL_MASK.fullmatch(name) and bool(tensor.any()):
            return True
    return False


def _check_config(shape: dict[str, int], file: Path) -> None:
    """Raise UserError for sizes that no model can have."""
    in_range = all(1 <= size < 2**31 for size in shape.values())
    if not in_range or shape["n_embd"] % shape["n_head"] != 0:
        raise UserError(f"{file}: impossible shape {shape}")


# --------------------------------------------------------------------------------------------------
# Hugging Face folders


def find_pretrained(path_or_name: str | Path) -> Path:
    """Return a local folder as it is, or the downloaded (or cached) folder of a hub name.

    Only the model's JSON, text and safetensors files are downloaded.
    """
    name = str(path_or_name)
    # Unlike Path's, these functions do not raise for a name that no file can have.
    if os.path.isdir(name):  # noqa: PTH112
        return Path(name)
    if os.path.isfile(name):  # noqa: PTH113
        raise UserError(
            f"{name} is a file, and a model is a folder with its config.json: "
            f"try --init_from={Path(name).parent}"
        )
    # The hub knows only names like "gpt2" and "owner/name".
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"init_from={name}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            allow_patterns=["*.json", "*.txt", "*.safetensors"],
            ignore_patterns=["*/*"],
            etag_timeout=5,
        )
    except Exception as error:  # many kinds: no network, no such name, a private repository
        raise UserError(
            f"{name!r} is no local folder and could not be fetched ({type(error).__name__}).\n"
            "Download config.json, model.safetensors, vocab.json and merges.txt from "
            f"https://huggingface.co/{name} into a folder and pass its path as --init_from=FOLDER"
        ) from None
    return Path(folder)


def read_config(file: Path) -> GPTConfig:
    """Read the shape of a model from its config.json; UserError if this model cannot have it."""
    content = _read_json(file)
    for key, values in SUPPORTED.items():
        if content.get(key, values[0]) not in values:
            raise UserError(f"{file}: {key}={content[key]!r} is not supported, only {values[0]!r}")
    try:
        shape = {key: int(content[key]) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        block_size = int(content.get("n_positions", content.get("n_ctx", 1024)))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: {error} is missing or not a number") from None
    _check_config(shape | {"n_positions": block_size}, file)
    if content.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise UserError(f"{file}: n_inner={content['n_inner']} is not supported, only 4 * n_embd")
    return GPTConfig(**shape, block_size=block_size, bias=bool(content.get("bias", True)))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: {file.parent} is no Hugging Face GPT-2 folder"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object")
    return content


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, memory-mapped."""
    import safetensors

    tensors: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        file = folder / name
        if not os.path.isfile(file):  # noqa: PTH113 (as above)
            raise UserError(_missing_weights(folder, file))
        try:
            with safetensors.safe_open(file, framework="pt") as content:
                for key in content.keys():
                    tensors[key] = content.get_tensor(key)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is damaged or no safetensors file: {error}") from None
    return tensors


def _weight_files(folder: Path) -> Sequence[str]:
    """Return the names of the files with the weights: one, or the shards that an index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(
                f"{index}: {name!r:.80} does not name a safetensors file of its own folder"
            )
    return names


def _missing_weights(folder: Path, file: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    hint = ""
    if pickles:
        hint = f"; {pickles[0]} is a pickle, which can run code and is never read"
    return f"{str(file)!a:.200} does not exist{hint}. Save the model as safetensors and try again"


# --------------------------------------------------------------------------------------------------
# nanoGPT's ckpt.pt


class NanoGPTCheckpoint(NamedTuple):
    """What a ckpt.pt of nanoGPT's train.py holds."""

    config: GPTConfig
    tensors: dict[str, Tensor]  # in the published layout
    dataset: str | None  # the data set that it was trained on


def read_nanogpt(file: Path) -> NanoGPTCheckpoint:
    """Read nanoGPT's ckpt.pt through torch's reader for tensors and plain values only."""
    if not exists(file):
        raise UserError(f"{str(file)!a:.200} does not exist: pass the path of a ckpt.pt")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        arguments = content["model_args"]
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        shape = {name: int(arguments[name]) for name in names}
        if shape["vocab_size"] == NANOGPT_PADDED_VOCAB_SIZE:
            shape["vocab_size"] = 50257
        # Checkpoints older than nanoGPT's key `bias` have biases.
        config = GPTConfig(**shape, bias=bool(arguments.get("bias", True)))
        tensors = _published_from_nanogpt(content["model"], config)
        dataset = dict(content.get("config", {})).get("dataset")
    except Exception as error:  # torch raises many kinds, UnpicklingError for a file with code
        raise UserError(
            f"{file} is no nanoGPT checkpoint that loads without running code "
            f"({type(error).__name__})"
        ) from None
    _check_config(shape, file)
    return NanoGPTCheckpoint(config, tensors, dataset if isinstance(dataset, str) else None)


def _published_from_nanogpt(weights: dict[str, Any], config: GPTConfig) -> dict[str, Tensor]:
    """Rename and transpose nanoGPT's tensors, and drop the padding rows of the vocabulary."""
    linear_weights = tuple(f"{name}.weight" for name in linear_names(config))
    tensors = {}
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            continue
        name = name.removeprefix("_orig_mod.")  # torch.compile's prefix
        tensors[name] = tensor.t() if name.endswith(linear_weights) else tensor
    embedding = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = embedding[: config.vocab_size]
    return tensors
