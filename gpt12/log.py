"""What a run tells: lines, a progress bar, metrics.jsonl, loss.png, Weights & Biases; its clock.

    RunLog.log_step()         a row of metrics.jsonl, and the bar or a line
    RunLog.log_evaluation()   a row, a line, a text that the model writes, loss.png
    RunLog.close()            what came out, and what to type next
    Clock                     seconds of training

Only rank 0 tells anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gpt12.errors import UserError, one_line, say
from gpt12.folder import Progress, write_file
from gpt12.generate import generate
from gpt12.run import Run

SAMPLE_TOKENS = 160  # length of the text written at each evaluation
NOTICEABLE_S = 1.0  # seconds of training that are told at the end
MAX_DRAWN = 4000  # loss.png is 770 pixels wide; more points would only cost memory
BLUE = "#0072B2"  # colours of Okabe and Ito's palette, which the colour-blind can tell apart
ORANGE = "#D55E00"
GREEN = "#009E73"

MetricsRow = dict[str, Any]  # of metrics.jsonl


def perplexity(loss: float) -> float:
    """Return e to the loss, without overflow."""
    return math.exp(min(loss, 700))


# --------------------------------------------------------------------------------------------------
# During training


class RunLog:
    """Tells about one run. On ranks other than 0 every method does nothing."""

    def __init__(self, run: Run):
        self.run = run
        self.active = run.machine.rank == 0
        self.progress = run.progress
        self.clock = Clock(run)
        self.metrics: Any = None  # metrics.jsonl
        self.cannot_write = False  # whether we said that metrics.jsonl lacks a row
        self.skipped = 0.0  # skipped updates that were reported
        self.start_loss: float | None = None  # validation loss at step 0
        self.wandb: Any = None
        self.bar: Any = None
        self.drawing: threading.Thread | None = None

    def introduce(self, lines: Iterable[str]) -> None:
        """Say what will be trained, and start Weights & Biases. Nothing is written yet."""
        if not self.active:
            return
        for line in lines:
            say(line)
        if self.run.config.wandb_log:
            self._start_wandb()

    def open(self) -> None:
        """Begin the metrics, and show a progress bar on a terminal.

        A log file gets a line per logged step instead of the bar.
        """
        if not self.active:
            return
        file = self.run.out_dir / "metrics.jsonl"
        drop_later_rows(file, self.progress)
        self.metrics = file.open("a", encoding="utf-8", buffering=1)  # a line at a time
        step = self.progress.step
        hidden = None if sys.stderr is not None else True  # None: tqdm looks for a terminal
        total = self.run.config.max_iters
        self.bar = tqdm(total=total, initial=step, unit="step", disable=hidden)
        if step == 0:
            say("evaluating before the first step")

    def log_step(
        self, lr: float, loss: float, grad_norm: float, bad: float, skipped: float
    ) -> None:
        """Record a step in the metrics and show it.

        bad: updates in a row, up to now, that were skipped. skipped: all skipped updates.
        """
        if not self.active:
            return
        step = self.progress.step
        tokens_per_s = None
        speed = ""
        left = ""
        steps_per_s = self.clock.steps_per_second()
        if steps_per_s is not None:
            config = self.run.config
            tokens_per_s = round(steps_per_s * config.tokens_per_step)
            speed = f", {tokens_per_s:,} tokens/s"
            left = f", {tqdm.format_interval((config.max_iters - step) / steps_per_s)} left"
        self._record(loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=tokens_per_s)
        self.bar.set_postfix_str(f"loss {loss:.4f}{speed}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable:
            say(f"step {step}: loss {loss:.4f}, lr {lr:.2e}{speed}{left}")
        if skipped > self.skipped:
            say(
                f"step {step}: loss or gradient not finite; skipped "
                f"{skipped - self.skipped:.0f} update(s) since the last log, the last {bad:.0f} in "
                "a row"
            )
            self.skipped = skipped

    def log_evaluation(self, train_loss: float, val_loss: float, better: bool) -> None:
        """Record an evaluation and show it, with a text and the picture of all losses.

        better: it is the best so far, and in best/.
        """
        if not self.active:
            return
        if self.progress.step == 0:
            self.start_loss = val_loss
        best = ", the best so far" if better else ""
        say(
            f"step {self.progress.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f} "
            f"(perplexity {perplexity(val_loss):.2f}){best}"
        )
        self._record(train_loss=train_loss, val_loss=val_loss)
        self._show_sample()
        self._draw()

    def close(self, status: int, saved: bool, failed: bool) -> None:
        """Say what came out and what to type next. failed: an exception ends the run."""
        if not self.active:
            return
        self.bar.close()
        self._wait_for_picture()
        with contextlib.suppress(OSError):  # _record() has already complained
            self.metrics.close()
        if self.wandb:
            with self._going_on_without_wandb():
                self.wandb.finish(exit_code=status)
        for line in self._end(status, saved, failed):
            say(line)

    def _end(self, status: int, saved: bool, failed: bool) -> Iterator[str]:
        progress = self.progress
        told = ""
        # A run of one step has no time of training: its only step compiles.
        if progress.elapsed_s >= NOTICEABLE_S:
            told = f", {progress.elapsed_s:.1f} s of training"
        typed = shlex.quote(self.run.out_dir.as_posix())  # as a shell takes it
        if failed or status > 128:
            yield f"{'failed' if failed else 'stopped'} at step {progress.step:,}{told}"
            if saved:
                yield f"go on with: python train.py --init_from=resume --out_dir={typed}"
            return
        best = progress.best_val_loss
        if best is not None:
            told += f", best val loss {best:.4f} at step {progress.best_step:,}"
        yield f"ended at step {progress.step:,}{told}; curves: {self.run.out_dir}/loss.png"
        if best is not None and self.start_loss is not None and self.start_loss <= best:
            yield (
                f"no better than at the start, val loss {self.start_loss:.4f}: try a lower "
                "learning_rate"
            )
        if status == 0 and saved and self.run.dataset.tokenizer is not None:
            talk = " --interactive" if self.run.packed else ""
            yield f"read what it writes: python sample.py --out_dir={typed}{talk}"

    def _record(self, **values: float | None) -> None:
        """Write a row into metrics.jsonl and, under the same names, to Weights & Biases."""
        row: MetricsRow = {"tokens": self.progress.tokens}
        row |= {key: value if is_finite(value) else None for key, value in values.items()}
        row["elapsed_s"] = round(self.progress.elapsed_s, 3)
        try:
            self.metrics.write(json.dumps({"step": self.progress.step} | row) + "\n")
        except OSError as error:  # the disk is full
            if not self.cannot_write:
                self.cannot_write = True
                say(f"could not write {self.metrics.name}: {error.strerror or error}")
        if self.wandb:
            with self._going_on_without_wandb():
                self.wandb.log(row, step=self.progress.step)

    def _start_wandb(self) -> None:
        """Start a run at Weights & Biases, or continue the one of a resumed run.

        Raises UserError if that fails.
        """
        config = self.run.config
        try:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb_project,
                name=config.wandb_run_name,
                config=asdict(config),
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
            say(
                f"warning: wandb has failed ({one_line(error)}) and gets nothing more. The run "
                f"goes on, and {self.run.out_dir}/metrics.jsonl holds all"
            )

    def _draw(self) -> None:
        """Draw loss.png anew, in a thread: importing the plotting library takes long."""
        self._wait_for_picture()
        best = (self.progress.best_val_loss, self.progress.best_step)
        self.drawing = threading.Thread(target=draw_losses, args=(self.run.out_dir, *best))
        self.drawing.start()

    def _wait_for_picture(self) -> None:
        if self.drawing is not None:
            self.drawing.join()

    def _show_sample(self) -> None:
        """Print a text that the model writes as it is now."""
        if self.run.dataset.tokenizer is None:
            return
        # Compiled layers would be compiled anew for a prompt, for a token, and for each layer.
        eagerly: Any = contextlib.nullcontext()
        if self.run.machine.compiled:
            eagerly = torch.compiler.set_stance("force_eager")
        self.run.model.eval()
        with eagerly, self.run.machine.autocast():
            text = self._sample_text()
        self.run.model.train()
        say("".join(f"    | {line}\n" for line in text.splitlines()))

    def _sample_text(self) -> str:
        """Return a text that follows an end of text, or the first question and its answer."""
        run = self.run
        tokenizer = run.dataset.tokenizer
        assert tokenizer is not None
        x, y, *_ = run.val_windows.batch(np.array([0]))
        prompt = x[0, :1].tolist()
        if run.packed:
            prompt = x[0, : 1 + (y[0] >= 0).argmax()].tolist()  # up to the first target
        elif tokenizer.eot is not None:
            prompt = [tokenizer.eot]
        length = min(SAMPLE_TOKENS, 2 * run.config.block_size)
        [ids] = generate(run.model, [prompt], max_new_tokens=length, seed=run.config.seed)
        if tokenizer.eot in ids:
            ids = ids[: ids.index(tokenizer.eot)]
        return tokenizer.decode(prompt + ids if run.packed else ids).strip()


# --------------------------------------------------------------------------------------------------
# metrics.jsonl and loss.png


def is_finite(value: float | None) -> bool:
    """Tell whether JSON has this number: not infinity, and not NaN."""
    return value is not None and math.isfinite(value)


def drop_later_rows(file: Path, progress: Progress) -> None:
    """Rewrite metrics.jsonl without the rows that a resumed run makes again.

    A run that was killed after its last checkpoint has left such rows.
    """
    kept = []
    for row in read_metrics(file):
        last = progress.evaluated_step if "val_loss" in row else progress.step
        if row["step"] <= last:
            kept.append(json.dumps(row) + "\n")
    write_file(file, "".join(kept).encode())


def read_metrics(file: Path) -> list[MetricsRow]:
    """Return the rows of a metrics.jsonl. Any other line is skipped, as half a line of a crash."""
    rows: list[MetricsRow] = []
    lines = file.read_text("utf-8", errors="replace").splitlines() if file.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"]), "tokens": int(row["tokens"])})
    return rows


def draw_losses(out_dir: Path, best_val_loss: float | None, best_step: int) -> None:
    """Draw the losses of metrics.jsonl over the tokens seen, and the learning rate below them.

    best_val_loss, best_step: of the model in best/.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: half the import time
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = read_metrics(out_dir / "metrics.jsonl")
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    _plot(losses, rows, "loss", label="loss of each step", color="0.75", lw=1)
    _plot(losses, rows, "train_loss", label="train", color=BLUE, marker="o", ms=4)
    _plot(losses, rows, "val_loss", label="validation", color=ORANGE, marker="s", ms=4)
    if best_val_loss is not None:
        label = f"best {best_val_loss:.4f} at step {best_step:,}"
        losses.axhline(best_val_loss, color=ORANGE, lw=0.8, ls=":", label=label)
    losses.set_ylabel("loss (nats per token)")
    losses.legend(frameon=False)
    _plot(rates, rows, "lr", color=GREEN)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("tokens")
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1.5G
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with contextlib.suppress(UserError):  # a full disk costs the picture, not the run
        write_file(out_dir / "loss.png", content.getvalue())


