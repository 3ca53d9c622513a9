"""Read and write models: a Hugging Face GPT-2 folder both ways, and nanoGPT's ckpt.pt one way.

    model = from_pretrained("gpt2")   # a hub name, a folder, or a ckpt.pt
    save_pretrained(model, folder)    # config.json, generation_config.json, model.safetensors

No list of the parameters is kept here: every parameter and persistent buffer of the model is
written and read, under its name in model.py. In the files of a folder

    the nn.Linear weights of the blocks   are transposed, as GPT-2's layers (Conv1D) have them
    the embedding and the head            end with the vocabulary: its padding rows are left out
    a head that is tied to the embedding  is left out
    LoRA's adapters                       are merged into the weights that they adapt

Nothing is unpickled except tensors and plain values by torch's safe reader.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat, InstanceOf
from torch import Tensor, nn

from gpt12.errors import UserError, warn
from gpt12.folder import find_local, json_bytes, read_json, validated
from gpt12.lora import LoRALinear, base_of_adapter, is_adapted, load_adapter
from gpt12.twin import fingerprint, has_fingerprint, is_gpt2
from model import GPT, GPTConfig, NaNMemory, NothingDrawn, meta_model

# Settings in config.json that change the architecture, and the values that this model has. The
# first value is the default of a missing key.
SUPPORTED = {
    "model_type": ("gpt2", "gpt12"),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "layer_norm_epsilon": (1e-5,),
}
# OpenAI's upload holds the causal masks under names that look like biases.
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")
VOCABULARY = ("transformer.wte.weight", "lm_head.weight")  # with a row for each id
OTHER_MODEL = "so it was trained with another model.py, or it is another kind of model"
MAX_SIZE = 2**29  # torch can still count the bytes of a matrix of two such sizes
NANOGPT_PADDED_VOCAB_SIZE = 50304  # GPT-2's, rounded up


# --------------------------------------------------------------------------------------------------
# Models whose memory is not drawn twice


def new_model(config: GPTConfig) -> GPT:
    """Return a model with the random weights of GPT.init_weights."""
    with NaNMemory():
        model = GPT(config)
    check_initialized(model, "GPT.init_weights in model.py must set it; what layers draw is lost")
    return model


def check_initialized(model: GPT, reason: str) -> None:
    """Raise UserError with the reason if a parameter or a buffer still holds NaN."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.isnan().any():
            raise UserError(f"{name} has no value: {reason}")


# --------------------------------------------------------------------------------------------------
# Reading and writing


def from_pretrained(
    path_or_name: str | Path,
    block_size: int | None = None,
    dropout: float = 0.0,
    new_run: bool = False,
) -> GPT:
    """Load a Hugging Face GPT-2 folder, a hub name (gpt2 ... gpt2-xl, owner/name) or a ckpt.pt.

    Adapters of gpt12/lora.py are added to the weights of their base model.
    block_size: shorten the context to this. dropout: the model's dropout, whatever the file says.
    new_run: the model is trained anew, perhaps by a model.py that was changed since. Otherwise such
        a change is an error.
    Raises UserError naming the file, the tensor or the setting that this model cannot represent.
    """
    source, adapters = _base_and_adapters(find_pretrained(path_or_name))
    if adapters and block_size is None:
        block_size = read_config(adapters[0]).block_size
    model = _read_model(source, block_size, dropout, new_run or bool(adapters))
    for folder in reversed(adapters):
        load_adapter(model, folder)
        check_code(folder, read_config(folder), new_run)
    return model


def _base_and_adapters(source: Path) -> tuple[Path, list[Path]]:
    """Return the model that adapters adapt, and their folders: a base may hold adapters itself."""
    adapters: list[Path] = []
    while (base := base_of_adapter(source)) is not None:
        if source in adapters:
            raise UserError(f"{source} is its own base")
        adapters.append(source)
        try:
            source = find_pretrained(base)
        except UserError as error:
            raise UserError(f"the base model of the adapters in {source}: {error}") from None
    return source, adapters


