"""Tokenizers, against a slow byte-pair encoding, published ids, and transformers.

transformers reads the files that we save and has to give the same ids.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from gpt12.errors import UserError
from tests.tiny_bpe import END, encode_slowly, tiny

TEXT = "  The cat's   bath\n\n\tcan't 123four\r\n <|endoftext|> naïve 猫🙂\u3000½  \n"


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
        with pytest.raises(UserError, match=said):
            chars.encode(f"th{missing}t")
    with pytest.raises(UserError) as caught:
        CharTokenizer("ab").encode("abécbaéz" + "".join(map(chr, range(0x4E00, 0x4E00 + 1000))))
    message = str(caught.value)
    assert "1,003 of the text's characters: 'c' (U+0063), 'z' (U+007A), 'é' (U+00E9)," in message
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
    made = [tiny, ByteTokenizer(), chars]
    made += [CharTokenizer("ab"), CharTokenizer("ba"), CharTokenizer("a")]
    assert len({tokenizer.sha256 for tokenizer in made}) == len(made)
    assert CharTokenizer("ab").sha256 == CharTokenizer("ab").sha256


def opens_in_transformers(folder, tokenizer):
    """Open a saved tokenizer in transformers, and compare ids, texts and special tokens."""
    from transformers import AutoTokenizer

    # A checkpoint's config.json lies beside it, and AutoTokenizer goes by that as well.
    config = {"model_type": "gpt2", "bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.eot
    # transformers 4 otherwise returns token_type_ids, and GPT-2 there adds their embeddings.
    assert theirs.model_input_names == ["input_ids", "attention_mask"]
    texts = [TEXT.replace(END, "")]
    if tokenizer.name != "char":
        texts += ["the cat\n\n  ' s", "    ", "\n\n\n"]
    if tokenizer.eot is not None:
        texts.append(f"{END}the{END}{END} cat")
    for text in texts:
        assert theirs.encode(text) == tokenizer.encode_prompt(text)
        assert theirs.decode(theirs.encode(text)) == text == tokenizer.decode(theirs.encode(text))
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "the cat"}]
        assert theirs.apply_chat_template(messages, tokenize=False) == "the cat"
    return theirs


@pytest.mark.parametrize("name", ["gpt2", "bytes", "char"])
def test_saved_files_open_here_and_in_transformers(name, tmp_path, request):
    own = {"bytes": ByteTokenizer(), "char": CharTokenizer("".join(sorted(set(TEXT))))}
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else own[name]
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (tmp_path / "ours").mkdir()
    tokenizer.save(tmp_path / "ours", context=32)
    tokenizer.chat_template, template = None, tokenizer.chat_template
    theirs = opens_in_transformers(tmp_path / "ours", load_tokenizer(tmp_path / "ours"))
    assert theirs.model_max_length == 32
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_tokenizer(tmp_path / folder)
        assert type(again) is type(tokenizer) and again.sha256 == tokenizer.sha256
        assert again.chat_template == template
        assert again.encode("the").tolist() == tokenizer.encode("the").tolist()
        assert again.end_ids == tokenizer.end_ids
        (tmp_path / "back").mkdir(exist_ok=True)
        again.save(tmp_path / "back")
        for file in (tmp_path / folder).glob("[!ct]*"):  # those that hold no changed setting
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


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
def test_any_tokenizer_of_a_model_gives_the_ids_of_transformers(make, tmp_path):
    """With its added tokens, which a prompt may name, and with its two end tokens."""
    from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

    if make == "older files":
        german().save_model(str(tmp_path))
        theirs = GPT2TokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    else:
        make().save(str(tmp_path / "t.json"))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    theirs.add_special_tokens(names)
    theirs.chat_template = "{{ messages[0]['content'] }}"
    folder = tmp_path / "model"
    theirs("cut", truncation=True, max_length=3, padding="max_length")  # tokenizer.json keeps this
    theirs.save_pretrained(folder)
    end = theirs.convert_tokens_to_ids("</s>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 7]}))
    ours = load_tokenizer(folder)
    assert (ours.name, ours.eot, ours.end_ids) == ("model", end, {end, 7})
    assert ours.vocab_size == len(theirs)
    theirs = AutoTokenizer.from_pretrained(folder)
    prompt = "<s>Süße Äpfel</s> über <pad>Köln 猫"
    ids = theirs.encode(prompt, add_special_tokens=False)
    assert ours.encode_prompt(prompt) == ids
    assert ours.decode(ids).strip() == theirs.decode(ids).strip()
    text = "Die Mönche essen 猫, Äpfel </s>"
    plain = ours.encode(text)
    assert end not in plain and ours.decode(plain).strip() == text
    for ids in ([token] for token in range(len(theirs))):
        assert (
            ours.token_bytes(ids[0]).decode(errors="replace").strip() == theirs.decode(ids).strip()
        )
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path / "tokenizer.json")  # by a file beside it
    assert (again.sha256, again.chat_template) == (ours.sha256, theirs.chat_template)
    for name in before.keys() - {"tokenizer_config.json"}:
        assert (tmp_path / name).read_bytes() == before[name]
    old, new = (
        json.loads((place / "tokenizer_config.json").read_text()) for place in (folder, tmp_path)
    )
    assert old == new


def test_gpt2_with_a_padding_token_uses_the_data_of_gpt2(gpt2, tmp_path):
    """As Trainer's users do it. A token that ends texts, too, makes it another tokenizer."""
    from transformers import AutoTokenizer

    gpt2.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.add_tokens(["klingon"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(tmp_path / "theirs")
    assert (ours.name, ours.vocab_size, ours.text_vocab_size, ours.eot) == (
        "gpt2",
        50259,
        50257,
        50256,
    )
    assert ours.sha256 == gpt2.sha256
    text = "klingon <pad> hello"
    assert ours.encode(text).tolist() == gpt2.encode(text).tolist()
    assert ours.encode_prompt(text) == theirs.encode(text)
    assert ours.decode([31373, 50257, 50258]) == "hello<pad>klingon"
    theirs.add_special_tokens({"eos_token": "</s>"})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(tmp_path / "theirs")
    assert (ours.name, ours.vocab_size, ours.eot) == ("model", 50260, 50259)
    assert ours.encode("hello world").tolist() == [31373, 995]


def test_an_end_token_behind_a_hole_in_the_ids_ends_texts(tmp_path):
    tiny.save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace(f":{tiny.eot}", ":999"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.end_ids) == (1000, 999, {999})


@pytest.mark.parametrize("stop", [KeyboardInterrupt, type("PanicException", (BaseException,), {})])
def test_a_panic_of_the_library_is_a_damaged_file_and_ctrl_c_is_not(tmp_path, monkeypatch, stop):
    tiny.save(tmp_path)

    def panic(*arguments):
        raise stop

    monkeypatch.setattr("data.tokenizers._recognize", panic)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else UserError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("end", ["7", [True, None, {}], -1, 1e3, 2**40])
def test_an_end_that_is_no_id_is_ignored(tmp_path, end):
    """And so is a setting that only has the name of a token."""
    tiny.save(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("{", '{"add_bos_token": true,'))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    tokenizer = load_tokenizer(tmp_path)
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
def test_a_damaged_tokenizer_file_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=f"damaged.*{message}"):
        load_tokenizer(tmp_path)
