"""FineWeb-Edu, web pages chosen for what they teach: the 10-billion-token sample, or less of it.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --tokens=1e9

Streamed from the Hugging Face hub in constant memory; stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is searched for `config` and `data`, not the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.openwebtext.prepare import prepare_corpus
from gpt12.errors import run_main

HERE = Path(__file__).parent
TOKENS = 9_950_000_000  # of GPT-2's; the sample's name counts them so as well
COST = "28 GB to download, 20 GB of disk, about an hour on a fast line with many cores"  # predicted


def count(text: str) -> int:
    """A number of tokens, also as 1e9."""
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= TOKENS:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens from 1 to {TOKENS:,}")


def prepare(tokens: int | None = None) -> None:
    """Write the shards and meta.json beside this file."""
    prepare_corpus("hf:HuggingFaceFW/fineweb-edu:sample-10BT", HERE, TOKENS, val_fraction=0.001, limit=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=count, help=f"end after about so many (all: {TOKENS:.3g})")
    prepare(parser.parse_args().tokens)


if __name__ == "__main__":
    run_main(main)
