"""What a training run starts from: configuration, weights and data, checked against each other."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.dataset import Dataset
from gpt12 import config_loader, lora
from gpt12.checkpoint import find_checkpoint
from gpt12.device import Machine
from gpt12.distributed import torchrun_ranks
from gpt12.errors import UserError
from gpt12.new_model import new_model
from gpt12.optimizer import find_optimizer
from gpt12.run_folder import REPOSITORY, is_run, read_run
from gpt12.settings import TrainConfig
from gpt12.shape import MODEL_KEYS, model_shape
from gpt12.weights import find_pretrained, from_pretrained
from model import GPT, GPTConfig, flops_per_token

# compile=auto: a run with fewer operations than this is over before compiling has paid off.
COMPILE_FROM_FLOPS = 6e15
# A core does about this many operations a second in float32; only used to warn before a very long
# run.
CPU_FLOPS_PER_CORE = 25e9
LONG_RUN_HOURS = 2
# Keys that a resumed run cannot change, because its weights or its optimizer's state depend on
# them.
FIXED_ON_RESUME = (
    *MODEL_KEYS,
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "optimizer",
    "val_fraction",
)


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    config: TrainConfig  # "auto" is not resolved yet
    given: set[str]  # the keys that the user set
    saved: dict[str, Any] | None = None  # run.json, if a run is resumed
    notes: list[str] = field(default_factory=list)
    advice: str = ""  # to add where the data set is not prepared

    @property
    def resumed(self) -> bool:
        """Tell whether an earlier run goes on."""
        return self.saved is not None

    @property
    def requested(self) -> dict[str, Any]:
        """Return every key as the user asked for it, now or when the run began: "auto" included.

        A resumed run's own values are decided already; this is what they were decided from.
        """
        values = as_dict(self.config)
        earlier = {} if self.saved is None else self.saved.get("requested", {})
        for key in values.keys() & earlier.keys() - self.given:
            values[key] = earlier[key]
        return values


# --------------------------------------------------------------------------------------------------
# The configuration


def read_request(argv: list[str]) -> Request:
    """Read the command line and the config files. Without arguments: Shakespeare, on any machine.

    Raises UserError with every mistake found.
    """
    if not argv:
        preset = _preset_for_this_machine()
        if torchrun_ranks().rank == 0:
            print(f"no preset given: using {preset}, which suits this machine (--help: others)")
        argv = [str(REPOSITORY / preset)]
    reading = config_loader.read(TrainConfig, argv)
    if reading.config.init_from == "resume":
        request = _read_resumed(argv, reading)
    else:
        config, given = reading.finish()
        config = _keep_sequences_of_a_step(config, reading)
        config = _with_data_of_the_run(config, given)
        request = Request(config, given, advice=_advise_a_preset(config, reading, argv))
    _check_ranks(request.config)
    find_optimizer(request.config.optimizer)  # or UserError
    return request


def _keep_sequences_of_a_step(
    config: TrainConfig, reading: config_loader.Reading[TrainConfig]
) -> TrainConfig:
    """With --batch_size=auto alone, a step keeps its number of sequences.

    With batch_size=auto, gradient_accumulation_steps counts sequences and not micro-batches.
    """
    preset = reading.before_flags
    if config.batch_size != "auto" or preset.batch_size == "auto":
        return config
    if reading.sources.get("gradient_accumulation_steps") == config_loader.COMMAND_LINE:
        return config
    rows = preset.gradient_accumulation_steps * int(preset.batch_size)
    return replace(config, gradient_accumulation_steps=rows)


def _with_data_of_the_run(config: TrainConfig, given: set[str]) -> TrainConfig:
    """Let --eval_only measure a run on its own data set, unless another one is given."""
    folder = Path(config.init_from)
    if not config.eval_only or "dataset" in given or not is_run(folder):
        return config
    saved = read_run(folder)["config"]
    own = {}
    for key in ("dataset", "tokenizer", "val_fraction", "text_column"):
        if key in saved and key not in given:
            own[key] = saved[key]
    return replace(config, **own)


def _preset_for_this_machine() -> str:
    size = "char" if torch.cuda.is_available() else "cpu"
    return f"config/train_shakespeare_{size}.py"


def _advise_a_preset(
    config: TrainConfig, reading: config_loader.Reading[TrainConfig], argv: list[str]
) -> str:
    """Return advice for somebody who changes a key but names neither preset nor data.

    As in nanoGPT that means GPT-2 on OpenWebText, which few people have.
    """
    has_preset = set(reading.sources.values()) != {config_loader.COMMAND_LINE}
    if has_preset or "dataset" in reading.sources or config.init_from != "scratch":
        return ""
    return (
        "You gave no preset. To change a key of the first run, name its preset: "
        f"python train.py {_preset_for_this_machine()} {shlex.join(argv)}"
    )


def _check_ranks(config: TrainConfig) -> None:
    """Refuse a number of micro-batches that cannot be shared equally."""
    world = torchrun_ranks().world
    rest = config.gradient_accumulation_steps % world
    if rest:
        near = config.gradient_accumulation_steps + world - rest
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not a multiple "
            f"of {world} ranks: pass --gradient_accumulation_steps={near}"
        )


def _read_resumed(argv: list[str], reading: config_loader.Reading[TrainConfig]) -> Request:
    """Merge the saved configuration of the run in out_dir with what is given now.

    reading: what is given now, without the saved values. It is compared with them, and then read
    once more on top of them.
    """
    asked, given = reading.finish(check=False)
    out_dir = Path(asked.out_dir)
    saved = read_run(out_dir)
    fixed = list(FIXED_ON_RESUME)
    if saved["config"].get("optimizer") == "adamw8bit":
        fixed.append("block_size")  # an 8-bit state cannot be cut to fewer positions
    for key in fixed:
        if key in given and getattr(asked, key) != saved["config"].get(key):
            raise UserError(
                f"{key}={getattr(asked, key)}, but the run in {out_dir} has "
                f"{saved['config'].get(key)}: leave --{key} out, or start a new run"
            )
    base = dict(saved["config"])
    # dtype=auto stays what it became: another precision would be another run.
    base["dtype"] = saved.get("dtype", "auto")
    notes = _decide_memory_again(base, saved, given)
    config, given = config_loader.load(TrainConfig, argv, base)
    if config.batch_size == "auto" and base["batch_size"] != "auto":
        if "gradient_accumulation_steps" not in given:
            # With batch_size=auto this key counts rows, not micro-batches.
            rows = config.gradient_accumulation_steps * base["batch_size"]
            config = replace(config, gradient_accumulation_steps=rows)
    # The folder may have been renamed, and run.json may be from somebody else's machine.
    config = replace(config, init_from=saved["config"]["init_from"], out_dir=str(out_dir))
    return Request(config, given, saved, notes)


def _decide_memory_again(base: dict[str, Any], saved: dict[str, Any], given: set[str]) -> list[str]:
    """Go back to "auto" for recompute and batch_size if the run moved to another GPU.

    What fitted the old card may not fit this one. The tokens of a step stay the same. What the user
    gives now counts as it is. Returns a note for the user.
    """
    requested = saved.get("requested", {})
    old = (saved.get("device"), saved.get("device_memory_gib"))
    if base.get("deterministic") or not torch.cuda.is_available() or old[1] is None:
        return []
    properties = torch.cuda.get_device_properties(torchrun_ranks().local)
    new = (properties.name, round(properties.total_memory / 2**30, 1))
    if old == new:
        return []
    changed = []
    if requested.get("recompute") == "auto" and "recompute" not in given:
        base["recompute"] = "auto"
        changed.append("recompute")
    batch_is_given = bool(given & {"batch_size", "gradient_accumulation_steps"})
    if requested.get("batch_size") == "auto" and not batch_is_given:
        base["gradient_accumulation_steps"] *= base["batch_size"]
        base["batch_size"] = "auto"
        changed.append("batch_size")
    if not changed:
        return []
    return [
        f"this run began on {old[0]} and continues on {new[0]}, so {' and '.join(changed)} "
        f"{'is' if len(changed) == 1 else 'are'} chosen again. Losses may differ in the last digits"
    ]


# --------------------------------------------------------------------------------------------------
# Weights


def load_start(request: Request, last: Path | None) -> tuple[GPT | None, Any]:
    """Load the model to start from, and its tokenizer if it has one.

    last: the checkpoint of a run that is resumed.
    Returns (None, None) for a model from scratch, whose vocabulary comes from the data. The model
    is on the CPU.
    """
    from data.tokenizers import load_tokenizer

    config = request.config
    source = _source(config, last)
    if source is None:
        return None, None
    crop = last is not None or "block_size" in request.given
    block_size = config.block_size if crop else None
    model = from_pretrained(source, block_size, config.dropout)
    if last is not None and source != last:
        _check_base(model, last, config)
    # A tokenizer may lie beside nanoGPT's ckpt.pt, which holds none itself.
    tokenizer = load_tokenizer(source if source.is_dir() else source.parent)
    return model, tokenizer


def _source(config: TrainConfig, last: Path | None) -> Path | None:
    """Return the folder or file with the weights, None for a model from scratch."""
    # LoRA resumes from the base model, whose weights it does not change; its adapters are loaded
    # later.
    if last is not None and (not config.lora_rank or config.eval_only):
        return last
    if config.init_from == "scratch":
        if config.lora_rank:
            raise UserError(
                "lora_rank with init_from=scratch: LoRA adapts a trained model, name one with "
                "--init_from="
            )
        return None
    source = Path(config.init_from)
    out_dir = Path(config.out_dir).resolve()
    inside = out_dir in (source.resolve(), *source.resolve().parents)
    if last is None and config.lora_rank and inside:
        raise UserError(
            f"init_from={source} is inside out_dir={config.out_dir}, whose files this run replaces."
            " A LoRA run needs its base model when it is resumed: choose another --out_dir="
        )
    if is_run(source):
        return find_checkpoint(source, ("best", "last"))[0]
    if source.suffix == ".pt":
        return source
    return find_pretrained(config.init_from)


def _check_base(model: GPT, last: Path, config: TrainConfig) -> None:
    """Refuse to resume adapters on another base model.

    Adapters never change the position embedding, so the base can be recognized by it.
    """
    import safetensors

    with safetensors.safe_open(last / "model.safetensors", framework="pt") as content:
        then = content.get_tensor("transformer.wpe.weight").float()
    now = model.transformer.wpe.weight.detach()
    rows = min(len(then), len(now))  # resuming may have made block_size smaller
    same = then.size(1) == now.size(1)
    # The checkpoint may be in 16 bits.
    if not same or not torch.allclose(then[:rows], now[:rows], rtol=1e-2, atol=1e-6):
        raise UserError(
            f"{config.init_from}, the base model of the adapters in {config.out_dir}, has other "
            "weights now. Restore it, or start a new run from the merged model: "
            f"--init_from={last}"
        )


def model_for_data(model: GPT | None, tokenizer: Any, dataset: Dataset, config: TrainConfig) -> GPT:
    """Return the loaded model after checking that the data fit it, or a new one for the data.

    Raises UserError if the data were made with another tokenizer than the model's.
    """
    if model is None:
        return new_model(model_shape(config, dataset.vocab_size))
    other_tokenizer = (
        tokenizer is not None
        and dataset.tokenizer is not None
        and tokenizer.sha256 != dataset.tokenizer.sha256
    )
    if other_tokenizer or dataset.vocab_size > model.config.vocab_size:
        raise UserError(_wrong_tokenizer(model, tokenizer, dataset, config))
    if tokenizer is None and dataset.vocab_size < model.config.vocab_size:
        dataset.warnings.append(
            f"{config.init_from} has no tokenizer. Its first {dataset.vocab_size} of "
            f"{model.config.vocab_size} ids are taken to be those of {dataset.name} "
            f"({dataset.meta.get('tokenizer')}). If it was trained with another tokenizer, what it "
            "learned is lost"
        )
    return model


def _wrong_tokenizer(model: GPT, tokenizer: Any, dataset: Dataset, config: TrainConfig) -> str:
    if tokenizer is None:
        advice = "The model has no tokenizer: put its files beside it, or pass a --tokenizer="
    elif config.tokenizer != "auto":
        advice = (
            f"The model brings its own tokenizer ({tokenizer.name}): leave "
            f"--tokenizer={config.tokenizer} out, or train a new model with --init_from=scratch"
        )
    else:
        advice = "Pass the text itself as --dataset=FILE"
    return (
        f"dataset {dataset.name} was made with another tokenizer "
        f"({dataset.meta.get('tokenizer')}, {dataset.vocab_size} tokens) than the model to start "
        f"from ({model.config.vocab_size} tokens). {advice}"
    )


def prepare_model(model: GPT, config: TrainConfig, machine: Machine) -> None:
    """Put the model on the device in the form that the configuration asks for.

    It adds adapters, sets precision and recomputation, and compiles. config: dtype, recompute and
    lora_alpha are decided.
    """
    if config.optimizer == "adamw8bit":
        if machine.dtype != torch.bfloat16:
            raise UserError(
                "optimizer=adamw8bit keeps the weights in bfloat16: pass --dtype=bfloat16, or "
                "choose another optimizer"
            )
        model.bfloat16()
    if config.lora_rank and not config.eval_only:
        targets = [] if config.lora_targets == "all" else config.lora_targets.split(",")
        model.to(machine.dtype)  # frozen weights need no float32 copy
        assert config.lora_alpha is not None
        lora.add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, targets)
    model.to(machine.device)
    model.set_recompute(config.recompute)
    if machine.compiled:
        compile_model(model)


def compile_model(model: GPT) -> None:
    """Compile the layers in place, and use the loss's Triton kernel.

    Equal layers are compiled once, so this takes a fraction of the time of compiling the whole
    model.
    """
    import logging

    from gpt12.loss import triton

    # torch warns of in-place operations under selective checkpointing; a layer has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    layers: list[nn.Module] = [*model.transformer.h, model.transformer.ln_f]
    for layer in layers:
        layer.compile(dynamic=False)
    if model.lm_head.weight.is_cuda and triton is not None:
        model.fused_loss = True


# --------------------------------------------------------------------------------------------------
# Length


def is_worth_compiling(shape: GPTConfig, config: TrainConfig) -> bool:
    """Tell whether a run is long enough for compiling to pay off. Unknown length counts as long."""
    if config.eval_only or config.num_epochs > 0:
        return True
    return training_flops(shape, config, config.max_iters) >= COMPILE_FROM_FLOPS


def training_flops(shape: GPTConfig, config: TrainConfig, steps: int) -> float:
    """Return the operations of this number of steps."""
    rows = config.gradient_accumulation_steps
    if config.batch_size != "auto":
        rows *= int(config.batch_size)
    return float(flops_per_token(shape)) * steps * rows * config.block_size


def warn_of_long_run(shape: GPTConfig, config: TrainConfig, steps: int, cores: int) -> str | None:
    """Return a warning if the steps that are left will take many hours on this CPU."""
    hours = training_flops(shape, config, steps) / (cores * CPU_FLOPS_PER_CORE) / 3600
    if hours < LONG_RUN_HOURS:
        return None
    length = f"{hours:,.0f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
    return (
        f"warning: this run will take about {length} on this CPU. config/train_shakespeare_cpu.py "
        "trains a small model in half a minute, also on your own text: "
        "python train.py config/train_shakespeare_cpu.py --dataset=my.txt --tokenizer=char"
    )


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Return every key and its value, ready for JSON."""
    return asdict(config)
