"""Does fine-tuning learn? A model of one author is fine-tuned on another, fully and by LoRA.

    python -m tests.manual.learning_check --first=austen.txt --second=shakespeare.txt

Everything goes through train.py's command line, as a user types it. Every figure is what
`train.py --eval_only` says of the finished folder: one pass over the last tenth of the second text,
which no run has trained on. Both ways get the same steps, batches and schedule, and three learning
rates each. The exit status is 1 if the second author's perplexity does not fall, or if LoRA's best
run reaches less than 90% of the fall in loss of the best full one.

It takes 14 minutes of CPU time, over all cores.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MODEL = "--n_layer=4 --n_head=3 --n_embd=96 --block_size=128 --bias=True"
STEP = (
    "--tokenizer=bytes --batch_size=16 --gradient_accumulation_steps=1 --device=cpu "
    "--dtype=float32 --compile=False"
)
FIRST = (
    f"{MODEL} --max_iters=2000 --learning_rate=3e-3 --warmup_iters=100 --eval_interval=1000 "
    "--eval_iters=20"
)
SECOND = "--max_iters=400 --warmup_iters=20 --eval_interval=100 --eval_iters=20"
RATES = {"full": (3e-4, 1e-3, 3e-3), "LoRA": (3e-3, 1e-2, 3e-2)}
RANK = 16
SHARE = 0.9  # of the full run's fall in loss that LoRA has to reach


def train(*options: str, threads: int) -> str:
    """Run train.py and return what it prints."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "train.py", *STEP.split(), *options]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr}")
    return done.stdout


def measure(folder: Path, text: Path) -> tuple[float, float]:
    """Return loss (nats a byte) and perplexity of a folder's model on a text's validation part."""
    said = train(
        "--eval_only", "--eval_iters=0", f"--init_from={folder}", f"--dataset={text}", threads=1
    )
    found = re.search(r"val loss ([\d.]+), perplexity ([\d.]+)", said)
    assert found, said
    return float(found[1]), float(found[2])


def finetune(base: Path, text: Path, way: str, rate: float, rank: int) -> tuple[float, float]:
    """Fine-tune in this way and return what measure() says of the result."""
    if way == "LoRA":
        folder = base.with_name(f"{way}-{rank}-{rate:g}")
        lora = [f"--lora_rank={rank}"]
    else:
        folder = base.with_name(f"{way}-{rate:g}")
        lora = []
    options = [
        f"--init_from={base / 'best'}",
        f"--dataset={text}",
        f"--out_dir={folder}",
        f"--min_lr={rate / 10}",
    ]
    train(*SECOND.split(), *options, f"--learning_rate={rate}", *lora, threads=1)
    return measure(folder / "best", text)


def check(first: Path, second: Path, folder: Path, rank: int) -> bool:
    """Print the table. Tell whether both ways have learned what they should."""
    cores = os.cpu_count() or 1
    base = folder / "first"
    if not (base / "best").exists():
        train(*FIRST.split(), f"--dataset={first}", f"--out_dir={base}", threads=cores)
    start, perplexity = measure(base / "best", second)
    print(f"{first.name}: loss {measure(base / 'best', first)[0]:.4f} of the model trained on it")
    print(f"\non {second.name}        rate   loss    perplexity  improvement")
    print(f"{'before':<20} {'':>8}  {start:.4f}  {perplexity:9.2f}", flush=True)
    runs = [(way, rate) for way, rates in RATES.items() for rate in rates]
    with ThreadPoolExecutor(cores) as pool:
        results = list(pool.map(lambda run: finetune(base, second, run[0], run[1], rank), runs))
    falls: dict[str, float] = {}
    for (way, rate), (loss, perplexity) in zip(runs, results, strict=True):
        name = f"LoRA, rank {rank}" if way == "LoRA" else way
        print(f"{name:<20} {rate:>8g}  {loss:.4f}  {perplexity:9.2f}  {start - loss:11.4f}")
        falls[way] = max(falls.get(way, 0.0), start - loss)
    share = falls["LoRA"] / falls["full"] if falls["full"] > 0 else 0.0
    print(
        f"\nLoRA's best run reaches {share:.1%} of the improvement of the best full one "
        f"({SHARE:.0%} is asked)"
    )
    return share >= SHARE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=Path, required=True, help="text to train a model on")
    parser.add_argument(
        "--second", type=Path, required=True, help="another author's text, to fine-tune on"
    )
    parser.add_argument("--rank", type=int, default=RANK, help="of the adapters")
    parser.add_argument(
        "--out_dir",
        type=Path,
        help="keep the runs here; a model of the first text that is there is used",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out_dir or Path(temporary)).resolve()
        return 0 if check(args.first.resolve(), args.second.resolve(), folder, args.rank) else 1


if __name__ == "__main__":
    sys.exit(main())
