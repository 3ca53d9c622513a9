"""Data sets by name and path, and the way from texts to shards.

They are compared with splits and rows that are put together by hand.
"""

import collections
import functools
import json
import os
import pickle
import signal
import tracemalloc

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
from gpt12.errors import UserError
from gpt12.files import lock_folder
from tests.helpers import write_shard
from tests.test_tokenizers import metaspace
from tests.tiny_bpe import tiny, tiny_library

EOT = 256


@pytest.fixture(autouse=True)
def house(tmp_path, monkeypatch):
    """An empty data/ of its own for each test, and a working directory beside it."""
    monkeypatch.setattr(dataset_module, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids(tokens):
    return [] if tokens is None else tokens.gather(np.array([0]), len(tokens))[0].tolist()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def open_bytes(name, **more):
    options = {"tokenizer": "bytes", "block_size": 8} | more
    return open_dataset(str(name), **options)


# Splits


@pytest.mark.parametrize(
    ("tokenizer", "fraction", "text"),
    [("bytes", 0.1, "abcde"), ("bytes", 0.3, "Lorem ipsum " * 40), ("char", 0.1, "or not\n" * 30)],
)
def test_a_single_text_is_split_at_its_last_tokens(house, tokenizer, fraction, text):
    """Characters as nanoGPT splits them; two tokens at least are left to validate."""
    (house / "a.txt").write_text(text)
    dataset = open_bytes("a.txt", tokenizer=tokenizer, val_fraction=fraction)
    chars = sorted(set(text))
    whole = [*text.encode(), EOT] if tokenizer == "bytes" else [chars.index(c) for c in text]
    keep = min(int(len(whole) * (1 - fraction)), len(whole) - 2)
    assert (ids(dataset.train), ids(dataset.val)) == (whole[:keep], whole[keep:])
    assert (dataset.document_count, dataset.tokenizer.name) == (1, tokenizer)
    assert dataset.text_vocab_size == (257 if tokenizer == "bytes" else len(chars))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "folder", "lines.txt"])
def test_characters_have_a_line_end_between_documents(house, name):
    texts = [f"text {i}" for i in range(9)]
    (house / "folder").mkdir()
    for i, text in enumerate(texts):
        (house / f"folder/{i}.txt").write_text(text)
    (house / "rows.csv").write_text("\n".join(["text", *texts]))
    jsonl(house / "rows.jsonl", [{"text": text} for text in texts])
    (house / "lines.txt").write_text("\n".join(texts))
    column = "line" if name == "lines.txt" else "text"
    dataset = open_bytes(name, tokenizer="char", text_column=column)
    whole = [*ids(dataset.train), *ids(dataset.val)]
    assert dataset.tokenizer.decode(whole) == "".join(f"{text}\n" for text in texts)
    without = CharTokenizer("tex 0123456789")  # a model's own, which has no line end
    again = open_bytes(name, tokenizer=without, text_column=column)
    assert without.decode([*ids(again.train), *ids(again.val)]) == "".join(texts)


@pytest.mark.parametrize("count, fraction", [(20, 0.001), (300, 0.1)])
def test_many_documents_go_whole_to_one_side(house, count, fraction):
    texts = [f"document {i} " * (1 + i % 7) for i in range(count)]
    source = jsonl(house / "a.jsonl", [{"text": text} for text in texts])
    dataset = open_bytes(source, val_fraction=fraction)
    sides = collections.Counter()
    parts = {"train": [], "val": []}
    first = Documents(house / "a.jsonl").first_indices
    for i, text in enumerate(texts):
        side = "val" if is_for_validation(i, first, fraction) else "train"
        parts[side] += [*text.encode(), EOT]
        sides[side] += 1
    assert (ids(dataset.train), ids(dataset.val)) == (parts["train"], parts["val"])
    assert dataset.document_count == count
    assert abs(sides["val"] - count * fraction) <= 1 + 3 * (count * fraction) ** 0.5
    assert sides["val"] >= 1


def test_documents_that_are_added_later_do_not_change_the_split(house):
    def picked(count):
        jsonl(house / "a.jsonl", [{"text": "x"}] * count)
        first = Documents(house / "a.jsonl").first_indices
        return [i for i in range(count) if is_for_validation(i, first, 0.1)]

    assert picked(50) == [i for i in picked(300) if i < 50]


