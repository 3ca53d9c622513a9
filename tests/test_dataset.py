"""Data sets by name and path, and the way from texts to shards.

They are compared with splits and rows that are put together by hand.
"""

import collections
import itertools
import os
import pickle
import signal
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data import dataset as dataset_module
from data import prepare
from data.chat import CHAT_TEMPLATE, chat_template
from data.dataset import open_dataset
from data.prepare import is_for_validation, prepare_texts
from data.shakespeare_char import prepare as shakespeare_char
from data.shards import EXAMPLE_START, TRAINED, UINT16, ShardWriter
from data.texts import Documents
from data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from data.windows import TrainWindows
from gpt12.files import lock_folder
from tests.helpers import read_json, refused, write, write_shard
from tests.test_tokenizers import metaspace
from tests.tiny_bpe import tiny, tiny_library

EOT = 256
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 2


@pytest.fixture(autouse=True)
def house(here, monkeypatch):
    """An empty data/ of its own for each test, in the working directory."""
    monkeypatch.setattr(dataset_module, "DATA", Path("data").absolute())
    Path("data").mkdir()


def ids(tokens):
    return [] if tokens is None else tokens.gather(np.array([0]), len(tokens))[0].tolist()


def open_bytes(name, **more):
    options = {"tokenizer": "bytes", "block_size": 8} | more
    return open_dataset(str(name), **options)


# Splits


@pytest.mark.parametrize(
    ("tokenizer", "fraction", "text"),
    [("bytes", 0.1, "abcde"), ("bytes", 0.3, "Lorem ipsum " * 40), ("char", 0.1, "or not\n" * 30)],
)
def test_a_single_text_is_split_at_its_last_tokens(tokenizer, fraction, text):
    """Characters as nanoGPT splits them; two tokens at least are left to validate."""
    write("a.txt", text)
    dataset = open_bytes("a.txt", tokenizer=tokenizer, val_fraction=fraction)
    chars = sorted(set(text))
    whole = [*text.encode(), EOT] if tokenizer == "bytes" else [chars.index(c) for c in text]
    keep = min(int(len(whole) * (1 - fraction)), len(whole) - 2)
    assert (ids(dataset.train), ids(dataset.val)) == (whole[:keep], whole[keep:])
    assert (dataset.document_count, dataset.tokenizer.name) == (1, tokenizer)
    assert dataset.text_vocab_size == (257 if tokenizer == "bytes" else len(chars))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "folder", "lines.txt"])
def test_characters_have_a_line_end_between_documents(name):
    texts = [f"text {i}" for i in range(9)]
    for i, text in enumerate(texts):
        write(f"folder/{i}.txt", text)
    write("rows.csv", "\n".join(["text", *texts]))
    write("rows.jsonl", [{"text": text} for text in texts])
    write("lines.txt", "\n".join(texts))
    column = "line" if name == "lines.txt" else "text"
    without = CharTokenizer("tex 0123456789")  # a model's own, which has no line end
    for tokenizer, between in (("char", "\n"), (without, "")):
        dataset = open_bytes(name, tokenizer=tokenizer, text_column=column)
        whole = [*ids(dataset.train), *ids(dataset.val)]
        assert dataset.tokenizer.decode(whole) == "".join(text + between for text in texts)


@pytest.mark.parametrize("count, fraction", [(20, 0.001), (300, 0.1)])
def test_many_documents_go_whole_to_one_side(count, fraction):
    texts = [f"document {i} " * (1 + i % 7) for i in range(count)]
    write("a.jsonl", [{"text": text} for text in texts])
    dataset = open_bytes("a.jsonl", val_fraction=fraction)
    sides = [], []
    first = Documents("a.jsonl").first_indices
    for i, text in enumerate(texts):
        sides[is_for_validation(i, first, fraction)].extend([*text.encode(), EOT])
    assert (ids(dataset.train), ids(dataset.val)) == sides
    assert dataset.document_count == count
    validated = sides[1].count(EOT)
    assert abs(validated - count * fraction) <= 1 + 3 * (count * fraction) ** 0.5
    assert validated >= 1


