"""Draw bench.png: bars for the speed and the memory of what bench.py measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt12.measure import OutOfMemory, StepResult
from gpt12.measure_decoding import DecodingResult
from gpt12.settings import BenchConfig
from gpt12.sweep import swept_key
from gpt12.terminal import say

PICTURE = Path("bench.png")
# Of the palette by Okabe and Ito, which colour-blind readers can tell apart.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"


@dataclass(frozen=True)
class Panel:
    """Bars for one quantity in several measurements, with its value at each bar."""

    title: str
    color: str
    labels: list[str]
    values: list[float]
    numbers: list[str]


def draw(
    steps: Sequence[StepResult | OutOfMemory],
    texts: Sequence[DecodingResult],
    config: BenchConfig,
    device: str,
) -> None:
    """Write bench.png, with the name of the device in its title.

    steps: a ladder or a sweep. texts: generation. Either may be empty.
    """
    panels = choose_panels(steps, texts)
    if not panels:
        return
    try:
        _draw_panels(panels, picture_title(steps, config, device))
    except OSError as error:
        say(f"could not write {PICTURE}: {error.strerror or error}")
    else:
        say(f"wrote {PICTURE}")


def picture_title(
    steps: Sequence[StepResult | OutOfMemory], config: BenchConfig, device: str
) -> str:
    """Return the device, the model, and the size of a micro-batch if all steps have the same.

    A sweep over the model's shape has several models, which its labels tell.
    """
    if swept_key(config) in ("block_size", "n_layer", "n_head", "n_embd", "bias", "init_from"):
        return device
    sizes = {row.batch_size for row in steps}
    size = f"{config.block_size:,} tokens a sequence"
    if len(sizes) == 1:
        size = f"{sizes.pop():,} x {config.block_size:,} tokens"
    return f"{device}, {config.n_layer} layers, {config.n_embd:,} wide, {size}"


def choose_panels(
    steps: Sequence[StepResult | OutOfMemory], texts: Sequence[DecodingResult]
) -> list[Panel]:
    """Return the panels for which there are figures."""
    labels = []
    speeds = []
    peaks = []
    for row in steps:
        if isinstance(row, OutOfMemory):
            labels.append(f"{row.label}: {row.error}")
            speeds.append(0.0)
            peaks.append(0.0)
        else:
            labels.append(row.label)
            speeds.append(row.tokens_per_s)
            peaks.append(row.peak_gib or 0.0)
    panels = []
    if any(speeds):
        panels.append(_panel("training, tokens/s", BLUE, labels, speeds, digits=0))
    if any(peaks):
        panels.append(_panel("training, peak GiB", ORANGE, labels, peaks, digits=2))
    if texts:
        names = [row.label for row in texts]
        rates = [row.tokens_per_s for row in texts]
        panels.append(_panel("generation, tokens/s", GREEN, names, rates, digits=0))
    return panels


def _panel(title: str, color: str, labels: list[str], values: list[float], digits: int) -> Panel:
    numbers = [f"{value:,.{digits}f}" if value else "" for value in values]
    return Panel(title, color, labels, values, numbers)


def _draw_panels(panels: Sequence[Panel], title: str) -> None:
    from matplotlib.figure import Figure  # not pyplot, which takes twice as long to import

    most_bars = max(len(panel.labels) for panel in panels)
    size = (1.5 + 4.2 * len(panels), 1.2 + 0.33 * most_bars)  # inches
    figure = Figure(size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for number, panel in enumerate(panels, start=1):
        axis = figure.add_subplot(1, len(panels), number)
        places = range(len(panel.labels))
        bars = axis.barh(places, panel.values, color=panel.color)
        axis.bar_label(bars, panel.numbers, padding=3, fontsize=8)
        axis.set_yticks(places, panel.labels)
        axis.set_xlabel(panel.title)
        axis.set_xticks([])  # the numbers stand at the bars
        axis.margins(x=0.2)
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(PICTURE, dpi=110)
