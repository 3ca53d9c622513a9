"""Try a model that somebody has changed, in seconds, before it is trained for hours.

    python train.py PRESET --check

A small model of the same code (gpt12/twin.py) is run in all the ways that must give the same
numbers. They are float32 numbers, so a difference is a mistake.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt12.device import Machine, compile_model
from gpt12.errors import UserError, one_line, say
from gpt12.generate import KVCache, refill
from gpt12.settings import TrainConfig, model_shape
from gpt12.twin import TOLERANCE, VOCAB_SIZE, make_twin, sample_ids
from gpt12.weights import from_pretrained, new_model, save_pretrained
from model import GPT, GPTConfig

ROWS = 4  # in a training step
Result = tuple[str, str | None]
MakeStep = Callable[[GPT, TrainConfig, Machine], Any]  # TrainStep of train.py


def check_start(shape: GPTConfig) -> None:
    """Try what costs least, at the start of every run. Raises UserError if it fails."""
    twin = make_twin(shape)
    if wrong := saving(twin) or decoding(twin):
        raise UserError(f"{wrong}. --check tries more")


def check_model(config: TrainConfig, machine: Machine, make_step: MakeStep) -> int:
    """Try everything, print a line for each, and return the exit status."""
    torch.backends.cuda.matmul.allow_tf32 = False
    status = 0
    machine = replace(machine, dtype=torch.float32, world=1)
    for name, wrong in results(config, machine, make_step):
        status = 1 if wrong else status
        say(f"WRONG  {name}: {wrong}" if wrong else f"ok     {name}")
    return status


def results(config: TrainConfig, machine: Machine, make_step: MakeStep) -> Iterator[Result]:
    """Yield what must hold, and what is wrong with it or None."""
    twin = make_twin(model_shape(config, VOCAB_SIZE)).to(machine.device)
    length = min(config.block_size, 128)
    ids = sample_ids(ROWS * length)

    def new_step(micro_batches: int = 1, recompute: str = "none", compiled: bool = False) -> Any:
        shape: Any = {"batch_size": ROWS // micro_batches, "block_size": length}
        settings = replace(config, gradient_accumulation_steps=micro_batches, **shape)
        step = make_step(copy.deepcopy(twin).train(), settings, machine)
        step.model.set_recompute(recompute)
        if compiled:
            compile_model(step.model)
        step.x.copy_(ids.view_as(step.x))
        step.y.copy_(ids.roll(-1).view_as(step.y))
        step.set_divisor()
        return step

    def same(where: str, **how: Any) -> str | None:
        return compare(gradients(new_step(**how)), gradients(new_step()), where)

    attempts: dict[str, Callable[[], str | None]] = {
        "a new model has all its values": lambda: drawing(twin.config),
        "saved and loaded, the model is the same": lambda: saving(copy.deepcopy(twin).cpu()),
        "with the cache as without, past the context's end, too": lambda: decoding(twin),
        "packed examples as single ones": lambda: packing(twin, length),
        "the loss is the cross-entropy of the logits": lambda: losing(copy.deepcopy(twin), length),
        "recompute=pointwise as none": lambda: same("Block.layer", recompute="pointwise"),
        "recompute=block as none": lambda: same("Block.layer", recompute="block"),
        "two micro-batches as one": lambda: same("loss / divisor", micro_batches=2),
        "compiled as not": lambda: same("model.py and gpt12/loss.py", compiled=True),
        "an update moves every parameter, a skipped one none": lambda: updating(new_step()),
    }
    for name, attempt in attempts.items():
        if machine.compiled or name != "compiled as not":
            try:
                yield name, attempt()
            except Exception as error:  # a changed model may raise anything
                yield name, one_line(error)


def drawing(config: GPTConfig) -> str | None:
    """Draw a new model, which raises UserError if something is forgotten."""
    new_model(config)
    return None


@torch.no_grad()
def saving(model: GPT) -> str | None:
    """Save a model that is on the CPU, load it, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder))
        loaded = from_pretrained(folder).eval()
    idx = sample_ids(8)[:, : model.config.block_size]
    found, expected = (m.state_dict() | {"logits": m(idx)[0]} for m in (loaded, model))
    return compare(found, expected, "what is no parameter and no buffer, or gpt12/weights.py")


@torch.no_grad()
def decoding(model: GPT) -> str | None:
    """Compare reading token by token with one pass, past the context's end, too."""
    limit = model.config.block_size
    idx = sample_ids(limit).to(model.lm_head.weight.device)
    cache = KVCache(1, limit, idx.device)
    parts = [model.transformer(part, cache) for part in idx.split(max(1, limit - 1), dim=1)]
    rest = idx[:, limit // 2 :]  # with which a text goes on after the context's end
    refill(model, cache, 0, rest[0, :-1].tolist())
    parts.append(model.transformer(rest[:, -1:], cache))
    found = {"logits": model.logits(torch.cat(parts, dim=1))}
    expected = {"logits": torch.cat((model(idx)[0], model(rest)[0][:, -1:]), dim=1)}
    return compare(found, expected, "what attention stores in the cache, or Transformer.sees")


@torch.no_grad()
def packing(model: GPT, length: int) -> str | None:
    """Compare two examples in one row with each in a row of its own."""
    idx = sample_ids(length).to(model.lm_head.weight.device)
    border = length // 3
    starts = torch.where(torch.arange(length, device=idx.device) < border, 0, border)[None]
    packed = model(idx, example_starts=starts)[0]
    single = torch.cat([model(idx[:, :border])[0], model(idx[:, border:])[0]], dim=1)
    return compare({"logits": packed}, {"logits": single}, "positions and Transformer.sees")


@torch.no_grad()
def losing(model: GPT, length: int) -> str | None:
    """Compare the loss with the cross-entropy of logits so large that a cap on them shows."""
    model.lm_head.weight *= 50
    idx = sample_ids(length).to(model.lm_head.weight.device)
    expected = F.cross_entropy(model(idx)[0][0], idx.roll(-1)[0])
    found = model(idx, idx.roll(-1))[1]
    return compare({"loss": found}, {"loss": expected}, "GPT.logits and gpt12/loss.py")


def gradients(step: Any) -> dict[str, Tensor]:
    """Return the gradients of a step, before the update."""
    step.accumulate_gradients()
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


def updating(step: Any) -> str | None:
    """Make an update whose loss is infinite, then a good one."""
    after = dict(step.model.named_parameters())
    before = copy.deepcopy(after)
    step.divisor.zero_()
    step.compute()
    wrong = compare(after, before, "a loss that ignores divisor, or found_inf")
    step(1e-2)
    for name, moved in after.items():
        if torch.equal(moved, before[name]) or not moved.isfinite().all():
            return wrong or f"{name} is not trained; look at what the layers use"
    return wrong


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> str | None:
    """Name a tensor that differs, by how much, and where to look; None if all agree."""
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max().item()
        if not difference <= TOLERANCE * largest:
            return f"{name} differs by {difference:.1g} of {largest:.1g}; look at {where}"
    return None
