"""Readers of text: every format, constant pieces, conversations, and broken input.

Conversations are compared with what transformers renders.
"""

import csv
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import texts
from data.texts import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_OF_CHARACTERS,
    CommonEnding,
    Documents,
    Piece,
    chat_pieces,
    prompt_template,
    split_document,
)
from data.tokenizers import ByteTokenizer, CharTokenizer, get_tokenizer
from gpt12.errors import UserError
from tests.harmless import FEW, harmless
from tests.tiny_bpe import tiny

ODD = [
    "plain",
    'quoted "x", with\na line, and ; \t',
    "naïve 猫 🙂",
    "",
    "  \n ",
    "no end\n",
    "long " * 40_000,
]
CHAT = [
    {"role": "system", "content": " Be kind.\n"},
    {"role": "user", "content": "  Hi\n\nthere "},
    {"role": "assistant", "content": "\nHello  you. "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "<|endoftext|> Bye!"},
]


def read(source, *args):
    """The documents, each as one text."""
    documents: list[str] = []
    open_ = False
    for piece in Documents(source, *args):
        assert piece.trained and piece.end == piece.last
        if open_:
            documents[-1] += piece.text
        else:
            documents.append(piece.text)
        open_ = not piece.last
    assert not open_
    return documents


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture
def odd_csv(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text", "body"])
        writer.writerows([i, text, text[::-1]] for i, text in enumerate(ODD))
    return tmp_path / "a.csv"


def test_every_text_format_is_read(tmp_path, odd_csv):
    assert read(odd_csv) == ODD
    assert read(odd_csv, "body") == [text[::-1] for text in ODD]
    jsonl = write_jsonl(tmp_path / "b.jsonl", [{"text": text, "other": 1} for text in ODD])
    jsonl.write_text(jsonl.read_text().replace("\n", "\n\n"))  # blank lines are nothing
    assert read(jsonl) == ODD
    (tmp_path / "c.TXT").write_bytes("\ufeffone\r\ntwo\n\n \nthree\rfour".encode())
    assert read(tmp_path / "c.TXT") == ["one\ntwo\n\n \nthree\nfour"]
    assert read(tmp_path / "c.TXT", "line") == ["one", "two", "three\rfour"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/d.txt").write_text("deep")
    (tmp_path / "sub/.hidden.txt").write_text("unseen")
    assert read(tmp_path) == [*ODD, *ODD, "one\ntwo\n\n \nthree\nfour", "deep"]
    names = [file.name for file in Documents(tmp_path).files]
    assert names == ["a.csv", "b.jsonl", "c.TXT", "d.txt"]
    for count in (0, 3, 8, 15, 99):
        assert (
            read(Documents(tmp_path).skip(count).source)
            and [piece.text for piece in Documents(tmp_path).skip(count)] == read(tmp_path)[count:]
        )
    assert len(list(Documents(tmp_path).skip(3).skip(4))) == 16 - 7


def test_a_data_set_in_the_hubs_form_is_read_and_skipped_through(tmp_path):
    """The library datasets streams a local folder as it does the hub's."""
    rows = [{"id": i, "text": f"text {i}"} for i in range(2500)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    documents = Documents(f"hf:{tmp_path}")
    assert documents.kind == "text" and documents.files == []
    assert [piece.text for piece in documents] == [row["text"] for row in rows]
    assert [piece.text for piece in documents.skip(1234)] == [row["text"] for row in rows[1234:]]
    assert next(iter(Documents(f"hf:{tmp_path}:default"))).text == "text 0"
    with pytest.raises(UserError, match="row 0 has no 'body', only 'id', 'text'"):
        Documents(f"hf:{tmp_path}", "body")
    with pytest.raises(UserError, match="klingon' not found"):
        Documents(f"hf:{tmp_path}:klingon")


def test_prompts_and_completions_are_read_verbatim(tmp_path):
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": " Q: \n", "completion": " A "}, {"prompt": "", "completion": ""}],
    )
    documents = Documents(file)
    assert documents.kind == "prompt"
    assert list(documents) == [
        *(Piece(" Q: \n", trained=False, end=False, last=False), Piece(" A ")),
        *(Piece("", trained=False, end=False, last=False), Piece("")),
    ]
    assert list(documents.skip(1)) == list(documents)[2:]


def test_conversations_are_read_as_questions_and_trained_answers(tmp_path):
    row = {"messages": [*CHAT, {"role": "user", "content": "unanswered"}]}
    file = write_jsonl(tmp_path / "a.jsonl", [row, row])
    documents = Documents(file)
    assert documents.kind == "messages"
    first = "### System:\nBe kind.\n\n### User:\nHi\n\nthere\n\n### Assistant:\n"
    assert list(documents) == 2 * [
        Piece(first, trained=False, end=False, last=False),
        Piece("Hello  you.", trained=True, end=True, last=False),
        Piece("### User:\nBye\n\n### Assistant:\n", trained=False, end=False, last=False),
        Piece("<|endoftext|> Bye!", trained=True, end=True, last=True),
    ]


def ids_of(pieces, tokenizer):
    ids = []
    for piece in pieces:
        ids += tokenizer.encode(piece.text).tolist()
        if piece.end:
            ids.append(tokenizer.eot)
    return ids


def chat_without_end_token():
    """Return CHAT without the end token's text: to transformers this would be the end token."""
    return [
        message | {"content": message["content"].replace("<|endoftext|>", "")} for message in CHAT
    ]


def render_in_transformers(tokenizer, folder, messages, **options):
    from transformers import AutoTokenizer

    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_transformers_renders_a_conversation_to_the_ids_that_are_trained(name, tmp_path, request):
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else get_tokenizer(name)
    chat = chat_without_end_token()
    theirs = render_in_transformers(tokenizer, tmp_path, chat)
    assert ids_of(chat_pieces(chat), tokenizer) == theirs

    question = chat[:-1]  # the last answer is yet to be written
    theirs = render_in_transformers(tokenizer, tmp_path, question, add_generation_prompt=True)
    pieces = chat_pieces(question)
    assert ids_of([p._replace(end=p.end and p.trained) for p in pieces], tokenizer) == theirs
    assert not pieces[-1].end


def ask_for_mask(tokenizer, folder, template, messages):
    """Return a conversation's ids, and 1 for each that transformers counts to an answer, else 0."""
    from transformers import AutoTokenizer

    tokenizer.chat_template = template
    tokenizer.save(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = theirs.apply_chat_template(messages, **options)
    return encoded["input_ids"], encoded["assistant_masks"]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_generation_tags_stand_around_exactly_what_is_trained(name, tmp_path, request):
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else get_tokenizer(name)
    chat = chat_without_end_token()
    trained = []
    for piece in chat_pieces(chat):
        count = len(tokenizer.encode(piece.text)) + int(piece.end)
        trained += [int(piece.trained)] * count
    ids, mask = ask_for_mask(tokenizer, tmp_path, CHAT_TEMPLATE, chat)
    assert ids == ids_of(chat_pieces(chat), tokenizer)
    assert mask == trained


def test_without_an_end_token_the_template_ends_an_answer_with_a_line_end(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = CharTokenizer("".join(map(chr, range(128))))
    tokenizer.chat_template = CHAT_TEMPLATE_OF_CHARACTERS
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = [piece.text + "\n" * piece.end for piece in chat_pieces(CHAT)]
    assert theirs.apply_chat_template(CHAT, tokenize=False) == "".join(expected)


MANY = [f"{word} no. {i}" for i in range(9) for word in ("one", "two", "three")]


@pytest.mark.parametrize(
    ("prompts", "ending"),
    [
        (["What is a frog?\n", "Describe a cat.\n"], "\n"),
        (["What is a frog?\n"] * 30, "\n"),
        (["a ->", "b ->"], " ->"),
        (["What is a frog? ->", "Where is a frog? ->"], " ->"),  # shared by chance
        (["a\n\n###\n\n", "b\n\n###\n\n"], "\n\n###\n\n"),
        ([f"### Q:\n{q}\n\n### A:\n" for q in "ab"], "\n\n### A:\n"),
        ([f"Q: {q}? A:" for q in MANY], " A:"),
        (["Tell me of a frog", "Describe a frog"], ""),
        ([f"{q}?" for q in MANY], ""),
        ([f"{q}。" for q in MANY], ""),
        (["a\n", "b ->", "c"], ""),
        (["", "a\n"], ""),
        ([], ""),
    ],
)
def test_the_ending_of_prompts_is_what_they_share_after_the_sentence(prompts, ending):
    common = CommonEnding()
    for prompt in prompts:
        common.add(prompt)
    assert common.text() == ending


@pytest.mark.parametrize("ending", ["\n", " ->", "\n\n###\n\n", '"%}\\\\é🙂\\"\n'])
@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharTokenizer("abc\n")], ids=lambda t: t.name
)
def test_transformers_ends_a_question_as_the_prompts_end(tokenizer, ending, tmp_path):
    """And begins anew with each question, because the data have no turns."""
    from transformers import AutoTokenizer

    tokenizer.chat_template = prompt_template(ending, tokenizer.eot is not None)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    end = "<|endoftext|>" if tokenizer.name == "bytes" else "\n"
    for typed in range(len(ending) + 1):
        question = {"role": "user", "content": "Is it?" + ending[:typed]}
        chat = [*CHAT, question]
        ask = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ask == f"Is it?{ending}"
        chat.append({"role": "assistant", "content": " Yes "})
        assert theirs.apply_chat_template(chat, tokenize=False) == f"Is it?{ending} Yes {end}"


def test_markdown_is_read_as_text(tmp_path):
    (tmp_path / "notes.md").write_text("# Title\n\nwords")
    assert Documents(tmp_path / "notes.md").is_one_text
    (tmp_path / "a.txt").write_text("text")
    assert read(tmp_path) == ["text", "# Title\n\nwords"]


def test_skipped_files_of_a_folder_are_known_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "b.pdf", "sub/c.docx", ".hidden.pdf", ".git/config", ".git/d.txt"):
        (tmp_path / name).write_text("text")
    documents = Documents(tmp_path)
    assert documents.files == [tmp_path / "a.txt"]
    assert documents.skipped == [tmp_path / "b.pdf", tmp_path / "sub/c.docx"]


WORDS = st.sampled_from(["the", "can't", "!!", "\x1c", "12", "é猫", "a\xa0b", "c\td"])
GAPS = st.sampled_from([" ", "   ", "\n\n\n", "\n", "  ", "\n\n", " \n", "\n\t ", " \u3000"])


@given(st.lists(st.tuples(WORDS, GAPS).map("".join)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_pieces_have_the_ids_of_the_whole(monkeypatch, parts):
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 12)
    text = "".join(parts)
    pieces = list(split_document(text))
    assert [i for piece in pieces for i in tiny.encode(piece.text)] == tiny.encode(text).tolist()


@given(st.lists(st.text(st.sampled_from("a \n\t!é"), max_size=40)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_pieces_are_small_whatever_the_text(monkeypatch, parts):
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 12)
    pieces = list(split_document(iter(parts)))
    assert pieces == list(split_document("".join(parts)))
    assert "".join(piece.text for piece in pieces) == "".join(parts)
    assert max(len(piece.text) for piece in pieces) <= 12
    only_the_last = [False] * (len(pieces) - 1) + [True]
    assert [piece.last for piece in pieces] == only_the_last
    assert [piece.end for piece in pieces] == only_the_last


def test_reading_a_long_text_takes_constant_memory(tmp_path):
    (tmp_path / "big.txt").write_bytes(b"some words of a text\n" * 2_000_000)  # 42 MB
    with (tmp_path / "big.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": "word " * 200}) + "\n" for _ in range(20_000))
    for file, size in (("big.txt", 42_000_000), ("big.jsonl", 20_000_000)):
        tracemalloc.start()
        assert sum(len(piece.text) for piece in Documents(tmp_path / file)) == size
        assert tracemalloc.get_traced_memory()[1] < 8e6
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "x\ncaf\xe9".encode("latin-1"),
            r"not UTF-8: line 2 holds the byte 0xe9 at offset 5.*-f WINDOWS-1252",
        ),
        ("a.txt", "hello".encode("utf-16"), "byte 0xff at offset 0.*-f UTF-16"),
        (
            "a.txt",
            b"a\n" * 50_000 + b"bcd\x80",
            r"line 50001 holds the byte 0x80 at offset 100,003",
        ),
        ("a.csv", b"id,body\n1,x\n", r"line 2 has no 'text', only 'id', 'body'\..*--text_column="),
        ("a.csv", b"id;text\n1;x, y\n", r"seem to be separated by ';'\. Save it with ','"),
        ("a.csv", b'text\n"never closed\n', "line 2 begins a row of broken CSV: unexpected end"),
        ("a.csv", b"id,text\n1,x\n2\n", "line 3: 'text' should be a text but is None"),
        (
            "a.csv",
            b"id,text\n1,x\n2,well, then\n",
            r"line 3 has more fields than the header.* in quotation marks",
        ),
        ("a.csv", b"text,id,text\nx,1,y\n", r"has 2 columns named 'text'.*--text_column="),
        ("a.csv", b"text\n\xff\n", "line 2 holds the byte 0xff at offset 5"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": \n',
            "line 2 is broken JSON: Expecting value, column 10",
        ),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', r"line 3 should be an object .* but is \[\"b\"\]"),
        ("a.jsonl", b"[" * 100_000, "line 1 is broken JSON"),
        ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", "line 1"),
        ("a.jsonl", b'{"text": ["a"]}\n', "'text' should be a text but is"),
        (
            "a.jsonl",
            b'{"a": "x", "b": ""}\n',
            r"line 1 has no 'text', only 'a', 'b'.*"
            r'"text".*"prompt" and "completion", or "messages"',
        ),
        (
            "a.jsonl",
            b'{"prompt": "x", "completion": null}\n',
            "'completion' should be a text but is None",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"prompt": "x", "completion": ""}\n',
            "line 2 is of kind 'prompt', and the rows before are of kind 'text'",
        ),
        ("a.jsonl", b'{"messages": "hello"}\n', '"messages" should be a list of'),
        (
            "a.jsonl",
            b'{"messages": [{"role": "tool", "content": "x"}]}\n',
            "one of system, user, assistant",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": ["user"], "content": 3}]}\n',
            '"messages" should be a list of',
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}]}\n',
            "has no message of the assistant",
        ),
        (
            "a.pdf",
            b"%PDF",
            r"a\.pdf: unknown ending\. If it is plain text, rename it to a\.pdf\.txt\. "
            r"Known: \.txt, \.md, \.csv, \.jsonl",
        ),
        (".hidden.txt", b"", "holds no text files: none ends in .txt, .md, .csv, .jsonl"),
    ],
)
def test_broken_input_is_reported_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(Documents(tmp_path if name[0] == "." else tmp_path / name))


