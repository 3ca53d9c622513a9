"""Fine-tuning from end to end: Hugging Face folders, LoRA, instruction data, a user's mistakes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import sample
import train
from data.tokenizers import CharTokenizer
from gpt12.errors import run_main
from gpt12.generate import generate
from gpt12.run import load_start, read_request
from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import (
    OUT,
    losses,
    read_json,
    refused,
    resume,
    run,
    same_tensors,
    write,
)
from tests.test_tokenizers import german

pytestmark = pytest.mark.usefixtures("own_cache", "here")
BEST = OUT / "best"
CHARS = "\n abcdefghijklmnopqrstuvwxyz.,?"
QUICK = ["--device=cpu", "--dtype=float32", "--batch_size=4", "--gradient_accumulation_steps=1"]
QUICK += ["--eval_iters=4", "--warmup_iters=2"]


def save_their_gpt2(folder: Path, vocab_size: int) -> Path:
    """Save a random GPT-2 as `transformers` does."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A random GPT-2 with a tokenizer beside it."""
    folder = save_their_gpt2(tmp_path_factory.mktemp("start"), len(CHARS))
    CharTokenizer(CHARS).save(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A language of one sentence with changing words: easy to learn, but not by heart."""
    words = ["ada", "bob", "cleo", "dan", "eve"]
    generator = np.random.default_rng(0)
    lines = [f"{words[a]} asks {words[b]} again." for a, b in generator.integers(0, 5, (400, 2))]
    return Path(write(tmp_path_factory.mktemp("text") / "mine.txt", "\n".join(lines)))


def finetune(start, text, *options) -> None:
    """Fine-tune a model."""
    argv = [*QUICK, "--max_iters=60", "--eval_interval=20", "--learning_rate=3e-3"]
    assert train.main([*argv, f"--init_from={start}", f"--dataset={text}", *options]) == 0


def test_the_finished_directory_opens_in_transformers_with_equal_logits(start, text):
    finetune(start, text)
    evaluations = list(losses(key="val_loss").values())
    assert evaluations[-1] < 0.6 * evaluations[0]
    theirs = GPT2LMHeadModel.from_pretrained(BEST).eval()
    ours = from_pretrained(BEST).eval()
    tokenizer = AutoTokenizer.from_pretrained(BEST)
    x = torch.tensor([tokenizer("ada asks bob")["input_ids"]])
    assert tokenizer.decode(x[0]) == "ada asks bob"
    assert (theirs(x).logits - ours(x)[0]).abs().max() < 1e-5 * theirs(x).logits.abs().max()
    cut = tokenizer("ada asks bob " * 500, truncation=True)["input_ids"]
    assert len(cut) == theirs.config.n_positions  # more would have no position
    complete = pipeline("text-generation", model=str(BEST))
    [said] = complete("ada asks", max_new_tokens=20, do_sample=False)
    prompt = tokenizer("ada asks")["input_ids"]
    [ids] = generate(ours, [prompt], max_new_tokens=20, temperature=0)
    assert said["generated_text"] == "ada asks" + tokenizer.decode(ids)
    assert set(said["generated_text"].split()) & {"ada", "bob", "cleo", "dan", "eve", "again."}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A random GPT-2 without a tokenizer."""
    return save_their_gpt2(tmp_path_factory.mktemp("bare"), 300)


@pytest.mark.parametrize("tokenizer", ["char", "bytes"])
def test_a_model_without_a_tokenizer_gets_that_of_the_data(
    bare, text, capsys, monkeypatch, tokenizer
):
    """Its ids past the tokenizer's are shown as characters that are none."""
    finetune(bare, text, f"--tokenizer={tokenizer}", "--max_iters=20")
    said = capsys.readouterr().out
    known = {"char": len(set(text.read_text())), "bytes": 257}[tokenizer]
    taken = f"Its first {known} of 300 ids are taken to be those of {text} ({tokenizer})"
    assert f"{bare} has no tokenizer. {taken}" in said
    assert "\ufffd" in said
    argv = ["--start=ada", "--num_samples=2", "--device=cpu", "--temperature=99"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    sample.main()
    assert "\ufffd" in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(BEST)) == known
    end = read_json(BEST / "config.json")["eos_token_id"]
    assert end == {"char": None, "bytes": 256}[tokenizer]  # where transformers' generate() stops
    resume("--max_iters=21")
    assert "has no tokenizer" not in capsys.readouterr().out


def test_the_context_is_the_models_unless_another_is_asked_for(bare):
    """And dropout is the configuration's, whatever the model's file says."""
    for options, block_size in ([], 32), (["--block_size=16"], 16):
        request = read_request([f"--init_from={bare}", "--dropout=0.25", *options])
        model, _ = load_start(request, None)
        assert model.config.block_size == block_size
        assert (model.config.dropout, model.transformer.h[0].attn.dropout) == (0.25, 0.25)


@pytest.mark.usefixtures("own_folder")
def test_a_key_that_the_model_overrules_is_told(bare, capsys):
    run(f"--init_from={bare}", "--n_layer=7", "--n_head=2", "--max_iters=1")
    said = capsys.readouterr().out
    assert f"n_layer=7 does not count: the model in {bare} has 2\n" in said
    assert said.count("does not count") == 2  # n_embd, too, but not n_head, which is equal
    resume("--max_iters=2")
    assert "does not count" not in capsys.readouterr().out


def test_lora_learns_and_leaves_its_adapters_beside_the_merged_model(start, text):
    finetune(start, text, "--lora_rank=4", "--learning_rate=1e-2")
    evaluations = list(losses(key="val_loss").values())
    # A random base cannot be bent much.
    assert evaluations[-1] < 0.93 * evaluations[0]
    assert GPT2LMHeadModel.from_pretrained(BEST)
    adapter = read_json(BEST / "adapter/adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 8)  # by default twice the rank


def test_a_lora_run_resumes_bit_for_bit(start, text, capsys):
    fixed = ["--lora_rank=4", "--dropout=0.1", "--decay_lr=False"]
    finetune(start, text, *fixed)
    finetune(start, text, *fixed, "--max_iters=23", "--out_dir=parts")
    resume("--max_iters=60", "--out_dir=parts")
    a, b = (from_pretrained(Path(name, "last")).state_dict() for name in ("out", "parts"))
    assert same_tensors(a, b)
    capsys.readouterr()
    resume("--eval_only")
    final = losses(key="val_loss")[60]
    assert f"val loss {final:.4f}" in capsys.readouterr().out  # the adapted model, not its base


def test_adapters_whose_model_has_changed_are_not_resumed(start, text):
    """The run that they began with has begun anew, in another shape even."""
    finetune(start, text, "--out_dir=base", "--max_iters=2")
    finetune("base", text, "--lora_rank=4", "--max_iters=2", "--block_size=16")
    resume("--max_iters=3", "--block_size=8")
    shape = ["--tokenizer=char", "--n_layer=1", "--n_embd=12", "--block_size=32"]
    finetune("scratch", text, "--out_dir=base", "--max_iters=2", *shape)
    changed = "base/.* is not the base model of the adapters in out/last, or its"
    for options in ([], ["--eval_only"]):
        refused(changed, resume, "--max_iters=4", *options)
    assert train.main([f"--init_from={BEST}", f"--dataset={text}", "--eval_only"]) == 0


def test_a_model_learns_the_answers_of_instruction_data(start, capsys):
    rows = [{"prompt": f"what is {a}?", "completion": f" {a} is {a}."} for a in CHARS[2:28]]
    finetune(start, write("ask.jsonl", rows), "--max_iters=120")
    evaluations = list(losses(key="val_loss").values())
    # Not the last: 22 epochs of 23 short examples are learned by heart.
    assert min(evaluations) < 0.5 * evaluations[0]
    assert capsys.readouterr().out.endswith("--out_dir=out --interactive\n")


# A user's mistakes: status 2, a message that says what and where, no traceback, nothing left


def turned_down(capsys, start, text, *options) -> str:
    """The message with which `python train.py` turns a fine-tuning down."""
    argv = [*QUICK, "--max_iters=1", f"--init_from={start}", f"--dataset={text}", *options]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: train.main(argv))
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.out + captured.err
    assert not OUT.exists()
    return captured.err


def test_the_tokenizer_of_a_model_goes_back_as_it_came(text):
    """A byte-pair encoding of its own, with an added token, and two tokens that end a text."""
    save_their_gpt2(Path("model"), 401)
    theirs = PreTrainedTokenizerFast(tokenizer_object=german()._tokenizer, eos_token="</s>")
    theirs.save_pretrained("model")
    write("model/generation_config.json", json.dumps({"eos_token_id": [400, 3]}))
    finetune("model", text, "--max_iters=1")
    for name in ("tokenizer.json", "generation_config.json"):
        assert Path("out/last", name).read_bytes() == Path("model", name).read_bytes()


@pytest.mark.parametrize(
    ("content", "of_the_template"), [("who?", True), ("ada asks \u00d8rsted.", False)]
)
def test_a_chat_template_that_the_models_characters_cannot_write_is_refused(
    capsys, content, of_the_template
):
    chars = CHARS + ("" if of_the_template else "#:AU")
    save_pretrained(GPT(GPTConfig(32, len(chars), 1, 2, 8)), Path("model"))
    CharTokenizer(chars).save(Path("model"))
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "bob."}]
    message = turned_down(capsys, "model", write("chat.jsonl", [{"messages": chat}] * 40))
    assert ("'#' (U+0023)" if of_the_template else "'\u00d8'") in message
    for advice in ("'### Assistant:'", "prompt and completion", "--tokenizer=bytes"):
        assert advice in message


def test_a_tokenizer_is_refused_for_a_model_that_brings_its_own(start, capsys):
    text = write("a.txt", "only some of the characters. " * 40)
    message = turned_down(capsys, start, text, "--tokenizer=char")
    for words in ("made with another tokenizer", "without --tokenizer="):
        assert words in message


def test_a_file_of_weights_is_no_model_to_start_from(start, text, capsys):
    file = start / "model.safetensors"
    assert f"{file} is no Hugging Face GPT-2 folder" in turned_down(capsys, file, text)
