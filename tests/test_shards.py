"""Shards against bytes written out by hand, and against one concatenated array."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from data.shards import UINT8, UINT16, UINT32, ShardWriter, Tokens, find_shards, token_dtype
from gpt12.errors import UserError
from tests.helpers import write_shard


def llm_c_shard(tokens, magic=20240520, version=1, kind="H", count=None):
    """llm.c's layout, from its description: 256 int32, then the tokens, all little-endian."""
    if count is None:
        count = len(tokens)
    header = struct.pack("<256i", magic, version, count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{kind}", *tokens)


@pytest.mark.parametrize(
    ("dtype", "form"),
    [(UINT16, (20240520, 1, "H")), (UINT32, (20240801, 7, "I")), (UINT8, (20240520, 1, "B"))],
)
def test_shards_are_written_in_llm_cs_format(tmp_path, monkeypatch, dtype, form):
    """And a shard has no header before its tokens are on the disk: a power cut may come."""
    file = tmp_path / "train_000000.bin"
    on_disk = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.append(file.read_bytes()))
    tokens = [0, 1, 200, np.iinfo(dtype).max]
    writer = ShardWriter(tmp_path, "train", dtype)
    writer.add(np.array(tokens[:1], np.int64))
    writer.add(np.array(tokens[1:], np.int64))
    writer.close()
    expected = llm_c_shard(tokens, *form)
    assert file.read_bytes() == expected
    assert on_disk == [bytes(1024) + expected[1024:], expected]


def test_windows_over_borders_equal_a_concatenated_array(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 60000, n).astype(np.uint16) for n in (7, 1, 0, 30, 2, 100)]
    for i, part in enumerate(parts):
        write_shard(tmp_path / f"train_{i:06d}.bin", part)
    tokens = Tokens(tmp_path, "train")
    whole = np.concatenate(parts)
    assert len(tokens) == len(whole) == 140
    assert tokens.max_id() == whole.max()
    padded = np.concatenate([whole, np.zeros(140, int)])
    for length in (0, 1, 9, 40, 140):
        starts = np.arange(len(whole))
        naive = np.array([padded[s : s + length] for s in starts])
        np.testing.assert_array_equal(tokens.gather(starts, length), naive)
    with pytest.raises(AssertionError, match="outside"):
        tokens.gather(np.array([-1]), 9)


def test_ids_beyond_uint16_are_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 2)
    assert [token_dtype(size) for size in (2, 65535, 65536)] == [UINT16, UINT16, UINT32]
    with pytest.raises(AssertionError, match="wrap"):
        ShardWriter(tmp_path, "val", UINT16).add(np.array([65536]))
    writer = ShardWriter(tmp_path, "val", token_dtype(128256))
    writer.add(np.array([65536, 128255, 7]))
    writer.close()
    assert Tokens(tmp_path, "val").gather(np.array([0]), 3).tolist() == [[65536, 128255, 7]]


def test_a_splits_files_are_found_by_their_names(tmp_path):
    def names(split):
        return [path.name for path in find_shards(tmp_path, split)]

    assert names("train") == []
    (tmp_path / "train.bin").write_bytes(b"ab")
    assert names("train") == ["train.bin"]
    for name in (
        "train_000001.bin",
        "fineweb_train_000002.bin",
        "train_mask_000001.bin",
        "val_000000.bin",
    ):
        (tmp_path / name).write_bytes(llm_c_shard([1]))
    assert names("train") == ["fineweb_train_000002.bin", "train_000001.bin"]
    assert names("val") == ["val_000000.bin"]


def test_a_bare_file_is_read_only_as_train_bin_or_val_bin(tmp_path):
    bare = struct.pack("<5H", 3, 1, 4, 1, 50256)
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bare)
        tokens = Tokens(tmp_path, name.removesuffix(".bin"))
        assert tokens.gather(np.array([0]), 5).tolist() == [[3, 1, 4, 1, 50256]]
        for broken in (bare[:-1], llm_c_shard([9, 8])[:-2]):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(UserError, match="not a whole token shard"):
                Tokens(tmp_path, name[:-4])
        (tmp_path / name).write_bytes(llm_c_shard([9, 8]))
        assert len(Tokens(tmp_path, name[:-4])) == 2
    (tmp_path / "train_000000.bin").write_bytes(bare * 1000)
    with pytest.raises(UserError, match="train_000000.bin is not a whole token shard"):
        Tokens(tmp_path, "train")


