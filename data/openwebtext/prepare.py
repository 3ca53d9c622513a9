"""Prepare OpenWebText, the open copy of GPT-2's training data: 8 million pages, 9.0 billion tokens.

    python data/openwebtext/prepare.py

The pages are streamed from the Hugging Face hub in constant memory. If you stop the script and
start it again, it continues where it was.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

if (
    __name__ == "__main__"
):  # Python looks for imports in this script's folder, not in the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.prepare import prepare_texts
from data.shards import Tokens
from data.texts import Documents
from data.tokenizers import get_tokenizer
from gpt12.errors import UserError, run_main

HERE = Path(__file__).parent
TOKENS = 9_040_000_000
BYTES_PER_TOKEN = 2
# A prediction. open_dataset shows it instead of preparing so much unasked.
COST = "24 GB to download, 18 GB of disk, about an hour on a fast line with many cores"


def prepare() -> None:
    """Write the shards and meta.json beside this file."""
    val_fraction = 0.0005  # nanoGPT's
    prepare_corpus("hf:Skylion007/openwebtext", HERE, TOKENS, val_fraction)


def prepare_corpus(
    source: str, folder: Path, tokens: int, val_fraction: float, limit: int | None = None
) -> None:
    """Tokenize a hub data set with GPT-2's tokenizer into a folder.

    tokens: about how many the data set has.
    limit: stop after this many tokens.
    Raises UserError if it is prepared already or the disk has too little room.
    """
    unfinished = (folder / "progress.json").exists()
    if (folder / "meta.json").exists() and not unfinished:
        raise UserError(
            f"{folder} is prepared already. To prepare it again, delete meta.json and the .bin "
            "files in it."
        )
    _check_room(folder, BYTES_PER_TOKEN * (limit or tokens))
    prepare_texts(
        folder.name,
        Documents(source),
        get_tokenizer("gpt2"),
        folder,
        val_fraction,
        max_tokens=limit,
        expected_tokens=tokens,
    )
    for split in ("train", "val"):
        print(f"{folder.name}: {len(Tokens.open(folder, split)):,} {split} tokens")


def _check_room(folder: Path, shard_bytes: int) -> None:
    """Raise UserError if the shards will not fit on the disk, counting those already there."""
    written = sum(file.stat().st_size for file in folder.glob("*.bin*"))
    missing = shard_bytes - written
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise UserError(
            f"{folder} needs {missing / 1e9:.1f} GB more, "
            f"and its disk has {free / 1e9:.1f} GB free."
        )


if __name__ == "__main__":
    run_main(prepare, help_page=__doc__)