@pytest.mark.parametrize("text", ["", "a", "ab"])
def test_too_little_text_is_refused_and_leaves_no_data_set(house, text):
    (house / "a.txt").write_text(text)
    with pytest.raises(UserError, match="too short"):
        open_bytes("a.txt")
    assert not [path for path in (house / "data" / "cache").iterdir() if path.suffix != ".tmp"]
    (house / "a.txt").write_text(text + "and more than that")
    assert len(open_bytes("a.txt").train) > 8


def test_answers_that_are_all_blank_are_too_short(house):
    rows = [{"question": "Hi?", "answer": " "}] * 30
    with pytest.raises(UserError, match="too short .* 30 blank texts or answers were left out"):
        open_bytes(jsonl(house / "a.jsonl", rows))


# The cache


def test_the_cache_is_made_once_and_again_when_anything_changes(house, monkeypatch):
    made = []

    def prepare_and_note(documents, *args, **kwargs):
        made.append(documents.source)
        return prepare_texts(documents, *args, **kwargs)

    monkeypatch.setattr(dataset_module, "prepare_texts", prepare_and_note)
    (house / "my text.txt").write_text("some text, long enough for all of this " * 3)
    (house / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30)

    def folder(*args, **more):
        before = len(made)
        dataset = open_bytes(*args, **more)
        return dataset.folder, len(made) - before

    first, fresh = folder("my text.txt")
    assert fresh and first.name.startswith("my-text-")
    assert folder("my text.txt", block_size=16) == folder(house / "my text.txt") == (first, 0)
    assert folder("my text.txt", tokenizer=ByteTokenizer()) == (first, 0)
    letters = "".join(sorted(set("some text, long enough for all of this ")))
    for change in (
        {"val_fraction": 0.2},
        {"tokenizer": "char"},
        {"tokenizer": CharTokenizer(letters + "x")},
        {"tokenizer": CharTokenizer(letters + "z")},
        {"text_column": "line"},
    ):
        other, fresh = folder("my text.txt", **change)
        assert fresh and other != first
    os.utime(house / "my text.txt", (0, 0))
    assert folder("my text.txt") == (first, 0)
    (house / "my text.txt").write_text("some text, long enough for all of that " * 3)
    assert folder("my text.txt")[1]
    (house / "table.txt").write_text("text\n" + "a row of some words\n" * 30)
    assert folder("table.txt")[1]
    (house / "table.txt").rename(house / "table.csv")
    assert folder("table.csv")[1]  # the same bytes, read as something else
    rows, fresh = folder("rows.jsonl")
    assert fresh and folder("rows.jsonl") == (rows, 0)
    assert folder("rows.jsonl", block_size=9)[1]
    assert folder("rows.jsonl", encoding="latin-1")[1]
    monkeypatch.setattr(dataset_module, "FORMAT", "another version's")
    assert folder("rows.jsonl")[1]
    assert not list((house / "data" / "cache").glob("*.tmp"))


def test_what_was_read_and_left_out_is_said_each_time(house):
    (house / "texts").mkdir()
    (house / "texts/a.md").write_text("some text, long enough for all of this " * 3)
    jsonl(house / "texts/test.jsonl", [{"text": " "}])
    jsonl(house / "texts/train.jsonl", [{"text": "another text, as long as this"}])
    (house / "texts/c.pdf").write_bytes(b"\0")
    for dataset in (open_bytes("texts"), open_bytes("texts")):  # the second time out of the cache
        assert dataset.notes == [
            "texts: 3 files are read: 2 .jsonl, 1 .md; 1 without a text are not: 1 .pdf.",
            "The files named test and train are read as one data set, which is split anew. Move "
            "those away that should not be trained on.",
            "1 blank texts or answers were left out.",
        ]
        assert len(dataset.train) > 8
    (house / "data/mine").mkdir()  # a folder in data/ without a prepare.py
    (house / "data/mine/a.txt").write_text("some text, long enough for all of this " * 3)
    assert len(open_bytes("mine").train) > 8
    question, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    chats = [[question], [question, answer, question], [question, answer], [question, answer]]
    jsonl(house / "chats.jsonl", [{"messages": chat} for chat in chats])
    assert open_bytes("chats.jsonl", block_size=64).notes == [
        "1 conversations end with a message that has no answer. It was left out.",
        "1 blank texts or answers were left out.",
    ]


def test_unknown_characters_of_a_text_are_refused(house):
    (house / "own.txt").write_text("abc " * 20 + "é" + " abc" * 100 + "漢")
    with pytest.raises(UserError, match=r"know 2 of the text's characters: 'é' \(U\+00E9\), '漢'"):
        open_bytes("own.txt", tokenizer=CharTokenizer(" abc"))


# Killed and continued


