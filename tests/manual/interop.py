r"""Open what train.py writes in other programs, open here what they write, and print a table.

    python -m tests.manual.interop
    python -m tests.manual.interop --only=GGUF --llama_cpp=../llama.cpp --work=/tmp/interop

It trains four tiny models on the CPU first. A tool that is not installed is skipped. The converters
to ONNX and GGUF pin older packages than requirements.txt does, so each needs an environment of its
own; --work keeps the models, so that several environments check the same ones:

    pip install -r requirements.txt transformers accelerate peft trl "lm_eval[hf]" onnx onnxscript \
        onnxruntime
    pip install torch==2.13.0 safetensors filelock tiktoken tqdm "optimum-onnx[onnxruntime]"
    pip install torch==2.13.0 safetensors filelock tiktoken tqdm "transformers<4.58" \
        sentencepiece gguf llama-cpp-python

The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from data.texts import CHAT_TEMPLATE, chat_pieces
from data.tokenizers import END_OF_TEXT
from gpt12.weights import from_pretrained
from tests.manual.interop_models import (
    MESSAGES,
    NEW_TOKENS,
    PROMPT,
    Runs,
    batch,
    check_close,
    check_equal,
    largest_difference,
    our_conversation,
    our_logits,
    our_loss,
    our_text,
    our_tokenizer,
    run_command,
    run_script,
    sentences,
    train_runs,
)


class SkippedError(Exception):
    """A check cannot be made here; the text says why."""


# --------------------------------------------------------------------------------------------------
# transformers


def check_logits(runs: Runs) -> str:
    from transformers import AutoModelForCausalLM

    differences = []
    for folder in (runs.text, runs.char, runs.lora, runs.chat):
        ids = batch(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        difference = largest_difference(our_logits(folder, ids), theirs(ids).logits)
        check_close(f"logits of {folder.parent.name}", difference)
        differences.append(difference)
    return f"logits of 4 models, largest difference {max(differences):.1e}"


def check_greedy_text(runs: Runs) -> str:
    for folder in (runs.text, runs.char, runs.lora, runs.chat):
        check_equal(f"texts of {folder.parent.name}", our_text(folder), their_text(folder))
    return f"{NEW_TOKENS} greedy tokens of 4 models, equal to sample.py's"


def their_text(folder: Path) -> str:
    """Return the greedy continuation of PROMPT by `transformers`, without the prompt.

    If the model was trained on conversations, PROMPT is the user's message.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = PROMPT
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": PROMPT}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # All that the tokenizer returns goes in, as users write it.
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)


def check_pipeline(runs: Runs) -> str:
    from transformers import pipeline

    write: Any
    for folder in (runs.text, runs.char):
        write = pipeline("text-generation", model=str(folder), device="cpu")
        (said,) = write(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)
        check_equal("texts", PROMPT + our_text(folder), said["generated_text"])
    write = pipeline("text-generation", model=str(runs.chat), device="cpu")
    question = [{"role": "user", "content": "say eve"}]
    (said,) = write(question, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = said["generated_text"][-1]["content"]
    check_equal("answers", our_text(runs.chat, "say eve"), answer)
    return "pipeline: 2 greedy texts and the answer to a message, equal to sample.py's"


def check_chat_template(runs: Runs) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(runs.chat)
    ours = ""
    for piece in chat_pieces(MESSAGES):
        ours += piece.text + (END_OF_TEXT if piece.end else "")
    check_equal("texts", ours, tokenizer.apply_chat_template(MESSAGES, tokenize=False))
    ids, trained = our_conversation(runs.chat, MESSAGES)
    theirs = tokenizer.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    check_equal("ids", ids, list(theirs["input_ids"]))
    mask = [int(token >= 0) for token in trained]
    check_equal("masks of the answers", mask, list(theirs["assistant_masks"]))
    return "chat template: text, ids and mask of the answers equal to what train.py trains"


def check_char_tokenizer(runs: Runs) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runs.char)
    encoded = tokenizer(PROMPT)
    check_equal("inputs", ["attention_mask", "input_ids"], sorted(encoded))
    check_equal("ids", our_tokenizer(runs.char).encode(PROMPT).tolist(), encoded["input_ids"])
    check_equal("texts", PROMPT, tokenizer.decode(encoded["input_ids"]))
    return "character tokenizer: the same ids and text, no token_type_ids"


# --------------------------------------------------------------------------------------------------
# Training elsewhere


def check_trainer(runs: Runs) -> str:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(runs.text)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(runs.text)
    lines = sentences(16, "\n").splitlines()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**training_options(runs.work / "trainer")),
        train_dataset=[dict(tokenizer(line)) for line in lines],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(runs.work / "trainer"))
    check_came_home(runs, runs.work / "trainer", model)
    return "one step on best/, save_model; back here biases are kept, sample.py and train.py go on"


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


