"""What a training run tells: lines on the terminal, a progress bar, metrics, a sample text.

Only rank 0 tells anything.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from gpt12.errors import UserError
from gpt12.generate import Sampling, generate
from gpt12.memory import GIB, needed_memory
from gpt12.metrics import Metrics, Picture, start_wandb
from gpt12.run import Run, warn_of_long_run
from gpt12.run_folder import describe_run, set_aside, write_json
from gpt12.targets import IGNORE_INDEX
from gpt12.terminal import printable
from model import parameter_count

SAMPLE_TOKENS = 160  # length of the text written at each evaluation
FEW_UPDATES = 30  # a run with fewer is warned of
# A model with so many trained parameters for each token, that reads the text so many times, can
# repeat it.
BY_HEART_PARAMETERS = 20
BY_HEART_EPOCHS = 20


def say(text: str) -> None:
    """Print a line above the progress bar."""
    from tqdm import tqdm

    # A reader that has gone, a full disk under a log file, or a signal in the middle of another
    # line must not end the run. For the last of these, Python raises RuntimeError.
    with contextlib.suppress(OSError, RuntimeError):
        tqdm.write(printable(text, sys.stdout))
        sys.stdout.flush()  # else a log file gets the line much later


def perplexity(loss: float) -> float:
    """Return e to the loss, without overflow."""
    return math.exp(min(loss, 700))


class RunLog:
    """Tells about one run. On ranks other than 0 every method does nothing."""

    def __init__(self, run: Run):
        self.run = run
        self.active = run.machine.rank == 0
        self.progress = run.progress
        self.told_time_left = False
        self.skipped = 0.0  # skipped updates that were reported
        self.wandb: Any = None
        self.bar: Any = None
        self.metrics: Metrics | None = None
        self.picture = Picture(run.out_dir / "loss.png")

    def say(self, text: str) -> None:
        """Print a line."""
        if self.active:
            say(text)

    # ---------------------------------------------------------------------------------------------
    # Beginning and end

    def introduce(self) -> None:
        """Say what will be trained, on what, and with which data."""
        run = self.run
        config = run.config
        shape = run.model.config
        for note in [*run.request.notes, *run.machine.notes, *run.dataset.warnings]:
            self.say(note)
        self.say(
            f"model: {parameter_count(shape):,} parameters ({_count(shape.n_layer, 'layer')}, "
            f"{_count(shape.n_head, 'head')}, {shape.n_embd} channels, "
            f"context {config.block_size} tokens, "
            f"vocabulary {shape.vocab_size:,})"
        )
        if config.lora_rank:
            trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
            self.say(f"LoRA: {trained:,} parameters are trained, the others stay as they are")
        self.say(self._data_line())
        self.say(self._step_line())
        for problem in self._warnings():
            self.say(f"warning: {problem}")
        gib = needed_memory(shape, config, config.recompute, run.machine) / GIB
        size = f"{gib:.1f} GiB" if gib >= 0.05 else f"{1024 * gib:.0f} MiB"
        self.say(f"memory: about {size} at the peak of a step (recompute={config.recompute})")
        if run.machine.device.type == "cpu":
            steps_left = config.max_iters - self.progress.step
            cores = torch.get_num_threads()
            warning = warn_of_long_run(shape, config, steps_left, cores)
            if warning is not None:
                self.say(warning)
        if run.request.resumed:
            self.say(f"resuming at step {self.progress.step:,}")

    def _data_line(self) -> str:
        dataset = self.run.dataset
        documents = ""
        if dataset.documents is not None:
            documents = f"{_count(dataset.documents, 'document')}, "
        assert dataset.train is not None
        line = (
            f"data: {dataset.name}, {documents}{len(dataset.train):,} training and "
            f"{len(dataset.val):,} validation tokens"
        )
        if dataset.train.mask is not None:
            line += "; only the answers are trained on"
        elif self.run.config.init_from != "scratch":
            # Instruction data that were not recognized as such show here.
            line += "; plain text, every token is a target"
        return line

    def _step_line(self) -> str:
        run = self.run
        config = run.config
        micro_batches = config.gradient_accumulation_steps
        per_step = run.windows_per_step * config.block_size
        epochs = self._epochs()
        if epochs > 1:
            part = f"the text {epochs:,.1f} times"
        elif epochs >= 0.01:
            part = f"{epochs:.0%} of the text"
        else:
            part = "less than 1% of the text"
        plural = "micro-batch" if micro_batches == 1 else "micro-batches"
        processes = ""
        if run.machine.world > 1:
            processes = f" on {run.machine.world} processes"
        return (
            f"step: {_count(int(config.batch_size), 'sequence')} x {config.block_size} tokens x "
            f"{micro_batches} {plural}{processes} = {per_step:,} tokens; "
            f"{_count(config.max_iters, 'step')} read {part}"
        )

    def _warnings(self) -> list[str]:
        """Return what is likely to spoil the result, and what to change."""
        run = self.run
        config = run.config
        steps = config.max_iters
        rate = f"learning_rate={config.learning_rate:g}"
        warnings = []
        if config.decay_lr and 2 * config.warmup_iters > steps:
            warnings.append(
                f"the warm-up of {_count(config.warmup_iters, 'step')} takes more than half of the "
                f"run's {steps:,}, so most updates stay far below {rate}: try "
                f"--warmup_iters={steps // 10}"
            )
        end = config.lr_decay_iters
        if config.decay_lr and end is not None and 2 * end < steps:
            warnings.append(
                f"after step {end:,} of {steps:,} the learning rate is only min_lr="
                f"{config.min_lr:g}, not {rate}: try --lr_decay_iters={steps}"
            )
        if steps < FEW_UPDATES:
            warnings.append(
                f"{_count(steps, 'update')} will hardly change the model: try "
                f"{self._advise_more_updates()}"
            )
        tokens = len(run.train_windows.tokens)
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        if self._epochs() > BY_HEART_EPOCHS and trained > BY_HEART_PARAMETERS * tokens:
            length = "num_epochs" if config.num_epochs else "max_iters"
            warnings.append(
                f"{run.dataset.name} has only {tokens:,} training tokens and is read "
                f"{self._epochs():,.0f} times: the model will learn it by heart. Try a smaller "
                f"--{length}; best/ keeps the model with the lowest validation loss"
            )
        return warnings

    def _advise_more_updates(self) -> str:
        """Return the options that give a run of few updates about FEW_UPDATES or more."""
        config = self.run.config
        factor = math.ceil(FEW_UPDATES / config.max_iters)
        if config.num_epochs == 0:
            return f"--max_iters={factor * config.max_iters}"
        advice = f"--num_epochs={factor * config.num_epochs:g}"
        world = self.run.machine.world
        fewer = max(1, config.gradient_accumulation_steps // world // factor) * world
        if fewer < config.gradient_accumulation_steps:
            return f"--gradient_accumulation_steps={fewer} or {advice}"
        smaller = max(1, int(config.batch_size) // factor)
        if smaller < int(config.batch_size):
            return f"--batch_size={smaller} or {advice}"
        return advice

    def _epochs(self) -> float:
        """Return how many times the run reads the training text."""
        run = self.run
        return run.config.max_iters * run.windows_per_step / run.train_windows.per_epoch

    def open(self) -> None:
        """Set an earlier run's files aside, write run.json, and open metrics.jsonl."""
        if not self.active:
            return
        run = self.run
        config = run.config
        facts = describe_run(
            asdict(config),
            requested=run.request.asked,
            given=sorted(run.request.given),
            device=run.machine.name,
            device_memory_gib=_rounded(run.machine.memory_gib()),
            dtype=config.dtype,
            compile=run.machine.compiled,
            world_size=run.machine.world,
            data={
                "name": run.dataset.name,
                "sha256": run.dataset.source_sha256,
                "tokens": len(run.train_windows.tokens),
            },
        )
        if config.wandb_log:
            self.wandb = start_wandb(
                config.wandb_project,
                config.wandb_run_name,
                config.out_dir,
                facts,
                self.progress.wandb_id,
            )
            self.progress.wandb_id = self.wandb.id
        if not run.request.resumed:
            previous = set_aside(run.out_dir)
            if previous is not None:
                self.say(f"the earlier run in {run.out_dir} was moved to {previous}")
        write_json(run.out_dir / "run.json", facts)
        resume_step = self.progress.step if run.request.resumed else None
        self.metrics = Metrics(run.out_dir / "metrics.jsonl", resume_step)

    def open_bar(self) -> None:
        """Show a progress bar on a terminal. A log file gets a line per logged step instead."""
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.run.config.max_iters,
            initial=self.progress.step,
            unit="step",
            disable=None if self.active else True,
            smoothing=0.05,
        )
        if self.progress.step == 0:
            self.say("evaluating before the first step")

    def close(self, status: int, saved: bool, failed: bool = False) -> None:
        """Say what came out and what to type next. failed: an exception ends the run."""
        if not self.active:
            return
        assert self.metrics is not None
        self.picture.wait()
        self.metrics.close()
        if self.wandb:
            with self._going_on_without_wandb():
                self.wandb.finish(exit_code=status)
        out_dir = self.run.out_dir
        typed = shlex.quote(out_dir.as_posix())  # as a shell takes it
        step = self.progress.step
        if failed or status > 128:
            self.say(f"{'failed' if failed else 'stopped'} at step {step:,}")
            if saved:
                self.say(f"go on with: python train.py --init_from=resume --out_dir={typed}")
            return
        best = ""
        if self.progress.best_val_loss is not None:
            best = (
                f", best val loss {self.progress.best_val_loss:.4f} at step "
                f"{self.progress.best_step:,}"
            )
        self.say(
            f"{_count(step, 'step')} in {self.progress.elapsed_s:.1f} s of training{best}; "
            f"curves: {out_dir}/loss.png"
        )
        self._warn_if_not_better()
        if status == 0 and self.run.dataset.tokenizer is not None:
            self.say(f"read what it writes: python sample.py --out_dir={typed}")

    def _warn_if_not_better(self) -> None:
        """Say so if fine-tuning made the model no better than it was at step 0."""
        best = self.progress.best_val_loss
        if self.run.request.resumed or best is None or self.metrics is None:
            return
        for row in self.metrics.evaluations:
            start = row.get("val_loss")
            if row["step"] == 0 and start is not None and start <= best:
                self.say(
                    f"no better than at the start, val loss {start:.4f}: try a lower learning_rate"
                )

    # ---------------------------------------------------------------------------------------------
    # During training

    def log_step(
        self,
        loss: float,
        lr: float,
        grad_norm: float,
        bad: float,
        skipped: float,
        steps_per_s: float | None,
    ) -> None:
        """Record a step in the metrics and show it.

        bad: updates in a row, up to now, that were skipped. skipped: all skipped updates.
        """
        tokens_per_s = None
        if steps_per_s:
            per_step = self.run.windows_per_step * self.run.config.block_size
            tokens_per_s = round(steps_per_s * per_step)
        if self.active:
            self._record(loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=tokens_per_s)
            self._show_step(loss, lr, tokens_per_s, steps_per_s)
        if skipped > self.skipped:
            self.say(
                f"step {self.progress.step}: loss or gradient not finite; skipped "
                f"{skipped - self.skipped:.0f} update(s) since the last log, the last {bad:.0f} in "
                "a row"
            )
            self.skipped = skipped

    def _show_step(
        self, loss: float, lr: float, tokens_per_s: int | None, steps_per_s: float | None
    ) -> None:
        speed = f", {tokens_per_s:,} tokens/s" if tokens_per_s else ""
        self.bar.set_postfix_str(f"loss {loss:.4f}{speed}", refresh=False)
        if not self.bar.disable:
            return
        line = f"step {self.progress.step}: loss {loss:.4f}, lr {lr:.2e}{speed}"
        if steps_per_s and not self.told_time_left:
            self.told_time_left = True
            line += _time_left(self.run.config.max_iters - self.progress.step, steps_per_s)
        self.say(line)

    def say_hopeless(self) -> None:
        """Explain why training stops after too many updates that were not finite."""
        bad_steps = self.run.config.max_bad_steps
        self.say(
            f"stopping at step {self.progress.step}: the last {bad_steps} updates had a loss or "
            "gradient that is not finite. The weights are as before the first of them. Try a lower "
            "learning_rate or --dtype=float32"
        )

    def log_evaluation(self, train_loss: float, val_loss: float, better: bool) -> None:
        """Record an evaluation and show it."""
        best = ", the best so far" if better else ""
        self.say(
            f"step {self.progress.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f} "
            f"(perplexity {perplexity(val_loss):.2f}){best}"
        )
        if self.active:
            self._record(train_loss=train_loss, val_loss=val_loss)

    def _record(self, **values: float | None) -> None:
        """Write a row into metrics.jsonl and, under the same names, to Weights & Biases."""
        assert self.metrics is not None
        row: dict[str, Any] = {"step": self.progress.step, "tokens": self.progress.tokens}
        row.update(values)
        row["elapsed_s"] = round(self.progress.elapsed_s, 3)
        self.metrics.append(row)
        if self.wandb:
            del row["step"]  # Weights & Biases keeps it apart
            with self._going_on_without_wandb():
                self.wandb.log(row, step=self.progress.step)

    @contextlib.contextmanager
    def _going_on_without_wandb(self) -> Iterator[None]:
        """Let the run go on if the block fails, and give Weights & Biases nothing more."""
        try:
            yield
        except Exception as error:  # its helper process has ended, for example
            self.wandb = None
            self.say(
                f"warning: wandb has failed ({_first_line(error)}) and gets nothing more. The run "
                f"goes on, and {self.run.out_dir}/metrics.jsonl holds all"
            )

    def draw(self) -> None:
        """Draw loss.png anew."""
        if self.active and self.metrics is not None:
            best = None
            if self.progress.best_val_loss is not None:
                best = (self.progress.best_val_loss, self.progress.best_step)
            self.picture.draw(self.metrics, best)

    def show_sample(self) -> None:
        """Print a text that the model writes as it is now."""
        if not self.active or self.run.dataset.tokenizer is None:
            return
        model = self.run.model
        was_training = model.training
        model.eval()
        try:
            text = self._sample_text()
        except torch.OutOfMemoryError:  # a sample must not end the run
            text = "(no sample: too little memory beside the training step)"
        model.train(was_training)
        self.say("".join(f"    | {line}\n" for line in text.splitlines()))

    def _sample_text(self) -> str:
        run = self.run
        tokenizer = run.dataset.tokenizer
        assert tokenizer is not None
        start = self._sample_prompt()
        count = min(SAMPLE_TOKENS, 2 * run.config.block_size)
        eager: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if run.machine.compiled:  # each length of a text would be compiled anew
            eager = torch.compiler.set_stance("force_eager")
        with run.machine.autocast(), eager:
            [ids] = generate(
                run.model,
                [start],
                count,
                sampling=Sampling(0.8, top_k=200),
                seeds=[run.config.seed],
            )
        if run.dataset.val.mask is not None:
            # Show the question, and the answer up to its end.
            if tokenizer.eot in ids:
                ids = ids[: ids.index(tokenizer.eot)]
            ids = start + ids
        return tokenizer.decode(ids).strip()

    def _sample_prompt(self) -> list[int]:
        """Return the ids to begin with: a question, the end-of-text token, or a line end."""
        tokenizer = self.run.dataset.tokenizer
        assert tokenizer is not None
        x, y, *_ = self.run.val_windows.batch(np.array([0]))
        if self.run.dataset.val.mask is not None:
            answer = int((y[0] != IGNORE_INDEX).argmax())
            return x[0, : 1 + answer].tolist()
        if tokenizer.eot is not None:
            return [tokenizer.eot]
        try:
            return list(tokenizer.encode("\n"))
        except UserError:  # a vocabulary of characters without a line end
            return x[0, :1].tolist()


def _count(number: int, noun: str) -> str:
    """Return `1 step` or `2 steps`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _first_line(error: Exception) -> str:
    """Return an error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _time_left(steps: int, steps_per_s: float) -> str:
    """Return how long `steps` will take, nothing for less than a minute."""
    seconds = steps / steps_per_s
    if seconds <= 60:
        return ""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f", about {hours} h {minutes} min to go"
    return f", about {minutes} min to go"


def _rounded(gib: float | None) -> float | None:
    return None if gib is None else round(gib, 1)
