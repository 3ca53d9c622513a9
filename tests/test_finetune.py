"""Fine-tuning from end to end: Hugging Face folders, LoRA, instruction data, a user's mistakes."""

import http.server
import io
import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
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
from gpt12.errors import UserError, run_main
from gpt12.generate import generate
from gpt12.run import load_start, read_request
from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import read_rows, resume, run

pytestmark = pytest.mark.usefixtures("no_picture", "own_cache")
CHARS = "\n abcdefghijklmnopqrstuvwxyz.,?"
QUICK = ["--device=cpu", "--dtype=float32", "--batch_size=4", "--gradient_accumulation_steps=1"]
QUICK += ["--eval_iters=4", "--warmup_iters=2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A random GPT-2 as `transformers` saves it, with a tokenizer beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start")
    config = GPT2Config(
        vocab_size=len(CHARS),
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    CharTokenizer(CHARS).save(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A language of one sentence with changing words: easy to learn, but not by heart."""
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
    return [row for row in read_rows(out_dir) if "val_loss" in row]


def test_the_finished_directory_opens_in_transformers_with_equal_logits(start, text, tmp_path):
    evaluations = finetune(start, text, tmp_path)
    assert evaluations[-1]["val_loss"] < 0.6 * evaluations[0]["val_loss"]
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "best").eval()
    ours = from_pretrained(tmp_path / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "best")
    x = torch.tensor([tokenizer("ada asks bob")["input_ids"]])
    assert tokenizer.decode(x[0]) == "ada asks bob"
    assert (theirs(x).logits - ours(x)[0]).abs().max() < 1e-5 * theirs(x).logits.abs().max()
    cut = tokenizer("ada asks bob " * 500, truncation=True)["input_ids"]
    assert len(cut) == theirs.config.n_positions  # more would have no position
    write = pipeline("text-generation", model=str(tmp_path / "best"))
    (said,) = write("ada asks", max_new_tokens=20, do_sample=False)
    prompt = tokenizer("ada asks")["input_ids"]
    [ids] = generate(ours, [prompt], max_new_tokens=20, temperature=0)
    assert said["generated_text"] == "ada asks" + tokenizer.decode(ids)
    assert set(said["generated_text"].split()) & {"ada", "bob", "cleo", "dan", "eve", "again."}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A random GPT-2 as `transformers` saves it, without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    shape = GPT2Config(
        vocab_size=300,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tokenizer", ["char", "bytes"])
def test_a_model_without_a_tokenizer_gets_that_of_the_data(
    bare, text, tmp_path, capsys, monkeypatch, tokenizer
):
    """Its ids past the tokenizer's are shown as characters that are none."""
    finetune(bare, text, tmp_path, f"--tokenizer={tokenizer}", "--max_iters=20")
    said = capsys.readouterr().out
    known = {"char": len(set(text.read_text())), "bytes": 257}[tokenizer]
    taken = f"Its first {known} of 300 ids are taken to be those of {text} ({tokenizer})"
    assert f"{bare} has no tokenizer. {taken}" in said
    assert "\ufffd" in said
    argv = [
        "sample.py",
        f"--out_dir={tmp_path}",
        "--start=ada",
        "--num_samples=2",
        "--device=cpu",
        "--temperature=99",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    sample.main()
    assert "\ufffd" in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "best")) == known
    end = json.loads((tmp_path / "best/config.json").read_text())["eos_token_id"]
    assert end == {"char": None, "bytes": 256}[tokenizer]  # where transformers' generate() stops
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=21"]) == 0
    assert "has no tokenizer" not in capsys.readouterr().out


def test_the_context_is_the_models_unless_another_is_asked_for(bare):
    """And dropout is the configuration's, whatever the model's file says."""
    for options, block_size in ([], 32), (["--block_size=16"], 16):
        request = read_request([f"--init_from={bare}", "--dropout=0.25", *options])
        model, _ = load_start(request, None)
        assert model.config.block_size == block_size
        assert (model.config.dropout, model.transformer.h[0].attn.dropout) == (0.25, 0.25)


def test_a_key_that_the_model_overrules_is_told(bare, dataset, tmp_path, capsys):
    options = [f"--init_from={bare}", "--n_layer=7", "--n_head=2", "--max_iters=1"]
    assert run(dataset, tmp_path / "out", *options) == 0
    said = capsys.readouterr().out
    assert f"n_layer=7 does not count: the model in {bare} has 2\n" in said
    assert said.count("does not count") == 2  # n_embd, too, but not n_head, which is equal
    assert resume(tmp_path / "out", "--max_iters=2") == 0
    assert "does not count" not in capsys.readouterr().out


def test_a_model_with_fewer_ids_than_the_data_is_refused(bare, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(256, 600))))
    options = f"--init_from={bare}", f"--dataset={tmp_path / 'a.txt'}", "--tokenizer=char"
    message = refused(capsys, tmp_path / "out", *options)
    assert "(char, 344 tokens) than the model to start from (300 tokens)" in message
    assert "A model that brings no tokenizer needs one's files beside it" in message