def _read_model(source: Path, block_size: int | None, dropout: float, new_run: bool) -> GPT:
    """Load a folder or a ckpt.pt that holds a whole model. The arguments: see from_pretrained."""
    if source.suffix == ".pt":
        config, tensors, _ = read_nanogpt(source)
    else:
        config = read_config(source)
        tensors = _read_tensors(source)
    if not any(name.startswith("transformer.") for name in tensors):  # GPT-2 without a head
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    # Another program may have trained biases of a model of ours that had none: they count.
    has_bias = any(_is_bias(name) and bool(tensor.any()) for name, tensor in tensors.items())
    shape = replace(config, bias=config.bias or has_bias, dropout=dropout)
    if block_size is not None and block_size > config.block_size:
        raise UserError(
            f"the model in {source} has a context of {config.block_size} tokens: "
            f"pass --block_size={config.block_size} or less"
        )
    _check_tensors(shape, tensors, source)
    check_code(source, config, new_run)
    with NothingDrawn():
        model = GPT(shape)
    with torch.no_grad():
        for name, tensor in tensors_by_name(model).items():
            tensor.zero_()  # the padding rows, which files leave out
            as_published(model, name, tensor).copy_(tensors[name])
    check_initialized(model, f"{source} holds NaN, or nothing sets it")
    if block_size is not None:
        model.crop_block_size(block_size)
    return model


def check_code(source: Path, config: GPTConfig, new_run: bool = False) -> None:
    """Compare what model.py computes now with what it did when the model in `source` was trained.

    config: of that model. Its fingerprint lies in config.json, if it was trained here.
    Raises UserError if the two differ, or only warns for a new run and for another program's model.
    """
    saved = None
    if source.suffix != ".pt":
        file = source / "config.json"
        value = read_json(file).get("fingerprint") or None
        saved = validated(list[FiniteFloat] | None, value, file)
    if saved is None:
        if not is_gpt2(config):
            warn(
                f"{source} is a GPT-2, and model.py computes something else: the weights fit by "
                "name and shape alone"
            )
    elif not has_fingerprint(config, saved):
        changed = f"model.py computes something else than when {source} was trained"
        if not new_run:
            raise UserError(
                f"{changed}. Undo the change, or train on as a new run: "
                f"--init_from={source} --out_dir=..."
            )
        warn(changed)


def _check_tensors(config: GPTConfig, tensors: dict[str, Tensor], source: Path) -> None:
    """Compare a file's tensors with its configuration, before memory is taken for the model.

    Raises UserError if one is missing, has another shape, or is left over.
    """
    if config.n_layer > len(tensors):
        raise UserError(f"{source}: its configuration asks for more than its tensors hold")
    model = meta_model(config)
    places = tensors_by_name(model)
    for name, tensor in places.items():
        if name not in tensors:
            raise UserError(f"{source}: tensor {name} is missing, {OTHER_MODEL}")
        expected = tuple(as_published(model, name, tensor).shape)
        found = tuple(tensors[name].shape)
        if found != expected:
            raise UserError(
                f"{source}: tensor {name} has shape {found}, its configuration asks for {expected}"
            )
    for name in tensors.keys() - places.keys():
        if not _says_nothing(name, tensors):
            raise UserError(f"{source}: tensor {name} has no place in model.py, {OTHER_MODEL}")


def _says_nothing(name: str, tensors: dict[str, Tensor]) -> bool:
    """Tell whether a model computes the same without this tensor."""
    if name == "lm_head.weight":
        embedding = tensors["transformer.wte.weight"]
        return torch.equal(tensors[name][: len(embedding)], embedding)  # it may have padding rows
    return name.endswith(CAUSAL_MASKS) or (_is_bias(name) and not tensors[name].any())


def _is_bias(name: str) -> bool:
    return name.endswith(".bias") and not name.endswith(CAUSAL_MASKS)


