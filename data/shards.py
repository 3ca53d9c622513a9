"""Token shards on disk, in llm.c's layout: written whole or not at all, read as one long sequence.

A shard is a header of 256 little-endian int32 (magic, version, token count, zeros) and then the tokens: uint16 under
(20240520, 1), uint32 under (20240801, 7). A mask shard has the first header and one uint8 a token. nanoGPT's
train.bin and val.bin are bare uint16.

Windows are read from the file, not through a memory map. It costs the same (16 windows of 1,025 tokens: 39 us against
37 us, page cache warm), while a map's resident memory grows with every page touched until it holds the corpus, and a
file that shrinks or a disk that fails under a map kills the process with SIGBUS instead of raising an error.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
import struct
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt12.errors import UserError

HEADER_BYTES = 1024
UINT16, UINT32, MASK = np.dtype("<u2"), np.dtype("<u4"), np.dtype("u1")
MAGIC = {UINT16: (20240520, 1), UINT32: (20240801, 7), MASK: (20240520, 1)}
MAX_OPEN = 64  # files a split keeps open: 100 GB are 500 shards, and some systems allow 256 files in all
CHUNK = 1 << 20  # tokens read at once where a split is scanned


def token_dtype(vocab_size: int) -> np.dtype:
    """The shard type that holds every id of a vocabulary."""
    return UINT16 if vocab_size <= 65535 else UINT32


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write one shard from a 1-D array of uint16, uint32 or (a mask) uint8; a kill leaves the old file or the new."""
    with Path(f"{path}.tmp").open("wb") as file:
        file.write(bytes(HEADER_BYTES) + tokens.tobytes())
        _publish(file, tokens.dtype, path)


def _publish(file: BinaryIO, dtype: np.dtype, path: Path) -> None:
    """Give a shard its header, which comes last so that half a shard has no magic, and its name; closes the file."""
    count = (file.tell() - HEADER_BYTES) // dtype.itemsize
    file.seek(0)
    file.write(struct.pack("<3i", *MAGIC[dtype], count))
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)  # noqa: PTH105 (the file knows its name, not its Path)


