"""A byte-pair encoding of a dozen merges, by our class and by a slow function written from GPT-2's description."""

import itertools

import regex

from data.tokenizers import GPT2Tokenizer

END = "<|endoftext|>"


def printable():
    """GPT-2's 256 names of bytes, from its paper's code: three ranges of Latin-1 stand for themselves."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    names = {byte: chr(byte) for byte in kept}
    return {b: names.get(b) or chr(256 + [c for c in range(256) if c not in names].index(b)) for b in range(256)}


NAMES = printable()
MERGES = ["h e", "t he", "Ġ the", "Ġ c", "a t", "Ġc at", "' s", "Ċ Ċ", "Ġ Ġ", "1 2", "ð Ł", "Ġ t"]
TINY = [*sorted(NAMES.values()), *(merge.replace(" ", "") for merge in MERGES), END]


def encode_slowly(text):
    """GPT-2's encoding from its description: cut by its regular expression, then merge the earliest pair first."""
    ids = []
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text):
        parts = [NAMES[byte] for byte in word.encode()]
        while ranks := [MERGES.index(" ".join(pair)) for pair in itertools.pairwise(parts) if " ".join(pair) in MERGES]:
            left, right = MERGES[min(ranks)].split()
            at = next(i for i in range(len(parts)) if parts[i : i + 2] == [left, right])
            parts[at : at + 2] = [left + right]
        ids += [TINY.index(part) for part in parts]
    return ids


tiny = GPT2Tokenizer(TINY, MERGES)
