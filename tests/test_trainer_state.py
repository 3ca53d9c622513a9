"""gpt12/trainer_state.py: what is saved beside the weights comes back bit for bit."""

import importlib.util
import json
import shutil

import pytest
import torch

from gpt12 import checkpoint
from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.trainer_state import (
    load_trainer_state,
    save_trainer_state,
    state_bytes,
    trainer_tensors,
)
from tests.helpers import (
    CPU,
    fill,
    losses,
    random_rows,
    resume,
    run,
    same_tensors,
    same_weights,
    small_gpt,
    small_step,
    trainer,
    weights,
)

pytestmark = pytest.mark.usefixtures("no_picture")
HALF = Machine(CPU.device, torch.float16, compiled=False)
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is optional and not installed"
)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_saved_state_continues_as_the_unbroken_step_does(tmp_path, optimizer):
    batches = [random_rows(seed=seed) for seed in range(4)]
    whole = small_step(optimizer=optimizer)
    first = small_step(optimizer=optimizer)
    for x, y in batches:
        whole(1e-2, fill(whole, x, y))
    for x, y in batches[:2]:
        first(1e-2, fill(first, x, y))
    save_trainer_state(tmp_path, first.trainer_state())
    second = small_step(optimizer=optimizer)
    second.model.load_state_dict(first.model.state_dict())
    load_trainer_state(tmp_path, second.trainer_state())
    for x, y in batches[2:]:
        second(1e-2, fill(second, x, y))
    assert same_weights(second.model, [p.detach() for p in whole.model.parameters()])


def test_the_names_of_the_tensors_are_those_that_the_format_says(tmp_path):
    step = small_step()
    step(1e-2, fill(step, *random_rows()))
    names = set(trainer_tensors(step.trainer_state()))
    expected = {"rng.cpu"}
    for name, _ in step.model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            expected.add(f"optimizer.{name}.{key}")
    assert names == expected
    save_trainer_state(tmp_path, step.trainer_state())
    size = (tmp_path / "trainer.safetensors").stat().st_size
    assert state_bytes(step.trainer_state()) == pytest.approx(size, rel=0.4)  # a header, and


def test_the_random_numbers_of_rank_0_are_restored_and_those_of_other_ranks_are_not(tmp_path):
    step = small_step()
    torch.manual_seed(5)
    save_trainer_state(tmp_path, step.trainer_state())
    expected = torch.rand(3)
    for rank in (0, 1):
        machine = Machine(CPU.device, CPU.dtype, compiled=False, rank=rank)
        torch.manual_seed(6)
        load_trainer_state(tmp_path, small_step(machine).trainer_state())
        assert torch.equal(torch.rand(3), expected) == (rank == 0)


def test_resuming_restores_the_loss_scale(tmp_path):
    x, y = random_rows()
    first = small_step(HALF)
    second = small_step(HALF)
    first.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    first(1e-2, fill(first, x, y))
    save_trainer_state(tmp_path, first.trainer_state())
    load_trainer_state(tmp_path, second.trainer_state())
    assert second.scaler.state_dict() == first.scaler.state_dict()
    second(1e-2, fill(second, x, y))
    state = second.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (256.0, 2)


def test_a_smaller_context_crops_the_moments_of_the_positions_too(finished, tmp_path):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    for steps in (6, 8):
        assert resume(out_dir, f"--max_iters={steps}", "--block_size=8") == 0
    moments = weights(out_dir, file="trainer")
    assert moments["optimizer.transformer.wpe.weight.exp_avg"].shape == (8, 16)


def strip_format(out_dir) -> None:
    """Make last/trainer.json one of the old program: without a format number."""
    file = out_dir / "last" / "trainer.json"
    content = json.loads(file.read_text())
    assert content.pop("format") == 1
    del content["checksum"]
    content["checksum"] = checkpoint._checksum(content)
    file.write_text(json.dumps(content, indent=2) + "\n")


@pytest.mark.parametrize("how", ["adamw", "muon", "lora"])
def test_a_checkpoint_without_a_format_number_resumes_bit_for_bit(dataset, finished, tmp_path, how):
    fixed = ["--decay_lr=False", "--eval_interval=3", "--dropout=0.1"]
    if how == "lora":
        fixed += [f"--init_from={finished}", "--lora_rank=2", "--lora_dropout=0.1"]
    else:
        fixed += [f"--optimizer={how}"]
    assert run(dataset, tmp_path / "whole", *fixed, "--max_iters=6") == 0
    assert run(dataset, tmp_path / "parts", *fixed, "--max_iters=3") == 0
    strip_format(tmp_path / "parts")
    assert resume(tmp_path / "parts", "--max_iters=6") == 0
    assert trainer(tmp_path / "parts")["format"] == 1  # written by this program now
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for file in ("model", "trainer"):
        whole = weights(tmp_path / "whole", file=file)
        assert same_tensors(weights(tmp_path / "parts", file=file), whole)


@needs_torchao
def test_8_bit_moments_resume_bit_for_bit(dataset, tmp_path):
    fixed = ["--optimizer=adamw8bit", "--dtype=bfloat16", "--decay_lr=False"]
    assert run(dataset, tmp_path / "whole", *fixed, "--max_iters=6") == 0
    assert run(dataset, tmp_path / "parts", *fixed, "--max_iters=3") == 0
    assert resume(tmp_path / "parts", "--max_iters=6") == 0
    assert same_tensors(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@needs_torchao
def test_8_bit_moments_cannot_be_resumed_with_a_smaller_context(dataset, tmp_path):
    fixed = ["--optimizer=adamw8bit", "--dtype=bfloat16", "--decay_lr=False"]
    assert run(dataset, tmp_path, *fixed, "--max_iters=2") == 0
    with pytest.raises(UserError, match=r"block_size=8, but the run in .* has 16: leave"):
        resume(tmp_path, "--max_iters=4", "--block_size=8")
    assert resume(tmp_path, "--max_iters=4", "--block_size=16") == 0


@needs_torchao
def test_a_skipped_update_of_8_bit_moments_leaves_the_weights():
    step = small_step(model=small_gpt().bfloat16(), optimizer="adamw8bit")
    step(1e-2, fill(step, *random_rows()))
    before = [p.clone() for p in step.model.parameters()]
    weight = step.model.transformer.ln_f.weight
    hook = weight.register_hook(lambda gradient: gradient * torch.nan)
    step(1e-2)
    assert step.bad.item() == 1
    assert same_weights(step.model, before)
    hook.remove()
    step(1e-2)
    assert not same_weights(step.model, before)
