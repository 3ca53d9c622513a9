"""Shards against bytes written out by hand, and against one concatenated array."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from data.shards import UINT8, UINT16, UINT32, ShardWriter, Tokens, find_shards, token_dtype
from tests.helpers import refused, write, write_shard

pytestmark = pytest.mark.usefixtures("here")
HERE = Path()


def llm_c_shard(tokens, magic=20240520, version=1, kind="H", count=None):
    """llm.c's layout, from its description: 256 int32, then the tokens, all little-endian."""
    count = len(tokens) if count is None else count
    header = struct.pack("<256i", magic, version, count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{kind}", *tokens)


def read(split):
    tokens = Tokens(HERE, split)
    return tokens.gather(np.array([0]), len(tokens))[0].tolist()


@pytest.mark.parametrize(
    ("dtype", "form"),
    [(UINT16, (20240520, 1, "H")), (UINT32, (20240801, 7, "I")), (UINT8, (20240520, 1, "B"))],
)
def test_shards_are_written_in_llm_cs_format(monkeypatch, dtype, form):
    """And a shard has no header before its tokens are on the disk: a power cut may come."""
    file = Path("train_000000.bin")
    on_disk = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.append(file.read_bytes()))
    tokens = [0, 1, 200, np.iinfo(dtype).max]
    writer = ShardWriter(HERE, "train", dtype)
    writer.add(np.array(tokens[:1], np.int64))
    writer.add(np.array(tokens[1:], np.int64))
    writer.close()
    expected = llm_c_shard(tokens, *form)
    assert file.read_bytes() == expected
    assert on_disk == [bytes(1024) + expected[1024:], expected]


def test_windows_over_borders_equal_a_concatenated_array():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 60000, n).astype(np.uint16) for n in (7, 1, 0, 30, 2, 100)]
    for i, part in enumerate(parts):
        write_shard(f"train_{i:06d}.bin", part)
    tokens = Tokens(HERE, "train")
    whole = np.concatenate(parts)
    assert (len(tokens), tokens.max_id()) == (140, whole.max())
    padded = np.append(whole, np.zeros(140, int))
    starts = np.arange(140)
    for length in (0, 1, 9, 40, 140):
        naive = [padded[s : s + length] for s in starts]
        np.testing.assert_array_equal(tokens.gather(starts, length), naive)
    with pytest.raises(AssertionError, match="outside"):
        tokens.gather(np.array([-1]), 9)


def test_ids_beyond_uint16_are_written_and_read_back(monkeypatch):
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 2)
    assert [token_dtype(size) for size in (2, 65535, 65536)] == [UINT16, UINT16, UINT32]
    with pytest.raises(AssertionError, match="wrap"):
        ShardWriter(HERE, "val", UINT16).add(np.array([65536]))
    writer = ShardWriter(HERE, "val", token_dtype(128256))
    writer.add(np.array([65536, 128255, 7]))
    writer.close()
    assert read("val") == [65536, 128255, 7]


def test_a_splits_files_are_found_by_their_names():
    def names(split):
        return [path.name for path in find_shards(HERE, split)]

    assert names("train") == []
    write("train.bin", b"ab")
    assert names("train") == ["train.bin"]
    for stem in ("train_000001", "fineweb_train_000002", "train_mask_000001", "val_000000"):
        write(f"{stem}.bin", llm_c_shard([1]))
    assert names("train") == ["fineweb_train_000002.bin", "train_000001.bin"]
    assert names("val") == ["val_000000.bin"]


def test_a_bare_file_is_read_only_as_train_bin_or_val_bin():
    bare = struct.pack("<5H", 3, 1, 4, 1, 50256)
    shard = llm_c_shard([9, 8])
    for split in ("train", "val"):
        write(f"{split}.bin", bare)
        assert read(split) == [3, 1, 4, 1, 50256]
        for broken in (bare[:-1], shard[:-2]):
            write(f"{split}.bin", broken)
            refused("not a whole token shard", Tokens, HERE, split)
        write(f"{split}.bin", shard)
        assert read(split) == [9, 8]
    write("train_000000.bin", bare * 1000)
    refused("train_000000.bin is not a whole token shard", Tokens, HERE, "train")


