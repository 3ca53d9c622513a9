r"""Open what train.py writes in other programs, and open here what they write.

    python -m tests.manual.interop
    LLAMA_CPP=../llama.cpp INTEROP_RUNS=/tmp/interop python -m tests.manual.interop -k gguf

It trains four tiny models on the CPU first, then pytest runs the checks, with options of its own
like -k. A tool that is not installed is skipped. The converters to ONNX and GGUF pin older packages
than requirements.txt does, so each needs an environment of its own; INTEROP_RUNS, a folder, keeps
the models, so that several environments check the same ones:

    pip install -r requirements.txt pytest hypothesis transformers accelerate peft trl \
        "lm_eval[hf]" onnx onnxscript onnxruntime
    pip install -r requirements.txt pytest hypothesis "optimum-onnx[onnxruntime]"
    pip install -r requirements.txt pytest hypothesis "transformers<4.58" sentencepiece gguf \
        llama-cpp-python

LLAMA_CPP is a checkout of llama.cpp, for GGUF; the source archive of llama-cpp-python has one in
vendor/llama.cpp.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data.chat import CHAT_TEMPLATE
from gpt12.weights import from_pretrained
from tests.manual.interop_models import (
    MESSAGES,
    NEW_TOKENS,
    PROMPT,
    Runs,
    batch,
    largest_difference,
    our_answer,
    our_logits,
    our_loss,
    our_tokenizer,
    run_command,
    run_script,
    sentences,
    train_runs,
)

QUESTION = [{"role": "user", "content": "say eve"}]
CLOSE = 1e-4  # the largest difference of two results that are the same


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the models, trained now unless the folder has them."""
    pytest.importorskip("transformers")
    kept = os.environ.get("INTEROP_RUNS")
    return train_runs(Path(kept).resolve() if kept else tmp_path_factory.mktemp("runs"))


# --------------------------------------------------------------------------------------------------
# transformers


@pytest.mark.parametrize("name", ["text", "char", "lora", "chat"])
def test_logits_and_greedy_text(runs, name):
    from transformers import AutoModelForCausalLM

    folder = getattr(runs, name)
    ids = batch(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert largest_difference(our_logits(folder, ids), theirs(ids).logits) <= CLOSE
    assert our_text(folder) == their_text(folder)


def their_text(folder: Path, model: Any = None) -> str:
    """Return the greedy continuation of PROMPT by `transformers`, without the prompt.

    model: in place of the folder's model.
    If the model was trained on conversations, PROMPT is the user's message.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = PROMPT
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": PROMPT}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # All that the tokenizer returns goes in, as users write it.
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)


def our_text(folder: Path, prompt: str = PROMPT) -> str:
    return our_answer(folder, prompt)["text"]


def test_pipeline(runs):
    from transformers import pipeline

    write: Any
    for folder in (runs.text, runs.char):
        write = pipeline("text-generation", model=str(folder), device="cpu")
        (said,) = write(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert PROMPT + our_text(folder) == said["generated_text"]
    write = pipeline("text-generation", model=str(runs.chat), device="cpu")
    (said,) = write(QUESTION, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert our_text(runs.chat, "say eve") == said["generated_text"][-1]["content"]


# --------------------------------------------------------------------------------------------------
# Training elsewhere


def test_trainer(runs):
    pytest.importorskip("accelerate")
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(runs.text)
    tokenizer.pad_token = tokenizer.eos_token
    lines = sentences(16, "\n").splitlines()
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(runs.text),
        args=TrainingArguments(**training_options(runs.work / "trainer")),
        train_dataset=[dict(tokenizer(line)) for line in lines],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    check_comes_home(runs, trainer)


def training_options(folder: Path) -> dict[str, Any]:
    """Return Trainer's arguments for one step on the CPU that changes the weights visibly."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def check_comes_home(runs: Runs, trainer: Any) -> None:
    """Train with another program, and check that ours open the folder that it saves.

    The start of both trainings, the run `text`, had no biases.
    """
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    ours = from_pretrained(folder).eval()
    assert ours.config.bias
    ids = batch(folder)
    with torch.no_grad():
        theirs = trainer.model.eval()(ids).logits
        assert largest_difference(ours(ids)[0], theirs) <= CLOSE
        assert largest_difference(our_logits(runs.text, ids), theirs) > 0.01  # it was trained
    assert our_text(folder) == their_text(folder)
    again = ["--max_iters=1", "--batch_size=2", "--gradient_accumulation_steps=1", "--device=cpu"]
    again += [f"--init_from={folder}", f"--out_dir={folder}-again"]
    run_script("train.py", *again, "--dataset=sentences.txt", folder=runs.work)


def test_trl(runs):
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(runs.chat)
    tokenizer.pad_token = tokenizer.eos_token
    with (runs.work / "chat.jsonl").open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream][:16]
    options = training_options(runs.work / "trl") | {"per_device_eval_batch_size": 1}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(runs.chat),
        args=SFTConfig(**options, assistant_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list([{"messages": MESSAGES}]),
        processing_class=tokenizer,
    )
    theirs = trainer.evaluate()["eval_loss"]
    assert our_loss(runs.chat, MESSAGES) == pytest.approx(theirs, abs=CLOSE)
    check_comes_home(runs, trainer)
    template = our_tokenizer(runs.work / "trl").chat_template
    assert template.strip() == CHAT_TEMPLATE


