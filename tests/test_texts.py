"""Readers of text: every container, form, encoding, constant pieces, and broken input.

Conversations are compared with what transformers renders.
"""

import csv
import gzip
import io
import itertools
import json
import re
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data import texts
from data.chat import CHAT_TEMPLATE, chat_template, common_ending
from data.texts import Documents, Found, Piece, split_text
from data.tokenizers import ByteTokenizer, CharTokenizer
from tests.helpers import refused, write
from tests.tiny_bpe import tiny

pytestmark = pytest.mark.usefixtures("here")
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
    {"role": "assistant", "content": "\n    Bye!\n    "},
]


def pieces_of(documents):
    return [piece for _, piece in documents.pieces()]


def read(source, *args):
    return [piece.text for piece in pieces_of(Documents(source, *args))]


def of_rows(*rows):
    return Documents(write("a.jsonl", [*rows]))


# Containers


def write_table(file, rows, delimiter=",", head=""):
    with file.open("w", newline="", encoding="utf-8-sig") as stream:
        stream.write(head)
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


CONTAINERS = {
    "a.csv": write_table,
    "excel.csv": lambda file, rows: write_table(file, rows, ";", "sep=;\r\n"),
    "bar.csv": lambda file, rows: write_table(file, rows, "|"),
    "a.tsv": lambda file, rows: write_table(file, rows, "\t"),
    "a.json": lambda file, rows: write(file, json.dumps(rows, indent=1).replace("\n", "\r\n")),
    "lines.json": write,
    "a.JSONL": write,
    "a.ndjson": write,
    "a.jsonlines": write,
    "a.parquet": lambda file, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), file),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_of_rows_is_read(name):
    rows = [{"id": str(i), "text": text, "body": text[::-1]} for i, text in enumerate(ODD)]
    CONTAINERS[name](Path(name), rows)
    write(f"{name}.gz", gzip.compress(Path(name).read_bytes()))
    filled = [(i, text) for i, text in enumerate(ODD) if text.strip()]
    assert read(name, "body") == [text[::-1] for _, text in filled]
    for file, skip in itertools.product((name, f"{name}.gz"), (0, 2, 5)):
        found = Found(skip)
        rest = [(index, piece.text) for index, piece in Documents(file).pieces(found)]
        assert rest == [(i, text) for i, text in filled if i >= skip]
        assert found.count == len(rows)


def test_a_line_end_is_the_same_everywhere():
    for end in ("\n", "\r\n", "\r"):
        table = f'text,id{end}"a{end}b",1{end}'
        write("a.csv", table.encode())
        write("b.jsonl", f"{json.dumps({'text': f'a{end}b'})}{end}".encode())
        write("c.txt", f"a{end}b{end}".encode())
        assert read(".") == ["a\nb", "a\nb", "a\nb\n"]
        assert read("c.txt", "line") == ["a", "b"]


@pytest.mark.parametrize(
    ("table", "texts"),
    [
        (
            'id\ttext\n1\t"Oui, dit Jean.\n2\tComment ?\n3\tBien."\n',
            '"Oui, dit Jean.|Comment ?|Bien."',
        ),
        ('id\ttext\n1\t"Sim", disse\n2\tO "3" e 5"\n', '"Sim", disse|O "3" e 5"'),
        ('id\ttext\n1\t"never\n2\tclosed\n', '"never|closed'),
        ('id\ttext\n1\t"two\nlines"\n2\t"a ""b"""\n', 'two\nlines|a "b"'),
        ('id\ttext\n1\t"two\n\t\tlines"\n', "two\n\t\tlines"),
        ('text\n"two\nlines"\n', "two\nlines"),
    ],
)
def test_quotation_marks_that_join_whole_lines_of_a_tsv_are_characters(table, texts):
    write("a.tsv", table)
    assert read("a.tsv") == texts.split("|")


