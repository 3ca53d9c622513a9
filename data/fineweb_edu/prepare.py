"""Prepare FineWeb-Edu, web pages chosen for their educational value: the 10-billion-token sample.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --tokens=1e9

The pages are streamed from the Hugging Face hub in constant memory. If you stop the script and
start it again, it continues where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if (
    __name__ == "__main__"
):  # Python looks for imports in this script's folder, not in the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.openwebtext.prepare import prepare_corpus
from gpt12.errors import run_main

HERE = Path(__file__).parent
TOKENS = 9_950_000_000  # of GPT-2's tokenizer
# A prediction. open_dataset shows it instead of preparing so much unasked.
COST = "28 GB to download, 20 GB of disk, about an hour on a fast line with many cores"


def prepare(tokens: int | None = None) -> None:
    """Write the shards and meta.json beside this file.

    tokens: stop after about this many.
    """
    source = "hf:HuggingFaceFW/fineweb-edu:sample-10BT"
    prepare_corpus(source, HERE, TOKENS, val_fraction=0.001, limit=tokens)


def token_count(text: str) -> int:
    """Read a number of tokens, which may be written as 1e9."""
    try:
        count = float(text)
    except ValueError:
        count = 0
    if not 1 <= count <= TOKENS:  # false for NaN, too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens from 1 to {TOKENS:,}")
    return int(count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=token_count, help=f"stop after about this many (default: all {TOKENS:.3g})"
    )
    prepare(parser.parse_args().tokens)


if __name__ == "__main__":
    run_main(main)
