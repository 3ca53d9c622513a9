"""gpt12/text_stream.py: whole characters, stop strings, and the end-of-text token."""

from types import SimpleNamespace

import pytest

from gpt12.generate import TextStream


def pieces(*table: str | bytes) -> SimpleNamespace:
    """A tokenizer whose id i is the i-th piece; the one after the last ends a text."""
    parts = [piece if isinstance(piece, bytes) else piece.encode() for piece in table]
    return SimpleNamespace(eot=len(parts), token_bytes=lambda i: parts[i])


def shown(tokens: list[str | bytes], *stops: str) -> tuple[list[str], str | None]:
    text = TextStream(pieces(*tokens), stops)
    steps = [text.add(i) for i in range(len(tokens))]
    reason = text.finish_reason
    steps.append("" if reason else text.finish("length"))
    assert text.shown == "".join(steps)
    return steps, reason


@pytest.mark.parametrize(
    ("tokens", "stops", "steps", "reason"),
    [
        (["ab", "c"], (), ["ab", "c", ""], None),
        (["ab\n\ncd", "e"], ("\n\n",), ["ab", "", ""], "stop"),  # inside a token
        (
            ["ab\n", "\ncd"],
            ("\n\n",),
            ["ab", "", ""],
            "stop",
        ),  # over two, and the first newline never shown
        (["ab\n", "cd", "\n"], ("\n\n",), ["ab", "\ncd", "", "\n"], None),  # held back until known
        (["x", "a", "a", "b", "z"], ("aab",), ["x", "", "", "", "", ""], "stop"),
        (
            ["a", "a", "a", "b"],
            ("aab",),
            ["", "", "a", "", ""],
            "stop",
        ),  # a beginning inside a beginning
        (["one END two STOP"], ("STOP", "END"), ["one ", ""], "stop"),  # the first in the text
        (["EN", "D"], ("ENDING", "XY"), ["", "", "END"], None),
        (["\u00e9".encode()[:1], "\u00e9".encode()[1:]], (), ["", "\u00e9", ""], None),
        ([b"a\xf0\x9f", b"\x99", b"\x82b"], (), ["a", "", "\U0001f642b", ""], None),
        ([b"a\xf0\x9f", b"b"], (), ["a", "\ufffdb", ""], None),  # half a character that stays one
        ([b"a\xf0\x9f"], (), ["a", "\ufffd"], None),
        (
            [b"\xe2\x82", b"\xac!"],
            ("\u20ac",),
            ["", "", ""],
            "stop",
        ),  # a stop string of bytes over two tokens
    ],
)
def test_stop_strings_and_whole_characters(tokens, stops, steps, reason):
    assert shown(tokens, *stops) == (steps, reason)


def test_the_end_of_text_token_ends_a_text():
    text = TextStream(pieces("ab", "\n"), ("\n\n",))
    assert [text.add(i) for i in (0, 1, 2, 0)] == ["ab", "", "\n", ""]
    assert (text.finish_reason, text.ids, text.shown) == ("end", [0, 1], "ab\n")
