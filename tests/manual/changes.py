"""What does each change of docs/changes/ do to loss, speed and memory? It makes a table.

    python -m tests.manual.changes --dataset=fineweb_edu --steps=900 --batch_size=16
    python -m tests.manual.changes --dataset=fineweb_edu --steps=900 --jobs=8 --seeds=1,2,3
    python -m tests.manual.changes --dataset=my.txt --changes=rotary,swiglu --steps=100 --n_layer=2

Each change is applied to a copy of the tree, which then trains with config/train_gpt2_fast.py. All
other keys are train.py's and hold for every run. --jobs=N trains N of them at a time, each on a GPU
of its own. The first row is the tree as it is. Where several seeds are given, losses are means,
with half their range.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from gpt12.errors import UserError, run_main, say
from tests.helpers import CHANGES, ROOT, changed_copy

# What a change needs besides the recipe. A third of the rate, as Lion's authors say.
KEYS = {
    "grouped_query": ["--n_kv_head=4"],
    "lion": ["--optimizer=lion", "--learning_rate=2e-4", "--beta2=0.99"],
}
# Trains, then prints the most memory that was in use.
TRAIN = """
import sys, torch, train
status = train.main(sys.argv[1:])
if torch.cuda.is_available():
    print("peak", torch.cuda.max_memory_allocated() / 2**30)
sys.exit(status)
"""


def lines(name: str) -> str:
    """Return how many lines a change adds and removes."""
    added, removed = 0, 0
    for line in (CHANGES / f"{name}.diff").read_text().splitlines():
        added += line.startswith("+") and not line.startswith("+++")
        removed += line.startswith("-") and not line.startswith("---")
    return f"+{added} -{removed}"


def train(name: str, seed: int, options: list[str], gpus: Queue[int], place: Path) -> dict:
    """Train a changed copy and return its figures."""
    copy = place / f"{name}-{seed}"
    changed_copy(copy, None if name == "as it is" else name)
    (copy / "data" / "cache").symlink_to(ROOT / "data" / "cache")
    out_dir = copy / "out"
    command = [sys.executable, "-c", TRAIN, str(ROOT / "config" / "train_gpt2_fast.py")]
    command += [*options, *KEYS.get(name, []), f"--seed={seed}", f"--out_dir={out_dir}"]
    gpu = gpus.get()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1"}
    with (copy / "output.txt").open("w") as output:
        done = subprocess.run(command, cwd=copy, env=environment, stdout=output, stderr=output)
    gpus.put(gpu)
    text = (copy / "output.txt").read_text()
    if done.returncode != 0:
        raise UserError(f"{name} ended with {done.returncode}:\n{text[-2000:]}")
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return figures(rows, text)


def figures(rows: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """Return parameters, speed, memory and loss of a run that has ended."""
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
    losses = [row for row in rows if "val_loss" in row]
    parameters = re.search(r"model: ([\d,]+) parameters", text)
    peak = re.search(r"^peak ([\d.]+)", text, re.MULTILINE)
    return {
        "parameters": parameters.group(1) if parameters else "",
        "speed": statistics.median(speeds) if speeds else 0.0,
        "memory": f"{float(peak.group(1)):.2f}" if peak else "",
        "seconds": losses[-1]["elapsed_s"],
        "loss": losses[-1]["val_loss"],
    }


def row(name: str, runs: list[dict[str, Any]]) -> str:
    """Return a line of the table: of several seeds, means."""
    losses = [run["loss"] for run in runs]
    loss = f"{statistics.mean(losses):.4f}"
    if len(losses) > 1:
        loss += f" ± {(max(losses) - min(losses)) / 2:.4f}"
    speed = statistics.median([run["speed"] for run in runs])
    seconds = statistics.median([run["seconds"] for run in runs])
    changed = "" if name == "as it is" else lines(name)
    cells = (name, changed, runs[0]["parameters"], f"{speed:,.0f}", runs[0]["memory"])
    return f"| {' | '.join(cells)} | {seconds:,.0f} | {loss} |"


def main() -> int:
    """Train all and print the table, row by row."""
    known = sorted(file.stem for file in CHANGES.glob("*.diff"))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--changes", default=",".join(known))
    parser.add_argument("--seeds", default="1337")
    parser.add_argument("--jobs", type=int, default=1)
    arguments, options = parser.parse_known_args()
    names = [name for name in arguments.changes.split(",") if name]
    for name in names:
        if name not in known:
            raise UserError(f"--changes={name}: docs/changes/ has {', '.join(known)}")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    dataset = arguments.dataset
    for path in (ROOT / "data" / dataset, Path(dataset)):
        if path.exists():
            dataset = str(path.resolve())
            break
    steps = arguments.steps
    recipe = [f"--dataset={dataset}", f"--max_iters={steps}", f"--warmup_iters={steps // 10}"]
    recipe += [f"--eval_interval={steps}", "--eval_iters=0", "--save_interval_s=3600"]
    recipe += ["--always_save_checkpoint=False", *options]
    gpus: Queue[int] = Queue()
    for gpu in range(arguments.jobs):
        gpus.put(gpu)
    say("| change | lines | parameters | tokens/s | GiB | seconds | validation loss |")
    say("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as threads:
        runs: dict[str, list[Future[dict[str, Any]]]] = {}
        for name in ["as it is", *names]:
            for seed in seeds:
                job = threads.submit(train, name, seed, recipe, gpus, Path(folder))
                runs.setdefault(name, []).append(job)
        for name, jobs in runs.items():
            say(row(name, [job.result() for job in jobs]))
    return 0


if __name__ == "__main__":
    run_main(main)
