"""See that a long run does not grow: python -m tests.manual.long_run --steps=20000

train.py itself, in a process of its own, trains a tiny model on the CPU. It logs every step, and
evaluates, saves and draws every steps/40. Every steps/200 its resident memory and its open files
are read from outside. In the second half, the median memory of each tenth must stay within 1%, and
the number of open files must stay the same. The first half may grow: the steps that loss.png shows
fill up, and Python frees the figures of earlier drawings only when its collector finds them.
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

from tests.helpers import OPTIONS, ROOT, command, make_dataset


def observe(pid: int) -> tuple[float, int]:
    """Return a process's resident memory in MB and its number of open files."""
    try:
        import psutil
    except ImportError:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = int(re.findall(r"VmRSS:\s+(\d+)", status)[0])
        return resident * 1024 / 1e6, len(list(Path(f"/proc/{pid}/fd").iterdir()))
    process = psutil.Process(pid)
    return process.memory_info().rss / 1e6, process.num_fds()


def long_run(
    steps: int, folder: Path, options: list[str]
) -> tuple[list[tuple[float, int]], int | None]:
    """Return what was observed at every steps/200, and the exit status."""
    dataset = make_dataset(folder / "letters")
    places = [f"--dataset={dataset}", f"--out_dir={folder / 'out'}"]
    plan = [f"--max_iters={steps}", f"--eval_interval={max(1, steps // 40)}"]
    argv = command("train.py", *OPTIONS, *places, *plan, "--save_interval_s=5", *options)
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
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
    steps = max(200, options.steps)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen, status = long_run(steps, Path(folder), more)
    print("steps     resident MB  open files\n          median    max   median max")
    medians = []
    median_files = []
    for i in range(10):
        part = seen[i * len(seen) // 10 : (i + 1) * len(seen) // 10]
        memory = [resident for resident, _ in part]
        files = [open_files for _, open_files in part]
        medians.append(median(memory))
        median_files.append(median(files))
        figures = f"{medians[-1]:6.1f} {max(memory):6.1f}   {median_files[-1]:6.0f} {max(files):3}"
        print(f"{(i + 1) * steps // 10:<9,} {figures}")
    after = medians[5:]
    growth = max(after) / after[0] - 1
    slope = np.polyfit(range(5), after, 1)[0] * 10 / steps * 1e6
    files_are_flat = len(set(median_files[5:])) == 1
    flat = growth < 0.01 and files_are_flat and status == 0
    print(
        f"{'flat' if flat else 'NOT FLAT'}: in the second half memory grew by {growth:.2%} "
        f"({slope:.0f} bytes a step), open files {'did not' if files_are_flat else 'did too'}, "
        f"exit status {status}, seconds {time.perf_counter() - started:.0f}"
    )
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
