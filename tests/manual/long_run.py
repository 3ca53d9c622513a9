"""See that a long run does not grow: python -m tests.manual.long_run --steps=20000

train.py itself, in a process of its own, trains a tiny model on the CPU, logs every step, and evaluates, saves and
draws every steps/40. Every steps/200 its resident memory and open files are read from outside. After the first tenth,
memory by tenths (their medians: drawing takes some for a moment) must stay within 1%, and the files must be as many.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from tests.helpers import OPTIONS, make_dataset

ROOT = Path(__file__).parents[2]


def observe(pid: int) -> tuple[float, int]:
    """Resident memory in MB and open files of a process."""
    try:
        import psutil
    except ImportError:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024 / 1e6, len([*Path(f"/proc/{pid}/fd").iterdir()])
    process = psutil.Process(pid)
    return process.memory_info().rss / 1e6, process.num_fds()


def long_run(steps: int, folder: Path, options: list[str]) -> tuple[list[tuple[float, int]], int]:
    """What was observed at every steps/200, and the exit status."""
    places = [f"--dataset={make_dataset(folder / 'letters')}", f"--out_dir={folder / 'out'}"]
    plan = [f"--max_iters={steps}", f"--eval_interval={max(1, steps // 40)}", "--save_interval_s=5"]
    command = [sys.executable, "train.py", *OPTIONS, *places, *plan, *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seen = []
    for line in process.stdout or ():
        step = re.match(r"step (\d+): loss", line)
        if step and int(step[1]) % (steps // 200) == 0 and int(step[1]) < steps:
            seen.append(observe(process.pid))
    return seen, process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    options, more = parser.parse_known_args()  # the rest is for train.py
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen, status = long_run(max(200, options.steps), Path(folder), more)
    tenths = [[*zip(*part)] for part in (seen[i * len(seen) // 10 : (i + 1) * len(seen) // 10] for i in range(10))]
    print("steps     resident MB  open files\n          median    max   median max")
    for i, (memory, files) in enumerate(tenths):
        figures = f"{median(memory):6.1f} {max(memory):6.1f}   {median(files):6.0f} {max(files):3}"
        print(f"{(i + 1) * options.steps // 10:<9,} {figures}")
    middles = [median(memory) for memory, _ in tenths[1:]]
    growth = max(middles) / middles[0] - 1
    slope = np.polyfit(range(9), middles, 1)[0] * 10 / options.steps * 1e6
    files_flat = len({median(files) for _, files in tenths[1:]}) == 1
    flat = growth < 0.01 and files_flat and status == 0
    print(
        f"{'flat' if flat else 'NOT FLAT'}: after the first tenth memory grew by {growth:.2%} ({slope:.0f} bytes a step), "
        f"open files {'did not' if files_flat else 'did too'}, exit status {status}, "
        f"seconds {time.perf_counter() - started:.0f}"
    )
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