def test_documents_that_are_added_later_do_not_change_the_split():
    def picked(count):
        write("a.jsonl", [{"text": "x"}] * count)
        first = Documents("a.jsonl").first_indices
        return [i for i in range(count) if is_for_validation(i, first, 0.1)]

    assert picked(50) == [i for i in picked(300) if i < 50]


@pytest.mark.parametrize("text", ["", "a", "ab"])
def test_too_little_text_is_refused_and_leaves_no_data_set(text):
    write("a.txt", text)
    refused("too short", open_bytes, "a.txt")
    assert not [path for path in Path("data/cache").iterdir() if path.suffix != ".tmp"]
    write("a.txt", text + "and more than that")
    assert len(open_bytes("a.txt").train) > 8


def test_answers_that_are_all_blank_are_too_short():
    rows = [{"question": "Hi?", "answer": " "}] * 30
    refused(
        "too short .* 30 blank texts or answers were left out", open_bytes, write("a.jsonl", rows)
    )


# The cache


def test_the_cache_is_made_once_and_again_when_anything_changes(monkeypatch):
    making = Mock(wraps=prepare_texts)
    monkeypatch.setattr(dataset_module, "prepare_texts", making)
    write("my text.txt", "some text, long enough for all of this " * 3)
    write("rows.jsonl", rows_of([("a", "b")] * 30))

    def folder(*args, **more):
        making.reset_mock()
        return open_bytes(*args, **more).folder, making.call_count

    first, fresh = folder("my text.txt")
    assert fresh and first.name.startswith("my-text-")
    assert folder("my text.txt", block_size=16) == (first, 0)
    assert folder(Path("my text.txt").absolute()) == (first, 0)
    assert folder("my text.txt", tokenizer=ByteTokenizer()) == (first, 0)
    letters = " ,aefghilmnorstux"
    for change in (
        {"val_fraction": 0.2},
        {"tokenizer": "char"},
        {"tokenizer": CharTokenizer(letters + "x")},
        {"tokenizer": CharTokenizer(letters + "z")},
        {"text_column": "line"},
    ):
        other, fresh = folder("my text.txt", **change)
        assert fresh and other != first
    os.utime("my text.txt", (0, 0))
    assert folder("my text.txt") == (first, 0)
    write("my text.txt", "some text, long enough for all of that " * 3)
    assert folder("my text.txt")[1]
    write("table.txt", "text\n" + "a row of some words\n" * 30)
    assert folder("table.txt")[1]
    Path("table.txt").rename("table.csv")
    assert folder("table.csv")[1]  # the same bytes, read as something else
    rows, fresh = folder("rows.jsonl")
    assert fresh and folder("rows.jsonl") == (rows, 0)
    assert folder("rows.jsonl", block_size=9)[1]
    assert folder("rows.jsonl", encoding="latin-1")[1]
    monkeypatch.setattr(dataset_module, "FORMAT", "another version's")
    assert folder("rows.jsonl")[1]
    assert not list(Path("data/cache").glob("*.tmp"))


def test_what_was_read_and_left_out_is_said_each_time():
    write("texts/a.md", "some text, long enough for all of this " * 3)
    write("texts/test.jsonl", [{"text": " "}])
    write("texts/train.jsonl", [{"text": "another text, as long as this"}])
    write("texts/c.pdf", b"\0")
    for dataset in (open_bytes("texts"), open_bytes("texts")):  # the second time out of the cache
        assert dataset.notes == [
            "texts: 3 files are read: 2 .jsonl, 1 .md; 1 without a text are not: 1 .pdf.",
            "The files named test and train are read as one data set, which is split anew. Move "
            "those away that should not be trained on.",
            "1 blank texts or answers were left out.",
        ]
        assert len(dataset.train) > 8
    # A folder in data/ without a prepare.py.
    write("data/mine/a.txt", "some text, long enough for all of this " * 3)
    assert len(open_bytes("mine").train) > 8
    chats = [CHAT[:1], CHAT[:3], CHAT[:2], CHAT[:2]]
    write("chats.jsonl", [{"messages": chat} for chat in chats])
    assert open_bytes("chats.jsonl", block_size=64).notes == [
        "1 conversations end with a message that has no answer. It was left out.",
        "1 blank texts or answers were left out.",
    ]


