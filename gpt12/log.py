"""What a run tells: lines, a progress bar, metrics.jsonl, loss.png, Weights & Biases; its clock.

Only rank 0 tells anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from gpt12.checkpoint import describe_run, set_aside, write_json, write_text
from gpt12.device import Machine
from gpt12.errors import UserError, one_line, printable
from gpt12.files import remove_link
from gpt12.generate import Sampling, generate
from gpt12.loss import IGNORE_INDEX
from gpt12.memory import GIB, needed_memory
from gpt12.run import Run, warn_of_long_run
from gpt12.twin import is_gpt2
from model import parameter_count

SAMPLE_TOKENS = 160  # length of the text written at each evaluation
FEW_UPDATES = 30  # a run with fewer is warned of
# A model with so many trained parameters for each token, that reads the text so many times, can
# repeat it.
BY_HEART_PARAMETERS = 20
BY_HEART_EPOCHS = 20
NOTICEABLE_S = 1.0  # seconds of saving that are told at the end
MAX_STEPS_DRAWN = 4000  # loss.png is 770 pixels wide; more points would only cost memory
BLUE = "#0072B2"  # colours of Okabe and Ito's palette, which the colour-blind can tell apart
ORANGE = "#D55E00"
GREEN = "#009E73"

Row = dict[str, Any]


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
        self.saving_s = 0.0  # seconds of saving so far
        self.start_loss: float | None = None  # validation loss at step 0
        self.wandb: Any = None
        self.bar: Any = None
        self.metrics: Metrics | None = None
        self.drawing: threading.Thread | None = None

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        from tqdm import tqdm

        if not self.active or sys.stdout is None:
            return
        # A reader that has gone, a full disk under a log file, or a signal in the middle of
        # another line must not end the run. For the last of these, Python raises RuntimeError.
        with contextlib.suppress(OSError, RuntimeError):
            tqdm.write(printable(text, sys.stdout))
            sys.stdout.flush()  # else a log file gets the line much later

    # ---------------------------------------------------------------------------------------------
    # Beginning and end

    def introduce(self) -> None:
        """Say what will be trained, on what, and with which data."""
        run = self.run
        config = run.config
        shape = run.model.config
        for note in run.notes:
            self.say(note)
        self.say(
            f"model: {parameter_count(shape):,} parameters ({_count(shape.n_layer, 'layer')}, "
            f"{_count(shape.n_head, 'head')}, {shape.n_embd} channels, "
            f"context {config.block_size} tokens, vocabulary {shape.vocab_size:,})"
        )
        if config.lora_rank:
            self.say(
                f"LoRA: {self._trained():,} parameters are trained, the others stay as they are"
            )
        self.say(self._data_line())
        self.say(self._step_line())
        gib = needed_memory(shape, config, run.machine) / GIB
        doubt = "" if is_gpt2(shape) else ", an estimate, because model.py is not GPT-2's"
        peak = f"about {gib:.3g} GiB at the peak of a step"
        self.say(f"memory: {peak} (recompute={config.recompute}){doubt}")
        for problem in self._problems():
            self.say(f"warning: {problem}")
        if run.machine.device.type == "cpu":
            steps_left = config.max_iters - self.progress.step
            warning = warn_of_long_run(shape, config, steps_left, torch.get_num_threads())
            if warning is not None:
                self.say(warning)
        if run.request.resumed:
            self.say(f"resuming at step {self.progress.step:,}")

    def _trained(self) -> int:
        """Return the number of parameters that are trained."""
        return sum(p.numel() for p in self.run.model.parameters() if p.requires_grad)

    def _data_line(self) -> str:
        dataset = self.run.dataset
        assert dataset.train is not None
        documents = ""
        if dataset.documents is not None:
            documents = f"{_count(dataset.documents, 'document')}, "
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

    def _epochs(self) -> float:
        """Return how many times the run reads the training text."""
        run = self.run
        left = run.config.max_iters - self.progress.step
        windows = self.progress.position + left * run.windows_per_step
        return windows / run.train_windows.per_epoch

    def _step_line(self) -> str:
        run = self.run
        config = run.config
        epochs = self._epochs()
        if epochs > 1:
            part = f"the text {epochs:,.1f} times"
        elif epochs >= 0.01:
            part = f"{epochs:.0%} of the text"
        else:
            part = "less than 1% of the text"
        micro_batches = config.gradient_accumulation_steps
        plural = "micro-batch" if micro_batches == 1 else "micro-batches"
        processes = f" on {run.machine.world} processes" if run.machine.world > 1 else ""
        return (
            f"step: {_count(int(config.batch_size), 'sequence')} x {config.block_size} tokens x "
            f"{micro_batches} {plural}{processes} = {self._tokens_per_step():,} tokens; "
            f"{_count(config.max_iters, 'step')} read {part}"
        )

    def _tokens_per_step(self) -> int:
        return self.run.windows_per_step * self.run.config.block_size

    def _problems(self) -> Iterator[str]:
        """Say what is likely to spoil the result, and what to change."""
        run = self.run
        config = run.config
        steps = config.max_iters
        end = config.lr_decay_iters or steps
        if steps == 0:
            return  # only an evaluation
        if config.decay_lr and 2 * (min(end, steps) - config.warmup_iters) < steps:
            yield (
                f"the warm-up takes {config.warmup_iters:,} steps and the rate has fallen to "
                f"min_lr at step {end:,}, so most of the {steps:,} updates stay far below "
                f"learning_rate={config.learning_rate:g}: try --warmup_iters={steps // 10} "
                f"--lr_decay_iters={steps}"
            )
        length = "num_epochs" if config.num_epochs else "max_iters"
        if steps < FEW_UPDATES:
            more = math.ceil(FEW_UPDATES / steps) * getattr(config, length)
            yield (
                f"{_count(steps, 'update')} will hardly change the model: try --{length}={more:g}, "
                f"or a smaller step ({run.windows_per_step} = batch_size x "
                "gradient_accumulation_steps)"
            )
        tokens = len(run.train_windows.tokens)
        epochs = self._epochs()
        if epochs > BY_HEART_EPOCHS and self._trained() > BY_HEART_PARAMETERS * tokens:
            yield (
                f"{run.dataset.name} has only {tokens:,} training tokens and is read "
                f"{epochs:,.0f} times: the model will learn it by heart. Try a smaller --{length}; "
                "best/ keeps the model with the lowest validation loss"
            )

    def open(self) -> None:
        """Set an earlier run's files aside, write run.json, and open metrics.jsonl."""
        if not self.active:
            return
        run = self.run
        config = run.config
        gib = run.machine.memory_gib()
        facts = describe_run(
            asdict(config),
            requested=run.request.asked,
            given=sorted(run.request.given),
            device=run.machine.name,
            device_memory_gib=None if gib is None else round(gib, 1),
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
            self._start_wandb(facts)
        if not run.request.resumed:
            previous = set_aside(run.out_dir)
            if previous is not None:
                size = sum(file.stat().st_size for file in previous.rglob("*"))
                self.say(
                    f"the earlier run in {run.out_dir} was moved to {previous} "
                    f"({size / 1e6:,.1f} MB)"
                )
        write_json(run.out_dir / "run.json", facts)
        self.metrics = Metrics(
            run.out_dir / "metrics.jsonl", self.progress.step, self.progress.evaluated_step
        )

    def open_bar(self) -> None:
        """Show a progress bar on a terminal. A log file gets a line per logged step instead."""
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.run.config.max_iters,
            initial=self.progress.step,
            unit="step",
            disable=None if self.active and sys.stderr is not None else True,
            smoothing=0.05,
        )
        if self.progress.step == 0:
            self.say("evaluating before the first step")

    def close(self, status: int, saved: bool, failed: bool = False) -> None:
        """Say what came out and what to type next. failed: an exception ends the run."""
        if not self.active:
            return
        assert self.metrics is not None
        self._wait_for_picture()
        self.metrics.close()
        if self.wandb:
            with self._going_on_without_wandb():
                self.wandb.finish(exit_code=status)
        progress = self.progress
        times = []
        if progress.elapsed_s >= 0.05:  # the first step, which compiles, does not count
            times.append(f"{progress.elapsed_s:.1f} s of training")
        if self.saving_s >= NOTICEABLE_S:
            times.append(f"{self.saving_s:.1f} s of saving")
        spent = " and ".join(times)
        typed = shlex.quote(self.run.out_dir.as_posix())  # as a shell takes it
        if failed or status > 128:
            after = f" after {spent}" if spent else ""
            self.say(f"{'failed' if failed else 'stopped'} at step {progress.step:,}{after}")
            if saved:
                self.say(f"go on with: python train.py --init_from=resume --out_dir={typed}")
            return
        told = f" in {spent}" if spent else ""
        best = progress.best_val_loss
        if best is not None:
            told += f", best val loss {best:.4f} at step {progress.best_step:,}"
        curves = f"{self.run.out_dir}/loss.png"
        self.say(f"{_count(progress.step, 'step')}{told}; curves: {curves}")
        if best is not None and self.start_loss is not None and self.start_loss <= best:
            self.say(
                f"no better than at the start, val loss {self.start_loss:.4f}: try a lower "
                "learning_rate"
            )
        if status == 0 and self.run.dataset.tokenizer is not None:
            self.say(f"read what it writes: python sample.py --out_dir={typed}")

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
        if not self.active:
            return
        step = self.progress.step
        tokens_per_s = None
        if steps_per_s:
            tokens_per_s = round(steps_per_s * self._tokens_per_step())
        self._record(loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=tokens_per_s)
        speed = f", {tokens_per_s:,} tokens/s" if tokens_per_s else ""
        self.bar.set_postfix_str(f"loss {loss:.4f}{speed}", refresh=False)
        if self.bar.disable:
            self.say(f"step {step}: loss {loss:.4f}, lr {lr:.2e}{speed}")
            if steps_per_s and not self.told_time_left:
                self.told_time_left = True
                seconds = (self.run.config.max_iters - step) / steps_per_s
                if seconds > 60:
                    self.say(f"about {timedelta(seconds=round(seconds))} to go")
        if skipped > self.skipped:
            self.say(
                f"step {step}: loss or gradient not finite; skipped "
                f"{skipped - self.skipped:.0f} update(s) since the last log, the last {bad:.0f} in "
                "a row"
            )
            self.skipped = skipped

    def say_hopeless(self, bad: float) -> None:
        """Explain why training stops after `bad` updates that were not finite."""
        self.say(
            f"stopping at step {self.progress.step}: the last {bad:.0f} updates had a loss or "
            "gradient that is not finite. The weights are as before the first of them. Try a lower "
            "learning_rate or --dtype=float32"
        )

    def log_evaluation(self, train_loss: float, val_loss: float, better: bool) -> None:
        """Record an evaluation and show it. better: it is the best so far, and in best/."""
        if not self.active:
            return
        if self.progress.step == 0:
            self.start_loss = val_loss
        best = ", the best so far" if better else ""
        self.say(
            f"step {self.progress.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f} "
            f"(perplexity {perplexity(val_loss):.2f}){best}"
        )
        self._record(train_loss=train_loss, val_loss=val_loss)

    def _record(self, **values: float | None) -> None:
        """Write a row into metrics.jsonl and, under the same names, to Weights & Biases."""
        assert self.metrics is not None
        row: Row = {"step": self.progress.step, "tokens": self.progress.tokens}
        row.update(values)
        row["elapsed_s"] = round(self.progress.elapsed_s, 3)
        problem = self.metrics.append(row)
        if problem is not None:
            self.say(problem)
        if self.wandb:
            del row["step"]  # Weights & Biases keeps it apart
            with self._going_on_without_wandb():
                self.wandb.log(row, step=self.progress.step)

    def _start_wandb(self, facts: dict[str, Any]) -> None:
        """Start a run at Weights & Biases, or continue the one of a resumed run.

        Raises UserError if that fails.
        """
        config = self.run.config
        try:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb_project,
                name=config.wandb_run_name,
                config=facts,
                dir=config.out_dir,
                id=self.progress.wandb_id,
                resume="allow",
            )
        except Exception as error:  # not installed, not logged in, no network
            raise UserError(
                f"wandb_log=True, but wandb does not start: {error}. "
                "Log in with `wandb login`, set WANDB_MODE=offline, or leave wandb_log out"
            ) from None
        self.progress.wandb_id = self.wandb.id

    @contextlib.contextmanager
    def _going_on_without_wandb(self) -> Iterator[None]:
        """Let the run go on if the block fails, and give Weights & Biases nothing more."""
        try:
            yield
        except Exception as error:  # its helper process has ended, for example
            self.wandb = None
            self.say(
                f"warning: wandb has failed ({one_line(error)}) and gets nothing more. The run "
                f"goes on, and {self.run.out_dir}/metrics.jsonl holds all"
            )

    def draw(self) -> None:
        """Draw loss.png anew, in a thread: importing the plotting library takes long."""
        if not self.active:
            return
        self._wait_for_picture()
        folder = self.run.out_dir
        best = None
        if self.progress.best_val_loss is not None:
            best = (self.progress.best_val_loss, self.progress.best_step)
        arguments = (folder / "metrics.jsonl", folder / "loss.png", best)
        self.drawing = threading.Thread(target=draw_losses, args=arguments)
        self.drawing.start()

    def _wait_for_picture(self) -> None:
        if self.drawing is not None:
            self.drawing.join()

    def show_sample(self) -> None:
        """Print a text that the model writes as it is now."""
        if not self.active or self.run.dataset.tokenizer is None:
            return
        model = self.run.model
        was_training = model.training
        model.eval()
        # Compiled layers would be compiled anew for a prompt, for a token, and for each layer.
        eagerly: Any = contextlib.nullcontext()
        if self.run.machine.compiled:
            eagerly = torch.compiler.set_stance("force_eager")
        try:
            with eagerly:
                text = self._sample_text()
        except torch.OutOfMemoryError:  # a sample must not end the run
            text = "(no sample: too little memory beside the training step)"
        model.train(was_training)
        self.say("".join(f"    | {line}\n" for line in text.splitlines()))

    def _sample_text(self) -> str:
        run = self.run
        tokenizer = run.dataset.tokenizer
        assert tokenizer is not None
        is_instruction = run.dataset.val.mask is not None
        x, y, *_ = run.val_windows.batch(np.array([0]))
        if is_instruction:  # the first question
            answer = int((y[0] != IGNORE_INDEX).argmax())
            start = x[0, : 1 + answer].tolist()
        elif tokenizer.eot is not None:
            start = [tokenizer.eot]
        else:
            start = x[0, :1].tolist()
        with run.machine.autocast():
            [ids] = generate(
                run.model,
                [start],
                min(SAMPLE_TOKENS, 2 * run.config.block_size),
                sampling=Sampling(0.8, top_k=200),
                seeds=[run.config.seed],
            )
        if is_instruction:
            # Show the question, and the answer up to its end.
            if tokenizer.eot in ids:
                ids = ids[: ids.index(tokenizer.eot)]
            ids = start + ids
        return tokenizer.decode(ids).strip()


