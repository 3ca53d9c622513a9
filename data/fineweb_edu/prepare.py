"""Prepare FineWeb-Edu, web pages chosen for their educational value: the 10-billion-token sample.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --tokens=1e9

All of it takes 28 GB to download, 20 GB of disk, and about an hour on a fast line with many cores
(predicted). The pages are streamed from the Hugging Face hub in constant memory. If you stop the
script and start it again, it continues where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Python looks for imports in this script's folder, not in the repository.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.prepare import prepare_corpus
from gpt12.errors import run_main

HERE = Path(__file__).parent
SOURCE = "hf:HuggingFaceFW/fineweb-edu:sample-10BT"
VAL_FRACTION = 0.001


def main() -> None:
    """Write the shards, and what belongs to them, beside this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=float, default=float("inf"), help="stop after about this many of 10e9"
    )
    prepare_corpus(HERE, SOURCE, VAL_FRACTION, parser.parse_args().tokens)


if __name__ == "__main__":
    run_main(main)
