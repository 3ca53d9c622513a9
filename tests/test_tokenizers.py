"""Tokenizers, against a slow byte-pair encoding, published ids, and transformers.

transformers reads the files that we save and has to give the same ids.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from gpt12.errors import UserError
from tests.helpers import edit_json, read_json, refused, write
from tests.tiny_bpe import END, encode_slowly, tiny

TEXT = "  The cat's   bath\n\n\tcan't 123four\r\n <|endoftext|> naïve 猫🙂\u3000½  \n"


CHAT_TEMPLATE = "{{ messages[0]['content'] }}"
HERE = Path()
pytestmark = pytest.mark.usefixtures("here")
chars = CharTokenizer("".join(sorted(set(TEXT))))


@given(
    st.text(
        st.sampled_from("the catT's12\n\t \u3000éé猫🙂!<|")
        | st.characters(exclude_categories=["Cs"]),
        max_size=60,
    )
)
@example(TEXT)
@example("  \n \n  the 1212 12121")
def test_our_byte_pair_encoding_is_the_described_one(text):
    assert tiny.encode(text).tolist() == encode_slowly(text)
    assert tiny.decode(tiny.encode(text)) == text


def test_gpt2s_tokenizer_gives_the_published_ids(gpt2):
    assert gpt2.encode("hello world").tolist() == [31373, 995]  # tiktoken's documentation
    assert gpt2.encode(END).tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert (gpt2.vocab_size, gpt2.eot, gpt2.decode([31373, 50256])) == (50257, 50256, f"hello{END}")
    assert gpt2.decode(gpt2.encode(TEXT)) == TEXT
    assert (
        gpt2.sha256 == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )  # encoder.json's in tiktoken


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)


def test_the_character_tokenizer_refuses_unknown_characters():
    assert CharTokenizer("\nab").encode("ba\n").tolist() == [2, 1, 0]
    assert chars.decode(chars.encode(TEXT)) == TEXT
    for missing in ("Z", "\U0010ffff"):  # within and beyond the table of code points
        said = rf"does not know 1 of the text's characters: .*U\+{ord(missing):04X}"
        refused(said, chars.encode, f"th{missing}t")
    text = "abécbaéz" + "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    message = refused("1,003 of the text's characters: ", CharTokenizer("ab").encode, text)
    assert "characters: 'c' (U+0063), 'z' (U+007A), 'é' (U+00E9)," in message
    assert message.count("(U+") == 20
    assert "train_shakespeare_cpu.py --dataset=my.txt --tokenizer=char" in message


@pytest.mark.parametrize("tokenizer", [tiny, ByteTokenizer(), chars], ids=lambda t: t.name)
def test_every_tokenizer_decodes_what_it_encodes(tokenizer):
    with ThreadPoolExecutor(4) as threads:
        many = list(threads.map(tokenizer.encode, [TEXT[:at] for at in range(len(TEXT))]))
    for at, ids in enumerate(many):
        assert tokenizer.decode(ids) == TEXT[:at] and ids.dtype == np.uint32
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(TEXT)) == TEXT.encode()
    # A model may have more ids than the tokenizer.
    assert tokenizer.decode([0, tokenizer.vocab_size]) == tokenizer.decode([0]) + "\ufffd"


def test_a_million_blanks_are_encoded():  # where tiktoken raises
    assert tiny.decode(tiny.encode(" " * 1_100_000 + "x")) == " " * 1_100_000 + "x"


def test_different_tokenizers_have_different_hashes():
    made = [tiny, ByteTokenizer(), *map(CharTokenizer, ("ab", "ba", "a", "ab"))]
    hashes = [tokenizer.sha256 for tokenizer in made]
    assert len(set(hashes)) == 5 and hashes[2] == hashes[-1]


@pytest.mark.parametrize("name", ["gpt2", "bytes", "char"])
def test_saved_files_open_here_and_in_transformers(name, request):
    from transformers import AutoTokenizer

    own = {"bytes": ByteTokenizer(), "char": CharTokenizer(chars.names)}
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else own[name]
    tokenizer.chat_template = CHAT_TEMPLATE
    ours, saved, back = Path("ours"), Path("theirs"), Path("back")
    ours.mkdir()
    tokenizer.save(ours, context=32)
    tokenizer.chat_template = None
    # A checkpoint's config.json lies beside it, and AutoTokenizer goes by that as well.
    write(
        ours / "config.json", '{"model_type": "gpt2", "bos_token_id": null, "eos_token_id": null}'
    )
    theirs = AutoTokenizer.from_pretrained(ours)
    loaded = load_tokenizer(ours)
    assert len(theirs) == loaded.vocab_size and theirs.eos_token_id == loaded.eot
    # transformers 4 otherwise returns token_type_ids, and GPT-2 there adds their embeddings.
    assert theirs.model_input_names == ["input_ids", "attention_mask"]
    texts = [TEXT.replace(END, "")]
    if name != "char":  # which has no end token
        texts += ["the cat\n\n  ' s", "    ", "\n\n\n", f"{END}the{END}{END} cat"]
    for text in texts:
        ids = theirs.encode(text)
        assert ids == loaded.encode_prompt(text)
        assert theirs.decode(ids) == text == loaded.decode(ids)
    messages = [{"role": "user", "content": "the cat"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "the cat"
    assert theirs.model_max_length == 32
    theirs.save_pretrained(saved)
    back.mkdir()
    for folder in (ours, saved):
        again = load_tokenizer(folder)
        assert type(again) is type(tokenizer) and again.sha256 == tokenizer.sha256
        assert (again.chat_template, again.end_ids) == (CHAT_TEMPLATE, tokenizer.end_ids)
        assert again.encode("the").tolist() == tokenizer.encode("the").tolist()
        again.save(back)
        for file in folder.glob("[!ct]*"):  # those that hold no changed setting
            assert (back / file.name).read_bytes() == file.read_bytes()


GERMAN = "Die Straße führt über Köln. Ärger über süße Äpfel, größere Öfen und müßige Mönche. " * 9


def german():
    """Train a byte-level encoding of 400 tokens on a German text, with end, begin and padding."""
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([GERMAN], vocab_size=400, show_progress=False)
    return library


def metaspace():
    """Train an encoding that writes a space as "▁" and bytes without a token as <0xE4>."""
    library = tokenizers.SentencePieceBPETokenizer()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    library.train_from_iterator([GERMAN], vocab_size=500, special_tokens=["<unk>", *bytes_])
    content = json.loads(library.to_str())
    content["model"]["byte_fallback"] = True
    content["added_tokens"] = []
    steps = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], *steps]}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("make", [german, metaspace, "older files"])
def test_any_tokenizer_of_a_model_gives_the_ids_of_transformers(make):
    """With its added tokens, which a prompt may name, and with its two end tokens."""
    from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

    if make == "older files":
        german().save_model(".")
        theirs = GPT2TokenizerFast("vocab.json", "merges.txt")
    else:
        make().save("t.json")
        theirs = PreTrainedTokenizerFast(tokenizer_file="t.json")
    theirs.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    theirs.chat_template = CHAT_TEMPLATE
    folder = Path("model")
    theirs("cut", truncation=True, max_length=3, padding="max_length")  # tokenizer.json keeps this
    theirs.save_pretrained(folder)
    end = theirs.convert_tokens_to_ids("</s>")
    write(folder / "generation_config.json", json.dumps({"eos_token_id": [end, 7]}))
    ours = load_tokenizer(folder)
    described = (ours.name, ours.eot, ours.end_ids, ours.vocab_size)
    assert described == ("model", end, {end, 7}, len(theirs))
    theirs = AutoTokenizer.from_pretrained(folder)
    prompt = "<s>Süße Äpfel</s> über <pad>Köln 猫"
    ids = theirs.encode(prompt, add_special_tokens=False)
    assert ours.encode_prompt(prompt) == ids
    assert ours.decode(ids).strip() == theirs.decode(ids).strip()
    text = "Die Mönche essen 猫, Äpfel </s>"
    plain = ours.encode(text)
    assert end not in plain and ours.decode(plain).strip() == text
    for token in range(len(theirs)):
        written = ours.token_bytes(token).decode(errors="replace")
        assert written.strip() == theirs.decode([token]).strip()
    ours.save(HERE)
    again = load_tokenizer(Path("tokenizer.json"))  # by a file beside it
    assert (again.sha256, again.chat_template) == (ours.sha256, theirs.chat_template)
    settings = "tokenizer_config.json"
    assert read_json(settings) == read_json(folder / settings)
    for file in folder.iterdir():
        assert file.name == settings or Path(file.name).read_bytes() == file.read_bytes()


def test_gpt2_with_a_padding_token_uses_the_data_of_gpt2(gpt2):
    """As Trainer's users do it. A token that ends texts, too, makes it another tokenizer."""
    from transformers import AutoTokenizer

    gpt2.save(HERE)
    write("config.json", '{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(HERE)
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.add_tokens(["klingon"])
    theirs.save_pretrained("theirs")
    ours = load_tokenizer(Path("theirs"))
    described = (ours.name, ours.vocab_size, ours.text_vocab_size, ours.eot)
    assert described == ("gpt2", 50259, 50257, 50256)
    assert ours.sha256 == gpt2.sha256
    text = "klingon <pad> hello"
    assert ours.encode(text).tolist() == gpt2.encode(text).tolist()
    assert ours.encode_prompt(text) == theirs.encode(text)
    assert ours.decode([31373, 50257, 50258]) == "hello<pad>klingon"
    theirs.add_special_tokens({"eos_token": "</s>"})
    theirs.save_pretrained("theirs")
    ours = load_tokenizer(Path("theirs"))
    assert (ours.name, ours.vocab_size, ours.eot) == ("model", 50260, 50259)
    assert ours.encode("hello world").tolist() == [31373, 995]


def test_an_end_token_behind_a_hole_in_the_ids_ends_texts():
    tiny.save(HERE)
    content = Path("tokenizer.json").read_text()
    write("tokenizer.json", content.replace(f":{tiny.eot}", ":999"))
    tokenizer = load_tokenizer(HERE)
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.end_ids) == (1000, 999, {999})


