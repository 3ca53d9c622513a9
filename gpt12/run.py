"""What a training run starts from: settings, data, weights and machine.

    read_request()   what the user asks for: a new run, or how the run in out_dir goes on
    build_run()      opens the data, loads or makes the model, chooses the machine
    resolve()        decides each key that follows from others or from the data

A run has two configurations, which run.json keeps:

    asked      "requested"  what the user said when the run began or since; else the defaults
    config     "config"     what holds: every key is decided

When a run goes on, `before` is the `config` of its run.json, and `undecided` is what the new
`config` is decided from.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.dataset import Dataset, check_exists, open_dataset
from data.tokenizers import load_tokenizer
from data.windows import EvalWindows, TrainWindows
from gpt12.config import REPOSITORY, Loaded, Said, checked, load_config, merge
from gpt12.device import Machine, compile_model, open_machine
from gpt12.distributed import copy_from_rank_0, first_ranks_first, torchrun_ranks
from gpt12.errors import UserError, is_rank_0, say
from gpt12.folder import (
    Progress,
    describe_run,
    find_checkpoint,
    is_run,
    lock_run,
    read_run,
    resumable_files,
)
from gpt12.lora import add_lora
from gpt12.settings import TrainConfig, model_shape, shape_keys, with_shape
from gpt12.twin import unread_fields
from gpt12.weights import check_code, find_pretrained, from_pretrained, new_model, read_config
from model import GPT, GPTConfig, flops_per_token

Config = TypeVar("Config", bound=TrainConfig)
# compile=auto: a run with fewer operations than this is over before compiling has paid off.
COMPILE_FROM_FLOPS = 6e15
EVAL_TOKENS = 12 * 1024  # eval_iters counts portions of this many tokens, nanoGPT's default batch
# What a resumed run cannot change, because its weights or its optimizer's state depend on it.
FIXED_ON_RESUME = {
    *(set(shape_keys()) - {"block_size", "dropout"}),
    *("lora_rank", "lora_alpha", "optimizer", "val_fraction"),
}
# What stays as the run has decided it, unless it is typed: block_size and dtype belong to the
# model, eval_iters to the best loss so far, and short_context_share is 0 once that phase is over.
STAYS_ON_RESUME = {"block_size", "dtype", "eval_iters", "short_context_share"}
# Why resolve() gives a key another value than the user.
REASONS = {
    "warmup_iters": "it was not set: at most a tenth of all steps",
    "eval_iters": "it was not set: an evaluation is at most a tenth of the steps between two",
    "min_lr": "it was not set: a tenth of learning_rate",
    "short_context_share": "that phase is over and does not come back in a longer run",
}
# What a run fitted into the memory that there was, all three together. If one of them is typed on
# resuming, what was asked of the others counts again.
MEMORY_KEYS = {"batch_size", "gradient_accumulation_steps", "recompute"}


@dataclass(frozen=True)
class Request:
    """What the user asks for: a new run, or that an earlier one goes on."""

    asked: TrainConfig  # what the user said
    given: frozenset[str]  # the keys that the user set
    undecided: TrainConfig  # what resolve() starts from: `asked`, and what stays on resuming
    before: TrainConfig | None = None  # what held so far, in a run that goes on
    notes: list[str] = field(default_factory=list)  # see Run.notes

    @property
    def resumed(self) -> bool:
        """Tell whether an earlier run goes on."""
        return self.before is not None


@dataclass(frozen=True)
class Run:
    """Everything that a run works with. Nothing in it changes but the progress and the weights."""

    request: Request
    config: TrainConfig  # what holds: every key is decided
    out_dir: Path
    machine: Machine
    model: GPT
    dataset: Dataset
    train_windows: Any  # TrainWindows; None if the run is only an evaluation
    train_eval_windows: Any  # EvalWindows of the training split; None, too
    val_windows: EvalWindows
    eval_count: int  # windows in an evaluation
    packed: bool  # whether a training window holds several examples
    progress: Progress
    checkpoint: Path | None  # the folder that the run is resumed from

    @property
    def notes(self) -> list[str]:
        """Return what the user should know before the run begins, one line each.

        gpt12/introduction.py adds warnings: what is likely to spoil the result.
        """
        decided = []
        for key, reason in REASONS.items():
            value = getattr(self.config, key)
            if value != getattr(self.request.undecided, key):
                decided.append(f"{key}={value:.6g}, because {reason}")
        return [*self.request.notes, *decided, *self.machine.notes, *self.dataset.notes]

    def description(self) -> dict[str, Any]:
        """Return what run.json holds: configuration, what was asked for, machine and data."""
        return describe_run(
            asdict(self.config),
            requested=asdict(self.request.asked),
            given=sorted(self.request.given),
            device=self.machine.name,
            compile=self.machine.compiled,
            world_size=self.machine.world,
            data=data_facts(self.dataset),
        )


# --------------------------------------------------------------------------------------------------
# What the user asks for


def read_request(argv: list[str]) -> Request:
    """Return what the command line asks for. Without arguments: Shakespeare, on any machine.

    Raises UserError with every mistake found.
    """
    preset = f"config/train_shakespeare_{'char' if torch.cuda.is_available() else 'cpu'}.py"
    if not argv:
        say(f"no preset given: using {preset}, which suits this machine (--help: others)")
        argv = [str(REPOSITORY / preset)]
    loaded = load_config(TrainConfig, argv)
    start = loaded.config.init_from
    out_dir = Path(loaded.config.out_dir)
    if start in ("resume", "auto"):
        has_run = copy_from_rank_0(out_dir, resumable_files(out_dir))
        if has_run or start == "resume":
            return resume(loaded, out_dir)
    if not loaded.files and "dataset" not in loaded.given and start in ("scratch", "auto"):
        say(
            "no preset given: nanoGPT's defaults hold, GPT-2 124M on openwebtext. For a small "
            f"model, name its preset: python train.py {preset} ..."
        )
    return new_run(loaded)


def new_run(loaded: Loaded[TrainConfig]) -> Request:
    """Return the request for a new run."""
    config = loaded.config
    given = loaded.given
    if config.init_from == "auto":  # the preset says where to start, if it does
        said = merge(loaded.files, loaded.typed)
        said["init_from"] = loaded.files.get("init_from", said["init_from"])
        if said["init_from"].value == "auto":
            del said["init_from"]
        config = checked(TrainConfig, said, given)
    folder = Path(config.init_from)
    if config.eval_only and "dataset" not in given and is_run(folder):  # of the data of that run
        saved = read_run(folder).config
        keys = {"dataset", "tokenizer", "val_fraction", "text_column", "encoding"} - given
        config = replace(config, **{key: saved[key] for key in keys & saved.keys()})
    check_ranks(config)
    return Request(config, given, config)


def check_ranks(config: TrainConfig) -> None:
    """Refuse to train if the ranks cannot share the micro-batches equally."""
    world = torchrun_ranks().world
    rest = config.gradient_accumulation_steps % world
    if rest and not config.eval_only:
        near = config.gradient_accumulation_steps + world - rest
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not a multiple "
            f"of {world} ranks: pass --gradient_accumulation_steps={near}"
        )


# --------------------------------------------------------------------------------------------------
# Resuming


def resume(loaded: Loaded[TrainConfig], out_dir: Path) -> Request:
    """Return the request that the run in out_dir goes on.

    1. What was asked of the run so far counts.
    2. Keys that are typed now take their places, but another value of FIXED_ON_RESUME is refused.
       A config file that is named now changes nothing.
    3. STAYS_ON_RESUME, and what the run fitted into memory, stay as the run decided them, unless
       they are typed.
    4. resolve() decides the rest from all this, as in a new run.

    An example: --learning_rate=5e-4 is typed on resuming.

                       asked_before   before   typed   asked_now   undecided   config then
        learning_rate  1e-3           1e-3     5e-4    5e-4        5e-4        5e-4
        batch_size     32             16       -       32          16          16, which fitted
        warmup_iters   2000           50       -       2000        2000        50, decided anew

    With init_from=auto the line that began the run is typed again. Then only what is new in it
    counts as typed, else it would undo what was decided since.
    """
    # 1. What was asked of the run so far.
    saved = read_run(out_dir)
    before = checked(TrainConfig, said_in(out_dir, saved.config), ())
    asked_before = said_in(out_dir, saved.asked)

    # 2. What is typed now.
    typed = dict(loaded.typed)
    typed.pop("init_from", None)  # it says that a run goes on, and changes nothing in it
    if loaded.config.init_from == "auto":
        for key in typed.keys() & asked_before.keys():
            if getattr(loaded.config, key) == asked_before[key].value:
                del typed[key]
    refuse_fixed_keys(loaded.config, typed, before)
    asked_now = merge(asked_before, typed)
    # An earlier version did not write what was set. These two are as it has decided them.
    given_before = {"warmup_iters", "min_lr"} if saved.given is None else set(saved.given)
    # Set by the user now, or before and not replaced since.
    given = typed.keys() | (asked_now.keys() & given_before)
    asked = checked(TrainConfig, asked_now, given)

    # 3. What stays as the run decided it.
    stays = (FIXED_ON_RESUME | STAYS_ON_RESUME) - typed.keys()
    if MEMORY_KEYS.isdisjoint(typed):
        stays |= MEMORY_KEYS
    undecided = replace(asked, **{key: getattr(before, key) for key in stays})
    check_ranks(undecided)
    notes = differences(loaded, asked, before)
    return Request(asked, frozenset(given), undecided, before, notes)


def differences(loaded: Loaded[TrainConfig], asked: TrainConfig, before: TrainConfig) -> list[str]:
    """Tell each key in which a config file that is named on resuming differs from the run.

    The file changes nothing. It may repeat what was asked, although something else came of it.
    """
    notes = []
    for key, preset in loaded.files.items():
        value = getattr(before, key)
        if key != "init_from" and getattr(loaded.config, key) not in (value, getattr(asked, key)):
            notes.append(f"{preset.words} does not count: this run has {key}={value}")
    if notes:
        notes.append("a resumed run keeps its settings; type a key, as --KEY=VALUE, to change it")
    return notes


def said_in(out_dir: Path, values: dict[str, Any]) -> dict[str, Said]:
    """Return the settings of run.json. values: its own, perhaps of an earlier version.

    The folder may have been renamed since.
    Raises UserError if that version trained something that this one cannot.
    """
    for key, neutral in (("lora_dropout", 0), ("lora_targets", "all")):
        if values.get(key, neutral) != neutral:
            raise UserError(
                f"the run in {out_dir} has {key}={values[key]}, which this version cannot "
                f"train: start a new run from its model, --init_from={out_dir}/best"
            )
    known = asdict(TrainConfig()).keys()
    said = {}
    for key, value in (values | {"out_dir": str(out_dir)}).items():
        if key in known and (key, value) != ("save_interval_s", "auto"):
            said[key] = Said(value, f"{out_dir / 'run.json'}: {key}={value!r}")
    return said


def refuse_fixed_keys(now: TrainConfig, typed: dict[str, Said], before: TrainConfig) -> None:
    """Refuse typed keys that would need other weights or another state of the optimizer."""
    fixed = set(FIXED_ON_RESUME)
    if before.optimizer == "adamw8bit":
        fixed.add("block_size")  # an 8-bit state cannot be cut to fewer positions
    for key in sorted(fixed & typed.keys()):
        value = getattr(before, key)
        if getattr(now, key) != value:
            raise UserError(
                f"{key}={getattr(now, key)}, but the run in {now.out_dir} has {value}: "
                f"leave --{key} out, or start a new run"
            )


# --------------------------------------------------------------------------------------------------
# The run


def build_run(request: Request) -> Run:
    """Open the data, load or make the model, choose the machine; decide what depends on these."""
    config = request.undecided
    torch.manual_seed(config.seed)  # all ranks draw the same initial weights
    progress = Progress()
    checkpoint = None
    if request.resumed:
        checkpoint, progress = find_checkpoint(Path(config.out_dir), ("last",))

    check_exists(config.dataset)
    loaded, tokenizer = load_start(request, checkpoint)
    if loaded is not None:
        config = with_shape(config, loaded.config)
        if not request.resumed:  # where such a key is refused
            request.notes.extend(overruled_keys(request.undecided, request.given, config))
    dataset = open_data(config, tokenizer)
    if request.before is not None and not config.eval_only:
        _adapt_progress(progress, request.before, config, dataset)
    model = model_for_data(loaded, tokenizer, dataset, config)
    if config.init_from == "scratch" and not request.resumed:
        refuse_unread_keys(request, model.config)

    train_windows = train_eval_windows = None
    if not config.eval_only:
        train_windows = TrainWindows(dataset.train, config.block_size, config.seed)
        train_eval_windows = EvalWindows(dataset.train, config.block_size)
    config = resolve(config, request, train_windows, progress)
    flops = flops_per_token(model.config) * config.tokens_per_step * config.max_iters
    machine = open_machine(
        config.device,
        config.dtype,
        config.compile,
        long=config.eval_only or flops >= COMPILE_FROM_FLOPS,
        deterministic=config.deterministic,
    )
    config = decide_dtype_and_alpha(config, machine)
    prepare_model(model, config, machine)

    val_windows = EvalWindows(dataset.val, config.block_size)
    eval_count = val_windows.count
    if config.eval_iters > 0:
        portion = max(1, EVAL_TOKENS // config.block_size)
        eval_count = min(eval_count, config.eval_iters * portion)
    return Run(
        request=request,
        config=config,
        out_dir=Path(config.out_dir),
        machine=machine,
        model=model,
        dataset=dataset,
        train_windows=train_windows,
        train_eval_windows=train_eval_windows,
        val_windows=val_windows,
        eval_count=eval_count,
        packed=train_windows is not None and train_windows.tokens.mask is not None,
        progress=progress,
        checkpoint=checkpoint,
    )


def resolve(
    config: TrainConfig, request: Request, train_windows: TrainWindows | None, progress: Progress
) -> TrainConfig:
    """Return the configuration with every key that follows from others, or from the data, decided.

    config: with the shape of the model. Only dtype and lora_alpha are decided later, when the
    machine is known. train_windows: None if the run is only an evaluation.
    A key that was set, in a preset or by typing it, is in request.given and keeps its value.
    """
    if config.num_epochs > 0 and train_windows is not None:
        # The windows that are left, whatever a step took of them before.
        left = math.ceil(config.num_epochs * train_windows.per_epoch) - progress.position
        steps_left = max(0, math.ceil(left / config.windows_per_step))
        config = replace(config, max_iters=progress.step + steps_left)
    before = request.before
    end = config.short_context_steps
    if before is not None and before.short_context_steps <= progress.step < end:
        config = replace(config, short_context_share=0.0)
    warmup_iters = config.warmup_iters
    if "warmup_iters" not in request.given and not config.eval_only:
        warmup_iters = min(warmup_iters, min(config.max_iters, config.decay_end) // 10)
    min_lr = config.min_lr
    if config.decay_lr and "min_lr" not in request.given and min_lr > config.learning_rate:
        min_lr = config.learning_rate / 10
    return replace(
        config,
        eval_iters=_eval_iters(config, request),
        lr_decay_iters=config.decay_end,
        warmup_iters=warmup_iters,
        min_lr=min_lr,
    )


def decide_dtype_and_alpha(config: Config, machine: Machine) -> Config:
    """Return the configuration with the machine's dtype, and with lora_alpha for adapters."""
    lora_alpha = config.lora_alpha
    if config.lora_rank and lora_alpha is None:
        lora_alpha = 2.0 * config.lora_rank
    dtype = str(machine.dtype).removeprefix("torch.")
    return replace(config, dtype=dtype, lora_alpha=lora_alpha)  # type: ignore[arg-type]