def test_end_of_text_separates_the_documents_of_a_text_file():
    """As in files made for gpt-2-simple."""
    text = (
        "<|startoftext|>one\n<|endoftext|>\n<|startoftext|>two<|endoftext|><|endoftext|>3"
        "<|endoftext|>\n"
    )
    documents = Documents(write("a.txt", text))
    assert read("a.txt") == ["one\n", "two", "3"]
    # Nothing counts as blank.
    assert (len(documents.first_indices), read_through(documents).count) == (3, 3)
    rows = of_rows({"text": text}, {"text": "<|endoftext|>"})
    assert list(rows.pieces()) == [(0, Piece(part)) for part in ("one\n", "two", "3")]
    assert read("a.txt", "line") == ["one", "two", "3"]
    text = "<|startoftext|>one\nmore\n<|startoftext|>\ntwo<|startoftext|>3"
    for file, content in (("a.txt", text), ("a.jsonl", [{"text": text}])):
        assert read(write(file, content)) == ["one\nmore\n", "two", "3"]
    write("a.txt", ("x" * 99_999 + "\n") * 20 + "<|endoftext|>" + "y")
    assert sum(piece.end for piece in pieces_of(Documents("a.txt"))) == 2
    assert len("".join(read("a.txt"))) == 2_000_001


def test_a_folder_of_source_code_is_read_and_described():
    for name in ("a.py", "b.py", "sub/Makefile", "notes.md", ".hidden.txt", ".git/config"):
        write(name, f"text of {name}")
    write("logo.png", b"\x89PNG\0\0")
    write("node_modules/a.js", "theirs")
    write("sub/package.json", '{\n "name": "x"\n}')
    write("rows.csv", "id,name\n1,x\n")
    write("text.csv", "text\na row\n")
    names = ["a.py", "b.py", "notes.md", "sub/Makefile", "text.csv"]
    texts = [f"text of {name}" for name in names[:-1]]
    for encoding in ("utf-8", "utf-8-replace"):
        assert read(".", "text", encoding) == [*texts, "a row"]
        assert Documents(".", "text", encoding).notes == [
            ".: 5 files are read: 2 .py, 1 .md, 1 Makefile, 1 .csv; 3 without a text "
            "are not: 1 .png, 1 .csv, 1 .json."
        ]
    assert read("a.py") == ["text of a.py"]
    for name in ("a.py", "b.py"):
        Path(name).unlink()
    refused(
        r"header of .*rows\.csv has no 'text', only", read, "."
    )  # without source code a table without text is a mistake


@pytest.mark.parametrize("name", ["a.txt", "a.c", "a.csv"])
def test_another_encoding_holds_for_the_files_of_a_folder_that_are_not_utf8(name):
    line = "Le café était fermé l’été à l’île"
    old = f"text\n{line}\n"
    write(name, old.encode("cp1252"))
    for other in ("b.txt", "b.py"):
        write(other, old)
    write("plain.txt", "plain\n")
    if name != "a.csv":  # which is not read beside source code if it is broken
        refused(rf"{name} is not utf-8: line 2 (.*\n)+.*g=cp1252 +Le café", read, ".")
    first = line if name == "a.csv" else old
    assert read(".", "text", "cp1252") == [first, old, old, "plain\n"]
    assert read("b.txt", "text", "UTF8") == [old]


def test_a_data_set_in_the_hubs_form_is_read_and_skipped_through():
    """The library datasets streams a local folder as it does the hub's."""
    for split, count in (("train", 2500), ("test", 3)):
        rows = [{"id": i, "text": f"{split} {i}"} for i in range(count)]
        write(f"hub/{split}.jsonl", rows)
    documents = Documents("hf:hub")
    for skip in (0, 1234):
        rest = [(i, f"train {i}") for i in range(skip, 2500)]
        assert [(index, piece.text) for index, piece in documents.pieces(Found(skip))] == rest
    for source in ("hf:hub:default:test", "hf:hub::test"):
        assert read(source) == ["test 0", "test 1", "test 2"]
    refused("row 1 has no 'body', only 'id', 'text'", read, "hf:hub", "body")
    refused("klingon' not found", read, "hf:hub:klingon")


# Encodings