def save_pretrained(model: GPT, folder: Path, eot: int | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors as `transformers` does.

    eot: the id of the end-of-text token, which ends a text in `transformers`.
    If model.py does not compute what GPT-2 computes, "model_type" is "gpt12", which no other
    program opens.
    Weights keep their dtype. A GPT-2 without biases gets zero biases and "bias": false, which only
    our reader looks at.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_config(model, folder, eot)
    tensors = {}
    with torch.no_grad():
        for name, tensor in _tensors_to_save(model):
            # Move it first: a transposed copy of the whole model may not fit on the GPU.
            tensors[name] = tensor.cpu().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tensors_by_name(model: GPT) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer once: of a tied pair only the first."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(tensor is other for other in found.values()):
            found[name] = tensor
    return found


def as_published(model: GPT, name: str, tensor: Tensor) -> Tensor:
    """Return a parameter or buffer as a folder's file holds it: a view, unless it was merged."""
    tensor = tensor.detach()
    if name in VOCABULARY:
        return tensor[: model.config.vocab_size]  # without the padding rows
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, LoRALinear) and name.endswith(".weight"):
        tensor = module.merged_weight()
    is_matrix = name.endswith(".weight") and isinstance(module, nn.Linear | LoRALinear)
    in_block = name.startswith("transformer.h.")
    return tensor.t() if is_matrix and in_block else tensor


