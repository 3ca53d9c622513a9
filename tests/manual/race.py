"""How much sooner than nanoGPT's recipe does ours reach a loss? Both run in train.py.

    python -m tests.manual.race --dataset=fineweb_edu
    python -m tests.manual.race --dataset=my.txt --steps=900 --micro_batch=16

nanoGPT's recipe: AdamW at 1e-3, 65,536 tokens a step, 100 steps of warm-up, a cosine to 0, 1,000
steps. Its last validation loss is the finish. Ours: Muon, a quarter of the tokens a step, a short
context first. Its rate falls to 0 at the last of --steps, so a run of more steps is another run:
the smallest number of steps that ends below the finish is the fair one.

--sequences are those of a step of ours; a step of nanoGPT's has 64, and --nanogpt_steps of them.
--micro_batch sequences are computed at once: a power of 2, 16 for 12 GB.

It prints a table and draws race.png. The exit status is 1 if ours does not reach the finish.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpt12.errors import run_main
from tests.helpers import ROOT, options_parser

BOTH = (
    "--block_size=1024 --n_layer=12 --n_head=12 --n_embd=768 --bias=False --dropout=0.0 "
    "--weight_decay=0.1 --grad_clip=1.0 --min_lr=0.0 --eval_iters=0 --log_interval=50 "
    "--always_save_checkpoint=False"
)
RECIPES = {
    "nanoGPT": "--optimizer=adamw --learning_rate=1e-3 --beta1=0.9 --beta2=0.95 --schedule=cosine",
    "ours": "--optimizer=muon --learning_rate=4e-3 --beta1=0.9 --beta2=0.98 --schedule=wsd "
    "--decay_fraction=1.0 --short_context_share=0.5",
}
EVALUATIONS = 4

Row = dict[str, Any]  # an evaluation, as in metrics.jsonl


def run(
    name: str, steps: int, sequences: int, micro_batch: int, options: list[str], out_dir: Path
) -> list[Row]:
    """Run train.py with a recipe as a command of its own. Returns the evaluations.

    The last one gets command_s, the seconds of the whole command.
    sequences: of 1,024 tokens, in a step.
    """
    micro_batch = min(micro_batch, sequences)
    plan = [
        f"--max_iters={steps}",
        f"--warmup_iters={steps // 10}",
        f"--eval_interval={math.ceil(steps / EVALUATIONS)}",
        f"--batch_size={micro_batch}",
        f"--gradient_accumulation_steps={sequences // micro_batch}",
        f"--out_dir={out_dir}",
    ]
    argv = [sys.executable, "train.py", *BOTH.split(), *RECIPES[name].split(), *plan, *options]
    print(f"{name}: {' '.join(argv)}", flush=True)
    start = time.perf_counter()
    if subprocess.run(argv, cwd=ROOT).returncode != 0:
        sys.exit(f"{name} failed; the last lines above say why")
    seconds = time.perf_counter() - start
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "val_loss" in row]
    rows[-1]["command_s"] = seconds
    return rows


def show(runs: dict[str, list[Row]]) -> bool:
    """Print the table and tell whether ours reached their last loss."""
    print(f"\n{'':10}{'loss':>8}{'tokens':>14}{'training s':>12}{'command s':>11}")
    for name, rows in runs.items():
        last = rows[-1]
        print(
            f"{name:10}{last['val_loss']:8.4f}{last['tokens']:14,}{last['elapsed_s']:12.1f}"
            f"{last['command_s']:11.1f}"
        )
    finish = runs["nanoGPT"][-1]
    for row in runs["ours"]:
        if row["val_loss"] <= finish["val_loss"]:
            print(
                f"\nOurs reached nanoGPT's last loss by step {row['step']:,}: "
                f"{finish['tokens'] / row['tokens']:.2f} times fewer tokens, "
                f"{finish['elapsed_s'] / row['elapsed_s']:.2f} times less training time."
            )
            return True
    print("\nOurs did not reach nanoGPT's last loss; give it more --steps.")
    return False


def draw(runs: dict[str, list[Row]], file: Path) -> None:
    """Draw the validation losses over tokens and over seconds of training."""
    from matplotlib.figure import Figure

    from gpt12.log import BLUE, ORANGE

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    columns = (("tokens", 1e6, "million tokens"), ("elapsed_s", 1, "seconds of training"))
    for axis, (key, unit, label) in zip(axes, columns):
        for name, colour in (("nanoGPT", ORANGE), ("ours", BLUE)):
            rows = [row for row in runs[name] if row["step"] > 0]
            loss = [row["val_loss"] for row in rows]
            axis.plot([row[key] / unit for row in rows], loss, "o-", color=colour, label=name)
        axis.axhline(runs["nanoGPT"][-1]["val_loss"], color="grey", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")


def main() -> int:
    """Run both recipes. Options that this program does not know go to train.py in both runs."""
    keys = {"steps": 850, "sequences": 16, "nanogpt_steps": 1000, "micro_batch": 32}
    parser = options_parser(__doc__, dataset=str, out_dir=Path("out-race"), **keys)
    args, rest = parser.parse_known_args()
    out_dir = args.out_dir.absolute()
    options = [f"--dataset={args.dataset}", *rest]
    runs = {}
    plans = {"nanoGPT": (args.nanogpt_steps, 64), "ours": (args.steps, args.sequences)}
    for name, (steps, sequences) in plans.items():
        runs[name] = run(name, steps, sequences, args.micro_batch, options, out_dir / name)
    reached = show(runs)
    draw(runs, out_dir / "race.png")
    return 0 if reached else 1


if __name__ == "__main__":
    run_main(main)