def killed_at(call, work):
    """Run `work` in a process that is killed before its call number `call` that touches a file.

    Returns True if it was killed, False if it came to its end first.
    """
    calls = 0

    def counted(function):
        def counting(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
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
            work()
            os._exit(0)
        finally:
            os._exit(1)  # an error must not lead the child back into pytest
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("kind", ["one text", "many documents"])
def test_killed_anywhere_and_continued_gives_the_same_shards(house, monkeypatch, kind):
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 1000)
    monkeypatch.setattr(prepare, "PIECES_AT_ONCE", 2)
    monkeypatch.setattr(prepare, "SAVE_TOKENS", 1100)
    # A kill, unlike a power cut, loses no write.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("data.texts.PIECE_CHARACTERS", 300)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd \n"), rng.integers(0, 500))) for _ in range(22)]
    if kind == "one text":
        source = "a.txt"
        (house / source).write_text("".join(texts[:12]))
    else:
        source = jsonl(house / "a.jsonl", [{"text": text} for text in texts])

    class Counting(ByteTokenizer):
        encoded = 0

        def encode(self, text, before=""):
            Counting.encoded += len(text.encode())
            return super().encode(text)

    def work(folder):
        Counting.encoded = 0
        prepare_texts(Documents(source), Counting(), folder, max_tokens=4000)
        return contents(folder)

    expected = work(house / "unbroken")
    assert len(expected) >= 5 and "progress.json" not in expected
    again = 0
    for call in range(1, 500, 7):
        folder = house / f"killed-{call}"
        if not killed_at(call, functools.partial(work, folder)):
            break
        progress = folder / "progress.json"
        done = 0
        if progress.exists():
            done = json.loads(progress.read_bytes())["next"]
            # As an older version wrote it.
            progress.write_text(progress.read_text().replace('"count"', '"documents"'))
        assert work(folder) == expected
        assert Counting.encoded <= sum(len(text) for text in texts[done:])
        again += done > 0
    assert call > 12
    assert again > 1 or kind == "one text"  # which begins anew


def test_the_hub_is_not_asked_for_what_is_there(house, monkeypatch):
    rows = [("hf", {"text": f"row {i}"}) for i in range(50)]
    monkeypatch.setattr("data.texts.hub_rows", lambda source: iter(rows))
    first = open_bytes("hf:owner/name")
    assert first.document_count == 50 and first.folder.name.startswith("name-")
    monkeypatch.setattr("data.texts.hub_rows", None)
    assert open_bytes("hf:owner/name", block_size=4).folder == first.folder