def _count(number: int, noun: str) -> str:
    """Return `1 step` or `2 steps`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# --------------------------------------------------------------------------------------------------
# metrics.jsonl and loss.png


class Metrics:
    """metrics.jsonl: one JSON object a line, for each logged step and each evaluation."""

    def __init__(self, file: Path, step: int, evaluated_step: int):
        """Keep the steps up to `step` and the evaluations up to `evaluated_step`.

        A run that was killed after its last checkpoint makes the later ones again.
        """
        kept = []
        for row in read_metrics(file):
            last = evaluated_step if "val_loss" in row else step
            if row["step"] <= last:
                kept.append(json.dumps(row) + "\n")
        write_text(file, "".join(kept))
        self._file: TextIO = open(file, "a", encoding="utf-8")
        self._complained = False

    def append(self, row: Row) -> str | None:
        """Write one row. If the disk is full, the row is lost; return what to say, once."""
        numbers = {}
        for key, value in row.items():  # JSON has neither infinity nor NaN
            finite = value is not None and math.isfinite(value)
            numbers[key] = value if finite else None
        try:
            self._file.write(json.dumps(numbers) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._complained:
                self._complained = True
                return f"could not write {self._file.name}: {error.strerror or error}"
        return None

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # append() has already complained
            self._file.close()


def read_metrics(file: Path) -> list[Row]:
    """Return the valid rows of a metrics.jsonl; a half line from a power cut is skipped."""
    rows: list[Row] = []
    if not file.is_file():
        return rows
    for line in file.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def draw_losses(metrics: Path, picture: Path, best: tuple[float, int] | None = None) -> None:
    """Draw the losses of metrics.jsonl over the tokens seen, and the learning rate below them.

    best: the validation loss of the model in best/ and its step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: half the import time
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = read_metrics(metrics)
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    steps = [row for row in rows if row.get("loss") is not None]
    steps = steps[:: 1 + len(steps) // MAX_STEPS_DRAWN]
    tokens = [row.get("tokens") for row in steps]
    step_losses = [row["loss"] for row in steps]
    losses.plot(tokens, step_losses, ".-", color="0.75", lw=1, ms=2, label="loss of each step")
    _plot_evaluations(losses, rows, "train_loss", color=BLUE, marker="o", label="train")
    _plot_evaluations(losses, rows, "val_loss", color=ORANGE, marker="s", label="validation")
    if best is not None:
        label = f"best {best[0]:.4f} at step {best[1]:,}"
        losses.axhline(best[0], color=ORANGE, lw=0.8, ls=":", label=label)
    losses.set_ylabel("loss (nats per token)")
    losses.legend(frameon=False)
    rates.plot(tokens, [row.get("lr") for row in steps], ".-", color=GREEN, lw=1.5, ms=2)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("tokens")
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1.5G
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    _save_figure(figure, picture)


def _plot_evaluations(
    axes: Any, rows: list[Row], key: str, color: str, marker: str, label: str
) -> None:
    """Draw one loss of the evaluations.

    Step 0's is left out if there are others: a line from there would pass far above the curve of
    the steps, and its height would flatten the rest.
    """
    rows = [row for row in rows if row.get(key) is not None]
    rows = [row for row in rows if row["step"] > 0] or rows
    tokens = [row.get("tokens") for row in rows]
    axes.plot(
        tokens, [row[key] for row in rows], color=color, marker=marker, ms=4, lw=1.5, label=label
    )


def _save_figure(figure: Any, file: Path) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with contextlib.suppress(OSError):  # a full disk costs the picture, not the run
        remove_link(temporary)
        figure.savefig(temporary, format="png")
        temporary.replace(file)


# --------------------------------------------------------------------------------------------------
# Training time


class Clock:
    """Counts seconds and steps of training: evaluation, saving and compiling do not count."""

    def __init__(self, machine: Machine, total: float):
        """total: seconds of training before this process, when a run is resumed."""
        self.machine = machine
        self.total = total
        self.running = False
        self._read_at = 0.0  # when `total` was last brought up to date
        self._lap_began = total
        self._lap_steps = 0

    def start(self) -> None:
        """Let time count from now on. Waits for the device."""
        self.machine.synchronize()
        self._read_at = time.perf_counter()
        self.running = True

    def stop(self) -> None:
        """Stop counting, if the clock runs. Waits for the device."""
        if self.running:
            self.machine.synchronize()
            self._read()
            self.running = False

    def count_step(self) -> None:
        """Count a finished step, if the clock runs."""
        if self.running:
            self._lap_steps += 1

    def steps_per_second(self) -> float | None:
        """Return the speed since the last call, None if no step was counted.

        Call it after something has waited for the device; otherwise unfinished steps are
        counted.
        """
        if self.running:
            self._read()
        seconds = self.total - self._lap_began
        speed = self._lap_steps / seconds if self._lap_steps and seconds > 0 else None
        self._lap_began = self.total
        self._lap_steps = 0
        return speed

    def _read(self) -> None:
        now = time.perf_counter()
        self.total += now - self._read_at
        self._read_at = now
