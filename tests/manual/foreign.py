"""Compare strangers' GPT-2s, made by transformers with random weights, here and in transformers:

    python -m tests.manual.foreign

One line a model: the largest difference of logits; whether a prompt's ids, a greedy text, the end
of a text at a second end token, and what we save again (logits and ids there) are equal. Exit
status 1 if one is not.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from gpt12.weights import from_pretrained, save_pretrained
from tests.manual.interop_models import NEW_TOKENS, ROOT, our_tokenizer, run_script

GERMAN = "Die Straße führt über Köln. Ärger über süße Äpfel, größere Öfen und müßige Mönche. " * 90
PROMPT = "<s>Süße Äpfel über <pad>Köln"
CLOSE = 1e-4
# Each: what is special, and the keys of its GPT2Config.
MODELS: dict[str, dict[str, Any]] = {
    "German BPE, added bos/eos/pad": {"n_layer": 2},
    "six layers": {"n_layer": 6},
    "pytorch_model.bin only": {"n_layer": 2},
    "vocab.json, merges.txt, added_tokens.json": {"n_layer": 2},
}


def make(folder: Path, name: str) -> None:
    """Save a model and its tokenizer as transformers does."""
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([GERMAN], vocab_size=400, show_progress=False)
    folder.mkdir()
    theirs: Any
    if name.startswith("vocab.json"):
        from transformers import GPT2TokenizerFast  # type: ignore[attr-defined]

        library.save_model(str(folder))
        theirs = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    else:
        library.save(str(folder / "t.json"))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "t.json"))
        (folder / "t.json").unlink()
    theirs.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    torch.manual_seed(1)
    shape = {"n_positions": 64, "n_embd": 48, "n_head": 4, "bos_token_id": 0} | MODELS[name]
    shape["eos_token_id"] = theirs.eos_token_id
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(theirs), **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    theirs.save_pretrained(folder)
    if name.startswith("vocab.json"):
        (folder / "tokenizer.json").unlink()
        added = json.dumps(theirs.get_added_vocab())  # as transformers 4 wrote it
        (folder / "added_tokens.json").write_text(added)
    if name.startswith("pytorch"):
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


def our_answer(folder: Path) -> tuple[str, str]:
    """Return sample.py's greedy continuation of PROMPT, and why it ended."""
    options = ["--temperature=0", f"--start={PROMPT}", f"--max_new_tokens={NEW_TOKENS}", "--json"]
    options += ["--device=cpu", "--dtype=float32", f"--init_from={folder}"]
    answer = json.loads(run_script("sample.py", *options, folder=ROOT))
    return answer["text"], answer["finish"]


def compare(folder: Path, again: Path) -> list[Any]:
    """Return what a line of the table says; `again` is where we save the model."""
    ours, tokenizer = from_pretrained(folder).eval(), our_tokenizer(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    their_tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = their_tokenizer.encode(PROMPT, add_special_tokens=False)
    with torch.no_grad():
        batch = torch.tensor([ids])
        logits = theirs(batch).logits
        difference = (ours(batch)[0] - logits).abs().max().item()
        written = theirs.generate(batch, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    new = written[len(ids) :]
    greedy = our_answer(folder) == (their_tokenizer.decode(new), "length")

    save_pretrained(ours, again, tokenizer.eot)
    tokenizer.save(again)
    saved: Any = AutoModelForCausalLM.from_pretrained(again).eval()
    their_again: Any = AutoTokenizer.from_pretrained(again)
    with torch.no_grad():
        round_trip = torch.equal(saved(batch).logits, logits)
    round_trip &= their_again.encode(PROMPT, add_special_tokens=False) == ids
    round_trip &= their_again.get_vocab() == their_tokenizer.get_vocab()

    place = max(map(new.index, new))  # the last token that is new in the text ends it, too
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [their_tokenizer.eos_token_id, new[place]]
    (folder / "generation_config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ended = theirs.generate(batch, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    stop = ended == written[: len(ids) + place + 1]
    stop &= our_answer(folder) == (their_tokenizer.decode(new[:place]), "end")
    return [difference, tokenizer.encode_prompt(PROMPT) == ids, greedy, stop, round_trip]


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("| model | largest logit difference | ids | greedy text | stop | round trip |")
    print("|---|---|---|---|---|---|")
    equal = True
    work = Path(tempfile.mkdtemp())
    for number, name in enumerate(MODELS):
        make(work / f"{number}", name)
        (work / f"{number}-again").mkdir()
        difference, *same = compare(work / f"{number}", work / f"{number}-again")
        equal &= difference < CLOSE and all(same)
        words = ["equal" if one else "DIFFERENT" for one in same]
        print(f"| {name} | {difference:.1e} | {' | '.join(words)} |", flush=True)
    shutil.rmtree(work)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
