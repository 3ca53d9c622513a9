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
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from gpt12.weights import from_pretrained, save_pretrained
from tests.manual.interop_models import (
    NEW_TOKENS,
    largest_difference,
    our_answer,
    our_logits,
    our_tokenizer,
)
from tests.test_tokenizers import german

PROMPT = "<s>Süße Äpfel über <pad>Köln"
CLOSE = 1e-4
# Each: what is special, and the number of its layers.
MODELS = {
    "German BPE, added bos/eos/pad": 2,
    "six layers": 6,
    "pytorch_model.bin only": 2,
    "vocab.json, merges.txt, added_tokens.json": 2,
}


def make(folder: Path, name: str) -> None:
    """Save a model and its tokenizer as transformers does."""
    library = german()
    folder.mkdir()
    theirs: Any
    if name.startswith("vocab.json"):
        from transformers import GPT2TokenizerFast  # type: ignore[attr-defined]

        library.save_model(str(folder))
        theirs = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    else:
        theirs = PreTrainedTokenizerFast(tokenizer_object=library._tokenizer)
    theirs.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    torch.manual_seed(1)
    shape = GPT2Config(
        vocab_size=len(theirs),
        n_positions=64,
        n_layer=MODELS[name],
        n_head=4,
        n_embd=48,
        bos_token_id=0,
        eos_token_id=theirs.eos_token_id,
    )
    model = GPT2LMHeadModel(shape)
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


def their_logits(folder: Path, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([ids])).logits


def their_text(folder: Path, ids: list[int]) -> list[int]:
    """Return the ids of the greedy continuation by `transformers`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    text = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    return text[len(ids) :].tolist()


def our_text(folder: Path) -> tuple[str, str]:
    """Return sample.py's greedy continuation of PROMPT, and why it ended."""
    answer = our_answer(folder, PROMPT)
    return answer["text"], answer["finish"]


def compare(folder: Path, again: Path) -> list[Any]:
    """Return what a line of the table says; `again` is where we save the model."""
    tokenizer = our_tokenizer(folder)
    their_tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = their_tokenizer.encode(PROMPT, add_special_tokens=False)
    logits = their_logits(folder, ids)
    difference = largest_difference(our_logits(folder, torch.tensor([ids])), logits)
    text = their_text(folder, ids)
    greedy = our_text(folder) == (their_tokenizer.decode(text), "length")

    save_pretrained(from_pretrained(folder), again, tokenizer.eot)
    tokenizer.save(again)
    their_again: Any = AutoTokenizer.from_pretrained(again)
    round_trip = torch.equal(their_logits(again, ids), logits)
    round_trip &= their_again.encode(PROMPT, add_special_tokens=False) == ids
    round_trip &= their_again.get_vocab() == their_tokenizer.get_vocab()

    place = max(map(text.index, text))  # the last token that is new in the text ends it, too
    file = folder / "generation_config.json"
    ends = {"eos_token_id": [their_tokenizer.eos_token_id, text[place]]}
    file.write_text(json.dumps(json.loads(file.read_text()) | ends))
    stop = their_text(folder, ids) == text[: place + 1]
    stop &= our_text(folder) == (their_tokenizer.decode(text[:place]), "end")
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
