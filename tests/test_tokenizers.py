"""Tokenizers, against a slow byte-pair encoding, published ids, and transformers.

transformers reads the files that we save and has to give the same ids.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    from_meta,
    load_tokenizer,
)
from gpt12.errors import UserError
from tests.tiny_bpe import END, MERGES, TINY, encode_slowly, tiny

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
        said = rf"does not know 1 of the characters: .*U\+{ord(missing):04X}"
        with pytest.raises(UserError, match=said):
            chars.encode(f"th{missing}t")


def test_the_message_about_unknown_characters_lists_them_all_and_names_the_way_out():
    with pytest.raises(UserError) as caught:
        CharTokenizer("ab").encode("abécbaéz")
    message = str(caught.value)
    assert "does not know 3 of the characters: 'c' (U+0063), 'z' (U+007A), 'é' (U+00E9)." in message
    command = "python train.py config/train_shakespeare_cpu.py --dataset=my.txt --tokenizer=char"
    assert command in message
    assert "--tokenizer=bytes" in message


def test_the_message_about_unknown_characters_shows_at_most_twenty():
    with pytest.raises(UserError) as caught:
        CharTokenizer("a").encode("".join(map(chr, range(0x4E00, 0x4E00 + 1234))))
    message = str(caught.value)
    assert "does not know 1,234 of the characters" in message
    assert message.count("(U+") == 20
    assert "and 1,214 more" in message


@pytest.mark.parametrize("tokenizer", [tiny, ByteTokenizer(), chars], ids=lambda t: t.name)
def test_every_tokenizer_decodes_what_it_encodes(tokenizer):
    with ThreadPoolExecutor(4) as threads:
        many = list(threads.map(tokenizer.encode, [TEXT[:at] for at in range(len(TEXT))]))
    for at, ids in enumerate(many):
        assert tokenizer.decode(ids) == TEXT[:at] and ids.dtype == tokenizer.dtype == np.uint16
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(TEXT)) == TEXT.encode()
    # A model may have more ids than the tokenizer.
    assert tokenizer.decode([0, tokenizer.vocab_size]) == tokenizer.decode([0]) + "\ufffd"


def test_a_large_vocabulary_gets_a_larger_number_type():
    many = CharTokenizer("".join(map(chr, range(0x10000, 0x20000))))
    assert many.encode(chr(0x1FFFF)).tolist() == [65535] and many.dtype == np.uint32


def test_lone_surrogates_become_replacement_characters():
    for tokenizer in (tiny, ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    with pytest.raises(UserError, match="U\\+D800"):
        chars.encode("\ud800")


def test_a_million_blanks_are_encoded():  # where tiktoken raises
    assert tiny.decode(tiny.encode(" " * 1_100_000 + "x")) == " " * 1_100_000 + "x"


def test_different_tokenizers_have_different_hashes():
    made = [tiny, ByteTokenizer(), chars]
    made += [CharTokenizer("ab"), CharTokenizer("ba"), CharTokenizer("a")]
    assert len({tokenizer.sha256 for tokenizer in made}) == len(made)
    assert CharTokenizer("ab").sha256 == CharTokenizer("ab").sha256


def opens_in_transformers(tokenizer, folder):
    from transformers import AutoTokenizer

    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save(folder)
    # A checkpoint's config.json lies beside it, and AutoTokenizer goes by that as well.
    config = {"model_type": "gpt2", "bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.eot
    texts = [TEXT.replace(END, "")]
    if tokenizer.name != "char":
        texts += ["the cat\n\n  ' s", "    ", "\n\n\n"]
    for text in texts:
        assert theirs.encode(text) == tokenizer.encode(text).tolist()
        assert theirs.decode(theirs.encode(text)) == text
    messages = [{"role": "user", "content": "the cat"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "the cat"
    return theirs


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharTokenizer("".join(sorted(set(TEXT))))], ids=lambda t: t.name
)
def test_saved_files_open_here_and_in_transformers(tokenizer, tmp_path):
    theirs = opens_in_transformers(tokenizer, tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        again = load_tokenizer(folder)
        assert again is not None and type(again) is type(tokenizer)
        assert again.sha256 == tokenizer.sha256
        assert (
            again.chat_template == tokenizer.chat_template
            and again.encode("the").tolist() == tokenizer.encode("the").tolist()
        )


def test_saved_bpe_opens_in_transformers(tmp_path):
    opens_in_transformers(GPT2Tokenizer(TINY, MERGES), tmp_path)
    (tmp_path / "tokenizer.json").unlink()  # the older pair of files says the same
    from transformers import AutoTokenizer

    assert (
        AutoTokenizer.from_pretrained(tmp_path).encode(TEXT.replace(END, ""))
        == tiny.encode(TEXT.replace(END, "")).tolist()
    )


def test_gpt2s_tokenizer_is_saved_and_loaded_unchanged(gpt2, tmp_path):
    theirs = opens_in_transformers(gpt2, tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "old").mkdir()
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(tmp_path / file, tmp_path / "old")
    for folder in (tmp_path, tmp_path / "theirs", tmp_path / "old"):
        again = load_tokenizer(folder)
        assert isinstance(again, GPT2Tokenizer) and again.sha256 == gpt2.sha256
        again.save(tmp_path / "old")
        assert (tmp_path / "old/merges.txt").read_bytes() == (tmp_path / "merges.txt").read_bytes()


def test_gpt2_with_added_tokens_loads_and_is_saved_with_them(gpt2, tmp_path):
    """As Trainer's users do it: a padding token behind GPT-2's vocabulary, and perhaps a word."""
    from transformers import AutoTokenizer

    gpt2.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.add_tokens(["klingon"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(tmp_path / "theirs")
    assert isinstance(ours, GPT2Tokenizer)
    assert (ours.vocab_size, ours.eot) == (50259, 50256)
    assert ours.sha256 == gpt2.sha256  # data that GPT-2's tokenizer made fit the model
    text = "klingon <pad> hello"
    assert ours.encode(text).tolist() == gpt2.encode(text).tolist()
    for tokenizer in (ours, theirs):
        assert tokenizer.decode([31373, 50257, 50258]) == "hello<pad>klingon"
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    (tmp_path / "again/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == theirs.get_vocab()
    assert again.pad_token == "<pad>"
    assert again.encode(text) == theirs.encode(text)


def test_gpt2_with_added_tokens_loads_from_the_older_files(gpt2, tmp_path):
    gpt2.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 50257}')
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.decode([50257])) == (50258, "<pad>")
    # The ids in between stand for nothing.
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 50300}')
    with pytest.raises(UserError, match="50,258 tokens that is neither"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", [tiny, ByteTokenizer(), chars], ids=lambda t: t.name)
def test_saved_settings_name_the_models_inputs(tokenizer, tmp_path):
    """transformers 4 otherwise returns token_type_ids, and GPT-2 there adds their embeddings."""
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_foreign_tokenizers_are_refused(tmp_path):
    assert load_tokenizer(tmp_path) is None
    tiny.save(tmp_path)
    with pytest.raises(UserError, match="269 tokens that is neither GPT-2's"):
        load_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    shape = (
        {"vocab": {"x": 5}},
        {"vocab": [["▁the", -1.5], ["x", -2.0]]},
        {"vocab": {"\u2581a": 0}, "merges": [["a", "b"]]},
    )
    for model in shape:
        damaged = content | {"model": model, "added_tokens": []}
        (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="neither"):
            load_tokenizer(tmp_path)


@given(
    st.sampled_from(
        [
            b"",
            b"{",
            b"[]",
            b"\xff",
            b"null",
            b"[" * 9999,
            b'{"model": {"vocab": 3}, "added_tokens": []}',
        ]
    )
    | st.binary()
)
def test_a_damaged_tokenizer_file_is_named(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(folder)


def test_a_tokenizer_is_made_again_from_a_data_sets_meta(tmp_path):
    assert from_meta({}, tmp_path) is None
    meta = {"tokenizer": "char", "chars": "".join(chars.names), "tokenizer_sha256": chars.sha256}
    for tokenizer, written in (chars, meta), (ByteTokenizer(), {"tokenizer": "bytes"}):
        again = from_meta(written, tmp_path)
        assert again is not None and again.sha256 == tokenizer.sha256
    bad = (
        {"tokenizer": "klingon"},
        {"tokenizer": ["char"]},
        meta | {"chars": "aa"},
        meta | {"chars": None},
        meta | {"chars": "ab"},
    )
    for wrong in bad:
        with pytest.raises(UserError):
            from_meta(wrong, tmp_path)