def test_peft(runs):
    pytest.importorskip("peft")
    from peft import AutoPeftModelForCausalLM

    ids = batch(runs.lora)
    theirs = AutoPeftModelForCausalLM.from_pretrained(runs.lora / "adapter").eval()
    ours = our_logits(runs.lora, ids)
    assert largest_difference(ours, theirs(ids).logits) <= CLOSE
    assert largest_difference(ours, our_logits(runs.text, ids)) > 0.01
    merged = theirs.merge_and_unload()
    merged.save_pretrained(runs.work / "peft")
    assert largest_difference(our_logits(runs.work / "peft", ids), ours) <= CLOSE


# --------------------------------------------------------------------------------------------------
# Evaluating elsewhere

LM_EVAL_TASK = """task: gpt12_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def test_lm_eval(runs):
    pytest.importorskip("lm_eval")
    folder = runs.work / "lm_eval"
    folder.mkdir(exist_ok=True)
    texts = [sentences(3, " "), "eve asks dan again.", "bob again"]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "local.jsonl").write_text("".join(lines), "utf-8")
    task = LM_EVAL_TASK.format(file=folder / "local.jsonl")
    (folder / "gpt12_local.yaml").write_text(task, "utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={runs.text},dtype=float32", "--batch_size", "1"]
    command += ["--tasks", "gpt12_local", "--include_path", str(folder)]
    command += ["--output_path", str(folder / "results")]
    run_command(command, folder)
    newest = max(folder.rglob("results_*.json"))  # its name has the time
    theirs = json.loads(newest.read_text("utf-8"))["results"]["gpt12_local"]["bits_per_byte,none"]
    assert our_bits_per_byte(runs.text, texts) == pytest.approx(theirs, abs=CLOSE)


def our_bits_per_byte(folder: Path, texts: list[str]) -> float:
    """Return -log2 p(text after the end of another text) / bytes, over all texts."""
    tokenizer = our_tokenizer(folder)
    nats = 0.0
    size = 0
    for text in texts:
        ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text).tolist()]])
        nats += F.cross_entropy(
            our_logits(folder, ids[:, :-1])[0], ids[0, 1:], reduction="sum"
        ).item()
        size += len(text.encode())
    return nats / math.log(2) / size


# --------------------------------------------------------------------------------------------------
# Converters


def test_optimum(runs):
    pytest.importorskip("optimum.onnxruntime")
    folder = runs.work / "onnx"
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model"]
    command += [str(runs.text), "--task", "text-generation-with-past", str(folder)]
    run_command(command, runs.work)
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(folder)
    ids = batch(runs.text)
    theirs = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert largest_difference(our_logits(runs.text, ids), theirs) <= CLOSE
    assert our_text(runs.text) == their_text(folder, model)


def test_torch_onnx(runs):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import onnxruntime
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs.text, use_cache=False).eval()
    ids = batch(runs.text)  # (2, 24); an example of one row would fix the number of rows
    file = runs.work / "torch.onnx"
    rows = torch.export.Dim("rows")
    tokens = torch.export.Dim("tokens", max=64)
    torch.onnx.export(
        model,
        (ids,),
        file,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamo=True,
        dynamic_shapes={"input_ids": {0: rows, 1: tokens}},
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    ids = ids.view(3, 16)
    logits = session.run(["logits"], {"input_ids": ids.numpy()})[0]
    assert largest_difference(our_logits(runs.text, ids), torch.tensor(logits)) <= CLOSE


def test_gguf(runs):
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP, llama.cpp's folder, is not set")
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    tokens = our_tokenizer(runs.text).encode(PROMPT).tolist()
    greedy = {"max_tokens": NEW_TOKENS, "temperature": 0, "repeat_penalty": 1.0}
    for kind in ("f32", "f16"):
        model = open_in_llama_cpp(runs, runs.text, kind)
        assert tokens == model.tokenize(PROMPT.encode(), add_bos=False)
        assert our_text(runs.text) == model(PROMPT, **greedy)["choices"][0]["text"]
    model = open_in_llama_cpp(runs, runs.chat, "f32")
    said = model.create_chat_completion(QUESTION, **greedy)
    assert our_text(runs.chat, "say eve") == said["choices"][0]["message"]["content"]


def open_in_llama_cpp(runs: Runs, folder: Path, kind: str) -> Any:
    """Convert a model to GGUF and open it."""
    from llama_cpp import Llama

    file = f"{runs.work}/{folder.parent.name}-{kind}.gguf"
    script = f"{Path(os.environ['LLAMA_CPP']).resolve()}/convert_hf_to_gguf.py"
    command = [sys.executable, script, str(folder), "--outfile", file, "--outtype", kind]
    run_command(command, runs.work)
    return Llama(file, n_ctx=64, n_threads=1, verbose=False)


if __name__ == "__main__":
    sys.exit(
        pytest.main([__file__, "-v", "-rs", "-oaddopts=", "-p", "no:cacheprovider", *sys.argv[1:]])
    )
