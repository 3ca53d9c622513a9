"""What a run records: metrics.jsonl, the picture loss.png, and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from gpt12.checkpoint import is_number_or_none
from gpt12.errors import UserError
from gpt12.files import remove_link
from gpt12.run_folder import write_text

MAX_STEPS_DRAWN = 4000  # loss.png is 770 pixels wide; more points would only cost memory
BLUE = "#0072B2"  # colours of Okabe and Ito's palette, which the colour-blind can tell apart
ORANGE = "#D55E00"
GREEN = "#009E73"

Row = dict[str, Any]


class Metrics:
    """metrics.jsonl: one JSON object a line, for each logged step and each evaluation."""

    def __init__(self, file: Path, resume_step: int | None):
        """resume_step: keep the rows up to this step; None starts an empty file."""
        rows = []
        if resume_step is not None:
            rows = [row for row in read_metrics(file) if row["step"] <= resume_step]
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        self.evaluations: list[Row] = []
        self.steps: list[Row] = []  # evenly thinned, for the picture
        self._seen = 0  # steps so far
        self._stride = 1  # self.steps keeps one of this many steps
        for row in rows:
            self._remember(row)
        self._file: TextIO = open(file, "a", encoding="utf-8")
        self._complained = False

    def append(self, row: Row) -> None:
        """Write one row. If the disk is full, the run goes on and the row may be lost."""
        if "val_loss" in row and self._is_evaluated(row["step"]):
            # A run that was killed between an evaluation and its checkpoint evaluates again.
            return
        row = {key: _json_number(value) for key, value in row.items()}
        self._remember(row)
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._complained:
                name = self._file.name
                print(f"could not write {name}: {error.strerror or error}", file=sys.stderr)
            self._complained = True

    def _is_evaluated(self, step: int) -> bool:
        return any(row["step"] == step for row in self.evaluations[-2:])

    def _remember(self, row: Row) -> None:
        """Keep a row for the picture. Of the steps at most MAX_STEPS_DRAWN are kept."""
        if "val_loss" in row:
            self.evaluations.append(row)
            return
        if self._seen % self._stride == 0:
            self.steps.append(row)
        self._seen += 1
        if self._seen == MAX_STEPS_DRAWN * self._stride:
            self._stride *= 2
            self.steps = self.steps[::2]

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
        if _is_row(row):
            rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    return all(is_number_or_none(value) for value in row.values())


def _json_number(value: Any) -> Any:
    """Return null for infinity and NaN, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --------------------------------------------------------------------------------------------------
# The picture


class Picture:
    """Draws loss.png in a thread: importing the plotting library takes longer than a small step."""

    def __init__(self, file: Path):
        self.file = file
        self._thread: threading.Thread | None = None

    def draw(self, metrics: Metrics, best: tuple[float, int] | None) -> None:
        """Start drawing what the metrics hold now. best: see draw_losses."""
        self.wait()
        arguments = (list(metrics.steps), list(metrics.evaluations), self.file, best)
        self._thread = threading.Thread(target=draw_losses, args=arguments)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the picture is written."""
        if self._thread is not None:
            self._thread.join()


def draw_losses(
    steps: list[Row], evaluations: list[Row], file: Path, best: tuple[float, int] | None = None
) -> None:
    """Draw the losses over the tokens seen, and the learning rate below them.

    best: the validation loss of the model in best/ and its step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: half the import time
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    steps = [row for row in steps if row.get("loss") is not None]
    tokens = [row.get("tokens") for row in steps]
    step_losses = [row["loss"] for row in steps]
    losses.plot(tokens, step_losses, ".-", color="0.75", lw=1, ms=2, label="loss of each step")
    _plot_evaluations(losses, evaluations, "train_loss", color=BLUE, marker="o", label="train")
    _plot_evaluations(losses, evaluations, "val_loss", color=ORANGE, marker="s", label="validation")
    if best is not None:
        label = f"best {best[0]:.4f} at step {best[1]:,}"
        losses.axhline(best[0], color=ORANGE, lw=0.8, ls=":", label=label)
    losses.set_ylabel("loss (nats per token)")
    losses.legend(frameon=False)
    learning_rates = [row.get("lr") for row in steps]
    rates.plot(tokens, learning_rates, ".-", color=GREEN, lw=1.5, ms=2)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("tokens")
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1.5G
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    _save_figure(figure, file)


def _plot_evaluations(
    axes: Any, evaluations: list[Row], key: str, color: str, marker: str, label: str
) -> None:
    """Draw one loss of the evaluations.

    Step 0's is left out if there are others: a line from there would pass far above the curve of
    the steps, and its height would flatten the rest.
    """
    rows = [row for row in evaluations if row.get(key) is not None]
    later = [row for row in rows if row["step"] > 0] or rows
    tokens = [row.get("tokens") for row in later]
    values = [row[key] for row in later]
    axes.plot(tokens, values, color=color, marker=marker, ms=4, lw=1.5, label=label)


def _save_figure(figure: Any, file: Path) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with contextlib.suppress(OSError):  # a full disk costs the picture, not the run
        remove_link(temporary)
        figure.savefig(temporary, format="png")
        temporary.replace(file)


# --------------------------------------------------------------------------------------------------
# Weights & Biases


def start_wandb(
    project: str, name: str, out_dir: str, facts: dict[str, Any], run_id: str | None
) -> Any:
    """Start a run at Weights & Biases, or continue the one with this id.

    Raises UserError if that fails.
    """
    try:
        import wandb

        return wandb.init(
            project=project, name=name, config=facts, dir=out_dir, id=run_id, resume="allow"
        )
    except Exception as error:  # not installed, not logged in, no network
        raise UserError(
            f"wandb_log=True, but wandb does not start: {error}. "
            "Log in with `wandb login`, set WANDB_MODE=offline, or leave wandb_log out"
        ) from None
