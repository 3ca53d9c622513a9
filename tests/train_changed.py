"""Train, resume and sample with the code of the working directory, at tiny size.

    python -m tests.train_changed FOLDER [--key=value ...]
    python -m tests.train_changed FOLDER --device=cuda [--key=value ...]     # compiled and recorded

tests/test_changes.py runs this in a copy of the tree whose code was changed. Wherever the code does
not behave as it should, an assertion fails.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

import gpt12.log
import train
from gpt12.generate import generate
from gpt12.optimizer import OPTIMIZERS
from gpt12.weights import from_pretrained
from tests.helpers import (
    TINY,
    built,
    check_resuming,
    losses,
    make_dataset,
    run,
    trainer,
)
from tests.texts import recomputed
from train import Trainer


def train_and_resume(options: list[str]) -> None:
    """A resumed run is the unbroken one, bit for bit, and learns."""
    options = [*options, "--bias=True"]
    before, after = check_resuming(*options, steps=12)
    val_loss = losses("whole", "val_loss")
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), f"{name} is not trained"
    assert val_loss[12] < val_loss[0]
    for how in ("pointwise", "block"):
        run(f"--out_dir={how}", *options, "--decay_lr=False", f"--recompute={how}", "--max_iters=3")
        for step, loss in losses(how).items():
            assert loss == pytest.approx(losses("whole")[step], rel=1e-5)


def train_adapters(options: list[str]) -> None:
    """Adapters are trained, and the saved model is the one that was measured."""
    lora = ["--init_from=whole/last", "--lora_rank=2", "--eval_iters=0", "--learning_rate=0.01"]
    run("--out_dir=lora", *options, *lora, "--max_iters=4")
    run("--out_dir=merged", "--init_from=lora/best", "--max_iters=1", "--eval_iters=0")
    best = trainer("lora", "best")["best_val_loss"]
    assert losses("merged", "val_loss")[0] == pytest.approx(best, rel=1e-5)


def sample() -> None:
    """Text written with the cache is that written without, past the context's end, too."""
    model = from_pretrained(Path("whole/last")).eval()
    with torch.no_grad():  # a text of many different tokens
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    prompts = [[1, 5, 3], [2], list(range(12))]
    written = generate(model, prompts, max_new_tokens=40, temperature=0)
    for prompt, text in zip(prompts, written):
        assert text == recomputed(model, prompt, 40, decided=-1.0)
    assert len({token for text in written for token in text}) > 3


def train_on_a_gpu(options: list[str]) -> None:
    """Compiled and recorded as a CUDA graph, ten steps have the losses of the plain path."""
    options = [*options, "--dtype=bfloat16", "--max_iters=10"]
    for fast in (False, True):
        built_run = built(f"--out_dir=fast-{fast}", *options, f"--compile={fast}")
        loop = Trainer(built_run, cuda_graph=fast)
        assert loop.train() == 0
        recordable = OPTIMIZERS[built_run.config.optimizer].recordable
        assert (loop.train_step.graph is not None) == (fast and recordable)
    for step, loss in losses("fast-True").items():
        assert loss == pytest.approx(losses("fast-False")[step], rel=0.02)


def main() -> None:
    """Run all of it."""
    gpt12.log.draw_losses = lambda *arguments: None  # which takes as long as a tiny run
    os.chdir(sys.argv[1])
    make_dataset(Path("letters"))
    options = sys.argv[2:]
    torch.manual_seed(0)
    assert train.main(["--check", *TINY, "--bias=True", *options]) == 0
    if "--device=cuda" in options:
        train_on_a_gpu(options)
        return
    train_and_resume(options)
    train_adapters(options)
    sample()


if __name__ == "__main__":
    main()