def _tensors_to_save(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Yield what a file holds, one by one: so only one merged weight at a time is in memory.

    A GPT-2 has biases. Where this one has none, they are zeros.
    """
    tensors = tensors_by_name(model)
    for name, tensor in tensors.items():
        if not name.endswith((".lora_A", ".lora_B")):  # these are merged into the weight
            yield name, as_published(model, name, tensor)
    if is_gpt2(model.config):
        for name, bias in meta_model(replace(model.config, bias=True)).named_parameters():
            if _is_bias(name) and name not in tensors:
                yield name, torch.zeros(bias.shape, dtype=tensor.dtype)


def save_config(model: GPT, folder: Path, eot: int | None) -> None:
    """Write config.json and generation_config.json. The arguments are those of save_pretrained.

    config.json is what `transformers` writes, and what only our reader knows: `bias`, whatever
    somebody adds to GPTConfig, and the fingerprint of what model.py computes.
    """
    config = model.config
    gpt2 = is_gpt2(config)
    # Weights with merged adapters are float32.
    dtype = torch.float32 if is_adapted(model) else model.transformer.wte.weight.dtype
    content = {
        "architectures": ["GPT2LMHeadModel" if gpt2 else "GPT"],
        "model_type": "gpt2" if gpt2 else "gpt12",
        "dtype": str(dtype).removeprefix("torch."),
        "activation_function": "gelu_new",
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # an old name that llama.cpp's converter reads
        "n_inner": None,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
    }
    shape = asdict(config)
    del shape["block_size"], shape["dropout"]  # they have other names above
    shape["fingerprint"] = fingerprint(config)
    (folder / "config.json").write_bytes(json_bytes(content | shape))
    file = folder / "generation_config.json"
    if not file.exists():  # else it came with the tokenizer of the model that was loaded
        ends = {"_from_model_config": True, "bos_token_id": eot, "eos_token_id": eot}
        file.write_bytes(json_bytes(ends))


def find_pretrained(path_or_name: str | Path) -> Path:
    """Return a local folder or ckpt.pt, or the downloaded (or cached) folder of a hub name.

    Of a run it is that of its best checkpoint, or of its last. Of a hub name only the model's JSON,
    text and safetensors files are downloaded.
    """
    local = find_local(path_or_name)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download

    name = str(path_or_name)

    try:
        folder = snapshot_download(
            name,
            allow_patterns=["*.json", "*.txt", "*.safetensors"],
            ignore_patterns=["*/*"],
            etag_timeout=5,
        )
    except Exception as error:  # many kinds: no network, no such name, a private repository
        raise UserError(
            f"{name!r} is no local folder or file and could not be fetched "
            f"({type(error).__name__}).\n"
            "Download config.json, model.safetensors, vocab.json and merges.txt from "
            f"https://huggingface.co/{name} into a folder and pass its path as --init_from=FOLDER"
        ) from None
    return Path(folder)


def _make_config(values: dict[str, Any], file: Path) -> GPTConfig:
    """Build a configuration from a file's values, with whatever somebody has added to GPTConfig."""
    config: GPTConfig = validated(GPTConfig, values, file)
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    if not all(1 <= size < MAX_SIZE for size in sizes):
        raise UserError(f"{file}: impossible shape {config}")
    return config


def read_config(folder: Path) -> GPTConfig:
    """Return a model's shape from its config.json. UserError if it is no model of this kind."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} is no Hugging Face GPT-2 folder: it has no config.json")
    content = read_json(file)
    for key, values in SUPPORTED.items():
        if content.get(key, values[0]) not in values:
            raise UserError(f"{file}: {key}={content[key]!r} is not supported, only {values[0]!r}")
    block_size = content.get("n_positions", content.get("n_ctx", 1024))
    config = _make_config(content | {"block_size": block_size}, file)
    if content.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{file}: n_inner={content['n_inner']} is not supported, only 4 * n_embd")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, memory-mapped."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            is_pickle = file.suffix == ".bin"
            tensors |= _held_tensors(_read_pickle(file), file) if is_pickle else load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is missing, damaged or no safetensors file: {error}") from None
    return tensors


@dataclass
class WeightIndex:
    """What we read of an index: the file beside it that holds a tensor, by the tensor's name."""

    # A path would lead out of the folder.
    weight_map: dict[str, Annotated[str, Field(pattern=r"^\w[\w.-]*$")]]


def _weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights: one, or the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            parts = set(read_json(index, WeightIndex).weight_map.values())
            return [folder / part for part in sorted(parts)]
        if (folder / name).exists():
            return [folder / name]
    return [folder / "model.safetensors"]


def _held_tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """Return what a pickle holds if it is tensors by name; UserError if it is something else.

    Tensors may share their numbers, and then ask for more memory than the file has. Only a head
    that is tied to the embedding does so for good.
    """
    tensors: dict[str, Tensor] = validated(dict[str, InstanceOf[Tensor]], content, file)
    held = 0
    plain = True
    for name, tensor in tensors.items():
        plain &= tensor.layout == torch.strided and tensor.device.type == "cpu"
        held += 0 if name.endswith("lm_head.weight") else tensor.nbytes
    if not plain or held > file.stat().st_size:
        raise UserError(f"{file} does not hold all numbers of its tensors")
    return tensors


def _read_pickle(file: Path) -> Any:
    """Read a file of torch.save with torch's reader for tensors and plain values only."""
    try:
        mapped = zipfile.is_zipfile(file)  # versions of torch before 1.6 wrote another format
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds, UnpicklingError for a file with code
        raise UserError(
            f"{file} does not load without running code ({type(error).__name__})"
        ) from None


# --------------------------------------------------------------------------------------------------
# nanoGPT's ckpt.pt


@dataclass
class NanoGPTFile:
    """What we read of a ckpt.pt of nanoGPT's train.py."""

    model_args: dict[str, Any]
    model: dict[str, InstanceOf[Tensor]]
    config: dict[str, Any] = field(default_factory=dict)


def read_nanogpt(file: Path) -> tuple[GPTConfig, dict[str, Tensor], Any]:
    """Read nanoGPT's ckpt.pt. Raises UserError if it is something else.

    Returns the shape, the tensors as a folder has them, and the name of the data set.
    """
    content: NanoGPTFile = validated(NanoGPTFile, _read_pickle(file), file)
    config = _make_config(content.model_args, file)  # without a `bias` it has biases
    if config.vocab_size == NANOGPT_PADDED_VOCAB_SIZE:
        config = replace(config, vocab_size=GPTConfig.vocab_size)
    tensors = {}
    for name, tensor in _held_tensors(content.model, file).items():
        name = name.removeprefix("_orig_mod.")  # torch.compile's prefix
        if name in VOCABULARY and tensor.ndim == 2:
            tensor = tensor[: config.vocab_size]
        elif name.startswith("transformer.h.") and tensor.ndim == 2:
            tensor = tensor.t()
        tensors[name] = tensor
    return config, tensors, content.config.get("dataset")
