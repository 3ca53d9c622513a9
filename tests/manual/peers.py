"""A training step, its memory, and writing texts: ours beside nanoGPT and transformers.

    python -m tests.manual.peers --nanogpt=../nanoGPT                    # GPT-2 124M on a GPU
    python -m tests.manual.peers --nanogpt=../nanoGPT --batch_size=12 --what=step
    python -m tests.manual.peers --nanogpt=../nanoGPT --tiny             # tries it on a CPU

Each measurement is a process of its own, and the programs take turns, so that a change of the
machine's speed affects all. Ours is measured by bench.py, the others here, by the same clock.

All do the same work on random tokens: one shape, 16-bit autocast and torch.compile on a GPU, norm
clipping, fused AdamW. transformers has biases, the others have none. Texts are written as each
program's users do it: ours and transformers with a cache and not compiled, nanoGPT with neither.
tests/manual/race.py compares how soon a loss is reached.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from gpt12.device import Machine, open_machine
from gpt12.errors import UserError, run_main
from gpt12.measure import attention_kernel, forget_last_measurement, time_calls

REPOSITORY = Path(__file__).parents[2]
SIDES = ("gpt12", "nanoGPT", "transformers")
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 100}
TEXTS = (1, 4, 16, 64)  # as bench.py --sample
TEMPERATURE = 0.8  # this and TOP_K are the defaults of sample.py, ours and nanoGPT's
TOP_K = 200
WARMUP_STEPS = 5

Row = dict[str, Any]  # what, tokens_per_s, and for a step ms and peak_gib

# --------------------------------------------------------------------------------------------------
# One measurement


def measure(side: str, args: argparse.Namespace) -> list[Row]:
    """Measure one program in this process, or ours in bench.py's."""
    if side == "gpt12":
        return measure_ours(args)
    machine = open_machine(args.device, "auto", "auto")
    build = build_nanogpt if side == "nanoGPT" else build_transformers
    model = build(args).to(machine.device)
    if args.what == "step":
        return [measure_step(model, side, args, machine)]
    return measure_texts(model.to(machine.dtype).eval(), side, args, machine)


def measure_ours(args: argparse.Namespace) -> list[Row]:
    """Run bench.py and return its figures."""
    command = [sys.executable, "bench.py", "--json", f"--device={args.device}", "--bias=False"]
    command += [f"--{key}={value}" for key, value in args.shape.items()]
    if args.what == "texts":
        found = run([*command, "--sample", f"--max_new_tokens={args.new_tokens}"])
        rows = []
        for row in found["sample"]:
            rows.append({"what": f"{row['texts']} texts", "tokens_per_s": row["tokens_per_s"]})
        return rows
    command += ["--real_data=False", f"--batch_size={args.batch_size}", f"--steps={args.steps}"]
    found = run([*command, f"--recompute={args.recompute}", f"--attention={args.attention}"])
    return [{"what": "step", **{key: found[key] for key in ("ms", "tokens_per_s", "peak_gib")}}]


def build_nanogpt(args: argparse.Namespace) -> Any:
    """Return nanoGPT's model. Its vocabulary is padded, as its train.py does it."""
    file = args.nanogpt / "model.py"
    specification = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up there
    specification.loader.exec_module(module)
    padded = (args.shape["vocab_size"] + 63) // 64 * 64
    shape = module.GPTConfig(**args.shape | {"vocab_size": padded}, bias=False, dropout=0.0)
    return module.GPT(shape)


def build_transformers(args: argparse.Namespace) -> Any:
    """Return transformers' model with random weights. It never ends a text early."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = dict(args.shape)
    shape["n_positions"] = shape.pop("block_size")
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        shape[dropout] = 0.0
    use_cache = args.what == "texts"
    config = GPT2Config(**shape, use_cache=use_cache, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config)


def measure_step(model: Any, side: str, args: argparse.Namespace, machine: Machine) -> Row:
    """Time forward, backward, clipping and update, as nanoGPT's train.py does them."""
    forget_last_measurement()
    model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if machine.compiled else model
    shape = (args.batch_size, args.shape["block_size"])
    x, y = torch.randint(args.shape["vocab_size"], (2, *shape), device=machine.device)

    def step() -> None:
        with machine.autocast():
            loss = forward(x, y)[1] if side == "nanoGPT" else forward(x, labels=x).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with attention_kernel(args.attention):
        timing = time_calls(step, machine, WARMUP_STEPS, args.steps)
    speed = 1e3 * x.numel() / timing.ms
    return {"what": "step", "ms": timing.ms, "tokens_per_s": speed, "peak_gib": timing.peak_gib}


