"""Prepare OpenWebText, the open copy of GPT-2's training data: 8 million pages, 9.0 billion tokens.

    python data/openwebtext/prepare.py

This takes 24 GB to download, 18 GB of disk, and about an hour on a fast line with many cores
(predicted). The pages are streamed from the Hugging Face hub in constant memory. If you stop the
script and start it again, it continues where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for imports in this script's folder, not in the repository.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.prepare import prepare_corpus
from gpt12.errors import run_main

HERE = Path(__file__).parent
SOURCE = "hf:Skylion007/openwebtext"
VAL_FRACTION = 0.0005  # nanoGPT's


def prepare() -> None:
    """Write the shards, and what belongs to them, beside this file."""
    prepare_corpus(HERE, SOURCE, VAL_FRACTION)


if __name__ == "__main__":
    run_main(prepare, help_page=__doc__)