LINES = {
    "cp1252": "Le café était fermé, l’été à l’île",
    "cp1251": "Мороз и солнце; день чудесный",
    "shift_jis": "吾輩は猫である。名前はまだ無い。",
    "gb18030": "床前明月光，疑是地上霜。举头望明月",
    "utf_16_le": "hello world",
    "utf_16_be": "hello world",
}


UNLIKELY = "他说：“这本书要 20€ 呢”，我说“好贵”。"  # the library has no guess


@pytest.mark.parametrize(("encoding", "line"), [*LINES.items(), ("gb18030", UNLIKELY)])
def test_a_file_in_another_encoding_is_shown_in_the_likely_ones(encoding, line):
    first = "" if "16" in encoding else "plain\n"
    content = first + f"{line}\n" * 30
    write("a.txt", content.encode(encoding))
    number = 2 if first else 1
    message = refused(f"a.txt is not utf-8: line {number} holds the byte 0x", read, "a.txt")
    shown = [row.split() for row in message.splitlines() if line in row.replace("\0", "")]
    assert shown  # a reader sees the right line, and how to ask for it
    asked = shown[0][0].removeprefix("--encoding=")
    assert read("a.txt", "text", asked) == [content]


def test_the_line_is_shown_in_which_the_likely_encodings_differ():
    lines = "Café fermé.", "Où êtes-vous, à bientôt, très bien"
    write("a.txt", "\n".join(lines).encode("cp1252"))
    message = refused("is not utf-8", read, "a.txt")
    shown = [line.split()[1] for line in message.splitlines()[1:]]
    assert sorted(shown) == ["Où", "Oů"]


def test_a_bad_byte_in_good_utf8_is_replaced_only_if_asked():
    write("a.txt", "naïve ü\nbad \udcff é\n".encode("utf-8", "surrogateescape"))
    said = r"line 2 holds the byte 0xff\. .* --encoding=utf-8-replace$"
    refused(said, read, "a.txt")
    assert read("a.txt", "text", "utf-8-replace") == ["naïve ü\nbad \ufffd é\n"]
    write("a.txt", "naïve\n".encode("utf-16"))  # it begins with a mark
    assert read("a.txt") == ["naïve\n"]
    write("a.txt", b"a\0b")
    refused("line 1 holds the byte 0x00", read, "a.txt")
    assert read("a.txt", "text", "utf-8-replace") == ["a\ufffdb"]
    refused("no encoding 'klingon'", Documents, "a.txt", "text", "klingon")
    write("a.jsonl", '{"text": "a\\ud800b"}\n')
    assert read("a.jsonl") == ["a\ufffdb"]


def test_a_cut_archive_of_another_encoding_is_named():
    write("a.txt.gz", gzip.compress(b"\xe9\n" * 99_999)[:-9])
    refused(r"a\.txt\.gz cannot be read: Compressed file ended", read, "a.txt.gz")


# Forms

ONE = [
    Piece("### User:\nHi?\n\n### Assistant:\n", trained=False, end=False),
    Piece("Ho.", after="text"),
]
FORMS = {
    "Alpaca": {"instruction": "Hi?", "input": "", "output": "Ho."},
    "question": {"question": "Hi?", "answer": "\nHo. "},
    "capitals": {"Question": "Hi?", "ANSWER": "Ho."},
    "no tools": {"question": "Hi?", "answer": "Ho.", "tools": "[]"},
    "response": {"prompt": " Hi?\n", "response": "Ho.<|endoftext|>\n<|endoftext|>"},
    "messages": {
        "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]
    },
}


def read_through(documents):
    """Return what a whole pass over the documents finds."""
    found = Found()
    for _ in documents.pieces(found):
        pass
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_question_becomes_the_same_conversation(form):
    documents = of_rows(FORMS[form])
    assert pieces_of(documents) == ONE
    assert (documents.kind, read_through(documents).notes) == ("messages", [])


def test_an_input_and_a_system_message_belong_to_the_question():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count."}
    prompt = "### System:\nCount.\n\n### User:\nAdd.\n\n1 2\n\n### Assistant:\n"
    rows = [row, row, row | {"system": "Be kind."}, row | {"system": ""}]
    documents = of_rows(*rows)
    assert read("a.jsonl")[:2] == [prompt, "3"]
    found = read_through(documents)
    next(documents.pieces())  # another pass changes nothing in what was found
    template = chat_template("messages", True, system="Count.", single_turn=True)
    assert found.chat_template("messages", has_end_token=True) == template