def _plot(axes: Any, rows: list[MetricsRow], key: str, **style: Any) -> None:
    """Draw one column of the metrics.

    Step 0's evaluation is left out if there are others: a line from there would pass far above the
    curve of the steps, and its height would flatten the rest.
    """
    rows = [row for row in rows if row.get(key) is not None]
    rows = [row for row in rows if row["step"] > 0] or rows
    rows = rows[:: 1 + len(rows) // MAX_DRAWN]
    axes.plot([row["tokens"] for row in rows], [row[key] for row in rows], **style)


# --------------------------------------------------------------------------------------------------
# Training time


class Clock:
    """Counts seconds of training: evaluation, saving and compiling do not count."""

    def __init__(self, run: Run):
        """run: its progress holds the seconds, those of a resumed run's earlier processes, too."""
        self.machine = run.machine
        self.progress = run.progress
        self.running = False
        self._read_at = 0.0  # when the seconds were last brought up to date
        self._lap_began = (0, 0.0)  # step and seconds of the last call of steps_per_second()

    def start(self) -> None:
        """Let time count from now on. Waits for the device."""
        self.machine.synchronize()
        self._read_at = time.perf_counter()
        self._lap_began = (self.progress.step, self.progress.elapsed_s)
        self.running = True

    def stop(self) -> None:
        """Stop counting, if the clock runs. Waits for the device."""
        if self.running:
            self.machine.synchronize()
            self._read()
            self.running = False

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Count no time during the block."""
        was_running = self.running
        self.stop()
        yield
        if was_running:
            self.start()

    def steps_per_second(self) -> float | None:
        """Return the speed since the last call, or since the start if that was later.

        Call it after something has waited for the device; otherwise unfinished steps are counted.
        None if the clock does not run.
        """
        if not self.running:
            return None
        self._read()
        step, elapsed_s = self._lap_began
        self._lap_began = (self.progress.step, self.progress.elapsed_s)
        seconds = self.progress.elapsed_s - elapsed_s
        return (self.progress.step - step) / seconds if seconds > 0 else None

    def _read(self) -> None:
        now = time.perf_counter()
        self.progress.elapsed_s += now - self._read_at
        self._read_at = now
