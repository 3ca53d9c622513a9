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
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from gpt12.errors import UserError
from gpt12.files import sync

HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000  # tokens in a full shard, as in the published FineWeb shards
UINT8 = np.dtype("u1")
UINT16 = np.dtype("<u2")
UINT32 = np.dtype("<u4")
FORMATS = {
    UINT8: (20240520, 1),
    UINT16: (20240520, 1),
    UINT32: (20240801, 7),
}  # (magic number, version)
# The bits of a mask. Masks of older versions have no EXAMPLE_START: a row of theirs is one example.
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


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write one shard from a 1-D array of uint16, uint32 or (for a mask) uint8."""
    with _create(path) as file:
        file.write(tokens.tobytes())
        _publish(file, path, tokens.dtype)


def _temporary(path: Path) -> Path:
    """Return the name under which a shard is written until it is complete."""
    return path.with_name(path.name + ".tmp")


def _create(path: Path) -> BinaryIO:
    """Open a new temporary file for a shard and leave room for its header."""
    file = _temporary(path).open("wb")
    file.write(bytes(HEADER_BYTES))
    return file


def _publish(file: BinaryIO, path: Path, dtype: np.dtype) -> None:
    """Complete a shard: write its header, force it to the disk, and give it its final name.

    The header comes last, so that half a shard has no magic number.
    """
    count = (file.tell() - HEADER_BYTES) // dtype.itemsize
    magic, version = FORMATS[dtype]
    file.seek(0)
    file.write(struct.pack("<3i", magic, version, count))
    file.flush()
    os.fsync(file.fileno())
    file.close()  # Windows cannot rename an open file
    _temporary(path).replace(path)
    sync(path.parent)


class ShardWriter:
    """Write a stream of tokens as {stem}_000000.bin, {stem}_000001.bin, ... in constant memory.

    A shard has the ending .bin.tmp until it is complete, so a file that ends in .bin is always
    whole.

    start: go on after this many tokens of an interrupted writer. What lies after them is removed.
    count: tokens written so far.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        dtype: np.dtype,
        shard_tokens: int = SHARD_TOKENS,
        start: int = 0,
    ) -> None:
        self.folder = folder
        self.stem = stem
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.count = start
        self._file: BinaryIO | None = None
        index, held = divmod(start, shard_tokens)
        for path in folder.glob(f"{stem}_{'[0-9]' * 6}.bin*"):
            if int(path.name[len(stem) + 1 :][:6]) >= index + bool(held):
                path.unlink()
        if held > 0:
            path = self._path()
            if path.exists():
                path.replace(_temporary(path))
            self._file = _temporary(path).open("r+b")
            self._file.truncate(HEADER_BYTES + held * dtype.itemsize)
            self._file.seek(0, os.SEEK_END)

    def _path(self) -> Path:
        """Return the final name of the shard that the next token belongs to."""
        return self.folder / f"{self.stem}_{self.count // self.shard_tokens:06d}.bin"

    def add(self, tokens: np.ndarray) -> None:
        """Append a 1-D array of ids that fit the shard's type."""
        assert tokens.max(initial=0) <= np.iinfo(self.dtype).max, "an id would wrap"
        tokens = np.ascontiguousarray(tokens, self.dtype)
        while len(tokens) > 0:
            path = self._path()
            if self._file is None:
                self._file = _create(path)
            part = tokens[: self.shard_tokens - self.count % self.shard_tokens]
            tokens = tokens[len(part) :]
            self._file.write(part.data)
            self.count += len(part)
            if self.count % self.shard_tokens == 0:
                _publish(self._file, path, self.dtype)
                self._file = None

    def flush(self) -> None:
        """Force all tokens so far to the disk, so that a later writer can start after them."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Complete the last shard even if it is not full."""
        if self._file is not None:
            _publish(self._file, self._path(), self.dtype)
            self._file = None


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

    paths: the shard files. dtype: the type of a token in the first of them.
    mask: the split's mask shards as Tokens of the same length, or None.
    """

    def __init__(
        self, paths: list[Path], mask: Tokens | None = None, is_mask: bool = False
    ) -> None:
        self.paths = paths
        self.mask = mask
        self._shards = [_inspect(path, is_mask) for path in paths]
        self.dtype = self._shards[0].dtype
        self._ends = list(itertools.accumulate(shard.length for shard in self._shards))
        self._vocab_size = math.inf
        self._map = functools.lru_cache(maxsize=MAX_OPEN_MAPS)(_map_shard)
        if mask is not None and len(mask) != len(self):
            raise UserError(
                f"The mask shards in {paths[0].parent} do not fit the token shards. "
                "Prepare the data again."
            )

    @classmethod
    def open(cls, folder: Path, split: str) -> Tokens:
        """Open the split "train" or "val" of a folder, with its mask shards if there are any."""
        paths = find_shards(folder, split)
        if not paths:
            raise UserError(
                f"{folder} has no {split} shards ({split}_*.bin, *_{split}_*.bin or {split}.bin)."
            )
        mask_paths = sorted(folder.glob(f"{split}_mask_*.bin"))
        mask = cls(mask_paths, is_mask=True) if mask_paths else None
        return cls(paths, mask=mask)

    def __len__(self) -> int:
        return self._ends[-1]

    def close(self) -> None:
        """Close the memory maps. Windows can neither replace nor delete a file that is mapped."""
        self._map.cache_clear()
        if self.mask is not None:
            self.mask.close()

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the windows of `length` tokens from `starts` on: int64 (len(starts), length).

        A window may cross the borders of shards. Raises UserError for an id over the vocabulary
        that check_vocab was told.
        """
        windows = np.empty((len(starts), length), np.int64)
        for window, start in zip(windows, starts.tolist()):
            assert 0 <= start <= len(self) - length, f"window at {start} is outside the split"
            filled = 0
            while filled < length:
                shard, first = self._locate(start + filled)
                part = self._map(shard)[first : first + length - filled]
                window[filled : filled + len(part)] = part
                filled += len(part)
        if windows.max(initial=0) >= self._vocab_size:
            self._report_id(starts, windows)
        return windows

    def _locate(self, position: int) -> tuple[Shard, int]:
        """Return the shard that holds a position of the split, and the position within it."""
        index = bisect.bisect_right(self._ends, position)
        shard = self._shards[index]
        return shard, position - (self._ends[index] - shard.length)

    def _report_id(self, starts: np.ndarray, windows: np.ndarray) -> NoReturn:
        row, column = np.argwhere(windows >= self._vocab_size)[0].tolist()
        shard, position = self._locate(int(starts[row]) + column)
        raise UserError(
            f"{shard.path}: token {position} is {windows[row, column]}, but the vocabulary has "
            f"ids 0 to {self._vocab_size - 1}. "
            "The file is damaged, or another tokenizer made it. Prepare the data again."
        )

    def check_vocab(self, vocab_size: int) -> None:
        """Raise UserError with file, position and id if an id is not below vocab_size.

        This reads the whole of a split of up to 50 million tokens, and 50 million tokens spread
        over a larger one. From now on gather() checks what it reads: on a GPU such an id would fail
        without saying where it is.
        """
        self._vocab_size = vocab_size
        self.max_id(MAX_CHECKED_CHUNKS)

    def max_id(self, most_chunks: int | None = None) -> int:
        """Return the largest id of the whole split, or of this many chunks spread over it."""
        chunk_starts = range(0, len(self), CHUNK_TOKENS)
        if most_chunks is not None:
            chunk_starts = chunk_starts[:: math.ceil(len(chunk_starts) / most_chunks) or 1]
        largest = 0
        for start in chunk_starts:
            chunk = self.gather(np.array([start]), min(CHUNK_TOKENS, len(self) - start))
            largest = max(largest, int(chunk.max()))
        return largest