def test_a_row_with_two_forms_says_which_is_used():
    row = FORMS["Alpaca"] | FORMS["ShareGPT"] | {"text": "all of it"}
    documents = of_rows(row)
    assert pieces_of(documents) == ONE
    assert read_through(documents).notes == [
        "a.jsonl is read by its columns conversations. Columns not used: 'instruction', "
        "'input', 'output', 'text'."
    ]
    of_rows(row | {"body": "asked for"})
    assert read("a.jsonl", "body") == ["asked for"]


def test_prompts_and_completions_are_read_verbatim():
    rows = [{"prompt": " Q: \n", "completion": " A "}, {"prompt": "", "completion": " \n"}]
    documents = of_rows(*rows)
    assert documents.kind == "prompt"
    pieces = [Piece(" Q: \n", trained=False, end=False), Piece(" A ", after="text")]
    assert list(documents.pieces()) == [(0, piece) for piece in pieces]  # a blank answer is none
    rows[0]["completion"] += "<|endoftext|>\n"
    assert pieces_of(of_rows(*rows)) == pieces


@pytest.mark.parametrize(
    ("columns", "unused"),
    [
        (("question", "answer", "context", "id"), "'context', 'id'"),
        (("system_prompt", "prompt", "response", "system"), "'system_prompt'"),
        (("prompt", "completion", "input"), "'input'"),
        (("instruction", "input", "output", "tools"), None),
        (("text", "id"), None),
        (("messages", "id"), "'id', 'name' of a message"),
    ],
)
def test_columns_that_questions_and_answers_do_not_use_are_named(columns, unused):
    row = dict.fromkeys(columns, "x") | ({"tools": []} if "tools" in columns else {})
    if "messages" in columns:
        row["messages"] = [message | {"name": "x"} for message in CHAT]
    documents = of_rows(row)
    assert (documents.kind == "text") == (columns[0] == "text")
    notes = read_through(documents).notes
    assert [note.partition("Columns not used: ")[2] for note in notes] == (
        [f"{unused}."] if unused else []
    )


def test_conversations_are_read_as_questions_and_trained_answers():
    row = {"messages": [*CHAT, {"role": "user", "content": "unanswered"}]}
    first = "### System:\nBe kind.\n\n### User:\nHi\n\nthere\n\n### Assistant:\n"
    expected = [
        Piece(first, trained=False, end=False),
        Piece("Hello  you.", after="text"),
        Piece("### User:\nBye\n\n### Assistant:\n", after="end", trained=False, end=False),
        Piece("    Bye!", after="text"),
    ]
    assert pieces_of(of_rows(row, row)) == 2 * expected
    # A message of weight 0 is read and not trained; a blank answer neither.
    ignored = [({key: value}, "Hello  you.") for key, value in (("weight", 0), ("train", False))]
    for change, text in (*ignored, ({"content": " "}, ""), ({"content": None}, "")):
        row = {"messages": [*CHAT[:2], CHAT[2] | change, *CHAT[3:]]}
        found = pieces_of(of_rows(row))
        changed = expected[1]._replace(trained=False, text=text)
        assert found == [expected[0], changed, *expected[2:]]
    blank = [[CHAT[1], CHAT[2] | {"weight": 0}], [CHAT[1], CHAT[2] | {"content": "\n"}]]
    rows = [{"messages": messages} for messages in (*blank, [CHAT[1]], [])]
    assert pieces_of(of_rows(*rows)) == []


# Chat templates


def in_transformers(tokenizer, template):
    from transformers import AutoTokenizer

    tokenizer.chat_template, before = template, tokenizer.chat_template
    tokenizer.save(Path())
    tokenizer.chat_template = before
    return AutoTokenizer.from_pretrained(".")


