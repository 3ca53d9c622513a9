"""What does each change of docs/changes/ do to loss, speed and memory? It makes a table.

    python -m tests.manual.changes --dataset=my.txt --steps=600
    python -m tests.manual.changes --dataset=my.txt --steps=600 --changes=rotary --seeds=1,2,3
    python -m tests.manual.changes --dataset=my.txt --steps=20 --device=cpu --tokenizer=bytes \\
        --block_size=64 --n_layer=1 --n_head=4 --n_embd=32 --log_interval=1 --eval_iters=1

Each change is applied to a copy of the tree, which then trains with config/train_gpt2_fast.py and
one micro-batch a step. All other keys are train.py's and hold for every run. --jobs=N trains N of
them at a time, each on a GPU of its own. Of several seeds, losses are means, with half their range.

The first row is the tree as it is. It is also trained for half the steps: the two losses show what
a longer run gains. By that, the last column moves each loss to where its run would have been after
as many seconds as the first row's. It is an estimate; the other columns are measured.

Rows are printed and written into --table as they come, so a run that is cut short leaves a table.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from gpt12.errors import UserError, run_main, say
from tests.helpers import CHANGES, ROOT, changed_copy, options_parser

AS_IT_IS = "as it is"
HALF_AS_LONG = "as it is, for half the steps"
# What a change needs besides the recipe. Lion's authors want a third of AdamW's rate, here 1e-3.
KEYS = {
    "grouped_query": ["--n_kv_head=4"],
    "lion": ["--optimizer=lion", "--learning_rate=3e-4", "--beta2=0.99"],
    "modern": ["--n_kv_head=4"],
}
# Trains, then prints the most memory that was in use.
TRAIN = """
import sys, torch, train
status = train.main(sys.argv[1:])
if torch.cuda.is_available():
    print("peak", torch.cuda.max_memory_allocated() / 2**30)
