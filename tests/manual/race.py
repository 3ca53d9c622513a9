"""How much sooner than nanoGPT's recipe does ours reach a loss? Both run in train.py.

    python -m tests.manual.race --dataset=fineweb_edu
    python -m tests.manual.race --dataset=my.txt --steps=900 --micro_batch=16

nanoGPT's recipe: AdamW at 1e-3, 65,536 tokens a step, 100 steps of warm-up, a cosine to 0, 1,000
steps. Its last validation loss is the finish. Ours: Muon, a quarter of the tokens a step, a short
context first. Its rate falls to 0 at the last of --steps, so a run of more steps is another run:
the smallest number of steps that ends below the finish is the fair one.

It prints a table and draws race.png. The exit status is 1 if ours does not reach the finish.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt12.errors import UserError, run_main

REPOSITORY = Path(__file__).parents[2]
SEQUENCES = {"nanoGPT": 64, "ours": 16}  # of 1,024 tokens, in a step
BOTH = (
    "--block_size=1024 --n_layer=12 --n_head=12 --n_embd=768 --bias=False --dropout=0.0 "
    "--weight_decay=0.1 --grad_clip=1.0 --min_lr=0.0 --eval_iters=0 --log_interval=50 "
    "--always_save_checkpoint=False"
)
NANOGPT = "--optimizer=adamw --learning_rate=1e-3 --beta1=0.9 --beta2=0.95 --schedule=cosine"
OURS = (
    "--optimizer=muon --learning_rate=4e-3 --beta1=0.9 --beta2=0.98 --schedule=wsd "
    "--decay_fraction=1.0 --short_context_share=0.5"
)
NANOGPT_STEPS = 1000
EVALUATIONS = 4

Row = dict[str, Any]


@dataclass
class Finished:
    """A run that has ended. evaluations: rows of metrics.jsonl that have a val_loss."""

    name: str
    evaluations: list[Row]
    command_s: float

    def arrival(self, loss: float) -> Row | None:
        """Return the first evaluation at or below this loss, None if there is none."""
        for row in self.evaluations:
            if row["val_loss"] <= loss:
                return row
        return None


def recipe(name: str, steps: int, micro_batch: int) -> list[str]:
    """Return the options of train.py for this side of the race."""
    micro_batch = min(micro_batch, SEQUENCES[name])
    if SEQUENCES[name] % micro_batch != 0:
        raise UserError(
            f"--micro_batch={micro_batch} does not divide the {SEQUENCES[name]} sequences of a "
            "step: choose a power of 2"
        )
    options = [*BOTH.split(), *(NANOGPT if name == "nanoGPT" else OURS).split()]
    options += [
        f"--max_iters={steps}",
        f"--warmup_iters={steps // 10}",
        f"--eval_interval={math.ceil(steps / EVALUATIONS)}",
        f"--batch_size={micro_batch}",
        f"--gradient_accumulation_steps={SEQUENCES[name] // micro_batch}",
    ]
    return options


def run(name: str, options: list[str], out_dir: Path) -> Finished:
    """Run train.py as a command of its own and read what it measured."""
    command = [sys.executable, "train.py", *options, f"--out_dir={out_dir}"]
    print(f"{name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    if subprocess.run(command, cwd=REPOSITORY).returncode != 0:
        sys.exit(f"{name} failed; the last lines above say why")
    seconds = time.perf_counter() - start
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return Finished(name, [row for row in rows if "val_loss" in row], seconds)


def show(theirs: Finished, ours: Finished) -> bool:
    """Print the table and tell whether ours reached their last loss."""
    last = theirs.evaluations[-1]
    finish = last["val_loss"]
    print(f"\nThe finish is nanoGPT's last validation loss, {finish:.4f}.\n")
    print(f"{'':10}{'loss':>8}{'tokens':>14}{'training s':>12}{'command s':>11}")
    for side in (theirs, ours):
        row = side.evaluations[-1]
        print(
            f"{side.name:10}{row['val_loss']:8.4f}{row['tokens']:14,}{row['elapsed_s']:12.1f}"
            f"{side.command_s:11.1f}"
        )
    arrival = ours.arrival(finish)
    if arrival is None:
        print("\nOurs did not reach the finish; give it more --steps.")
        return False
    print(
        f"\nOurs reached it by step {arrival['step']:,}: "
        f"{last['tokens'] / arrival['tokens']:.2f} times fewer tokens, "
        f"{last['elapsed_s'] / arrival['elapsed_s']:.2f} times less training time. "
        f"The whole commands took {theirs.command_s:.0f} s and {ours.command_s:.0f} s."
    )
    return True


def draw(theirs: Finished, ours: Finished, file: Path) -> None:
    """Draw the validation losses over tokens and over seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from gpt12.log import BLUE, ORANGE

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for side, colour in ((theirs, ORANGE), (ours, BLUE)):
        rows = [row for row in side.evaluations if row["step"] > 0]
        loss = [row["val_loss"] for row in rows]
        left.plot([row["tokens"] / 1e6 for row in rows], loss, "o-", color=colour, label=side.name)
        right.plot([row["elapsed_s"] for row in rows], loss, "o-", color=colour)
    for axes, label in ((left, "million tokens"), (right, "seconds of training")):
        axes.axhline(theirs.evaluations[-1]["val_loss"], color="grey", linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.set_ylabel("validation loss")
    left.legend(frameon=False)
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")


def main() -> int:
    """Run both recipes. Options that this program does not know go to train.py in both runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="as train.py's")
    parser.add_argument("--steps", type=int, default=850, help="of ours, 16,384 tokens each")
    parser.add_argument("--nanogpt_steps", type=int, default=NANOGPT_STEPS)
    parser.add_argument(
        "--micro_batch", type=int, default=32, help="sequences at once; 16 for 12 GB"
    )
    parser.add_argument("--out_dir", type=Path, default=Path("out-race"))
    args, rest = parser.parse_known_args()
    out_dir = args.out_dir.absolute()
    finished = []
    for name, steps in (("nanoGPT", args.nanogpt_steps), ("ours", args.steps)):
        options = [*recipe(name, steps, args.micro_batch), f"--dataset={args.dataset}", *rest]
        finished.append(run(name, options, out_dir / name))
    theirs, ours = finished
    reached = show(theirs, ours)
    draw(theirs, ours, out_dir / "race.png")
    return 0 if reached else 1


if __name__ == "__main__":
    run_main(main)