def measure_texts(model: Any, side: str, args: argparse.Namespace, machine: Machine) -> list[Row]:
    """Time how prompts of a quarter of the context are continued."""
    length = max(1, args.shape["block_size"] // 4)
    sampling = {"temperature": TEMPERATURE, "top_k": min(TOP_K, args.shape["vocab_size"])}
    if side == "transformers":
        sampling |= {"do_sample": True, "pad_token_id": 0}

    def seconds(prompts: Tensor, new_tokens: int) -> float:
        options = dict(sampling, max_new_tokens=new_tokens)
        if side == "transformers":
            options["attention_mask"] = torch.ones_like(prompts)
        machine.synchronize()
        began = time.perf_counter()
        model.generate(prompts, **options)
        machine.synchronize()
        return time.perf_counter() - began

    new_tokens = min(args.new_tokens, args.shape["block_size"] - length)
    rows = []
    for texts in TEXTS:
        prompts = torch.randint(args.shape["vocab_size"], (texts, length), device=machine.device)
        seconds(prompts, 2)  # warm-up
        first = seconds(prompts, 1)
        rest = seconds(prompts, new_tokens) - first
        speed = texts * (new_tokens - 1) / rest
        rows.append({"what": f"{texts} texts", "tokens_per_s": speed})
    return rows


# --------------------------------------------------------------------------------------------------
# All of them, in turns


def run(command: list[str]) -> Any:
    """Run a program and return the JSON in the last line of what it prints."""
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise UserError(f"failed: {' '.join(command)}\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(sides: list[str], rounds: int, command: list[str]) -> dict[str, list[Row]]:
    """Measure all sides one after the other, `rounds` times; return each side's rows."""
    rows: dict[str, list[Row]] = {side: [] for side in sides}
    for number in range(1, rounds + 1):
        for side in sides:
            print(f"round {number} of {rounds}: {side} ...", file=sys.stderr, flush=True)
            rows[side] += run([*command, f"--measure={side}"])
    return rows


def show(rows: dict[str, list[Row]]) -> None:
    """Print the medians, the slowest and the fastest, and how many times as fast ours is."""
    print(f"{'':14}{'':10}{'tokens/s':>12}{'least':>12}{'most':>12}{'ms':>9}{'GiB':>8}{'ours':>8}")
    for what in dict.fromkeys(row["what"] for found in rows.values() for row in found):
        ours = 0.0
        for side, found in rows.items():
            same = [row for row in found if row["what"] == what]
            speeds = [row["tokens_per_s"] for row in same]
            middle = median(speeds)
            ours = ours or middle
            ms = f"{median(row['ms'] for row in same):.1f}" if "ms" in same[0] else ""
            peak = same[0].get("peak_gib")
            gib = "" if peak is None else f"{peak:.2f}"
            print(
                f"{side:14}{what:10}{middle:12,.0f}{min(speeds):12,.0f}{max(speeds):12,.0f}"
                f"{ms:>9}{gib:>8}{ours / middle:7.2f}x"
            )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; without it: left out")
    parser.add_argument("--what", choices=("step", "texts", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recompute", default="none", help="of ours")
    parser.add_argument("--attention", choices=("auto", "flash", "math"), default="auto")
    parser.add_argument("--new_tokens", type=int, default=500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU computes at once")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)  # in its own process
    args = parser.parse_args(argv)
    args.shape = TINY if args.tiny else GPT2
    return args


def main() -> None:
    """Take turns, or measure one program in this process."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    sides = [side for side in SIDES if side != "nanoGPT" or args.nanogpt]
    for what in ("step", "texts") if args.what == "both" else (args.what,):
        again = [sys.executable, "-m", "tests.manual.peers", *argv, f"--what={what}"]
        show(take_turns(sides, args.rounds, again))


if __name__ == "__main__":
    run_main(main)