sys.exit(status)
"""
HEAD = (
    "| change | lines | parameters | tokens/s | peak GiB | loss, equal tokens | loss, equal time |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


class Figures(NamedTuple):
    """What a run shows, or several runs together."""

    parameters: str
    speed: float  # tokens/s
    memory: str  # GiB; empty on a CPU
    loss: float  # over the validation split, at the end
    spread: float = 0.0  # half the range of several seeds' losses


def train(name: str, steps: int, options: list[str], gpus: Queue[int]) -> Figures:
    """Train a changed copy of the tree on the next free GPU and return its figures."""
    gpu = gpus.get()
    # In one piece, because the main thread prints, too.
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}: {steps} steps, {options[-1]}\n")
    with tempfile.TemporaryDirectory() as place:
        copy = changed_copy(Path(place) / "copy", None if name == AS_IT_IS else name)
        cache = ROOT / "data" / "cache"  # the text is prepared once
        cache.mkdir(exist_ok=True)
        (copy / "data" / "cache").symlink_to(cache)
        command = [sys.executable, "-c", TRAIN, "config/train_gpt2_fast.py", "--out_dir=out"]
        command += [f"--max_iters={steps}", f"--eval_interval={steps}"]
        command += [f"--warmup_iters={steps // 10}", *KEYS.get(name, []), *options]
        one_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        done = subprocess.run(command, cwd=copy, env=one_gpu, capture_output=True, text=True)
        gpus.put(gpu)
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).splitlines()
            raise UserError("\n".join([f"it ended with {done.returncode}:", *lines[-15:]]))
        rows = [json.loads(line) for line in (copy / "out" / "metrics.jsonl").open()]
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    parameters = re.search(r"model: ([\d,]+) parameters", done.stdout)
    peak = re.search(r"^peak ([\d.]+)", done.stdout, re.MULTILINE)
    return Figures(
        parameters=parameters[1] if parameters else "",
        # Each is of equally many tokens. A run of few steps has none.
        speed=statistics.harmonic_mean(speeds or [math.nan]),
        memory=f"{float(peak[1]):.2f}" if peak else "",
        loss=losses[-1],
    )


def together(runs: list[Figures]) -> Figures:
    """Return the mean of runs with several seeds."""
    losses = [run.loss for run in runs]
    return runs[0]._replace(
        speed=statistics.mean(run.speed for run in runs),
        loss=statistics.mean(losses),
        spread=(max(losses) - min(losses)) / 2,
    )


def row(name: str, found: Figures, first: Figures, gain: float) -> str:
    """Return a line of the table.

    first: the figures of the tree as it is. gain: how much the loss falls from half the steps on.
    """
    doublings = math.log2(found.speed / first.speed)
    cells = [
        name,
        "" if name == AS_IT_IS else changed_lines(name),
        found.parameters,
        f"{found.speed:,.0f}",
        found.memory,
        f"{found.loss:.4f}" + (f" ± {found.spread:.4f}" if found.spread else ""),
        f"{found.loss - gain * doublings:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def changed_lines(name: str) -> str:
    """Return how many lines a change adds and removes."""
    text = (CHANGES / f"{name}.diff").read_text()
    added = re.findall(r"^\+(?!\+\+)", text, re.MULTILINE)
    removed = re.findall(r"^-(?!--)", text, re.MULTILINE)
    return f"+{len(added)} -{len(removed)}"


def table(names: list[str], runs: dict[str, list[Future[Figures]]]) -> Iterator[str]:
    """Yield the lines of the table, each as soon as its runs have ended."""
    yield from HEAD
    half = runs[HALF_AS_LONG][0].result()
    first = together([run.result() for run in runs[AS_IT_IS]])
    for name in [AS_IT_IS, *names]:
        try:
            found = together([run.result() for run in runs[name]])
        except Exception as error:  # the other changes go on
            say(f"{name}: {error}")
        else:
            yield row(name, found, first, gain=half.loss - first.loss)


def main() -> int:
    """Train all and print the table, row by row. Return 1 if a run failed."""
    known = sorted(file.stem for file in CHANGES.glob("*.diff"))
    keys = {"dataset": str, "steps": int, "changes": ",".join(known), "seeds": "1337", "jobs": 1}
    parser = options_parser(__doc__, **keys, table=Path("out-changes.md"))
    arguments, options = parser.parse_known_args()
    names = [name for name in arguments.changes.split(",") if name]
    for name in names:
        if name not in known:
            raise UserError(f"--changes={name}: docs/changes/ has {', '.join(known)}")
    dataset = arguments.dataset
    for path in (ROOT / "data" / dataset, Path(dataset)):
        if path.exists():
            dataset = str(path.resolve())
            break
    recipe = [f"--dataset={dataset}", "--gradient_accumulation_steps=1", "--eval_iters=0"]
    recipe += ["--save_interval_s=3600", "--always_save_checkpoint=False", *options]
    gpus: Queue[int] = Queue()
    for gpu in range(arguments.jobs):
        gpus.put(gpu)
    threads = ThreadPoolExecutor(arguments.jobs)

    def start(name: str, steps: int, seed: str) -> Future[Figures]:
        return threads.submit(train, name, steps, [*recipe, f"--seed={seed}"], gpus)

    seeds = arguments.seeds.split(",")
    runs = {HALF_AS_LONG: [start(AS_IT_IS, arguments.steps // 2, seeds[0])]}
    for name in [AS_IT_IS, *names]:
        runs[name] = [start(name, arguments.steps, seed) for seed in seeds]
    say(f"{sum(map(len, runs.values()))} runs")
    rows = 0
    try:
        with arguments.table.open("w") as file:
            for line in table(names, runs):
                say(line)
                print(line, file=file, flush=True)
                rows += 1
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C ends the run that is under way alone
    return 0 if rows == len(HEAD) + 1 + len(names) else 1


if __name__ == "__main__":
    run_main(main)
