"""A training run: everything that it works with, built from what the user asked for."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.dataset import Dataset, check_exists, open_dataset
from data.windows import EvalWindows, TrainWindows
from gpt12.checkpoint import Progress, find_checkpoint
from gpt12.device import Machine, open_machine
from gpt12.distributed import is_rank_0, rank_0_first
from gpt12.errors import UserError
from gpt12.memory import check_memory, choose_batch_size
from gpt12.run_folder import lock_run
from gpt12.settings import CONTEXT_PARTS, TrainConfig
from gpt12.shape import with_shape
from gpt12.start import Request, is_worth_compiling, load_start, model_for_data, prepare_model
from model import GPT, GPTConfig


@dataclass(frozen=True)
class Run:
    """Everything that a run works with. Nothing in it changes but the progress and the weights."""

    request: Request  # what the user asked for
    config: TrainConfig  # the same; dtype, batch_size, recompute, max_iters are decided
    out_dir: Path
    machine: Machine
    model: GPT
    dataset: Dataset
    val_windows: EvalWindows
    eval_count: int  # windows in an evaluation
    progress: Progress
    checkpoint: Path | None  # the folder that the run is resumed from

    @property
    def windows_per_step(self) -> int:
        """Return the number of windows in a step, over all micro-batches and ranks."""
        return int(self.config.batch_size) * self.config.gradient_accumulation_steps

    @property
    def train_windows(self) -> TrainWindows:
        """Return the training windows in the order of the run's seed."""
        assert self.dataset.train is not None
        return TrainWindows(self.dataset.train, self.config.block_size, self.config.seed)

    @property
    def train_eval_windows(self) -> EvalWindows:
        """Return the training split's fixed windows for evaluation."""
        assert self.dataset.train is not None
        return EvalWindows(self.dataset.train, self.config.block_size)


def build_run(request: Request) -> Run:
    """Open the data, load or make the model, choose the machine; decide what depends on these."""
    config = request.config
    out_dir = Path(config.out_dir)
    torch.manual_seed(config.seed)  # all ranks draw the same initial weights
    progress = Progress()
    checkpoint = None
    if request.resumed:
        checkpoint, state = find_checkpoint(out_dir, ("last",))
        progress = Progress.from_trainer_json(state)

    check_exists(config.dataset)
    loaded, tokenizer = load_start(request, checkpoint)
    if loaded is not None:
        config = replace(config, block_size=loaded.config.block_size)
    try:
        dataset = open_data(config, tokenizer)
    except UserError as error:
        if not request.advice:
            raise
        raise UserError(f"{error}\n{request.advice}") from None
    if request.resumed and not config.eval_only:
        _forget_best_on_other_data(request, dataset, progress)
    model = model_for_data(loaded, tokenizer, dataset, config)

    machine = open_machine(
        config.device,
        config.dtype,
        config.compile,
        training=True,
        long=is_worth_compiling(model.config, config),
        deterministic=config.deterministic,
    )
    config = _resolve(config, model.config, dataset, machine)
    _check_short_context(config)
    config = choose_batch_size(model.config, config, machine)
    check_memory(model.config, config, machine)
    config = _count_epochs(config, dataset)
    prepare_model(model, config, machine)

    val_windows = EvalWindows(dataset.val, config.block_size)
    eval_count = config.eval_iters * int(config.batch_size)
    if eval_count == 0 or eval_count > val_windows.count:
        eval_count = val_windows.count
    return Run(
        request=request,
        config=config,
        out_dir=out_dir,
        machine=machine,
        model=model,
        dataset=dataset,
        val_windows=val_windows,
        eval_count=eval_count,
        progress=progress,
        checkpoint=checkpoint,
    )


def open_data(config: TrainConfig, tokenizer: Any) -> Dataset:
    """Open the data set, preparing it if it is not there yet. tokenizer: the loaded model's."""
    use_models = tokenizer is not None and config.tokenizer == "auto"
    with rank_0_first():
        return open_dataset(
            config.dataset,
            tokenizer=tokenizer if use_models else config.tokenizer,
            val_fraction=config.val_fraction,
            text_column=config.text_column,
            block_size=config.block_size,
        )


def _resolve(
    config: TrainConfig, shape: GPTConfig, dataset: Dataset, machine: Machine
) -> TrainConfig:
    """Return the configuration with the model's real shape, the chosen dtype, and LoRA's scale."""
    lora_alpha = config.lora_alpha
    if config.lora_rank and lora_alpha is None:
        lora_alpha = 2.0 * config.lora_rank
    config = with_shape(config, shape)
    return replace(
        config,
        dtype=str(machine.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        lora_alpha=lora_alpha,
    )


def _check_short_context(config: TrainConfig) -> None:
    """Refuse a sequence that cannot be cut into parts of equal length."""
    if config.short_context_share > 0 and config.block_size % CONTEXT_PARTS != 0:
        raise UserError(
            f"short_context_share={config.short_context_share} cuts a sequence into "
            f"{CONTEXT_PARTS} parts, but block_size={config.block_size} is not a multiple of "
            f"{CONTEXT_PARTS}: choose another --block_size, or --short_context_share=0"
        )


def _count_epochs(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Return the configuration with max_iters set from num_epochs, if that is given."""
    if config.num_epochs == 0 or dataset.train is None:
        return config
    per_epoch = TrainWindows(dataset.train, config.block_size, config.seed).per_epoch
    per_step = int(config.batch_size) * config.gradient_accumulation_steps
    return replace(config, max_iters=math.ceil(config.num_epochs * per_epoch / per_step))


def _forget_best_on_other_data(request: Request, dataset: Dataset, progress: Progress) -> None:
    """Reset the best loss if a resumed run gets other data: its losses cannot be compared."""
    assert request.saved is not None
    if request.saved.get("data", {}).get("sha256") == dataset.source_sha256:
        return
    progress.best_val_loss = None
    progress.best_step = 0
    progress.worse_evaluations = 0
    best = Path(request.config.out_dir) / "best"
    dataset.warnings.append(
        "the data are not those that this run began with: it reads other windows now, and its best "
        f"loss no longer counts. To keep {best}, copy it: the best on the new data replaces it"
    )


def lock_out_dir(config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """Let only one process write to out_dir. --eval_only writes nothing."""
    if config.eval_only or not is_rank_0():
        return contextlib.nullcontext()
    return lock_run(Path(config.out_dir))


def check_has_training_data(dataset: Dataset) -> None:
    """Raise UserError if there is only a validation split."""
    if dataset.train is None:
        raise UserError(
            f"{dataset.folder} holds no training shards (train_*.bin): only --eval_only works"
        )


def is_complete(run: Run) -> bool:
    """Tell whether a resumed run has nothing left to do, and say so.

    Raises UserError if it already has more steps than it is asked for.
    """
    progress = run.progress
    config = run.config
    if not run.request.resumed or progress.step < config.max_iters:
        return False
    if progress.step > config.max_iters:
        raise UserError(
            f"this run has {progress.step} finished steps, more than max_iters={config.max_iters}: "
            f"go on with a larger one, for example --max_iters={2 * progress.step}"
        )
    if progress.evaluated_step != progress.step:
        return False  # it was stopped before its last evaluation
    if is_rank_0():
        print(
            f"this run is complete ({progress.step} of {config.max_iters} steps); go on with "
            f"--max_iters={2 * progress.step}"
        )
    return True
