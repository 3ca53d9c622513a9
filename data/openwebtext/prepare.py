"""OpenWebText, the open copy of what GPT-2 was trained on: 8 million pages, 9.0 billion tokens.

    python data/openwebtext/prepare.py

Streamed from the Hugging Face hub in constant memory; stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is searched for `config` and `data`, not the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.prepare import prepare_texts
from data.shards import Tokens
from data.texts import Documents
from data.tokenizers import get_tokenizer
from gpt12.errors import UserError, run_main

HERE = Path(__file__).parent
TOKENS = 9_040_000_000
COST = "24 GB to download, 18 GB of disk, about an hour on a fast line with many cores"  # predicted


def prepare_corpus(source: str, folder: Path, tokens: int, val_fraction: float, limit: int | None = None) -> None:
    """Tokenize a hub data set of about so many tokens into a folder, if the disk has room; no more than `limit`."""
    unfinished = (folder / "progress.json").exists()
    if (folder / "meta.json").exists() and not unfinished:
        raise UserError(f"{folder} is prepared already. To prepare it anew, delete the .bin files and meta.json in it.")
    missing = 2 * (limit or tokens) - sum(file.stat().st_size for file in folder.glob("*.bin*"))
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise UserError(f"{folder} needs {missing / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB free.")
    gpt2 = get_tokenizer("gpt2")
    prepare_texts(folder.name, Documents(source), gpt2, folder, val_fraction, max_tokens=limit, expected_tokens=tokens)
    for split in ("train", "val"):
        print(f"{folder.name}: {len(Tokens.open(folder, split)):,} {split} tokens")


def prepare() -> None:
    """Write the shards and meta.json beside this file."""
    prepare_corpus("hf:Skylion007/openwebtext", HERE, TOKENS, val_fraction=0.0005)  # nanoGPT's fraction


if __name__ == "__main__":
    run_main(prepare, help_page=__doc__)
