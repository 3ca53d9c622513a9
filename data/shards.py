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
from typing import BinaryIO, NamedTuple

import numpy as np

from gpt12.errors import UserError
from gpt12.files import remove_link, sync

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
    """Write one shard from a 1-D array of uint16, uint32 or (for a mask) uint8.

    A crash at any moment leaves either the old file or the whole new one.
    """
    with _create(path) as file:
        file.write(tokens.tobytes())
        _publish(file, path, tokens.dtype)


def _temporary(path: Path) -> Path:
    """Return the name under which a shard is written until it is complete."""
    return path.with_name(path.name + ".tmp")


def _create(path: Path) -> BinaryIO:
    """Open a new temporary file for a shard and leave room for its header."""
    temporary = _temporary(path)
    remove_link(temporary)
    file = temporary.open("wb")
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
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        dtype: np.dtype,
        shard_tokens: int = SHARD_TOKENS,
        start: int = 0,
    ) -> None:
        """Start a stream, or continue one after `start` tokens of an interrupted writer.

        Whatever that writer wrote after those tokens is removed.

        Raises UserError if fewer than `start` tokens are on the disk.
        """
        self.folder = folder
        self.stem = stem
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.count = start  # tokens written so far
        self._path = folder  # the final name of the shard that is being written
        self._file: BinaryIO | None = None
        self._keep_first(start)

    def _shard_path(self, index: int) -> Path:
        return self.folder / f"{self.stem}_{index:06d}.bin"

    def _keep_first(self, start: int) -> None:
        """Remove what lies after the first `start` tokens, and reopen the shard they end in."""
        found = 0
        for path in sorted(self.folder.glob(f"{self.stem}_{'[0-9]' * 6}.bin*")):
            index = int(path.name[len(self.stem) + 1 :][:6])
            wanted = min(start - index * self.shard_tokens, self.shard_tokens)
            if wanted <= 0:
                path.unlink()
                continue
            held = (path.stat().st_size - HEADER_BYTES) // self.dtype.itemsize
            found += max(0, min(wanted, held))
            if wanted < self.shard_tokens:
                self._reopen(path, index, wanted)
        if found != start:
            raise UserError(
                f"{self.folder} has fewer {self.stem} tokens than its progress.json says. "
                "Delete progress.json and prepare the data again."
            )

    def _reopen(self, path: Path, index: int, tokens: int) -> None:
        """Go on writing a shard after its first `tokens` tokens."""
        self._path = self._shard_path(index)
        self._file = path.replace(_temporary(self._path)).open("r+b")
        self._file.truncate(HEADER_BYTES + tokens * self.dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def add(self, tokens: np.ndarray) -> None:
        """Append a 1-D array of ids. Raises ValueError if an id does not fit the shard's type."""
        if len(tokens) > 0 and int(tokens.max()) > np.iinfo(self.dtype).max:
            raise ValueError(
                f"id {tokens.max()} does not fit into {self.dtype}"
            )  # a cast would wrap it
        tokens = np.ascontiguousarray(tokens, self.dtype)
        while len(tokens) > 0:
            if self._file is None:
                self._path = self._shard_path(self.count // self.shard_tokens)
                self._file = _create(self._path)
            room = self.shard_tokens - self.count % self.shard_tokens
            part = tokens[:room]
            tokens = tokens[room:]
            self._file.write(part.data)
            self.count += len(part)
            if len(part) == room:
                self.close()

    def flush(self) -> None:
        """Force all tokens so far to the disk, so that a later writer can start after them."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Complete the last shard even if it is not full."""
        if self._file is not None:
            _publish(self._file, self._path, self.dtype)
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

    Opening reads each header and compares it with the length of the file. A shard that is cut
    short, or that is no shard, is a UserError then. A shard that becomes shorter between opening
    and its first use is a UserError, too. Do not shorten a shard that is in use: reading a page
    that a map has lost ends the process (SIGBUS).

    paths: the shard files. dtype: the type of a token.
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
        self._vocab_size: int | None = None
        self._map = functools.lru_cache(maxsize=MAX_OPEN_MAPS)(_map_shard)
        for shard in self._shards:
            if shard.dtype != self.dtype:
                raise UserError(
                    f"{shard.path} holds {shard.dtype} and {paths[0]} holds {self.dtype}. "
                    "They seem to belong to two data sets: move one of them to another folder."
                )
        if mask is not None and mask._ends != self._ends:
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
        """Return the windows of `length` tokens that begin at `starts`: (len(starts), length).

        A window may cross the borders of shards. Raises ValueError for a window outside the split,
        and UserError for an id over the vocabulary that check_vocab was told.
        """
        windows = np.empty((len(starts), length), self.dtype)
        for window, start in zip(windows, starts.tolist()):
            if not 0 <= start <= len(self) - length:
                raise ValueError(
                    f"window [{start}, {start + length}) is outside the {len(self)} tokens"
                )
            self._read(start, window)
        if self._vocab_size is not None:
            self._check_ids(starts, windows, self._vocab_size)
        return windows

    def _read(self, start: int, window: np.ndarray) -> None:
        """Fill a window with the tokens from `start` on."""
        filled = 0
        while filled < len(window):
            shard, first = self._locate(start + filled)
            part = self._map(shard)[first : first + len(window) - filled]
            window[filled : filled + len(part)] = part
            filled += len(part)

    def _locate(self, position: int) -> tuple[Shard, int]:
        """Return the shard that holds a position of the split, and the position within it."""
        index = bisect.bisect_right(self._ends, position)
        shard = self._shards[index]
        return shard, position - (self._ends[index] - shard.length)

    def _check_ids(self, starts: np.ndarray, windows: np.ndarray, vocab_size: int) -> None:
        """Raise UserError if an id in the windows is not below vocab_size."""
        if windows.size == 0 or int(windows.max()) < vocab_size:
            return
        row, column = np.argwhere(windows >= vocab_size)[0].tolist()
        shard, position = self._locate(int(starts[row]) + column)
        raise UserError(
            f"{shard.path}: token {position} is {windows[row, column]}, but the vocabulary has "
            f"ids 0 to {vocab_size - 1}. "
            "The file is damaged, or another tokenizer made it. Prepare the data again."
        )

    def check_vocab(self, vocab_size: int) -> None:
        """Raise UserError with file, position and id if an id is not below vocab_size.

        This reads the whole of a split of up to 50 million tokens, and 50 million tokens spread
        over a larger one. From now on gather() checks what it reads: on a GPU such an id would fail
        without saying where it is.
        """
        self._vocab_size = vocab_size
        chunks = range(0, len(self), CHUNK_TOKENS)
        stride = max(1, math.ceil(len(chunks) / MAX_CHECKED_CHUNKS))
        self._largest_id(chunks[::stride])

    def max_id(self) -> int:
        """Return the largest id of the whole split."""
        return self._largest_id(range(0, len(self), CHUNK_TOKENS))

    def _largest_id(self, chunk_starts: range) -> int:
        largest = 0
        for start in chunk_starts:
            chunk = self.gather(np.array([start]), min(CHUNK_TOKENS, len(self) - start))
            largest = max(largest, int(chunk.max()))
        return largest


def _map_shard(shard: Shard) -> np.ndarray:
    """Map the tokens of a shard into memory, read-only."""
    try:
        tokens = np.memmap(
            shard.path, shard.dtype, mode="r", offset=shard.offset, shape=(shard.length,)
        )
    except ValueError:
        raise UserError(
            f"{shard.path} has become shorter since it was opened. Prepare the data again."
        ) from None
    except OSError as error:
        raise UserError(f"{shard.path} cannot be read: {error.strerror}.") from None
    return np.asarray(tokens)  # slices of np.memmap itself are slow


def _inspect(path: Path, is_mask: bool) -> Shard:
    """Read a shard's header. Raises UserError if it does not agree with the file's length."""
    try:
        if not path.is_file():  # opening a pipe would wait forever
            raise UserError(f"{path} cannot be read: it is not a regular file.")
        with path.open("rb") as file:
            header = file.read(12).ljust(12, b"\0")
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    magic, version, count = struct.unpack("<3i", header)
    dtypes = (UINT8,) if is_mask else (UINT16, UINT32)
    for dtype in dtypes:
        if magic == FORMATS[dtype][0]:
            _check_header(path, dtype, version, count, size)
            return Shard(path, dtype, count, offset=HEADER_BYTES)
    if path.name in BARE_NAMES:
        return _inspect_bare(path, size)
    raise UserError(
        f"{path} is not a token shard: it begins with {magic}, not with {FORMATS[UINT16][0]}, "
        "as a shard in llm.c's layout does."
    )


def _inspect_bare(path: Path, size: int) -> Shard:
    if size % UINT16.itemsize != 0:
        raise UserError(
            f"{path} was cut short: {size:,} bytes are not a whole number of uint16 tokens."
        )
    return Shard(path, UINT16, size // UINT16.itemsize, offset=0)


def _check_header(path: Path, dtype: np.dtype, version: int, count: int, size: int) -> None:
    expected = HEADER_BYTES + count * dtype.itemsize
    if version == FORMATS[dtype][1] and count >= 0 and size == expected:
        return
    problem = "was cut short" if size < expected else "has a damaged header"
    raise UserError(
        f"{path} {problem}: its header says version {version} and {count:,} tokens, which is "
        f"{expected:,} bytes, and the file has {size:,}. Prepare or download it again."
    )