class ShardWriter:
    """Writes a stream of tokens as {stem}_000000.bin, ...; memory stays flat, and only whole shards bear such a name.

    `start` goes on after that many tokens of an interrupted writer; whatever else it left is removed.
    """

    def __init__(self, folder: Path, stem: str, dtype: np.dtype, shard_tokens: int = 100_000_000, start: int = 0):
        self.folder, self.stem, self.dtype, self.shard_tokens, self.count = folder, stem, dtype, shard_tokens, start
        self._file: BinaryIO | None = None
        held = 0
        for path in sorted(folder.glob(f"{stem}_{'[0-9]' * 6}.bin*")):
            wanted = min(start - int(path.name[len(stem) + 1 :][:6]) * shard_tokens, shard_tokens)
            held += max(0, min(wanted, (path.stat().st_size - HEADER_BYTES) // dtype.itemsize))
            if wanted <= 0:
                path.unlink()
            elif wanted < shard_tokens:
                self._file = path.replace(f"{self._path()}.tmp").open("r+b")
                self._file.truncate(HEADER_BYTES + wanted * dtype.itemsize)
                self._file.seek(0, os.SEEK_END)
        if held != start:
            raise UserError(
                f"{folder} has lost {stem} shards that its progress.json counts: delete that file, begin anew."
            )

    def _path(self) -> Path:
        return self.folder / f"{self.stem}_{self.count // self.shard_tokens:06d}.bin"

    def add(self, tokens: np.ndarray) -> None:
        """Append a 1-D array of ids; ValueError if one does not fit the dtype, where a cast would wrap it."""
        if len(tokens) and int(tokens.max()) > np.iinfo(self.dtype).max:
            raise ValueError(f"id {tokens.max()} does not fit into {self.dtype}")
        tokens = np.ascontiguousarray(tokens, self.dtype)
        while len(tokens):
            if self._file is None:
                self._file = Path(f"{self._path()}.tmp").open("wb")  # noqa: SIM115 (closed when it is full)
                self._file.write(bytes(HEADER_BYTES))
            path, part = self._path(), tokens[: self.shard_tokens - self.count % self.shard_tokens]
            self._file.write(part.data)
            self.count += len(part)
            tokens = tokens[len(part) :]
            if self.count % self.shard_tokens == 0:
                _publish(self._file, self.dtype, path)
                self._file = None

    def flush(self) -> None:
        """Put all tokens so far on the disk, so that a later writer can start there."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Publish the last shard, though it is not full."""
        if self._file is not None:
            _publish(self._file, self.dtype, self._path())
            self._file = None


def find(folder: Path, split: str) -> list[Path]:
    """The shards of a split in order: train_*.bin and *_train_*.bin, else exactly train.bin; may be none."""
    name = re.compile(rf"(.+_)?{split}_(?!mask_).*\.bin")
    shards = sorted(path for path in folder.glob("*.bin") if name.fullmatch(path.name))
    return shards or [path for path in [folder / f"{split}.bin"] if path.exists()]


class Tokens:
    """A split's shards as one sequence: len(), .dtype, gather(). `mask` is the same of its mask shards, or None.

    Opening reads the headers only. UserError for a shard that is cut short, that is no shard, or whose header lies.
    """

    def __init__(self, paths: list[Path], mask: Tokens | None = None, is_mask: bool = False):
        self.paths, self.mask = paths, mask
        heads = [_inspect(path, is_mask) for path in paths]
        self.dtype = heads[0][0]
        self._counts, self._offsets = [count for _, count, _ in heads], [offset for _, _, offset in heads]
        self._ends = list(itertools.accumulate(self._counts))
        self._vocab_size: int | None = None
        self._files: dict[int, BinaryIO] = {}  # the least recently used first
        self._lock = threading.Lock()  # seek and read are two calls, and training may read ahead in a thread
        for path, (dtype, _, _) in zip(paths, heads):
            if dtype != self.dtype:
                raise UserError(f"{path} holds {dtype} and {paths[0]} {self.dtype}: are these two data sets?")
        if mask is not None and mask._counts != self._counts:
            raise UserError(
                f"The mask shards in {paths[0].parent} do not fit the token shards. Prepare the data again."
            )

    @classmethod
    def open(cls, folder: Path, split: str) -> Tokens:
        """The split "train" or "val" of a folder, with its mask if it has one."""
        folder = Path(folder)
        paths, masks = find(folder, split), sorted(folder.glob(f"{split}_mask_*.bin"))
        if not paths:
            raise UserError(f"{folder} has no {split} shards ({split}_*.bin, *_{split}_*.bin or {split}.bin).")
        return cls(paths, mask=cls(masks, is_mask=True) if masks else None)

    def __len__(self) -> int:
        return self._ends[-1]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            file.close()

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` tokens from each start, (len(starts), length); they may cross shard borders."""
        out = np.empty((len(starts), length), self.dtype)
        for row, start in zip(out, starts.tolist()):
            if not 0 <= start <= len(self) - length:
                raise ValueError(f"window [{start}, {start + length}) is outside the {len(self)} tokens")
            while len(row):
                shard, first = self._locate(start)
                part = row[: self._counts[shard] - first]
                self._read(shard, first, part)
                row, start = row[len(part) :], start + len(part)
        if self._vocab_size is not None and out.size and int(out.max()) >= self._vocab_size:
            row, column = np.argwhere(out >= self._vocab_size)[0].tolist()
            shard, position = self._locate(int(starts[row]) + column)
            raise UserError(
                f"{self.paths[shard]}: token {position} is {out[row, column]}, but the vocabulary has ids 0 to "
                f"{self._vocab_size - 1}: another tokenizer made it, or it is damaged. Prepare the data again."
            )
        return out

    def _locate(self, position: int) -> tuple[int, int]:
        """(shard, position in it) of a token."""
        shard = bisect.bisect_right(self._ends, position)
        return shard, position - self._ends[shard] + self._counts[shard]

    def _read(self, shard: int, first: int, out: np.ndarray) -> None:
        with self._lock:
            file = self._files.pop(shard, None) or self.paths[shard].open("rb", buffering=0)
            self._files[shard] = file
            if len(self._files) > MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file.seek(self._offsets[shard] + first * self.dtype.itemsize)
            if file.readinto(out.data) != out.nbytes:  # type: ignore[attr-defined]
                raise UserError(f"{self.paths[shard]} has become shorter since it was opened.")

    def check_vocab(self, vocab_size: int) -> None:
        """UserError, naming file, position and id, if an id is not below vocab_size.

        Looks at all of a split of up to 50M tokens and at 50M of a larger one. gather() looks at what it reads from
        then on, since on a GPU such an id ends in a device-side assert that names nothing.
        """
        self._vocab_size = vocab_size
        chunks = range(0, len(self), CHUNK)
        self._scan(chunks[:: -(-len(chunks) // 50) or 1])

    def max_id(self) -> int:
        """The largest id of the whole split."""
        return self._scan(range(0, len(self), CHUNK))

    def _scan(self, starts: range) -> int:
        return max((int(self.gather(np.array([at]), min(CHUNK, len(self) - at)).max()) for at in starts), default=0)


def _inspect(path: Path, is_mask: bool) -> tuple[np.dtype, int, int]:
    """(dtype, number of tokens, bytes before the first) of a shard whose header and length agree, else UserError."""
    try:
        if not path.is_file():  # a pipe would keep us waiting for ever
            raise OSError(0, "it is no regular file")
        with path.open("rb") as file:
            head, size = file.read(12).ljust(12, b"\0"), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    magic, version, count = struct.unpack("<3i", head)
    dtype = next((dtype for dtype in ((MASK,) if is_mask else (UINT16, UINT32)) if MAGIC[dtype][0] == magic), None)
    if dtype is None:
        if path.name not in ("train.bin", "val.bin"):
            raise UserError(
                f"{path} is no token shard: it begins with {magic}, not {MAGIC[UINT16][0]} (llm.c's layout)."
            )
        if size % UINT16.itemsize:
            raise UserError(f"{path} was cut short: {size:,} bytes are no whole number of uint16 tokens.")
        return UINT16, size // UINT16.itemsize, 0
    expected = HEADER_BYTES + count * dtype.itemsize
    if version != MAGIC[dtype][1] or count < 0 or size != expected:
        raise UserError(
            f"{path} {'was cut short' if size < expected else 'has a damaged header'}: version {version} and {count:,} "
            f"tokens, which would be {expected:,} bytes, and it has {size:,}. Prepare or download it again."
        )
    return dtype, count, HEADER_BYTES
