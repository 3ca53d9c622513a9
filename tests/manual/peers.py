"""A training step, its memory, and writing texts: ours beside nanoGPT and transformers.

    python -m tests.manual.peers --nanogpt=../nanoGPT                    # GPT-2 124M on a GPU
    python -m tests.manual.peers --nanogpt=../nanoGPT --batch_size=12 --what=step
    python -m tests.manual.peers --nanogpt=../nanoGPT --tiny             # tries it on a CPU

Each measurement is a process of its own, and the programs take turns, so that a change of the
machine's speed affects all. Ours is measured by bench.py, the others here, by the same clock.

All do the same work on random tokens: one shape, 16-bit autocast and torch.compile on a GPU, norm
clipping, fused AdamW. transformers has biases, the others have none. Texts are written as each
program's users do it: ours and transformers with a cache and not compiled, nanoGPT with neither.
Without --nanogpt, a checkout, it is left out. --recompute is ours.
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
from gpt12.errors import UserError, run_main, say
from gpt12.measure import COLUMNS, Row, attention_kernel, show_rows, time_calls
from tests.helpers import ROOT, options_parser

SIDES = ("gpt12", "nanoGPT", "transformers")
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 100}
TEXTS = (1, 4, 16, 64)  # as bench.py --sample
NEW_TOKENS = 500
# The defaults of sample.py, ours and nanoGPT's.
SAMPLING = {"temperature": 0.8, "top_k": 200}
STEPS = 20

# --------------------------------------------------------------------------------------------------
# One measurement of another program, in a process of its own


def measure(args: argparse.Namespace) -> list[Row]:
    """Measure another program."""
    machine = open_machine(args.device, "auto", "auto")
    build = build_nanogpt if args.measure == "nanoGPT" else build_transformers
    model = build(args).to(machine.device)
    if args.what == "step":
        return [measure_step(model, args, machine)]
    return measure_texts(model.to(machine.dtype).eval(), args, machine)


def build_nanogpt(args: argparse.Namespace) -> Any:
    """Return nanoGPT's model. Its vocabulary is padded, as its train.py does it."""
    specification = importlib.util.spec_from_file_location(
        "nanogpt", Path(args.nanogpt, "model.py")
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["nanogpt"] = module  # its dataclass looks itself up there
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


def measure_step(model: Any, args: argparse.Namespace, machine: Machine) -> Row:
    """Time forward, backward, clipping and update, as nanoGPT's train.py does them."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model.train()) if machine.compiled else model.train()
    shape = (2, args.batch_size, args.shape["block_size"])
    x, y = torch.randint(args.shape["vocab_size"], shape, device=machine.device)

    def step() -> None:
        with machine.autocast():
            loss = forward(x, y)[1] if args.measure == "nanoGPT" else forward(x, labels=x).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with attention_kernel(args.attention):
        row = time_calls(step, machine, warmup=5, count=STEPS)
    return row | {"tokens_per_s": 1e3 * x.numel() / row["ms"]}


def measure_texts(model: Any, args: argparse.Namespace, machine: Machine) -> list[Row]:
    """Time how prompts of a quarter of the context are continued."""
    length = args.shape["block_size"] // 4
    new_tokens = min(NEW_TOKENS, args.shape["block_size"] - length)

    def seconds(prompts: Tensor, count: int) -> float:
        options: dict[str, Any] = SAMPLING | {"max_new_tokens": count}
        if args.measure == "transformers":
            options |= {"do_sample": True, "pad_token_id": 0}
            options["attention_mask"] = torch.ones_like(prompts)
        began = time.perf_counter()
        model.generate(prompts, **options)
        machine.synchronize()
        return time.perf_counter() - began

    rows = []
    for texts in TEXTS:
        prompts = torch.randint(args.shape["vocab_size"], (texts, length), device=machine.device)
        seconds(prompts, 2)  # warm-up
        rest = seconds(prompts, new_tokens) - seconds(prompts, 1)
        rows.append({"tokens_per_s": texts * (new_tokens - 1) / rest})
    return rows


# --------------------------------------------------------------------------------------------------
# All of them, in turns


def command_of(side: str, what: str, args: argparse.Namespace) -> list[str]:
    """Return the command that measures one program and prints its figures in a line of JSON."""
    if side != "gpt12":
        argv = [*sys.argv[1:], f"--what={what}", f"--measure={side}"]
        return [sys.executable, "-m", "tests.manual.peers", *argv]
    command = [sys.executable, "bench.py", "--json", f"--device={args.device}", "--bias=False"]
    command += [f"--{key}={value}" for key, value in args.shape.items()]
    if what == "texts":
        return [*command, "--sample", f"--max_new_tokens={NEW_TOKENS}"]
    command += ["--real_data=False", f"--batch_size={args.batch_size}", f"--steps={STEPS}"]
    return [*command, f"--recompute={args.recompute}", f"--attention={args.attention}"]


def run(command: list[str]) -> list[Row]:
    """Run a program and return the rows in the last line of what it prints."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise UserError(f"failed: {' '.join(command)}\n{done.stdout}")
    found = json.loads(done.stdout.splitlines()[-1])
    if isinstance(found, dict):  # bench.py's
        return found.get("sample", [found])
    return found


def median_row(label: str, rows: list[Row]) -> Row:
    """Return the medians of the figures of some rows, and the least and the greatest speed."""
    speeds = [row["tokens_per_s"] for row in rows]
    result: Row = {"label": f"{label}, {min(speeds):,.0f} to {max(speeds):,.0f}"}
    for name in ("ms", "tokens_per_s", "peak_gib"):
        if name in rows[0] and name in COLUMNS:
            result[name] = median(row[name] for row in rows)
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    parser = options_parser(
        __doc__,
        nanogpt="",
        what=("both", "step", "texts"),
        rounds=3,
        batch_size=32,
        recompute="none",
        attention=("auto", "flash", "math"),
        device="auto",
        tiny=False,
        measure=("", *SIDES),  # one measurement, in its own process
    )
    args = parser.parse_args(argv)
    args.shape = TINY if args.tiny else GPT2
    return args


def main() -> None:
    """Take turns and print the medians, or measure one program in this process."""
    args = parse(sys.argv[1:])
    if args.measure:
        print(json.dumps(measure(args)))
        return
    sides = [side for side in SIDES if side != "nanoGPT" or args.nanogpt]
    for what in ("step", "texts") if args.what == "both" else (args.what,):
        rounds: dict[str, list[list[Row]]] = {side: [] for side in sides}
        for number in range(1, args.rounds + 1):
            for side in sides:
                say(f"{what}, round {number} of {args.rounds}: {side} ...")
                rounds[side].append(run(command_of(side, what, args)))
        for i in range(len(rounds["gpt12"][0])):
            name = what if what == "step" else f"{TEXTS[i]} texts"
            show_rows([median_row(f"{s}, {name}", [rows[i] for rows in rounds[s]]) for s in sides])


if __name__ == "__main__":
    run_main(main)