def test_transformers_renders_a_conversation_to_the_ids_that_are_trained():
    """And its generation tags stand around exactly what is trained."""
    tokenizer = ByteTokenizer()
    theirs = in_transformers(tokenizer, chat_template("messages", True))
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = theirs.apply_chat_template(CHAT, **options)
    ids = []
    trained = []
    for piece in pieces_of(of_rows({"messages": CHAT})):
        ids += tokenizer.encode(piece.text).tolist() + [tokenizer.eot] * piece.end
        trained += [int(piece.trained)] * (len(ids) - len(trained))
    assert encoded["input_ids"] == ids
    assert encoded["assistant_masks"] == trained
    whole = theirs.apply_chat_template(CHAT, tokenize=False)
    asked = theirs.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert asked == whole.rpartition("    Bye!")[0]
    # Characters have no end token. A line end takes its place.
    tokenizer = CharTokenizer("".join(map(chr, range(128))))
    theirs = in_transformers(tokenizer, chat_template("messages", False))
    ended = theirs.apply_chat_template(CHAT, tokenize=False)
    assert ended == whole.replace("<|endoftext|>", "\n")


def test_the_commonest_system_message_is_the_default_of_the_template():
    system = chat_template("messages", True, system='Say "é" {{ 1 }}\n!')
    theirs = in_transformers(ByteTokenizer(), system)
    written = theirs.apply_chat_template(CHAT[1:], tokenize=False)
    assert written.startswith('### System:\nSay "é" {{ 1 }}\n!\n\n### User:\nHi')
    plain = in_transformers(ByteTokenizer(), CHAT_TEMPLATE)
    for chat in (CHAT, CHAT[1:]):
        given = theirs.apply_chat_template(chat, tokenize=False)
        assert given.endswith(plain.apply_chat_template(CHAT[1:], tokenize=False))
    assert theirs.apply_chat_template(CHAT, tokenize=False).startswith("### System:\nBe kind.\n\n#")


MANY = [f"{word} no. {i}" for i in range(9) for word in ("one", "two", "three")]


@pytest.mark.parametrize(
    ("prompts", "ending"),
    [
        (["What is a frog?\n", "Describe a cat.\n"], "\n"),
        (["What is a frog?\n"] * 30, "\n"),
        (["What is a frog? ->", "Where is a frog? ->"], " ->"),  # shared by chance
        (["a\n\n###\n\n", "b\n\n###\n\n"], "\n\n###\n\n"),
        ([f"### Q:\n{q}\n\n### A:\n" for q in "ab"], "\n\n### A:\n"),
        ([f"Q: {q}? A:" for q in MANY], " A:"),
        (["Tell me of a frog", "Describe a frog"], ""),
        ([f"{q}?" for q in MANY], ""),
        ([f"{q}。" for q in MANY], ""),
        ([f"问：马吃什么{q}？答：" for q in MANY], "？答："),
        (["问：马吃什么？答：", "问：它是什么？答："], "？答："),
        ([f"马吃{q}吗答：" for q in MANY], "吗答："),
        ([f"{i}\n" + "long " * 100 + "\n" for i in range(9)], "\n" + "long " * 100 + "\n"),
        (["a\n", "b ->", "c"], ""),
        ([], ""),
    ],
)
def test_the_ending_of_prompts_is_what_they_share_after_the_sentence(prompts, ending):
    assert common_ending(set(prompts)) == ending


@pytest.mark.parametrize("ending", [" ->", "\n\n###\n\n", '"%}\\\\é🙂\\"\n'])
@pytest.mark.parametrize("name", ["bytes", "char"])
def test_transformers_ends_a_question_as_the_prompts_end(name, ending):
    """And begins anew with each question, because the data have no turns."""
    tokenizer = ByteTokenizer() if name == "bytes" else CharTokenizer("abc\n")
    template = chat_template("prompt", name == "bytes", ending)
    theirs = in_transformers(tokenizer, template)
    end = "<|endoftext|>" if name == "bytes" else "\n"
    for typed in range(len(ending) + 1):
        chat = [*CHAT, {"role": "user", "content": "Is it?" + ending[:typed]}]
        ask = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ask == f"Is it?{ending}"
        chat.append({"role": "assistant", "content": " Yes "})
        assert theirs.apply_chat_template(chat, tokenize=False) == f"Is it?{ending} Yes {end}"