def check_came_home(runs: Runs, folder: Path, model: Any) -> None:
    """Check that our programs open a folder that another program trained and saved.

    model: the model that was saved. Its start, the run `text`, had no biases.
    """
    model = model.eval()
    ours = from_pretrained(folder).eval()
    check_equal("biases", True, ours.config.bias)
    ids = batch(folder)
    with torch.no_grad():
        difference = largest_difference(ours(ids)[0], model(ids).logits)
        start = largest_difference(our_logits(runs.text, ids), model(ids).logits)
    check_close("logits", difference)
    assert start > 0.01, "the other program trained nothing"
    check_equal("texts", our_text(folder), their_text(folder))
    again = ["--max_iters=1", "--batch_size=2", "--gradient_accumulation_steps=1", "--device=cpu"]
    out_dir = f"--out_dir={folder}-again"
    dataset = f"--dataset={runs.work / 'sentences.txt'}"
    run_script("train.py", f"--init_from={folder}", dataset, out_dir, *again, folder=runs.work)


def check_trl(runs: Runs) -> str:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    if runs.tokenizer != "gpt2":
        raise SkippedError("GPT-2's tokenizer is not here, and in bytes a conversation is too long")
    tokenizer = AutoTokenizer.from_pretrained(runs.chat)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(runs.chat)
    with (runs.work / "chat.jsonl").open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream][:16]
    options = training_options(runs.work / "trl") | {"per_device_eval_batch_size": 1}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options, assistant_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list([{"messages": MESSAGES}]),
        processing_class=tokenizer,
    )
    theirs = trainer.evaluate()["eval_loss"]
    ours = our_loss(runs.chat, MESSAGES)
    check_close(f"losses on the answers, ours {ours:.5f}, theirs {theirs:.5f},", abs(ours - theirs))
    trainer.train()
    trainer.save_model(str(runs.work / "trl"))
    check_came_home(runs, runs.work / "trl", model)
    template = our_tokenizer(runs.work / "trl").chat_template
    assert template.strip() == CHAT_TEMPLATE, f"the chat template came back as {template!r:.200}"
    return "SFTTrainer, assistant_only_loss: loss equal to ours, one step, back here with template"


def check_peft(runs: Runs) -> str:
    from peft import AutoPeftModelForCausalLM

    ids = batch(runs.lora)
    theirs = AutoPeftModelForCausalLM.from_pretrained(runs.lora / "adapter").eval()
    ours = our_logits(runs.lora, ids)
    difference = largest_difference(ours, theirs(ids).logits)
    check_close("logits of best/ and best/adapter/", difference)
    change = largest_difference(ours, our_logits(runs.text, ids))
    assert change > 0.01, f"the adapter changes the logits by {change:.1e} only"
    merged = theirs.merge_and_unload()
    merged.save_pretrained(runs.work / "peft")
    back = largest_difference(our_logits(runs.work / "peft", ids), ours)
    check_close("logits of the model that PEFT merged", back)
    return f"best/adapter/ from another folder: merged logits within {max(difference, back):.1e}"


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


def check_lm_eval(runs: Runs) -> str:
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
    newest = max(folder.rglob("results_*.json"), key=_modified)
    theirs = json.loads(newest.read_text("utf-8"))["results"]["gpt12_local"]["bits_per_byte,none"]
    ours = our_bits_per_byte(runs.text, texts)
    check_close(f"bits per byte, ours {ours:.5f}, theirs {theirs:.5f},", abs(ours - theirs))
    return f"lm_eval --model hf, a task of local texts: {theirs:.4f} bits per byte, as ours"


def _modified(file: Path) -> float:
    return file.stat().st_mtime


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


def check_optimum(runs: Runs) -> str:
    folder = runs.work / "onnx"
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model"]
    command += [str(runs.text), "--task", "text-generation-with-past", str(folder)]
    run_command(command, runs.work)
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    model = ORTModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = batch(runs.text)
    difference = largest_difference(
        our_logits(runs.text, ids), model(ids, attention_mask=torch.ones_like(ids)).logits
    )
    check_close("logits", difference)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(said[0], skip_special_tokens=True)
    check_equal("texts", PROMPT + our_text(runs.text), text)
    return f"text-generation-with-past: logits within {difference:.1e}, greedy text equal"


def check_torch_onnx(runs: Runs) -> str:
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
    difference = largest_difference(our_logits(runs.text, ids), torch.tensor(logits))
    check_close("logits", difference)
    return f"torch.onnx.export(dynamo=True), run by onnxruntime: logits within {difference:.1e}"


