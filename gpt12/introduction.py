"""What a run says before it trains: what, on what, with which data, and what may spoil it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpt12.memory import GIB, step_memory
from gpt12.run import Run
from gpt12.twin import is_gpt2
from model import flops_per_token, parameter_count

FEW_UPDATES = 30  # a run with fewer is warned of
# A model can repeat its text if it has this many trained parameters for each token and reads the
# text this many times.
BY_HEART_PARAMETERS = 5
BY_HEART_EPOCHS = 20
# A core does about this many operations a second in float32.
CPU_FLOPS_PER_CORE = 25e9
LONG_RUN_HOURS = 2


def introduction(run: Run) -> Iterator[str]:
    """Yield the lines that a run prints first."""
    config = run.config
    shape = run.model.config
    yield from run.notes
    yield (
        f"model: {parameter_count(shape):,} parameters (n_layer={shape.n_layer}, "
        f"n_head={shape.n_head}, n_embd={shape.n_embd}, block_size={config.block_size}, "
        f"vocabulary {shape.vocab_size:,})"
    )
    if config.lora_rank:
        yield f"LoRA: {_trained(run):,} parameters are trained, the others stay as they are"
    gpt2 = is_gpt2(shape)
    if not gpt2:
        yield (
            "model.py does not compute what GPT-2 computes: this program opens the saved models, "
            "others cannot"
        )
    yield _data_line(run)
    world = run.machine.world
    yield (
        f"step: batch_size={config.batch_size} x block_size={config.block_size} x "
        f"gradient_accumulation_steps={config.gradient_accumulation_steps} = "
        f"{config.tokens_per_step:,} tokens"
        f"{f' on {world} processes' if world > 1 else ''}; "
        f"{config.max_iters:,} steps end after {_epochs(run):.3g} epochs"
    )
    gib = step_memory(shape, config, run.machine) / GIB
    doubt = "" if gpt2 else ", an estimate, because model.py is not GPT-2's"
    yield f"memory: about {gib:.3g} GiB at the peak of a step (recompute={config.recompute}){doubt}"
    for warning in _warnings(run):
        yield f"warning: {warning}"
    if run.request.resumed:
        yield f"resuming at step {run.progress.step:,}"


def _trained(run: Run) -> int:
    """Return the number of parameters that are trained."""
    return sum(p.numel() for p in run.model.parameters() if p.requires_grad)


def _epochs(run: Run) -> float:
    """Return how many times the run reads the training text."""
    left = run.config.max_iters - run.progress.step
    windows = run.progress.position + left * run.config.windows_per_step
    return windows / run.train_windows.per_epoch


def _data_line(run: Run) -> str:
    dataset = run.dataset
    kind = ""
    if run.packed:
        kind = "; only the answers are trained on"
    elif run.config.init_from != "scratch":
        # Instruction data that were not recognized as such show here.
        kind = "; plain text, every token is a target"
    documents = "" if dataset.document_count is None else f"documents: {dataset.document_count:,}, "
    return (
        f"data: {dataset.name}, {documents}{len(run.train_windows.tokens):,} training and "
        f"{len(dataset.val):,} validation tokens{kind}"
    )


def _warnings(run: Run) -> Iterator[str]:
    """Say what is likely to spoil the result, and what to change."""
    config = run.config
    steps = config.max_iters
    if steps == 0:
        return  # only an evaluation
    end = config.decay_end
    if config.decay_lr and 2 * (min(end, steps) - config.warmup_iters) < steps:
        yield (
            f"the warm-up takes {config.warmup_iters:,} steps and the rate has fallen to "
            f"min_lr at step {end:,}, so most of the {steps:,} updates stay far below "
            f"learning_rate={config.learning_rate:g}: try --warmup_iters={steps // 10} "
            f"--lr_decay_iters={steps}"
        )
    length = "num_epochs" if config.num_epochs else "max_iters"
    if steps < FEW_UPDATES:
        yield (
            f"max_iters={steps} updates will hardly change the model: try a larger --{length} or "
            f"fewer than {config.windows_per_step:,} sequences a step"
        )
    tokens = len(run.train_windows.tokens)
    epochs = _epochs(run)
    if epochs > BY_HEART_EPOCHS and _trained(run) > BY_HEART_PARAMETERS * tokens:
        yield (
            f"{run.dataset.name} has only {tokens:,} training tokens and is read {epochs:,.0f} "
            f"times: the model will learn it by heart. Try a smaller --{length}; best/ keeps the "
            "model with the lowest validation loss"
        )
    if run.machine.device.type == "cpu":
        tokens = (steps - run.progress.step) * config.tokens_per_step
        rate = torch.get_num_threads() * CPU_FLOPS_PER_CORE
        hours = float(flops_per_token(run.model.config)) * tokens / rate / 3600
        if hours >= LONG_RUN_HOURS:
            yield (
                f"this run will take about {hours:,.0f} hours on this CPU. "
                "config/train_shakespeare_cpu.py trains a small model in half a minute, also on "
                "your own text: "
                "python train.py config/train_shakespeare_cpu.py --dataset=my.txt --tokenizer=char"
            )