def _map_shard(shard: Shard) -> np.ndarray:
    """Map the tokens of a shard into memory, read-only."""
    tokens = np.memmap(
        shard.path, shard.dtype, mode="r", offset=shard.offset, shape=(shard.length,)
    )
    return np.asarray(tokens)  # slices of np.memmap itself are slow


def _inspect(path: Path, is_mask: bool) -> Shard:
    """Read a shard's header. Raises UserError if it does not agree with the file's length."""
    try:
        with path.open("rb") as file:
            header = file.read(12).ljust(12, b"\0")
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    magic, version, count = struct.unpack("<3i", header)
    for dtype in (UINT8,) if is_mask else (UINT16, UINT32):
        expected = HEADER_BYTES + count * dtype.itemsize
        if (magic, version) == FORMATS[dtype] and size == expected:
            return Shard(path, dtype, count, offset=HEADER_BYTES)
    is_bare = path.name in BARE_NAMES and magic not in (20240520, 20240801)
    if is_bare and size % UINT16.itemsize == 0:
        return Shard(path, UINT16, size // UINT16.itemsize, offset=0)
    raise UserError(
        f"{path} is not a whole token shard in llm.c's layout: its header says magic number "
        f"{magic}, version {version} and {count:,} tokens, and it has {size:,} bytes. "
        "Prepare or download it again."
    )