@pytest.mark.parametrize("lie", [{"count": -1}, {"count": 5}, {"version": 2}, {"magic": 20240801}])
def test_a_header_that_contradicts_the_file_is_refused(tmp_path, lie):
    path = tmp_path / "train_000000.bin"
    whole = llm_c_shard(range(500))
    shorter = [whole[:size] for size in (0, 1, 11, 1023, 1024, 1025, len(whole) - 1)]
    negative = llm_c_shard([], count=-1)[:-2]  # as long as its header says
    for content in (llm_c_shard([1, 2, 3, 4], **lie), whole + b"!", negative, *shorter):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"train_000000\.bin is not a whole token shard"):
            Tokens(tmp_path, "train")


def test_missing_and_unfit_files_are_refused(tmp_path):
    write_shard(tmp_path / "train_000000.bin", np.array([1, 2], UINT16))
    write_shard(tmp_path / "train_mask_000000.bin", np.array([1], UINT8))
    (tmp_path / "val_000000.bin").mkdir()
    for split, message in (
        ("train", "The mask shards in"),
        ("other", "has no other shards"),
        ("val", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            Tokens(tmp_path, split)


def test_an_id_over_the_vocabulary_is_named(tmp_path):
    write_shard(tmp_path / "train_000000.bin", np.arange(60, dtype=UINT16))
    write_shard(tmp_path / "train_000001.bin", np.array([5, 6, 77, 8], UINT16))
    tokens = Tokens(tmp_path, "train")
    tokens.check_vocab(78)
    said = r"train_000001\.bin: token 2 is 77, but the vocabulary has ids 0 to 76"
    with pytest.raises(UserError, match=said):
        tokens.check_vocab(77)
    with pytest.raises(UserError, match=said):
        tokens.gather(np.array([0, 55]), 9)
    assert tokens.gather(np.array([0, 50]), 9).shape == (2, 9)


@pytest.mark.parametrize("stopped", [0, 9, 10, 25])
@pytest.mark.parametrize("more", [0, 4, 30])
def test_a_writer_goes_on_where_another_was_killed(tmp_path, monkeypatch, stopped, more):
    """The first writer is killed `more` tokens after `stopped`, the last point that was noted.

    What it wrote after that point is written again, whether the shard was complete or not.
    """
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 10)
    ids = np.arange(1000, 1047)
    (tmp_path / "train_notes.bin").write_bytes(b"not ours")
    first = ShardWriter(tmp_path, "train", UINT16)
    first.add(ids[:stopped])
    first.add(ids[::-1][:more])
    first.flush()
    second = ShardWriter(tmp_path, "train", UINT16, start=stopped)
    second.add(ids[stopped:])
    second.close()
    (tmp_path / "train_notes.bin").unlink()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"train_{i:06d}.bin" for i in range(5)]
    for i, path in enumerate(paths):
        assert path.read_bytes() == llm_c_shard(ids[10 * i : 10 * i + 10])


def anonymous_memory():
    """Bytes of this process that are not pages of a file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def open_files(folder):
    """How many files of a folder this process has open or mapped."""
    descriptors = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(path.is_relative_to(folder) for path in descriptors)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_a_hundred_gigabytes_need_little_memory_and_few_open_files(tmp_path):
    """500 sparse shards of 100 million tokens."""
    header = llm_c_shard([], count=100_000_000)
    for i in range(500):
        with open(tmp_path / f"train_{i:06d}.bin", "wb") as file:
            file.write(header)
            file.truncate(1024 + 2 * 100_000_000)
    with open(tmp_path / "train_000250.bin", "r+b") as file:
        file.seek(1024 - 2 + 2 * 100_000_000)
        file.write(struct.pack("<H", 4321))
    before = anonymous_memory()
    tokens = Tokens(tmp_path, "train")
    tokens.check_vocab(50257)
    starts = np.random.default_rng(0).integers(0, len(tokens) - 1025, 100)
    assert not tokens.gather(starts, 1025).any()
    assert anonymous_memory() - before < 100e6  # the allocator keeps some of what was freed
    assert len(tokens) == 50_000_000_000
    assert tokens.gather(np.array([251 * 100_000_000 - 1]), 2).tolist() == [[4321, 0]]
    assert 0 < open_files(tmp_path) <= 64
    tokens.close()
    assert open_files(tmp_path) == 0
