"""A byte-pair encoding of a dozen merges, twice.

`tiny` is our class. `encode_slowly` is written from GPT-2's description and shares no code with it.
"""

import itertools

import regex
from tokenizers import models

from data.tokenizers import GPT2Tokenizer, byte_level

END = "<|endoftext|>"
# GPT-2's character for each of the 256 bytes, as in the code of its paper. Three ranges of Latin-1
# stand for themselves: from "!" to "~", from "¡" to "¬", from "®" to "ÿ". The other bytes get the
# characters from 256 on.
KEPT = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = itertools.count(256)
NAMES = {byte: chr(byte if byte in KEPT else next(OTHERS)) for byte in range(256)}
MERGES = ["h e", "t he", "Ġ the", "Ġ c", "a t", "Ġc at", "' s", "Ċ Ċ", "Ġ Ġ", "1 2", "ð Ł", "Ġ t"]
TINY = [*sorted(NAMES.values()), *(merge.replace(" ", "") for merge in MERGES), END]
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def encode_slowly(text):
    """Encode a text: cut it by GPT-2's regular expression, then merge the earliest pair first."""
    ids = []
    for word in regex.findall(PATTERN, text):
        parts = [NAMES[byte] for byte in word.encode()]
        while ranks := ranks_of_pairs(parts):
            left, right = MERGES[min(ranks)].split()
            at = next(i for i in range(len(parts)) if parts[i : i + 2] == [left, right])
            parts[at : at + 2] = [left + right]
        ids += [TINY.index(part) for part in parts]
    return ids


def ranks_of_pairs(parts):
    """Return the places in MERGES of all neighbours that can be merged."""
    pairs = [" ".join(pair) for pair in itertools.pairwise(parts)]
    return [MERGES.index(pair) for pair in pairs if pair in MERGES]


def tiny_library():
    """Return the same encoding in the library `tokenizers`."""
    vocabulary = {name: token for token, name in enumerate(TINY)}
    return byte_level(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))


tiny = GPT2Tokenizer(tiny_library())