def test_lora_learns_is_merged_in_best_and_opens_in_peft(start, text, tmp_path):
    evaluations = finetune(start, text, tmp_path, "--lora_rank=4", "--learning_rate=1e-2")
    assert (
        evaluations[-1]["val_loss"] < 0.93 * evaluations[0]["val_loss"]
    )  # a random base cannot be bent much
    adapter = json.loads((tmp_path / "best/adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 8)  # by default twice the rank
    x = torch.randint(0, len(CHARS), (2, 20))
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "best").eval()(x).logits
    base = GPT2LMHeadModel.from_pretrained(start).eval()
    plain = base(x).logits
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, tmp_path / "best/adapter").eval()(x).logits
    assert (adapted - merged).abs().max() < 1e-5 * merged.abs().max()
    assert (plain - merged).abs().max() > 0.01 * merged.abs().max()


def test_a_lora_run_resumes_bit_for_bit(start, text, tmp_path, capsys):
    fixed = ["--lora_rank=4", "--dropout=0.1", "--decay_lr=False"]
    finetune(start, text, tmp_path / "whole", *fixed)
    finetune(start, text, tmp_path / "parts", *fixed, "--max_iters=23")
    assert (
        train.main(["--init_from=resume", f"--out_dir={tmp_path / 'parts'}", "--max_iters=60"]) == 0
    )
    a, b = (from_pretrained(tmp_path / name / "last").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    capsys.readouterr()
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'whole'}", "--eval_only"]) == 0
    final = [row["val_loss"] for row in read_rows(tmp_path / "whole") if "val_loss" in row][-1]
    assert f"val loss {final:.4f}" in capsys.readouterr().out  # the adapted model, not its base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_whose_model_has_changed_are_not_resumed(start, text, tmp_path, dtype):
    """The run that they began with has been trained on, or begun anew, in another shape even."""
    base = tmp_path / "base"
    adapted = tmp_path / "adapted"
    finetune(start, text, base, "--max_iters=2")
    finetune(
        base, text, adapted, "--lora_rank=4", f"--dtype={dtype}", "--max_iters=2", "--block_size=16"
    )
    assert (
        train.main(
            ["--init_from=resume", f"--out_dir={adapted}", "--max_iters=3", "--block_size=8"]
        )
        == 0
    )
    resume = ["--init_from=resume", f"--out_dir={adapted}", "--max_iters=4"]
    assert train.main(["--init_from=resume", f"--out_dir={base}", "--max_iters=3"]) == 0
    changed = f"{base}/.* is not the base model of the adapters in {adapted / 'last'}, or its"
    with pytest.raises(UserError, match=changed):
        train.main(resume)
    finetune(
        "scratch",
        text,
        base,
        "--tokenizer=char",
        "--max_iters=2",
        "--n_layer=1",
        "--n_embd=12",
        "--block_size=32",
    )
    for options in ([], ["--eval_only"]):
        with pytest.raises(UserError, match=changed):
            train.main([*resume, *options])
    merged = [f"--init_from={adapted / 'best'}", f"--dataset={text}", "--eval_only"]
    assert train.main(merged) == 0


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("instructions") / "ask.jsonl"
    rows = [
        {"prompt": f"what is {a}?", "completion": f" {a} is {a}."}
        for a in "abcdefghijklmnopqrstuvwxyz"
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_a_model_learns_the_answers_of_instruction_data(start, instructions, tmp_path):
    evaluations = finetune(start, instructions, tmp_path, "--max_iters=120")
    # Not the last: 22 epochs of 23 short examples are learned by heart.
    assert min(row["val_loss"] for row in evaluations) < 0.5 * evaluations[0]["val_loss"]


@pytest.fixture(scope="module")
def short_pairs(tmp_path_factory) -> Path:
    """22 pairs to train on, of which 5 fit into a row of 32 tokens."""
    file = tmp_path_factory.mktemp("pairs") / "short.jsonl"
    pairs = [{"prompt": f"{a}?", "completion": f"{a}{a}."} for a in CHARS[2:28]]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


def test_a_run_on_packed_examples_resumes_bit_for_bit(start, short_pairs, tmp_path):
    fixed = ["--dropout=0.1", "--decay_lr=False", "--batch_size=2"]
    finetune(start, short_pairs, tmp_path / "whole", *fixed, "--max_iters=8")
    finetune(start, short_pairs, tmp_path / "parts", *fixed, "--max_iters=3")
    resume = ["--init_from=resume", f"--out_dir={tmp_path / 'parts'}", "--max_iters=8"]
    assert train.main(resume) == 0
    a, b = (from_pretrained(tmp_path / name / "last").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_warns_of_answers_without_an_end_of_text(start, instructions, text, tmp_path, capsys):
    told = "no end-of-text token, so answers will not end by themselves. Sample with --stop='\\n'."
    finetune(start, instructions, tmp_path / "a", "--max_iters=1")
    assert capsys.readouterr().out.count(told) == 1
    finetune(start, text, tmp_path / "b", "--max_iters=1")
    assert told not in capsys.readouterr().out


def test_losses_on_other_data_are_not_compared(start, text, tmp_path, capsys):
    """Else best/ would never be written again, and patience would run out."""
    finetune(start, text, tmp_path / "out", "--learning_rate=1e-2")
    other = tmp_path / "other.txt"
    other.write_text("".join(np.random.default_rng(0).choice(list("xyz,. "), 9000)))
    resume = [
        "--init_from=resume",
        f"--out_dir={tmp_path / 'out'}",
        "--max_iters=62",
        "--eval_interval=1",
        "--patience=1",
    ]
    assert train.main([*resume, f"--dataset={other}", "--learning_rate=1e-4"]) == 0
    assert "the best loss so far no longer counts" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/best/trainer.json").read_text())["best_step"] > 60
    assert not (tmp_path / "out/best.prev").exists()  # the old one goes once the new one is safe


# A user's mistakes: status 2, a message that says what and where, no traceback, nothing left


def refused(capsys, out_dir, *options) -> str:
    """The message with which `python train.py` turns a fine-tuning down."""
    argv = [*QUICK, f"--out_dir={out_dir}", "--max_iters=1", *options]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: train.main(argv))
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.out + captured.err
    assert not out_dir.exists()
    return captured.err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "short.txt",
            b"ada asks bob.",
            ["has 11 tokens, and block_size=32 needs 33", "--block_size=10"],
        ),
        (
            "long.jsonl",
            (json.dumps({"prompt": "ada asks " * 9, "completion": "bob"}) + "\n").encode() * 40,
            ["40 of 40 examples were longer than 32 tokens", "--block_size="],
        ),
        ("foreign.txt", "ada asks Ørsted. ".encode() * 99, ["'Ø'"]),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_refused(start, tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refused(
        capsys, tmp_path / "out", f"--init_from={start}", f"--dataset={tmp_path / name}"
    )
    assert [word for word in words if word not in message] == []


def test_a_question_in_the_chat_ends_as_the_prompts_did(tmp_path, monkeypatch, capsys):
    """input() drops the line end that every prompt of the data has."""
    rows = [{"prompt": f"What is {i}?\n", "completion": f"It is {i}."} for i in range(30)]
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=64", "--max_iters=2"]
    argv = [*QUICK, *shape, "--tokenizer=bytes", f"--dataset={file}", f"--out_dir={tmp_path}/out"]
    assert train.main(argv) == 0
    assert capsys.readouterr().out.endswith("/out --interactive\n")
    asked: list[bytes] = []

    def stream(model, prompts, *args, **options):
        asked.append(bytes(prompts[0]))
        yield [ord("!")]
        yield [256]

    monkeypatch.setattr(sample, "stream", stream)
    questions = io.TextIOWrapper(io.BytesIO(b"What is 3?\nWhat is 4?\n"))
    monkeypatch.setattr(sys, "stdin", questions)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={tmp_path}/out", "--interactive"])
    sample.main()
    # The data have no turns, so the second question does not follow the first.
    assert asked == [b"What is 3?\n", b"What is 4?\n"]
    assert capsys.readouterr().out.endswith("!\n!\n")


def test_the_tokenizer_of_a_german_model_goes_back_as_it_came(tmp_path):
    """Six layers, a byte-pair encoding of its own, added tokens, two tokens that end a text."""
    text = "Die Straße führt über Köln. Ärger über süße Äpfel, größere Öfen, müßige Mönche. " * 90
    (tmp_path / "ger.txt").write_text(text, "utf-8")
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([text], vocab_size=330, show_progress=False)
    library.save(str(tmp_path / "t.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"))
    theirs.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    end = theirs.eos_token_id
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 6, "n_head": 2, "eos_token_id": [end, 3]}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(theirs), **shape)).save_pretrained(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "model")
    finetune(tmp_path / "model", tmp_path / "ger.txt", tmp_path / "out", "--max_iters=20")
    for name in ("tokenizer.json", "generation_config.json"):
        came = (tmp_path / "model" / name).read_bytes()
        assert (tmp_path / "out/best" / name).read_bytes() == came
    again = AutoTokenizer.from_pretrained(tmp_path / "out/best")
    prompt = "<s>Süße Äpfel</s>"
    assert sample.load_tokenizer(tmp_path / "out/best").encode_prompt(prompt) == again.encode(
        prompt
    )
    assert again.get_vocab() == theirs.get_vocab() and again.pad_token == "<pad>"