def _eval_iters(config: TrainConfig, request: Request) -> int:
    """Return eval_iters. If nobody set it, an evaluation is at most a tenth of its interval.

    That is of the forward passes of the steps between two evaluations, each of which reads its
    windows from both splits.
    """
    if "eval_iters" in request.given or request.resumed or config.eval_only:
        return config.eval_iters
    steps = max(1, min(config.eval_interval, config.max_iters))
    portions = max(1, steps * config.tokens_per_step // (10 * 2 * EVAL_TOKENS))
    return min(portions, config.eval_iters)


def open_data(config: TrainConfig, tokenizer: Any = None) -> Dataset:
    """Open the data set, preparing it if it is not there yet. tokenizer: the loaded model's."""
    use_models = tokenizer is not None and config.tokenizer == "auto"
    with first_ranks_first():
        dataset = open_dataset(
            config.dataset,
            tokenizer=tokenizer if use_models else config.tokenizer,
            val_fraction=config.val_fraction,
            text_column=config.text_column,
            encoding=config.encoding,
            block_size=config.block_size,
        )
    if dataset.train is None and not config.eval_only:
        raise UserError(
            f"{dataset.folder} holds no training shards (train_*.bin): only --eval_only works"
        )
    return dataset


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """Return what run.json holds of the data. On resuming it tells whether they are others."""
    return {
        "name": dataset.name,
        "folder": dataset.folder.name,  # that of a text has a hash of the whole text
        "val_sha256": dataset.val_sha256,
        "tokens": len(dataset.train),
        "val_tokens": len(dataset.val),
    }


def _adapt_progress(
    progress: Progress, before: TrainConfig, config: TrainConfig, dataset: Dataset
) -> None:
    """Carry the position and the best loss of a resumed run over to the keys and data of now.

    Windows of another length are counted anew. A loss on other data or windows is forgotten.
    """
    if config.block_size != before.block_size:
        progress.position = progress.tokens // config.block_size
    out_dir = Path(config.out_dir)
    saved = read_run(out_dir).data
    facts = data_facts(dataset)
    if facts.pop("name") != saved.get("name"):
        del facts["folder"]  # the same text has another one by another name
    evaluation = (config.eval_iters, config.block_size)
    if any(saved.get(key, value) != value for key, value in facts.items()):
        reason = "the data are not those that this run began with"
    elif evaluation != (before.eval_iters, before.block_size):
        reason = "an evaluation reads other windows than before (eval_iters, block_size)"
    else:
        return
    progress.best_val_loss = None
    progress.best_step = 0
    progress.worse_evaluations = 0
    dataset.notes.append(
        f"{reason}: the best loss so far no longer counts. To keep {out_dir / 'best'}, copy it: "
        "the next best replaces it"
    )


def lock_out_dir(config: TrainConfig) -> contextlib.AbstractContextManager[object]:
    """Let only one process write to out_dir. --eval_only writes nothing."""
    if config.eval_only or not is_rank_0():
        return contextlib.nullcontext()
    return lock_run(Path(config.out_dir))


def is_complete(run: Run) -> bool:
    """Tell whether a resumed run has nothing left to do, and say so."""
    progress = run.progress
    config = run.config
    if not run.request.resumed:
        return False
    if progress.worse_evaluations >= config.patience > 0:
        say(
            f"this run ended at step {progress.step:,}, after {progress.worse_evaluations} "
            f"evaluations without a better loss; go on with --patience={2 * config.patience}"
        )
        return True
    if progress.step < config.max_iters:
        return False
    if progress.evaluated_step != progress.step:
        return False  # it was stopped before its last evaluation
    longer = f"--max_iters={2 * progress.step}"
    if config.num_epochs > 0:
        longer = f"--num_epochs={progress.position // run.train_windows.per_epoch + 1}"
    say(f"this run is complete ({progress.step} of {config.max_iters} steps); go on with {longer}")
    return True


def schedule_jumps(run: Run, learning_rate: Callable[[int, TrainConfig], float]) -> list[str]:
    """Tell each jump of a resumed run's schedule that changed keys cause.

    learning_rate: train.py's function.
    """
    config = run.config
    before = run.request.before
    step = run.progress.step
    if before is None or step == 0:
        return []
    notes = []
    last_end = before.short_context_steps
    end = config.short_context_steps
    if end != last_end and step < last_end:
        notes.append(f"the short context ends at step {max(step, end)} and not at step {last_end}")
    last_lr = f"{learning_rate(step, before):.3g}"
    lr = f"{learning_rate(step, config):.3g}"
    if lr != last_lr:
        notes.append(f"the learning rate goes on at {lr} and not at {last_lr}, by the keys typed")
    return notes


# --------------------------------------------------------------------------------------------------
# Weights


def load_start(request: Request, last: Path | None) -> tuple[GPT | None, Any]:
    """Load the model to start from, and its tokenizer if it has one.

    last: the checkpoint of a run that is resumed.
    Returns (None, None) for a model from scratch, whose vocabulary comes from the data. The model
    is on the CPU.
    """
    config = request.undecided
    source = _source(config, last)
    if source is None:
        return None, None
    crop = last is not None or "block_size" in request.given
    block_size = config.block_size if crop else None
    goes_on = config.eval_only or source == last
    model = from_pretrained(source, block_size, config.dropout, new_run=not goes_on)
    if last is not None and source != last:
        check_code(last, read_config(last))  # the adapters
    # A tokenizer may lie beside nanoGPT's ckpt.pt, which holds none itself.
    tokenizer = load_tokenizer(source)
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
    return find_pretrained(config.init_from)


def model_for_data(model: GPT | None, tokenizer: Any, dataset: Dataset, config: TrainConfig) -> GPT:
    """Return the loaded model after checking that the data fit it, or a new one for the data.

    Raises UserError if the data were made with another tokenizer than the model's.
    """
    if model is None:
        return new_model(model_shape(config, dataset.text_vocab_size))
    other_tokenizer = (
        tokenizer is not None
        and dataset.tokenizer is not None
        and tokenizer.sha256 != dataset.tokenizer.sha256
    )
    if other_tokenizer or dataset.text_vocab_size > model.config.vocab_size:
        raise UserError(
            f"dataset {dataset.name} was made with another tokenizer "
            f"({dataset.tokenizer_name}, {dataset.text_vocab_size} tokens) than the model to "
            f"start from ({model.config.vocab_size} tokens). Its own tokenizer must read the text: "
            "give the text itself as --dataset=, without --tokenizer=. A model that brings no "
            "tokenizer needs one's files beside it"
        )
    if tokenizer is None and dataset.text_vocab_size < model.config.vocab_size:
        dataset.notes.append(
            f"{config.init_from} has no tokenizer. Its first {dataset.text_vocab_size} of "
            f"{model.config.vocab_size} ids are taken to be those of {dataset.name} "
            f"({dataset.tokenizer_name}). If it was trained with another tokenizer, what it "
            "learned is lost"
        )
    return model


def overruled_keys(asked: TrainConfig, given: Collection[str], config: TrainConfig) -> list[str]:
    """Tell each given key that the shape of a loaded model overrules. config: with that shape."""
    return [
        f"{key}={getattr(asked, key)} does not count: the model in {config.init_from} has "
        f"{getattr(config, key)}"
        for key in sorted(given)
        if getattr(asked, key) != getattr(config, key)
    ]


def refuse_unread_keys(request: Request, shape: GPTConfig) -> None:
    """Refuse a key that somebody gives and has added to GPTConfig, but that the model ignores."""
    for key in sorted(request.given & unread_fields(shape)):
        raise UserError(
            f"{key}={getattr(shape, key)} would change nothing: no layer of model.py reads it "
            "from GPTConfig"
        )


def prepare_model(model: GPT, config: TrainConfig, machine: Machine) -> None:
    """Put the model on the device in the form that the configuration asks for.

    It adds adapters, sets precision and recomputation, and compiles. config: dtype, recompute and
    lora_alpha are decided.
    """
    if config.optimizer == "adamw8bit" and machine.dtype != torch.bfloat16:
        raise UserError(
            "optimizer=adamw8bit keeps the weights in bfloat16: pass --dtype=bfloat16, or choose "
            "another optimizer"
        )
    if config.lora_rank and not config.eval_only:
        assert config.lora_alpha is not None
        # Frozen weights need no float32 copy.
        add_lora(model, config.lora_rank, config.lora_alpha, machine.dtype)
    elif config.optimizer == "adamw8bit":
        model.bfloat16()
    model.to(machine.device)
    model.set_recompute(config.recompute)
    if machine.compiled:
        compile_model(model)