def test_unknown_characters_of_a_text_are_refused():
    write("own.txt", "abc " * 20 + "é" + " abc" * 100 + "漢")
    refused(
        r"know 2 of the text's characters: 'é' \(U\+00E9\), '漢'",
        open_bytes,
        "own.txt",
        tokenizer=CharTokenizer(" abc"),
    )


# Killed and continued


def killed_at(call, work, folder):
    """Run work(folder) in a process that is killed before its call number `call` on a file.

    Returns True if it was killed, False if it came to its end first.
    """
    calls = itertools.count(1)

    def counted(function):
        def counting(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counting

    child = os.fork()
    if child == 0:
        try:
            for owner, name in (
                (ShardWriter, "add"),
                (ShardWriter, "flush"),
                (prepare, "write_atomically"),
                (os, "replace"),
            ):
                setattr(owner, name, counted(getattr(owner, name)))
            work(folder)
            os._exit(0)
        finally:
            os._exit(1)  # an error must not lead the child back into pytest
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("kind", ["one text", "many documents"])
def test_killed_anywhere_and_continued_gives_the_same_shards(monkeypatch, kind):
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 1000)
    monkeypatch.setattr(prepare, "PIECES_AT_ONCE", 2)
    monkeypatch.setattr(prepare, "SAVE_TOKENS", 1100)
    # A kill, unlike a power cut, loses no write.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("data.texts.PIECE_CHARACTERS", 300)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd \n"), rng.integers(0, 500))) for _ in range(22)]
    rows = [{"text": text} for text in texts]
    one = kind == "one text"
    source = write("a.txt", "".join(texts[:12])) if one else write("a.jsonl", rows)

    class Counting(ByteTokenizer):
        encoded = 0

        def encode(self, text, before=""):
            Counting.encoded += len(text.encode())
            return super().encode(text)

    def work(folder):
        Counting.encoded = 0
        prepare_texts(Documents(source), Counting(), folder, max_tokens=4000)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}

    expected = work(Path("unbroken"))
    assert len(expected) >= 5 and "progress.json" not in expected
    again = 0
    for call in range(1, 500, 7):
        folder = Path(f"killed-{call}")
        if not killed_at(call, work, folder):
            break
        progress = folder / "progress.json"
        done = 0
        if progress.exists():
            done = read_json(progress)["next"]
            # As an older version wrote it.
            write(progress, progress.read_text().replace('"count"', '"documents"'))
        assert work(folder) == expected
        assert Counting.encoded <= sum(len(text) for text in texts[done:])
        again += done > 0
    assert call > 12
    assert again > 1 or one  # which begins anew


def test_the_hub_is_not_asked_for_what_is_there(monkeypatch):
    rows = [("hf", {"text": f"row {i}"}) for i in range(50)]
    monkeypatch.setattr("data.texts.hub_rows", lambda source: iter(rows))
    first = open_bytes("hf:owner/name")
    assert first.document_count == 50 and first.folder.name.startswith("name-")
    monkeypatch.setattr("data.texts.hub_rows", None)
    assert open_bytes("hf:owner/name", block_size=4).folder == first.folder


def test_an_unfinished_data_set_is_not_opened():
    write(f"{shards('x')}/progress.json", "{}")
    refused("not finished", open_bytes, "x")


@pytest.mark.parametrize("content", [b"[", b"[]", b"5", b"\xff\xfe\0"])
def test_a_meta_json_that_is_no_object_is_refused(content):
    write(f"{byte_shards('x')}/meta.json", content)
    refused(r"meta\.json is no JSON object\. Prepare", open_bytes, "x")


def test_a_locked_folder_is_reported_as_data_preparation():
    write("a.txt", "long enough to be split in two")
    folder = open_bytes("a.txt").folder
    folder.rename(building := folder.with_name(f"{folder.name}.tmp"))
    with lock_folder(building, "held by the test"):
        refused(f"Another process is preparing the data in {building}", open_bytes, "a.txt")