@pytest.mark.parametrize(
    ("content", "of_the_template"), [("who?", True), ("ada asks \u00d8rsted.", False)]
)
def test_a_chat_template_that_the_models_characters_cannot_write_is_refused(
    tmp_path, capsys, content, of_the_template
):
    chars = CHARS + ("" if of_the_template else "#:AU")
    save_pretrained(GPT(GPTConfig(32, len(chars), 1, 2, 8)), tmp_path / "model")
    CharTokenizer(chars).save(tmp_path / "model")
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "bob."}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40)
    options = [f"--init_from={tmp_path / 'model'}", f"--dataset={tmp_path / 'chat.jsonl'}"]
    message = refused(capsys, tmp_path / "out", *options)
    assert ("'#' (U+0023)" if of_the_template else "'\u00d8'") in message
    for advice in ("'### Assistant:'", "prompt and completion", "--tokenizer=bytes"):
        assert advice in message


@pytest.mark.parametrize("tokenizer", ["bytes", "char"])
def test_a_tokenizer_is_refused_for_a_model_that_brings_its_own(start, tmp_path, capsys, tokenizer):
    (tmp_path / "a.txt").write_text("only some of the characters. " * 40)
    options = [
        f"--init_from={start}",
        f"--dataset={tmp_path / 'a.txt'}",
        f"--tokenizer={tokenizer}",
    ]
    message = refused(capsys, tmp_path / "out", *options)
    for words in ("made with another tokenizer", "without --tokenizer="):
        assert words in message


FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("misshapen", [f"tensor {FC} has shape (32, 127)", "(32, 128)"]),
        ("none.pt", []),
        ("the file itself", []),
    ],
)
def test_weights_that_cannot_be_started_from_are_refused(
    start, text, tmp_path, capsys, change, words
):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    file = folder / "model.safetensors"
    source = folder
    if change == "misshapen":
        save_file(load_file(file) | {FC: torch.zeros(32, 127)}, file)
    elif change == "the file itself":
        source = file
    else:
        source = folder / change
    message = refused(capsys, tmp_path / "out", f"--init_from={source}", f"--dataset={text}")
    assert [word for word in [str(folder), *words] if word not in message] == []


@pytest.fixture
def empty_hub():
    """A Hugging Face hub that knows no name; yields its address."""

    class Unknown(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (the names that http.server calls)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unknown) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_model_that_the_hub_does_not_know_ends_with_a_message(
    text, tmp_path, capsys, empty_hub, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", empty_hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    message = refused(capsys, tmp_path / "out", "--init_from=nobody/nothing", f"--dataset={text}")
    for words in (
        "'nobody/nothing' is no local folder",
        "RepositoryNotFound",
        "--init_from=FOLDER",
    ):
        assert words in message


def test_a_data_set_that_the_hub_does_not_know_ends_with_a_message(
    start, tmp_path, capsys, monkeypatch
):
    import datasets

    def unknown(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("no such name")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    options = [f"--init_from={start}", "--dataset=hf:nobody/nothing"]
    message = refused(capsys, tmp_path / "out", *options)
    assert "hf:nobody/nothing cannot be read: DatasetNotFoundError" in message
    assert "Check the name" in message
    assert "as .txt, .csv or .jsonl files: python train.py --dataset=FOLDER" in message