@pytest.mark.parametrize("lie", [{"count": -1}, {"count": 5}, {"version": 2}, {"magic": 20240801}])
def test_a_header_that_contradicts_the_file_is_refused(lie):
    whole = llm_c_shard(range(500))
    shorter = [whole[:size] for size in (0, 1, 11, 1023, 1024, 1025, len(whole) - 1)]
    negative = llm_c_shard([], count=-1)[:-2]  # as long as its header says
    for content in (llm_c_shard([1, 2, 3, 4], **lie), whole + b"!", negative, *shorter):
        write("train_000000.bin", content)
        refused(r"train_000000\.bin is not a whole token shard", Tokens, HERE, "train")


def test_missing_and_unfit_files_are_refused():
    write("train_000000.bin", llm_c_shard([1, 2]))
    write("train_mask_000000.bin", llm_c_shard([1], kind="B"))
    Path("val_000000.bin").mkdir()
    for split, message in (
        ("train", "The mask shards in"),
        ("other", "has no other shards"),
        ("val", "cannot be read"),
    ):
        refused(message, Tokens, HERE, split)


def test_an_id_over_the_vocabulary_is_named():
    write("train_000000.bin", llm_c_shard(range(60)))
    write("train_000001.bin", llm_c_shard([5, 6, 77, 8]))
    tokens = Tokens(HERE, "train")
    tokens.check_vocab(78)
    said = r"train_000001\.bin: token 2 is 77, but the vocabulary has ids 0 to 76"
    refused(said, tokens.check_vocab, 77)
    refused(said, tokens.gather, np.array([0, 55]), 9)
    assert tokens.gather(np.array([0, 50]), 9).shape == (2, 9)


@pytest.mark.parametrize("stopped", [0, 9, 10, 25])
@pytest.mark.parametrize("more", [0, 4, 30])
def test_a_writer_goes_on_where_another_was_killed(monkeypatch, stopped, more):
    """The first writer is killed `more` tokens after `stopped`, the last point that was noted.

    What it wrote after that point is written again, whether the shard was complete or not.
    """
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 10)
    ids = np.arange(1000, 1047)
    write("train_notes.bin", b"not ours")
    first = ShardWriter(HERE, "train", UINT16)
    first.add(ids[:stopped])
    first.add(ids[::-1][:more])
    first.flush()
    second = ShardWriter(HERE, "train", UINT16, start=stopped)
    second.add(ids[stopped:])
    second.close()
    Path("train_notes.bin").unlink()
    assert {path.name: path.read_bytes() for path in HERE.iterdir()} == {
        f"train_{i:06d}.bin": llm_c_shard(ids[10 * i : 10 * i + 10]) for i in range(5)
    }


def anonymous_memory():
    """Bytes of this process that are not pages of a file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def open_files():
    """How many files of this folder this process has open or mapped."""
    descriptors = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(path.is_relative_to(Path.cwd()) for path in descriptors)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_a_hundred_gigabytes_need_little_memory_and_few_open_files():
    """500 sparse shards of 100 million tokens."""
    for i in range(500):
        file = write(f"train_{i:06d}.bin", llm_c_shard([], count=100_000_000))
        os.truncate(file, 1024 + 2 * 100_000_000)
    with open("train_000250.bin", "r+b") as file:
        file.seek(1024 - 2 + 2 * 100_000_000)
        file.write(struct.pack("<H", 4321))
    before = anonymous_memory()
    tokens = Tokens(HERE, "train")
    tokens.check_vocab(50257)
    starts = np.random.default_rng(0).integers(0, len(tokens) - 1025, 100)
    assert not tokens.gather(starts, 1025).any()
    assert anonymous_memory() - before < 100e6  # the allocator keeps some of what was freed
    assert len(tokens) == 50_000_000_000
    assert tokens.gather(np.array([251 * 100_000_000 - 1]), 2).tolist() == [[4321, 0]]
    assert 0 < open_files() <= 64
    tokens.close()
    assert open_files() == 0