def test_preparing_a_longer_text_takes_no_more_memory(monkeypatch):
    monkeypatch.setattr("data.texts.PIECE_CHARACTERS", 5_000)
    monkeypatch.setattr("data.shards.CHUNK_TOKENS", 50_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    peaks = []
    for lines in (50_000, 100_000):  # 2.2 and 4.4 MB
        write("a.txt", "All work and no play makes Jack a dull boy.\n" * lines)
        tracemalloc.start()
        prepare_texts(Documents("a.txt"), ByteTokenizer(), Path(f"{lines}"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6


# Instruction data


def rows_of(pairs):
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def test_examples_are_packed_whole_and_only_answers_are_targets():
    """No example is split, lost or doubled; a row is at most 7% padding."""
    rng = np.random.default_rng(1)
    words = lambda: "".join(rng.choice(list("abcdefgh "), rng.integers(1, 30))) + "."  # noqa: E731
    pairs = [(f"<{i}:{words()}>", words()) for i in range(300)]
    block = 160
    dataset = open_bytes(write("a.jsonl", rows_of(pairs)), block_size=block)
    found = collections.Counter()
    for split in (dataset.train, dataset.val):
        tokens = np.array(ids(split))
        marks = np.array(ids(split.mask))
        rows = TrainWindows(split, block, seed=0).per_epoch
        assert len(tokens) == rows * block + 1
        assert ((marks == EXAMPLE_START) == (tokens == ord("<"))).all()  # there an example begins
        used = 0
        for start in range(0, len(tokens) - 1, block):
            row = tokens[start : start + block].tolist()
            used += len("".join(map(chr, row)).rstrip(chr(EOT))) + 1
            # An answer follows ">" and ends with the end token. The rest is prompt or padding.
            inside = False
            for token, mark in zip(row, marks[start : start + block], strict=True):
                assert bool(mark & TRAINED) == inside
                inside = (inside or token == ord(">")) and token != EOT
            found.update(filter(None, dataset.tokenizer.decode(row).split("<|endoftext|>")))
        assert used > (rows - 1) * block * 0.93
    assert found == collections.Counter(p + c for p, c in pairs)
    assert not dataset.notes
    assert dataset.document_count == len(pairs)
    assert 0.05 < len(dataset.val) / len(dataset.train) < 0.2


def test_the_first_token_of_an_example_is_never_a_target():
    """And an example of one token is left out, because nothing is trained in it."""
    rows = rows_of([("", "abc")] * 4 + [("a", "b")] * 6)
    dataset = open_bytes(write("a.jsonl", rows[:4]))
    assert ids(dataset.train) == [*b"abc", EOT, *b"abc", EOT, *b"abc", EOT, *[EOT] * 5]
    assert ids(dataset.train.mask) == [2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 0, 0, 0, 0, 0]
    dataset = open_bytes(write("a.jsonl", rows), tokenizer="char", block_size=3)
    assert dataset.tokenizer.decode(ids(dataset.train)).count("ab\n") > 3  # characters' line end


def test_examples_too_long_are_cut_and_counted():
    pairs = [("ab", "cd"), ("ab", "c" * 20), ("a" * 12, "b"), ("a", "b")] * 5
    dataset = open_bytes(write("a.jsonl", rows_of(pairs)), block_size=10, val_fraction=0.5)
    assert dataset.notes[-1].startswith("10 of 20 examples")
    tokens = ids(dataset.train)[:-1] + ids(dataset.val)[:-1]
    rows = np.reshape(tokens, (-1, 10)).tolist()
    assert [*b"abcccccccc"] in rows
    assert not any(row[0] == row[2] == ord("a") for row in rows)  # nothing would be trained in it


def test_a_data_set_of_conversations_keeps_the_chat_template():
    """Without an end token a line end follows each answer: the template and a warning say so."""
    write("a.jsonl", [{"messages": CHAT}] * 25)
    without_end = tokenizers.ByteLevelBPETokenizer()
    without_end.train_from_iterator(["Hi Ho"], vocab_size=260, show_progress=False)
    for tokenizer, end in (
        ("bytes", "<|endoftext|>"),
        ("char", "\n"),
        (Tokenizer(without_end._tokenizer), "\n"),
    ):
        dataset = open_bytes("a.jsonl", tokenizer=tokenizer, block_size=128)
        template = CHAT_TEMPLATE if end != "\n" else chat_template("messages", False)
        assert dataset.tokenizer.chat_template == template
        pairs = zip(ids(dataset.train), ids(dataset.train.mask), strict=True)
        text = dataset.tokenizer.decode([token for token, mark in pairs if mark == TRAINED])
        assert set(text.split(end)) == {"Ho", ""}
        stops = [note.partition("--stop=")[2] for note in dataset.notes]
        assert stops == (["'\\n'."] if end == "\n" else [])


@pytest.mark.parametrize("blank", ["first", "always", "never", "Prepend"])
def test_the_ids_are_those_of_transformers_for_the_whole(monkeypatch, blank):
    """Also if the tokenizer begins each text with a token, or with a blank."""
    library = metaspace()
    scheme = blank.replace("Prepend", "never")
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if blank == "Prepend":
        library.normalizer = normalizers.Prepend("▁")
    library.add_special_tokens(["<s>", "</s>"])
    begin = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", begin)])
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
    theirs.save_pretrained("model")
    ours = load_tokenizer(Path("model"))
    monkeypatch.setattr("data.texts.PIECE_CHARACTERS", 100)
    text = "Köln ist alt.\nDie Straße ist süß.\n" * 20
    write("text.txt", text)
    dataset = open_bytes("text.txt", tokenizer=ours)
    assert ids(dataset.train) + ids(dataset.val) == [*theirs(text).input_ids, theirs.eos_token_id]
    dataset = open_bytes(
        write("a.jsonl", [{"messages": CHAT}] * 25), tokenizer=ours, block_size=256
    )
    theirs.chat_template = dataset.tokenizer.chat_template
    whole = theirs.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert ids(dataset.train)[: len(whole)] == whole


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"text": "so long that it is cut"}] * 25,
            "is left out, because the data are plain text",
        ),
        (rows_of([("Hi\n", "Ho")] * 25), "gives way to that of the data: "),
    ],
)
def test_a_models_chat_template_is_replaced_with_a_line(rows, said):
    name = write("a.jsonl", rows)
    for template in ("{{ messages }}", "{{ messages }}", None):  # new, and twice out of the cache
        model = CharTokenizer(" \nHabcdefghilnoprstu")
        model.chat_template = template
        dataset = open_bytes(name, tokenizer=model, block_size=16)
        told = f"The model's chat template {said}" in "".join(dataset.notes)
        assert told == (template is not None)
        ending = chat_template("prompt", False, "\n")
        assert dataset.tokenizer.chat_template == (None if "text" in rows[0] else ending)


