"""The types of the settings: what a value must be, and how it is converted and described.

A type is int, float, bool, str, None, a Literal of words, a tuple, a union of these, or one of them
with a Check. This file knows no key; gpt12/settings.py has those.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin

LORA_TARGETS = ("c_attn", "c_proj", "c_fc")  # the linear layers of a block, by GPT-2's names
LARGEST_TEXT_COUNT = 100_000  # all texts are made at once


@dataclass(frozen=True)
class Check:
    """A condition on a value, beyond its Python type."""

    description: str  # as in "dropout must be a number in [0, 1)"
    passes: Callable[[Any], bool]


def _is_whole(value: int) -> bool:
    return 0 <= value < 2**63


def _is_count(value: int) -> bool:
    return 1 <= value < 2**63


def _is_text_count(value: int) -> bool:
    return 1 <= value <= LARGEST_TEXT_COUNT


def _is_seed(value: int) -> bool:
    return 0 <= value < 2**62


def _is_amount(value: float) -> bool:
    return 0 <= value < inf


def _is_positive(value: float) -> bool:
    return 0 < value < inf


def _is_share(value: float) -> bool:
    return 0 <= value < 1


def _is_open_share(value: float) -> bool:
    return 0 < value < 1


def _is_full_share(value: float) -> bool:
    return 0 < value <= 1


def _is_unicode(value: str) -> bool:
    """Whether UTF-8 can encode the text. It cannot encode half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_text(value: str) -> bool:
    return value != "" and "\0" not in value and _is_unicode(value)


def _is_cuda_device(value: str) -> bool:
    return re.fullmatch("cuda:[0-9]{1,3}", value) is not None


def _is_list_of_layers(value: str) -> bool:
    return all(name in LORA_TARGETS for name in value.split(","))


Whole = Annotated[int, Check("a whole number >= 0", _is_whole)]
Count = Annotated[int, Check("a whole number >= 1", _is_count)]
TextCount = Annotated[int, Check(f"a whole number in [1, {LARGEST_TEXT_COUNT}]", _is_text_count)]
Seed = Annotated[int, Check("a whole number in [0, 2**62)", _is_seed)]
Amount = Annotated[float, Check("a number >= 0", _is_amount)]
Positive = Annotated[float, Check("a number > 0", _is_positive)]
Share = Annotated[float, Check("a number in [0, 1)", _is_share)]
OpenShare = Annotated[float, Check("a number in (0, 1)", _is_open_share)]
FullShare = Annotated[float, Check("a number in (0, 1]", _is_full_share)]
Prompt = Annotated[str, Check("text", _is_unicode)]
Text = Annotated[str, Check("text, not empty", _is_text)]
CudaDevice = Annotated[str, Check("cuda:N", _is_cuda_device)]
LayerList = Annotated[str, Check(f"a list like {','.join(LORA_TARGETS)}", _is_list_of_layers)]
Device = Literal["auto", "cpu", "mps", "cuda"] | CudaDevice
Layers = Literal["all"] | LayerList
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto"] | bool
Recompute = Literal["auto", "none", "pointwise", "block"]


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def is_list(kind: Any) -> bool:
    """Whether a key of this type takes several values, as --stop=a --stop=b."""
    return get_origin(kind) is tuple


def accepts_true(kind: Any) -> bool:
    """Whether --key alone, which means True, is a value of this type."""
    return kind is bool or (is_union(kind) and bool in get_args(kind))


def convert(value: Any, kind: Any) -> Any:
    """Return value as the type has it: 5e3 becomes 5000 for an int, and 1 becomes 1.0 for a float.

    Raises ValueError if the type does not allow the value. Any other exception may come from the
    value itself, which a config file may have made.
    """
    origin = get_origin(kind)
    if is_union(kind):
        return _convert_to_first_that_fits(value, get_args(kind))
    if origin is Annotated:
        return _convert_and_check(value, *get_args(kind))
    if origin is tuple:
        parts = [value] if isinstance(value, str) else value
        return tuple(convert(part, get_args(kind)[0]) for part in parts)
    if origin is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
    elif kind in (int, float):
        return _convert_number(value, kind)
    elif isinstance(value, kind):
        return value
    raise ValueError


def _convert_to_first_that_fits(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return convert(value, kind)
        except ValueError:
            continue
    raise ValueError


def _convert_and_check(value: Any, kind: Any, check: Check) -> Any:
    converted = convert(value, kind)
    if not check.passes(converted):
        raise ValueError
    return converted


def _convert_number(value: Any, kind: type[int] | type[float]) -> int | float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise ValueError
    if kind is int and value % 1 != 0:
        raise ValueError
    return kind(value)


def choices(kind: Any) -> list[str]:
    """Return what the type allows, in words: ["auto", "a whole number >= 1"]."""
    origin = get_origin(kind)
    if origin is Annotated:
        return [get_args(kind)[1].description]
    if origin is Literal:
        return list(get_args(kind))
    if origin is tuple:
        return choices(get_args(kind)[0])
    if is_union(kind):
        return [choice for part in get_args(kind) for choice in choices(part)]
    if kind is bool:
        return ["True", "False"]
    return ["None"]
