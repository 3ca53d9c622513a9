"""Read and write token shards, the files in which a data set's tokens lie.

A shard is a header of 1,024 bytes, followed by the tokens. The header is 256 little-endian int32: a
magic number, a version, the number of tokens, zeros. This is the layout of llm.c and
modded-nanogpt:

    type      magic number   version   used for
    uint16    20240520       1         tokens
    uint32    20240801       7         tokens of a vocabulary over 65,535
    uint8     20240520       1         mask shards: for each token the bits TRAINED, EXAMPLE_START

Only its name tells a mask shard from a token shard: train_mask_000000.bin lies beside
train_000000.bin. nanoGPT's train.bin and val.bin have no header and hold uint16 tokens.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from gpt12.errors import UserError

HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000  # tokens in a full shard, as in the published FineWeb shards
UINT8 = np.dtype("u1")
UINT16 = np.dtype("<u2")
UINT32 = np.dtype("<u4")
FORMATS: dict[np.dtype, tuple[int, int]] = {
    UINT8: (20240520, 1),
    UINT16: (20240520, 1),
    UINT32: (20240801, 7),
}  # (magic number, version)
# The bits of a mask. Older masks have no EXAMPLE_START: there a window is one example.
TRAINED = 1  # the token is a target
EXAMPLE_START = 2  # it is the first token of an example
BARE_NAMES = ("train.bin", "val.bin")  # the only files that may have no header
MAX_OPEN_MAPS = 64  # each holds a file descriptor, and some systems allow a process only 256
CHUNK_TOKENS = 1 << 20  # tokens read at once when a whole split is scanned
MAX_CHECKED_CHUNKS = 50


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest shard type that holds every id of a vocabulary."""
    if vocab_size <= 65535:
        return UINT16
    return UINT32


# ----------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Write a stream of tokens as {stem}_000000.bin, {stem}_000001.bin, ... in constant memory.

    A shard's header is zeros, so that nobody takes it for whole, until its tokens are on the disk.

    start: go on after this many tokens of an interrupted writer. What lies after them is removed.
    count: tokens written so far.
    """

    def __init__(self, folder: Path, stem: str, dtype: np.dtype, start: int = 0) -> None:
        self.folder = folder
        self.stem = stem
        self.dtype = dtype
        self.count = start
        self._file: BinaryIO | None = None
        if start % SHARD_TOKENS > 0:
            self._file = self._open()
        shards_in_use = math.ceil(start / SHARD_TOKENS)
        for path in folder.glob(f"{stem}_{'[0-9]' * 6}.bin"):
            if int(path.stem[-6:]) >= shards_in_use:
                path.unlink()

    def _open(self) -> BinaryIO:
        """Open the shard that the next token belongs to, and zero its header."""
        index, held = divmod(self.count, SHARD_TOKENS)
        path = self.folder / f"{self.stem}_{index:06d}.bin"
        file = path.open("r+b" if held > 0 else "wb")
        file.write(bytes(HEADER_BYTES))
        file.truncate(HEADER_BYTES + held * self.dtype.itemsize)
        file.seek(0, os.SEEK_END)
        return file

    def add(self, tokens: np.ndarray) -> None:
        """Append a 1-D array of ids that fit the shard's type."""
        assert tokens.max(initial=0) <= np.iinfo(self.dtype).max, "an id would wrap"
        tokens = np.ascontiguousarray(tokens, self.dtype)
        while len(tokens) > 0:
            if self._file is None:
                self._file = self._open()
            part = tokens[: SHARD_TOKENS - self.count % SHARD_TOKENS]
            tokens = tokens[len(part) :]
            self._file.write(part.data)
            self.count += len(part)
            if self.count % SHARD_TOKENS == 0:
                self.close()

    def flush(self) -> None:
        """Force all tokens so far to the disk, so that a later writer can start after them."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Complete the last shard: force its tokens to the disk, then write its header."""
        if self._file is None:
            return
        self.flush()
        tokens = (self._file.tell() - HEADER_BYTES) // self.dtype.itemsize
        self._file.seek(0)
        self._file.write(struct.pack("<3i", *FORMATS[self.dtype], tokens))
        self.flush()
        self._file.close()
        self._file = None


def write_shards(folder: Path, stem: str, tokens: np.ndarray, dtype: np.dtype) -> None:
    """Write an array of ids as shards."""
    writer = ShardWriter(folder, stem, dtype)
    writer.add(tokens)
    writer.close()


