"""What the tests of bench.py's parts share: a tiny model, and measurements that are made up."""

import json

import numpy as np
import torch

from data.shards import write_shard
from gpt12 import measure
from gpt12.bench_request import BenchRequest, read_request
from gpt12.config import load_config
from gpt12.device import Machine
from gpt12.measure import StepResult
from gpt12.settings import BenchConfig

SHAPE = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "vocab_size": 64,
    "batch_size": 3,
}
PLAIN = {"device": "cpu", "dtype": "float32", "compile": False, "real_data": False, "steps": 2}
CPU = Machine(torch.device("cpu"), torch.float32, compiled=False)


def arguments(**keys: object) -> list[str]:
    """The command line for the tiny model."""
    return [f"--{key}={value}" for key, value in (SHAPE | PLAIN | keys).items()]


def make(**keys: object) -> BenchConfig:
    """The settings for the tiny model."""
    return load_config(BenchConfig, arguments(**keys))[0]


def make_124m(**keys: object) -> BenchConfig:
    """Settings whose model is GPT-2 124M without biases."""
    return load_config(BenchConfig, [f"--{key}={value}" for key, value in keys.items()])[0]


def request(*flags: str, **keys: object) -> BenchRequest:
    """What the tiny model's command line asks for."""
    return read_request([*arguments(**keys), *flags])


def prepare(folder, vocab_size):
    """Write a data set of 2,000 tokens for each split."""
    for split in ("train", "val"):
        tokens = np.arange(2000, dtype=np.uint16) % vocab_size
        write_shard(folder / f"{split}_000000.bin", tokens)
    meta = {"tokenizer": None, "vocab_size": vocab_size, "documents": 1}
    (folder / "meta.json").write_text(json.dumps(meta))


def check_step(row: dict, tokens: int) -> None:
    """The times, speed and tokens of a measured step belong together."""
    assert row["tokens"] == tokens
    assert abs(row["tokens_per_s"] * row["ms"] / 1e3 - tokens) < 1e-6 * tokens
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert row["warmup_s"] > 0


def fake_result(config: BenchConfig, tokens_per_s: float) -> StepResult:
    """A made-up result of a step."""
    return StepResult(
        ms=1.0,
        ms_p10=1.0,
        ms_p90=1.0,
        steps=1,
        warmup_s=1.0,
        tokens=16,
        tokens_per_s=tokens_per_s,
        batch_size=int(config.batch_size),
        block_size=config.block_size,
        micro_steps=1,
        data=measure.RANDOM_DATA,
        parameters=1,
        flops_per_token=1,
        dtype=config.dtype,
        compile=False,
        recompute="none" if config.recompute == "auto" else config.recompute,
        attention=config.attention,
        cuda_graph=False,
        loss=1.0,
    )


def out_of_memory_above(limit, monkeypatch, *modules):
    """In these modules a step takes no time, and more rows than `limit` do not fit into memory."""

    def measure_step(config, tf32=True):
        if int(config.batch_size) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fake_result(config, 100.0 + int(config.batch_size))

    for module in modules:
        monkeypatch.setattr(module, "measure_step", measure_step)


def fake_gpu_memory(monkeypatch, gib):
    """torch sees a GPU with this much memory, 1 GiB of it in use."""
    numbers = (int((gib - 1) * 2**30), int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: numbers)
