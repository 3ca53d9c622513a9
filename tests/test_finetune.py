"""Fine-tuning: from a Hugging Face directory to one, adapters as PEFT reads them, instruction data, larger than fits."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import train
from data import open_dataset
from data.tokenizers import CharTokenizer
from data.windows import TrainWindows
from model import GPT, MASKED

CHARS = "\n abcdefghijklmnopqrstuvwxyz.,?"
QUICK = ["--device=cpu", "--dtype=float32", "--batch_size=4", "--gradient_accumulation_steps=1"]
QUICK += ["--eval_iters=4", "--warmup_iters=2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A random GPT-2 as `transformers` saves it, with a tokenizer beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start")
    config = GPT2Config(
        vocab_size=len(CHARS), n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    CharTokenizer(CHARS).save(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A language of one sentence with changing words: easily learned, and not by heart in a few steps."""
    words = ["ada", "bob", "cleo", "dan", "eve"]
    generator = np.random.default_rng(0)
    lines = [f"{words[a]} asks {words[b]} again." for a, b in generator.integers(0, 5, (400, 2))]
    file = tmp_path_factory.mktemp("text") / "mine.txt"
    file.write_text("\n".join(lines), "utf-8")
    return file


def finetune(start, text, out_dir, *options) -> list[dict]:
    argv = [
        *QUICK,
        f"--init_from={start}",
        f"--dataset={text}",
        f"--out_dir={out_dir}",
        "--max_iters=60",
        "--eval_interval=20",
    ]
    assert train.main([*argv, "--learning_rate=3e-3", *options]) == 0
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "val_loss" in row]


def test_the_finished_directory_opens_in_transformers_with_equal_logits(start, text, tmp_path):
    evaluations = finetune(start, text, tmp_path)
    assert evaluations[-1]["val_loss"] < 0.6 * evaluations[0]["val_loss"]
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "best").eval()
    ours = GPT.from_pretrained(tmp_path / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "best")
    x = torch.tensor([tokenizer("ada asks bob")["input_ids"]])
    assert tokenizer.decode(x[0]) == "ada asks bob"
    assert (theirs(x).logits - ours(x)[0]).abs().max() < 1e-5 * theirs(x).logits.abs().max()


def test_lora_learns_is_merged_in_best_and_opens_in_peft(start, text, tmp_path):
    evaluations = finetune(start, text, tmp_path, "--lora_rank=4", "--lora_targets=c_attn,c_fc", "--learning_rate=1e-2")
    assert evaluations[-1]["val_loss"] < 0.93 * evaluations[0]["val_loss"]  # a random base cannot be bent much
    x = torch.randint(0, len(CHARS), (2, 20))
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "best").eval()(x).logits
    base = GPT2LMHeadModel.from_pretrained(start).eval()
    plain = base(x).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "best/adapter").eval()(x).logits
    assert (adapted - merged).abs().max() < 1e-5 * merged.abs().max()
    assert (plain - merged).abs().max() > 0.01 * merged.abs().max()


def test_a_lora_run_resumes_bit_for_bit(start, text, tmp_path, capsys):
    fixed = ["--lora_rank=4", "--lora_dropout=0.1", "--decay_lr=False"]
    finetune(start, text, tmp_path / "whole", *fixed)
    finetune(start, text, tmp_path / "parts", *fixed, "--max_iters=23")
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'parts'}", "--max_iters=60"]) == 0
    a, b = (GPT.from_pretrained(tmp_path / name / "last").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    capsys.readouterr()
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'whole'}", "--eval_only"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    final = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    assert f"val loss {final:.4f}" in capsys.readouterr().out  # the adapted model, not its base


def test_only_adapters_are_trained(start):
    model = GPT.from_pretrained(start)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.add_lora(2, 4.0)
    x = torch.randint(0, len(CHARS), (2, 20))
    first = model(x)[0]
    with torch.no_grad():
        assert torch.equal(first, GPT.from_pretrained(start)(x)[0])  # B is zero: nothing has changed yet
    model(x, x)[1].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("instructions") / "ask.jsonl"
    rows = [{"prompt": f"what is {a}?", "completion": f" {a} is {a}."} for a in "abcdefghijklmnopqrstuvwxyz"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_instruction_data_train_answers_alone(start, instructions, tmp_path):
    evaluations = finetune(start, instructions, tmp_path, "--max_iters=120")
    assert evaluations[-1]["val_loss"] < 0.5 * evaluations[0]["val_loss"]


def test_targets_of_prompts_change_no_bit_of_any_gradient(start, instructions):
    """In a row of instruction data the model never hears what a prompt's next token is, wherever that stands."""
    dataset = open_dataset(str(instructions), tokenizer=CharTokenizer(CHARS), block_size=32)
    windows = TrainWindows(dataset.train, 32, seed=0)
    gradients = []
    for shift in (0, 1):
        x, y = (torch.from_numpy(part) for part in windows.batch(0, 4))
        raw = torch.cat([x[:, 1:], x[:, :1]], 1)  # the next token of every position, trained or not
        asked = y == MASKED
        targets = torch.where(asked, (raw + shift) % len(CHARS), y).masked_fill(asked, MASKED)
        trained = int((~asked).sum())
        assert 0 < trained < asked.numel()
        model = GPT.from_pretrained(start)
        model(x, targets, rows=trained)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # The mask is what does it: with the prompts' targets unmasked the gradients do differ.
    model = GPT.from_pretrained(start)
    model(x, raw)[1].backward()
    assert not torch.equal(next(model.parameters()).grad, gradients[0][0])


def test_batch_size_by_measuring_keeps_the_step(start, text, tmp_path, capsys):
    finetune(start, text, tmp_path, "--batch_size=auto", "--gradient_accumulation_steps=6", "--max_iters=4")
    chosen = json.loads((tmp_path / "run.json").read_text())["config"]
    assert chosen["batch_size"] * chosen["gradient_accumulation_steps"] == 6
    assert "batch_size:" in capsys.readouterr().out
    assert json.loads((tmp_path / "last/trainer.json").read_text())["position"] == 4 * 6
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=5"]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["config"]["batch_size"] == chosen["batch_size"]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is optional and not installed")
def test_8_bit_moments_resume_bit_for_bit(start, text, tmp_path):
    fixed = ["--optimizer=adamw8bit", "--dtype=bfloat16", "--decay_lr=False"]
    finetune(start, text, tmp_path / "whole", *fixed, "--max_iters=6")
    finetune(start, text, tmp_path / "parts", *fixed, "--max_iters=3")
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'parts'}", "--max_iters=6"]) == 0
    a, b = (GPT.from_pretrained(tmp_path / name / "last").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
