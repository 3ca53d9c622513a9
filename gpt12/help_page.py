"""The text that --help prints, made from the descriptions in gpt12/settings.py."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gpt12.option_types import choices, is_union
from gpt12.settings import Settings

REPOSITORY = Path(__file__).parents[1]
WIDTH = 100
DESCRIPTION_COLUMN = 38  # where the descriptions begin

HOW_TO_SET_KEYS = """\
Set a key with --key=value; --key alone means True. Dashes in keys work like underscores.
Values come from the defaults, then from config files in the order given, then from the keys that
you type. The last one wins. A config file is a Python program: read a stranger's before you use it.
"""


def build_help_page(schema: type[Settings]) -> str:
    """Return the text of --help: what the script does, its keys by group, and the presets."""
    lines = []
    for line in inspect.cleandoc(schema.__doc__ or "").splitlines():
        is_command = line.startswith("python ")
        lines.append(f"  {line}" if is_command else line)
    lines += ["", *HOW_TO_SET_KEYS.splitlines()]
    types = get_type_hints(schema, include_extras=True)
    for key in own_keys(schema):
        if key.metadata["new_group"]:
            lines += ["", key.metadata["new_group"]]
        lines += _describe_key(key, types[key.name])
    lines += ["", "Presets"]
    for path, title in preset_titles().items():
        lines.append(f"  config/{path.name:<29}{title}")
    return "\n".join(lines)


def own_keys(schema: type[Settings]) -> list[Field[Any]]:
    """Return the keys that the class itself defines, in order, without those that it inherits."""
    keys = {key.name: key for key in fields(schema)}
    return [keys[name] for name in inspect.get_annotations(schema)]


def _describe_key(key: Field[Any], kind: Any) -> list[str]:
    """Return the lines for one key: its default on the left, its description on the right."""
    description = key.metadata["description"]
    if _has_literal(kind):
        description += f" Choices: {', '.join(choices(kind))}."
    width = WIDTH - DESCRIPTION_COLUMN
    wrapped = textwrap.wrap(description, width, break_on_hyphens=False)
    left = f"  --{key.name}={_show_default(key.default)}"
    if len(left) > DESCRIPTION_COLUMN - 2:
        wrapped.insert(0, "")
    first = f"{left:<{DESCRIPTION_COLUMN}}{wrapped[0]}".rstrip()
    return [first, *(" " * DESCRIPTION_COLUMN + line for line in wrapped[1:])]


def _has_literal(kind: Any) -> bool:
    """Whether the type is a choice of words."""
    if is_union(kind):
        return any(get_origin(part) is Literal for part in get_args(kind))
    return get_origin(kind) is Literal


def _show_default(default: Any) -> str:
    """Return a default as it would be typed. Nothing is typed for an empty list."""
    if default == ():
        return ""
    text = str(default)
    if not text.isprintable():
        return f"${text!r}"  # a shell reads $'\n' as a line end
    return f'"{text}"' if " " in text else text


def preset_titles() -> dict[Path, str]:
    """Return each preset in config/ with its title, the comment that the file begins with."""
    titles = {}
    for path in sorted((REPOSITORY / "config").glob("*.py")):
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        if first_line.startswith("#"):
            titles[path] = first_line.lstrip("# ")
    return titles
