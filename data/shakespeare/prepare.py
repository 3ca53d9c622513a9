"""Prepare tiny Shakespeare with GPT-2's tokenizer, to fine-tune on.

    python data/shakespeare/prepare.py

It has 301,966 tokens to train on and 36,059 to validate. The text is that of
data/shakespeare_char/prepare.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for imports in this script's folder, not in the repository.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.shakespeare_char import prepare as shakespeare_char
from data.tokenizers import get_tokenizer
from gpt12.errors import run_main

HERE = Path(__file__).parent


def prepare(folder: Path = HERE) -> None:
    """Write the shards and meta.json into a folder."""
    shakespeare_char.prepare(folder, get_tokenizer("gpt2"))


if __name__ == "__main__":
    run_main(prepare, help_page=__doc__)