def test_prompts_keep_their_common_ending_as_a_template():
    pairs = [(f"What is {i}?\n", "A number.") for i in range(30)]
    odd = ("What is 7?", "A number.")
    for more, ending, notes in (
        ([], "\n", []),
        ([odd], "", ["The prompts have no common ending,"]),
    ):
        dataset = open_bytes(write("a.jsonl", rows_of(pairs + more)), block_size=64)
        assert dataset.tokenizer.chat_template == chat_template("prompt", True, ending)
        assert [text[:34] for text in dataset.notes] == notes


def test_rows_of_another_length_are_refused():
    folder = Path("data/mine")
    name = write("a.jsonl", rows_of([("a", "b")] * 30))
    prepare_texts(Documents(name), ByteTokenizer(), folder, block_size=16)
    assert len(open_bytes("mine", block_size=16).val) == 17
    refused("--block_size=16", open_bytes, "mine", block_size=8)


# What lies there already


def shards(folder, top=9):
    for split in ("train", "val"):
        write_shard(f"{folder}/{split}_000000.bin", np.arange(top, dtype=UINT16))
    return folder


def byte_shards(folder):
    ByteTokenizer().save(Path(shards(folder)))
    return folder


def test_a_name_in_data_comes_first_and_a_missing_one_names_the_nearest(monkeypatch):
    byte_shards("data/mine")
    write("mine", "a file of the same name")
    assert open_bytes("mine").folder == Path("data/mine").absolute()
    write("data/mine/prepare.py", "")
    refused("no data set 'mime'.* one of mine, a file", open_bytes, "mime")
    monkeypatch.chdir("data/mine")
    refused(r"\.\.: 1 files are read", open_bytes, "..")  # of data/
    for name in ("own.txt", "texts/own", "./own"):
        refused("no such file or folder exists", open_bytes, name)
    Path("../bare").mkdir()
    refused(r"bare holds no text and no val shards", open_bytes, "bare")