def check_gguf(runs: Runs) -> str:
    if runs.llama_cpp is None:
        raise SkippedError(
            "convert_hf_to_gguf.py is needed: --llama_cpp=FOLDER, with llama.cpp in it"
        )
    if runs.tokenizer != "gpt2":
        raise SkippedError("GPT-2's tokenizer is not here, and the others have no GGUF form")
    from llama_cpp import Llama

    tokens = our_tokenizer(runs.text).encode(PROMPT).tolist()
    expected = our_text(runs.text)
    types = ("f32", "f16")
    for kind in types:
        file = convert_to_gguf(runs, runs.text, kind)
        model = Llama(str(file), n_ctx=64, n_threads=1, verbose=False)
        check_equal("ids of the prompt", tokens, model.tokenize(PROMPT.encode(), add_bos=False))
        said = model(PROMPT, max_tokens=NEW_TOKENS, temperature=0, repeat_penalty=1.0)
        check_equal(f"texts in {kind}", expected, said["choices"][0]["text"])
    file = convert_to_gguf(runs, runs.chat, "f32")
    model = Llama(str(file), n_ctx=64, n_threads=1, verbose=False)
    question = [{"role": "user", "content": "say eve"}]
    said = model.create_chat_completion(
        question, max_tokens=NEW_TOKENS, temperature=0, repeat_penalty=1.0
    )
    answer = said["choices"][0]["message"]["content"]
    check_equal("answers", our_text(runs.chat, "say eve"), answer)
    return f"{', '.join(types)}: ids of the prompt, greedy text and a chat's answer equal"


def convert_to_gguf(runs: Runs, folder: Path, kind: str) -> Path:
    assert runs.llama_cpp is not None
    file = runs.work / f"{folder.parent.name}-{kind}.gguf"
    script = str(runs.llama_cpp / "convert_hf_to_gguf.py")
    command = [sys.executable, script, str(folder), "--outfile", str(file), "--outtype", kind]
    run_command(command, runs.work)
    return file


# --------------------------------------------------------------------------------------------------
# The table


class Check(NamedTuple):
    """A row of the table. packages: what has to be installed; the first one's version is shown."""

    tool: str
    packages: tuple[str, ...]
    function: Callable[[Runs], str]


CHECKS = [
    Check("transformers", ("transformers",), check_logits),
    Check("transformers", ("transformers",), check_greedy_text),
    Check("transformers", ("transformers",), check_pipeline),
    Check("transformers", ("transformers",), check_chat_template),
    Check("transformers", ("transformers",), check_char_tokenizer),
    Check("Trainer", ("transformers", "accelerate"), check_trainer),
    Check("PEFT", ("peft",), check_peft),
    Check("TRL", ("trl",), check_trl),
    Check("lm_eval", ("lm_eval",), check_lm_eval),
    Check("ONNX (optimum)", ("optimum-onnx", "onnxruntime"), check_optimum),
    Check("ONNX (torch)", ("onnxruntime", "onnxscript", "transformers"), check_torch_onnx),
    Check("GGUF", ("llama-cpp-python", "gguf"), check_gguf),
]


class Row(NamedTuple):
    tool: str
    version: str
    what: str
    result: str


def make_row(check: Check, runs: Runs) -> Row:
    """Run one check; whatever it raises becomes its result."""
    name = check.function.__name__.removeprefix("check_").replace("_", " ")
    versions = {package: installed_version(package) for package in check.packages}
    missing = [package for package, version in versions.items() if version is None]
    version = versions[check.packages[0]] or ""
    if missing:
        return Row(check.tool, version, name, f"skipped: {', '.join(missing)} not installed")
    try:
        return Row(check.tool, version, check.function(runs), "ok")
    except SkippedError as reason:
        return Row(check.tool, version, name, f"skipped: {reason}")
    except Exception as error:
        return Row(check.tool, version, name, f"FAILED: {type(error).__name__}: {error}")


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def print_table(rows: list[Row]) -> None:
    """Print the rows as a Markdown table."""
    print(f"\nPython {sys.version.split()[0]}, torch {torch.__version__}\n")
    print("| tool | version | what was done | result |")
    print("|---|---|---|---|")
    for row in rows:
        cells = [" ".join(cell.split()).replace("|", "/") for cell in row]
        print(f"| {' | '.join(cells)} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="check only tools whose name begins so")
    parser.add_argument("--work", type=Path, help="keep models here; those that are there are used")
    parser.add_argument(
        "--llama_cpp",
        type=Path,
        help="a checkout of llama.cpp, for GGUF; the source archive of llama-cpp-python has one in "
        "vendor/llama.cpp",
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        runs = train_runs((options.work or Path(temporary)).resolve())
        if options.llama_cpp is not None:
            runs.llama_cpp = options.llama_cpp.resolve()
        rows = []
        for check in CHECKS:
            if check.tool.lower().startswith(options.only.lower()):
                row = make_row(check, runs)
                print(f"{row.tool}: {row.what}: {row.result}", file=sys.stderr, flush=True)
                rows.append(row)
    print_table(rows)
    failed = any(row.result.startswith("FAILED") for row in rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