def test_an_unfinished_data_set_is_not_opened(house):
    write_shard(house / "train_000000.bin", np.arange(9, dtype=UINT16))
    write_shard(house / "val_000000.bin", np.arange(9, dtype=UINT16))
    (house / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        open_bytes(house)


@pytest.mark.parametrize("content", [b"[", b"[]", b"5", b"\xff\xfe\0"])
def test_a_meta_json_that_is_no_object_is_refused(house, content):
    shards(house / "x", tokenizer=ByteTokenizer())
    (house / "x/meta.json").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json is no JSON object\. Prepare"):
        open_bytes(house / "x")


def test_a_locked_folder_is_reported_as_data_preparation(house):
    (house / "a.txt").write_text("long enough to be split in two")
    folder = open_bytes("a.txt").folder
    folder.rename(building := folder.with_name(f"{folder.name}.tmp"))
    with lock_folder(building, "held by the test"), pytest.raises(UserError) as caught:
        open_bytes("a.txt")
    assert f"Another process is preparing the data in {building}" in str(caught.value)


def test_preparing_a_longer_text_takes_no_more_memory(house, monkeypatch):
    monkeypatch.setattr("data.texts.PIECE_CHARACTERS", 5_000)
    monkeypatch.setattr("data.shards.CHUNK_TOKENS", 50_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    peaks = []
    for lines in (50_000, 100_000):  # 2.2 and 4.4 MB
        (house / "a.txt").write_text("All work and no play makes Jack a dull boy.\n" * lines)
        tracemalloc.start()
        prepare_texts(Documents("a.txt"), ByteTokenizer(), house / f"{lines}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6


# Instruction data


def test_examples_are_packed_whole_and_only_answers_are_targets(house):
    """No example is split, lost or doubled; a row is at most 7% padding."""
    rng = np.random.default_rng(1)
    words = lambda: "".join(rng.choice(list("abcdefgh "), rng.integers(1, 30))) + "."  # noqa: E731
    pairs = [(f"<{i}:{words()}>", words()) for i in range(300)]
    block = 160
    name = jsonl(house / "a.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    dataset = open_bytes(name, block_size=block)
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


def test_the_first_token_of_an_example_is_never_a_target(house):
    """And an example of one token is left out, because nothing is trained in it."""
    rows = [{"prompt": "", "completion": "abc"}] * 4 + [{"prompt": "a", "completion": "b"}] * 6
    dataset = open_bytes(jsonl(house / "a.jsonl", rows[:4]))
    assert ids(dataset.train) == [*b"abc", EOT, *b"abc", EOT, *b"abc", EOT, *[EOT] * 5]
    assert ids(dataset.train.mask) == [2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 0, 0, 0, 0, 0]
    dataset = open_bytes(jsonl(house / "a.jsonl", rows), tokenizer="char", block_size=3)
    assert dataset.tokenizer.decode(ids(dataset.train)).count("ab\n") > 3  # characters' line end


def test_examples_too_long_are_cut_and_counted(house):
    pairs = [("ab", "cd"), ("ab", "c" * 20), ("a" * 12, "b"), ("a", "b")] * 5
    name = jsonl(house / "a.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    dataset = open_bytes(name, block_size=10, val_fraction=0.5)
    assert dataset.notes[-1].startswith("10 of 20 examples")
    rows = []
    for split in (dataset.train, dataset.val):
        rows += np.reshape(ids(split)[:-1], (-1, 10)).tolist()
    assert [*b"abcccccccc"] in rows
    assert not any(row[0] == row[2] == ord("a") for row in rows)  # nothing would be trained in it


def test_a_data_set_of_conversations_keeps_the_chat_template(house):
    """Without an end token a line end follows each answer: the template and a warning say so."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 2
    jsonl(house / "a.jsonl", [{"messages": chat}] * 25)
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
def test_the_ids_are_those_of_transformers_for_the_whole(house, monkeypatch, blank):
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
    ours = load_tokenizer(house / "model")
    monkeypatch.setattr("data.texts.PIECE_CHARACTERS", 100)
    text = "Köln ist alt.\nDie Straße ist süß.\n" * 20
    (house / "text.txt").write_text(text, "utf-8")
    dataset = open_bytes("text.txt", tokenizer=ours)
    assert ids(dataset.train) + ids(dataset.val) == [*theirs(text).input_ids, theirs.eos_token_id]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 2
    dataset = open_bytes(
        jsonl(house / "a.jsonl", [{"messages": chat}] * 25), tokenizer=ours, block_size=256
    )
    theirs.chat_template = dataset.tokenizer.chat_template
    whole = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids(dataset.train)[: len(whole)] == whole


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"text": "so long that it is cut"}] * 25,
            "is left out, because the data are plain text",
        ),
        ([{"prompt": "Hi\n", "completion": "Ho"}] * 25, "gives way to that of the data: "),
    ],
)
def test_a_models_chat_template_is_replaced_with_a_line(house, rows, said):
    name = jsonl(house / "a.jsonl", rows)
    for template in ("{{ messages }}", "{{ messages }}", None):  # new, and twice out of the cache
        model = CharTokenizer(" \nHabcdefghilnoprstu")
        model.chat_template = template
        dataset = open_bytes(name, tokenizer=model, block_size=16)
        told = f"The model's chat template {said}" in "".join(dataset.notes)
        assert told == (template is not None)
        ending = chat_template("prompt", False, "\n")
        assert dataset.tokenizer.chat_template == (None if "text" in rows[0] else ending)


def test_prompts_keep_their_common_ending_as_a_template(house):
    rows = [{"prompt": f"What is {i}?\n", "completion": "A number."} for i in range(30)]
    dataset = open_bytes(jsonl(house / "a.jsonl", rows), block_size=64)
    assert dataset.tokenizer.chat_template == chat_template("prompt", True, "\n")
    assert dataset.notes == []
    rows[7]["prompt"] = "What is 7?"
    dataset = open_bytes(jsonl(house / "a.jsonl", rows), block_size=64)
    assert dataset.tokenizer.chat_template == chat_template("prompt", True, "")
    assert [text[:34] for text in dataset.notes] == ["The prompts have no common ending,"]


def test_rows_of_another_length_are_refused(house):
    folder = house / "data" / "mine"
    name = jsonl(house / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    prepare_texts(Documents(name), ByteTokenizer(), folder, block_size=16)
    assert len(open_bytes("mine", block_size=16).val) == 17
    with pytest.raises(UserError, match="--block_size=16"):
        open_bytes("mine", block_size=8)


# What lies there already


def shards(folder, top=9, tokenizer=None):
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        write_shard(folder / f"{split}_000000.bin", np.arange(top, dtype=UINT16))
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


def test_a_name_in_data_comes_first_and_a_missing_one_names_the_nearest(house, monkeypatch):
    shards(house / "data" / "mine", tokenizer=ByteTokenizer())
    (house / "mine").write_text("a file of the same name")
    assert open_bytes("mine").folder == house / "data" / "mine"
    (house / "data" / "mine" / "prepare.py").write_text("")
    with pytest.raises(UserError, match="no data set 'mime'.* one of mine, a file"):
        open_bytes("mime")
    monkeypatch.chdir(house / "data" / "mine")
    with pytest.raises(UserError, match=r"\.\.: 1 files are read"):  # of data/
        open_bytes("..")
    for name in ("own.txt", "texts/own", "./own"):
        with pytest.raises(UserError, match="no such file or folder exists"):
            open_bytes(name)
    (house / "data" / "bare").mkdir()
    with pytest.raises(UserError, match=r"bare holds no text and no val shards"):
        open_bytes("bare")


@pytest.mark.parametrize("name", ["", "\0", "~/a/b", "a/b/c", "../a", "x" * 5000, "\ud800", "hf"])
def test_an_impossible_name_is_refused(house, name):
    with pytest.raises(UserError, match="no data set|too long"):
        open_bytes(name)


def test_only_our_small_data_sets_prepare_themselves(house, monkeypatch):
    """A stranger's prepare.py is not executed. nanoGPT's works when it is imported."""
    folder = house / "data" / "theirs"
    folder.mkdir()
    (folder / "prepare.py").write_text(f"import os\nos.mkdir({str(house / 'ran')!r})\n")
    for name in ("theirs", "data/theirs/"):
        with pytest.raises(UserError, match=r"Run: python .*theirs/prepare\.py .*--dataset=my\.t"):
            open_bytes(name)
    assert not (house / "ran").exists()
    (house / "data" / "shakespeare_char").mkdir()
    (house / "data" / "shakespeare_char" / "prepare.py").write_text("")
    monkeypatch.setattr(shakespeare_char, "read_input", lambda: "To be or not to be. " * 9)
    assert len(open_dataset("shakespeare_char", block_size=8).train) == 162


def test_a_models_tokenizer_lies_beside_its_data(house):
    """A later run of the model finds them, and another model is refused."""
    (house / "a.txt").write_text("the cat is on the mat. " * 40)
    own = Tokenizer(tiny_library())
    dataset = open_dataset("a.txt", tokenizer=own, block_size=8)
    assert dataset.tokenizer is own and dataset.text_vocab_size == own.vocab_size
    alone = open_dataset(str(dataset.folder), block_size=8)
    assert alone.tokenizer.decode(ids(alone.train)) == own.decode(ids(dataset.train))
    assert open_dataset("a.txt", tokenizer=alone.tokenizer, block_size=8).folder == dataset.folder
    for other in ("bytes", "char", CharTokenizer("abc")):
        with pytest.raises(UserError, match="made with the tokenizer model, not with"):
            open_dataset(str(dataset.folder), tokenizer=other, block_size=8)


def test_nanogpts_pickle_is_not_opened(house):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(house / "sprung"),))

    np.arange(40, dtype=np.uint16).tofile(house / "train.bin")
    np.arange(12, dtype=np.uint16).tofile(house / "val.bin")
    (house / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    dataset = open_dataset(str(house), block_size=8)
    assert dataset.text_vocab_size == 40
    assert dataset.tokenizer is None
    assert len(dataset.train) == 40
    assert len(dataset.val) == 12
    assert "never opened" in dataset.notes[0]
    assert not (house / "sprung").exists()


def test_shards_without_meta_json_are_taken_for_gpt2s(house, monkeypatch):
    monkeypatch.setattr(dataset_module, "get_tokenizer", {"gpt2": tiny}.get)
    dataset = open_dataset(str(shards(house / "x", tiny.vocab_size)), block_size=8)
    assert dataset.tokenizer is tiny and dataset.text_vocab_size == tiny.vocab_size
    with pytest.raises(UserError, match="the vocabulary has ids"):
        open_dataset(str(shards(house / "x", tiny.vocab_size + 1)), block_size=8)


def test_shards_without_training_split_can_be_evaluated(house):
    (shards(house / "x", tokenizer=ByteTokenizer()) / "train_000000.bin").unlink()
    dataset = open_bytes(house / "x")
    assert dataset.train is None and len(dataset.val) == 9