# ----------------------------------------------------------------------------------------------
# Reading


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split in order, or an empty list.

    They are train_*.bin and *_train_*.bin, or exactly train.bin if there are none of these (val
    likewise).
    """
    name = re.compile(rf"(.+_)?{split}_(?!mask_).*\.bin")
    shards = sorted(path for path in folder.glob("*.bin") if name.fullmatch(path.name))
    bare = folder / f"{split}.bin"
    if not shards and bare.exists():
        return [bare]
    return shards


class Shard(NamedTuple):
    """A shard file whose header and length agreed when it was opened."""

    path: Path
    dtype: np.dtype
    length: int  # in tokens
    offset: int  # bytes before the first token


class Tokens:
    """The shards of a split, read through memory maps as one sequence of tokens.

    Opening reads each header and compares it with the length of the file. Do not shorten a shard
    that is in use: reading a page that a map has lost ends the process (SIGBUS).

    split: "train" or "val"; or "train_mask" or "val_mask", as which each opens its mask.
    paths: the shard files. dtype: the type of a token in the first of them.
    mask: the split's mask shards as Tokens of the same length, or None.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.paths = find_shards(folder, split)
        if not self.paths:
            raise UserError(
                f"{folder} has no {split} shards ({split}_*.bin, *_{split}_*.bin or {split}.bin)."
            )
        self._shards = [_inspect(path) for path in self.paths]
        self.dtype = self._shards[0].dtype
        self._ends = list(itertools.accumulate(shard.length for shard in self._shards))
        self._vocab_size = math.inf
        self._map = functools.lru_cache(maxsize=MAX_OPEN_MAPS)(_map_shard)
        self.mask: Tokens | None = None
        if find_shards(folder, f"{split}_mask"):
            self.mask = Tokens(folder, f"{split}_mask")
            if len(self.mask) != len(self):
                raise UserError(
                    f"The mask shards in {folder} do not fit the token shards. "
                    "Prepare the data again."
                )

    def __len__(self) -> int:
        return self._ends[-1]

    def close(self) -> None:
        """Close the memory maps. Windows can neither replace nor delete a file that is mapped."""
        self._map.cache_clear()

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the windows of `length` tokens from `starts` on: int64 (len(starts), length).

        A window may cross the borders of shards; past the end of the split it is filled with 0.
        Raises UserError for an id over the vocabulary that check_vocab was told.
        """
        windows = np.zeros((len(starts), length), np.int64)
        for window, start in zip(windows, starts.tolist()):
            assert start >= 0, f"window at {start} is outside the split"
            filled = 0
            while filled < min(length, len(self) - start):
                number = bisect.bisect_right(self._ends, start + filled)
                shard = self._shards[number]
                first = start + filled - (self._ends[number] - shard.length)
                part = self._map(shard)[first : first + length - filled]
                if part.max() >= self._vocab_size:
                    place = int(np.argmax(part >= self._vocab_size))
                    raise UserError(
                        f"{shard.path}: token {first + place} is {part[place]}, but the vocabulary "
                        f"has ids 0 to {self._vocab_size - 1}. The file is damaged, or another "
                        "tokenizer made it. Prepare the data again."
                    )
                window[filled : filled + len(part)] = part
                filled += len(part)
        return windows

    def check_vocab(self, vocab_size: int) -> None:
        """Raise UserError with file, token index and id if an id is not below vocab_size.

        This reads the whole of a split of up to 50 million tokens, and 50 million tokens spread
        over a larger one. From now on gather() checks what it reads: on a GPU such an id would fail
        without saying where it is.
        """
        self._vocab_size = vocab_size
        chunks = math.ceil(len(self) / CHUNK_TOKENS)
        for _ in self.chunks(every=math.ceil(chunks / MAX_CHECKED_CHUNKS) or 1):
            pass  # gather() has checked it

    def max_id(self) -> int:
        """Return the largest id of the split."""
        return max((int(chunk.max()) for chunk in self.chunks()), default=0)

    def chunks(self, start: int = 0, every: int = 1) -> Iterator[np.ndarray]:
        """Yield the tokens from `start` on, int64, in chunks of CHUNK_TOKENS.

        every: 2 yields every second chunk.
        """
        for index in range(start, len(self), every * CHUNK_TOKENS):
            length = min(CHUNK_TOKENS, len(self) - index)
            yield self.gather(np.array([index]), length)[0]


def _map_shard(shard: Shard) -> np.ndarray:
    """Map the tokens of a shard into memory, read-only."""
    tokens = np.memmap(
        shard.path, shard.dtype, mode="r", offset=shard.offset, shape=(shard.length,)
    )
    return np.asarray(tokens)  # slices of np.memmap itself are slow


def _inspect(path: Path) -> Shard:
    """Read a shard's header. Raises UserError if it does not agree with the file's length."""
    try:
        with path.open("rb") as file:
            header = file.read(12).ljust(12, b"\0")
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    magic, version, count = struct.unpack("<2iI", header)
    for dtype, form in FORMATS.items():
        is_mask = "_mask_" in path.name
        whole = size == HEADER_BYTES + count * dtype.itemsize
        if form == (magic, version) and is_mask == (dtype == UINT8) and whole:
            return Shard(path, dtype, count, offset=HEADER_BYTES)
    if path.name in BARE_NAMES and magic not in (20240520, 20240801) and size % 2 == 0:
        return Shard(path, UINT16, size // 2, offset=0)
    raise UserError(
        f"{path} is not a whole token shard in llm.c's layout: its header says magic number "
        f"{magic}, version {version} and {count:,} tokens, and it has {size:,} bytes. "
        "Prepare or download it again."
    )