# Pieces

WORDS = st.sampled_from(["the", "can't", "!!", "\x1c", "12", "é猫", "a\xa0b", "c\td"])
GAPS = st.sampled_from([" ", "   ", "\n\n\n", "\n", "  ", "\n\n", " \n", "\n\t ", " \u3000"])


@given(st.lists(st.tuples(WORDS, GAPS).map("".join), min_size=1))
@settings(suppress_health_check=list(HealthCheck))
def test_pieces_have_the_ids_of_the_whole(monkeypatch, parts):
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 12)
    text = "x" + "".join(parts)
    pieces = list(split_text(io.StringIO(text)))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) == 1 or all(piece.text[-1].strip() for piece in pieces[:-1])
    assert len(pieces) > 1 or not re.search(r"(?s).{12}\S\n", text)
    assert [piece.end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [i for piece in pieces for i in tiny.encode(piece.text)]
    assert ids == tiny.encode(text).tolist()


# Broken input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body\n1,x\n", r"The header of .*a.csv has no 'text', only 'id', 'body'\. "),
        (
            "a.csv",
            'text\n"never closed\n',
            "line 2 begins a row of broken CSV: unexpected end.* each mark in the text twice",
        ),
        ("a.csv", '"text,\nx,y\n', "line 1 begins a row of broken CSV"),
        ("a.csv", 'sep=;\n"id\nof a row";text\n1;"x\n', "line 4 begins a row of broken CSV"),
        ("a.csv", "sep=\nx\n", "has no 'text', only 'sep='.*--text_column="),
        ("a.csv", 'sep="\nx\n', "has no 'text', only"),
        ("a.json", '{\n "text": "a"\n}', r"line 1 is broken JSON: .* as a list"),
        ("a.csv", "id,text\n1,x\n2,well, then\n", r"line 3 has more fields than the header.* ','"),
        ("a.csv", "sep=;\nid;text\n1;x;y\n", "line 3 has more fields than the header.* ';'"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is broken JSON: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n\n"b"\n', "line 3 should be an object .* but is 'b'"),
        ("a.jsonl", "[" * 100_000, "line 1 is broken JSON"),
        ("a.jsonl", '{"text": 1' + "0" * 5000 + "}", "line 1"),
        ("a.json", '[{"text": "a"},]', "line 1 is broken JSON"),
        ("a.json", '[{"text": "a"}, "b"]', "row 2 should be an object"),
        ("a.json.gz", "[]", "cannot be read"),
        ("a.parquet", "PAR1", "cannot be read"),
        ("a.jsonl", '{"a": "x"}\n', r"has no 'text', only 'a'.*messages.*prompt with completion"),
        ("a.jsonl", '{"prompt": "x", "completion": 3}\n', "'completion' should be a text but is 3"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"prompt": "x", "completion": ""}\n',
            r"line 2 is of kind 'prompt', and .* from .*a\.jsonl, line 1, are of kind 'text'",
        ),
        ("a.jsonl", '{"messages": "hello"}\n', "a message should be"),
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "x"}]}\n', "system, user or assist"),
        ("a.jsonl", '{"messages": [{"role": ["user"], "content": 3}]}\n', "a message should be"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}\n',
            "has 'tool_calls', which cannot be trained here",
        ),
        ("a.jsonl", '{"messages": [], "tools": "x"}\n', "'tools', which cannot be trained here"),
        ("a.pdf", "%PDF\0", r"a\.pdf holds no text.*\.txt, .*\.parquet, each also as \.gz"),
        (".hidden.txt", "", "holds no text and no val shards"),
    ],
)
def test_broken_input_is_reported_with_file_and_line(name, content, message):
    write(name, content)
    refused(message, read, "." if name[0] == "." else name)


def test_a_missing_path_is_refused():
    for path in ("none.txt", "x" * 5000, "\0"):
        refused("There is no file or folder", Documents, path)