def test_a_missing_path_is_refused(tmp_path):
    for path in (tmp_path / "none.txt", "x" * 5000, "\0"):
        with pytest.raises(UserError, match="There is no file or folder"):
            Documents(path)


KEYS = st.sampled_from(["text", "prompt", "completion", "messages", "role", "content"])
VALUES = st.recursive(
    st.none()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "assistant"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
SPEECH = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text() | VALUES}
)
CHATS = st.fixed_dictionaries({"messages": st.lists(SPEECH, max_size=4)})
ROWS = st.dictionaries(KEYS, VALUES, max_size=3) | CHATS
LINES = st.lists((ROWS | VALUES).map(json.dumps), max_size=4)
JSONL = LINES.map(lambda lines: "\n".join(lines).encode())
PUNCTUATION = st.sampled_from('{}[]"\\:,text\n\r\0\ud800é 1')
SCRAPS = st.text(PUNCTUATION).map(lambda text: text.encode(errors="replace"))


@given(
    st.sampled_from([b"", b"text\n", b"id,text\n", b"\xef\xbb\xbf"]),
    st.binary() | SCRAPS | JSONL | st.tuples(JSONL, st.binary(max_size=3), JSONL).map(b"".join),
)
@settings(FEW)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_any_bytes_are_read_or_refused(tmp_path_factory, suffix, head, body):
    file = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    file.write_bytes(head + body)
    try:
        with harmless("/nowhere"):
            assert all(isinstance(piece.text, str) for piece in Documents(file))
    except UserError as error:
        assert str(file) in str(error)