@pytest.mark.parametrize("stop", [KeyboardInterrupt, type("PanicException", (BaseException,), {})])
def test_a_panic_of_the_library_is_a_damaged_file_and_ctrl_c_is_not(monkeypatch, stop):
    tiny.save(HERE)

    monkeypatch.setattr("data.tokenizers._recognize", Mock(side_effect=stop))
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else UserError):
        load_tokenizer(HERE)


@pytest.mark.parametrize("end", ["7", [True, None, {}], -1, 1e3, 2**40])
def test_an_end_that_is_no_id_is_ignored(end):
    """And so is a setting that only has the name of a token."""
    tiny.save(HERE)
    edit_json("tokenizer_config.json", add_bos_token=True)
    write("generation_config.json", json.dumps({"eos_token_id": end}))
    tokenizer = load_tokenizer(HERE)
    assert tokenizer.end_ids == {tokenizer.eot}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", ""),
        (b"[]", ""),
        (b"\xff", ""),
        (b"[" * 9999, ""),
        (b'{"model": {"vocab": 3}, "added_tokens": []}', ""),
        (b'{"model": {"vocab": {"x": 300000000}, "merges": []}}', "largest id is 300,000,000"),
    ],
)
def test_a_damaged_tokenizer_file_is_named(content, message):
    write("tokenizer.json", content)
    refused(f"damaged.*{message}", load_tokenizer, HERE)
