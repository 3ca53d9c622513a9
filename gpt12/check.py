"""Try a model that somebody has changed, in seconds, before it is trained for hours.

    python train.py PRESET --check

Its small twin (gpt12/twin.py) runs in float32, in all the ways that must give the same numbers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from gpt12.device import Machine, compile_model
from gpt12.errors import UserError, one_line, say
from gpt12.generate import KVCache, refill
from gpt12.settings import TrainConfig, model_shape
from gpt12.twin import TOLERANCE, VOCAB_SIZE, make_twin, sample_ids
from gpt12.weights import from_pretrained, new_model, save_pretrained
from model import GPT, GPTConfig


def check_start(shape: GPTConfig) -> None:
    """Try what costs least, at the start of every run. Raises UserError if it fails."""
    twin = make_twin(shape)
    try:
        saving(twin)
        decoding(twin)
    except UserError as error:
        raise UserError(f"{error}. --check tries more") from None


def check_model(config: TrainConfig, machine: Machine, train_step: Callable[..., Any]) -> int:
    """Try everything with train.py's TrainStep, say what holds, and return the exit status."""
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = replace(machine, dtype=torch.float32, world=1)
    twin = make_twin(model_shape(config, VOCAB_SIZE)).to(machine.device)
    idx = sample_ids(min(config.block_size, 128)).to(machine.device)

    def new_step(micro_batches: int = 1, recompute: str = "none", compiled: bool = False) -> Any:
        shape: Any = {"batch_size": 4 // micro_batches, "block_size": idx.size(1)}
        settings = replace(config, gradient_accumulation_steps=micro_batches, **shape)
        step = train_step(copy.deepcopy(twin).train(), settings, machine)
        step.model.set_recompute(recompute)
        if compiled:
            compile_model(step.model)
        ids = sample_ids(step.x.numel())
        step.batch.copy_(torch.stack((ids, ids.roll(-1))).view_as(step.batch))
        step.set_divisor()
        return step

    def gradients(**how: Any) -> dict[str, torch.Tensor]:
        step = new_step(**how)
        step.accumulate_gradients()
        return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}

    def training(where: str, **how: Any) -> Callable[[], object]:
        return lambda: compare(gradients(**how), gradients(), where)

    attempts: dict[str, Callable[[], object]] = {
        "a new model has all its values": lambda: new_model(twin.config),
        "saved and loaded, the model is the same": lambda: saving(copy.deepcopy(twin).cpu()),
        "with the cache as without, past the context's end, too": lambda: decoding(twin),
        "packed examples as single ones": lambda: packing(twin, idx),
        "the loss is the cross-entropy of the logits": lambda: losing(copy.deepcopy(twin), idx),
        "recompute=pointwise as none": training("Block.layer", recompute="pointwise"),
        "recompute=block as none": training("Block.layer", recompute="block"),
        "two micro-batches as one": training("loss / divisor", micro_batches=2),
        "an update moves every parameter, a skipped one none": lambda: updating(new_step()),
    }
    if machine.compiled:
        attempts["compiled as not"] = training("model.py and gpt12/loss.py", compiled=True)
    status = 0
    for name, attempt in attempts.items():
        try:
            attempt()
            say(f"ok     {name}")
        except Exception as error:  # a changed model may raise anything
            status = 1
            say(f"WRONG  {name}: {error if isinstance(error, UserError) else one_line(error)}")
    return status


def saving(model: GPT) -> None:  # on the CPU
    idx = sample_ids(8)[:, : model.config.block_size]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder))
        loaded = from_pretrained(folder).eval().requires_grad_(False)
    found, expected = (m.state_dict() | {"logits": m(idx)[0]} for m in (loaded, model))
    compare(found, expected, "what is no parameter and no buffer, or gpt12/weights.py")
    if found["logits"].requires_grad:  # its parameters do not
        raise UserError("something gets gradients and is no parameter; look at plain lists")


@torch.no_grad()
def decoding(model: GPT) -> None:
    limit = model.config.block_size
    idx = sample_ids(limit).to(model.lm_head.weight.device)
    cache = KVCache(1, limit, idx.device)
    parts = [model.transformer(part, cache) for part in idx.split(max(1, limit - 1), dim=1)]
    rest = idx[:, limit // 2 :]  # with which a text goes on after the context's end
    refill(model, cache, 0, rest[0, :-1].tolist())
    parts.append(model.transformer(rest[:, -1:], cache))
    found = {"logits": model.logits(torch.cat(parts, dim=1))}
    expected = {"logits": torch.cat((model(idx)[0], model(rest)[0][:, -1:]), dim=1)}
    compare(found, expected, "what attention stores in the cache, or Transformer.sees")


def packing(model: GPT, idx: torch.Tensor) -> None:
    length = max(1, idx.size(1) // 3)  # of an example
    starts = torch.arange(idx.size(1), device=idx.device)[None] // length * length
    found = {"logits": model(idx, example_starts=starts)[0]}
    single = [model(example)[0] for example in idx.split(length, dim=1)]
    compare(found, {"logits": torch.cat(single, dim=1)}, "positions and Transformer.sees")


@torch.no_grad()
def losing(model: GPT, idx: torch.Tensor) -> None:
    model.lm_head.weight *= 50  # makes the logits so large that a cap would change them
    found = {"loss": model(idx, idx.roll(-1), divisor=1.0)[1]}  # as evaluation calls it
    expected = {"loss": cross_entropy(model(idx)[0][0], idx[0].roll(-1), reduction="sum")}
    compare(found, expected, "GPT.forward, GPT.logits and gpt12/loss.py")


def updating(step: Any) -> None:
    after = dict(step.model.named_parameters())
    before = copy.deepcopy(after)
    step.divisor.zero_()  # the loss is infinite, and the update is skipped
    step.compute()
    compare(after, before, "a loss that ignores divisor, or found_inf")
    step(1e-2)
    for name, moved in after.items():
        if torch.equal(moved, before[name]) or not moved.isfinite().all():
            raise UserError(f"{name} is not trained; look at what the layers use")


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    """Raise UserError if a tensor differs: its name, by how much, and where to look."""
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max().item()
        if not difference <= TOLERANCE * largest:
            raise UserError(f"{name} differs by {difference:.1g} of {largest:.1g}; look at {where}")