@pytest.mark.parametrize("name", ["", "\0", "~/a/b", "a/b/c", "../a", "x" * 5000, "\ud800", "hf"])
def test_an_impossible_name_is_refused(name):
    refused("no data set|too long", open_bytes, name)


def test_only_our_small_data_sets_prepare_themselves(monkeypatch):
    """A stranger's prepare.py is not executed. nanoGPT's works when it is imported."""
    ran = Path("ran").absolute()
    write("data/theirs/prepare.py", f"import os\nos.mkdir({str(ran)!r})\n")
    for name in ("theirs", "data/theirs/"):
        refused(r"Run: python .*theirs/prepare\.py .*--dataset=my\.t", open_bytes, name)
    assert not ran.exists()
    write("data/shakespeare_char/prepare.py", "")
    monkeypatch.setattr(shakespeare_char, "read_input", lambda: "To be or not to be. " * 9)
    assert len(open_dataset("shakespeare_char", block_size=8).train) == 162


def test_a_models_tokenizer_lies_beside_its_data():
    """A later run of the model finds them, and another model is refused."""
    write("a.txt", "the cat is on the mat. " * 40)
    own = Tokenizer(tiny_library())
    dataset = open_dataset("a.txt", tokenizer=own, block_size=8)
    assert dataset.tokenizer is own and dataset.text_vocab_size == own.vocab_size
    alone = open_dataset(str(dataset.folder), block_size=8)
    assert alone.tokenizer.decode(ids(alone.train)) == own.decode(ids(dataset.train))
    assert open_dataset("a.txt", tokenizer=alone.tokenizer, block_size=8).folder == dataset.folder
    for other in ("bytes", "char", CharTokenizer("abc")):
        refused(
            "made with the tokenizer model, not with",
            open_dataset,
            str(dataset.folder),
            tokenizer=other,
            block_size=8,
        )


def test_nanogpts_pickle_is_not_opened():
    class Trap:
        def __reduce__(self):
            return (os.mkdir, ("sprung",))

    np.arange(40, dtype=UINT16).tofile("train.bin")
    np.arange(12, dtype=UINT16).tofile("val.bin")
    write("meta.pkl", pickle.dumps(Trap()))
    dataset = open_dataset(".", block_size=8)
    assert (dataset.text_vocab_size, dataset.tokenizer) == (40, None)
    assert (len(dataset.train), len(dataset.val)) == (40, 12)
    assert "never opened" in dataset.notes[0]
    assert not Path("sprung").exists()


def test_shards_without_meta_json_are_taken_for_gpt2s(monkeypatch):
    monkeypatch.setattr(dataset_module, "get_tokenizer", {"gpt2": tiny}.get)
    dataset = open_dataset(shards("x", tiny.vocab_size), block_size=8)
    assert dataset.tokenizer is tiny and dataset.text_vocab_size == tiny.vocab_size
    refused("the vocabulary has ids", open_dataset, shards("x", tiny.vocab_size + 1), block_size=8)


def test_shards_without_training_split_can_be_evaluated():
    Path(byte_shards("x"), "train_000000.bin").unlink()
    dataset = open_bytes("x")
    assert dataset.train is None and len(dataset.val) == 9
