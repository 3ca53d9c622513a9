"""See that a long run does not grow: python -m tests.manual.long_run --steps=20000

train.py itself, in a process of its own, trains a tiny model on the CPU. It logs every step, and
evaluates, saves and draws every steps/40. Every steps/200 its resident memory and its open files
are read from outside, which needs Linux. In the second half, the median memory of each tenth must
stay within 1%, and the number of open files must stay the same. The first half may grow: the steps
that loss.png shows fill up, and Python frees the figures of earlier drawings only when its
collector finds them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.helpers import OPTIONS, ROOT, make_dataset

PARTS = 10


def observe(pid: int) -> tuple[float, int]:
    """Return a process's resident memory in MB and its number of open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.findall(r"VmRSS:\s+(\d+)", status)[0])
    return resident * 1024 / 1e6, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def long_run(steps: int, folder: Path, options: list[str]) -> list[tuple[float, int]]:
    """Return what was observed at every steps/200."""
    places = [f"--dataset={make_dataset(folder / 'letters')}", f"--out_dir={folder / 'out'}"]
    plan = [f"--max_iters={steps}", f"--eval_interval={steps // 40}", "--save_interval_s=5"]
    argv = [sys.executable, "train.py", *OPTIONS, *places, *plan, *options]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seen = []
    for line in process.stdout or ():
        step = re.match(r"step (\d+): loss", line)
        if step and int(step[1]) % (steps // 200) == 0 and int(step[1]) < steps:
            seen.append(observe(process.pid))
    assert process.wait() == 0, "the run failed"
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="at least 200")
    options, more = parser.parse_known_args()  # the rest is for train.py
    with tempfile.TemporaryDirectory() as folder:
        seen = long_run(options.steps, Path(folder), more)
    print("medians of a tenth of the steps: resident MB, open files")
    memory = []
    files = []
    for i in range(PARTS):
        part = seen[i * len(seen) // PARTS : (i + 1) * len(seen) // PARTS]
        memory.append(median(resident for resident, _ in part))
        files.append(median(open_files for _, open_files in part))
        print(f"{memory[-1]:8.1f} {files[-1]:4.0f}")
    half = PARTS // 2
    growth = max(memory[half:]) / memory[half] - 1
    flat = growth < 0.01 and len(set(files[half:])) == 1
    print(f"{'flat' if flat else 'NOT FLAT'}: memory grew by {growth:.2%} in the second half")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
