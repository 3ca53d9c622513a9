"""Read the configuration: defaults, then config files, then --key=value. The last one wins.

    load_config() -> read() -> execute() for a config file, read_word() for a typed key
                  -> check(): pydantic checks each value, gpt12/settings.py which ones contradict

A config file is Python and is executed, as in nanoGPT: it may read the present values, import
modules, define functions and compute. Read a stranger's before you use it.
All mistakes are collected and raised together.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import symtable
import textwrap
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic.json_schema import model_json_schema

from gpt12.errors import UserError, one_line
from gpt12.files import exists
from gpt12.settings import ALL_KEYS, REPLACES, BenchConfig, SampleConfig, TrainConfig

REPOSITORY = Path(__file__).parents[1]
Schema = TypeVar("Schema", TrainConfig, SampleConfig, BenchConfig)


class Said(NamedTuple):
    """A value that the user gave, and how: "--dropout=1" or "my.py:4: dropout=1.5"."""

    value: Any
    words: str


def load_config(schema: type[Schema], argv: Sequence[str]) -> tuple[Schema, set[str]]:
    """Return the configuration that the command line asks for, and the keys that it sets.

    schema: TrainConfig, SampleConfig or BenchConfig.
    argv: the command line without the program's name. --help prints the help page and exits.
    Raises UserError with every mistake, one a line.
    """
    files, typed, problems = read(schema, argv)
    said = merge(files, typed)
    return check(schema, said, set(said), problems), set(said)


def read(
    schema: type[Schema], argv: Sequence[str]
) -> tuple[dict[str, Said], dict[str, Said], list[str]]:
    """Execute the config files and read the keys on the command line; check no value.

    Returns what the files say (of two, the last one counts), the typed keys, and all mistakes.
    Files come first, wherever they stand, so that a key on the command line always wins.
    """
    if "-h" in argv or "--help" in argv:
        print(help_page(schema))
        raise SystemExit(0)
    kinds = kinds_of(schema)
    defaults = asdict(schema())
    files: dict[str, Said] = {}
    typed: dict[str, Said] = {}
    problems = []
    for word in argv:
        if word.startswith("-"):
            read_word(word, kinds, typed)
        elif word.endswith(".py"):
            present = defaults | {key: said.value for key, said in files.items()}
            try:
                files = merge(files, execute(word, present))
            except UserError as problem:
                problems.append(str(problem))
        else:
            problems.append(
                f"{word}: a key is set by --key={word}, a config file ends with .py, and your own "
                f"text is given by {'--start=FILE:' if schema is SampleConfig else '--dataset='}"
                f"{word}"
            )
    return files, typed, problems


def merge(earlier: Mapping[str, Said], later: Mapping[str, Said]) -> dict[str, Said]:
    """Return both; of a key in both, and of two keys that replace each other, the later counts."""
    replaced = {REPLACES.get(key) for key in later}
    return {key: said for key, said in earlier.items() if key not in replaced} | dict(later)


def check(
    schema: type[Schema],
    said: Mapping[str, Said],
    given: Collection[str],
    problems: Sequence[str] = (),
) -> Schema:
    """Return the configuration, or raise UserError with every mistake.

    given: the keys that the user set; the others are those of a run that is resumed.
    problems: mistakes found so far. After one in a file, any value might be another.
    """
    values = {key: one.value for key, one in said.items()}
    wrong: dict[str, str] = {}
    try:
        schema(**values)
    except ValidationError as error:
        for mistake in error.errors():
            key = str(mistake["loc"][0])
            unknown = mistake["type"] == "unexpected_keyword_argument"
            wrong[key] = unknown_key(key, schema) if unknown else mistake["msg"]
    messages = [*problems, *(f"{said[key].words}: {wrong[key]}" for key in said if key in wrong)]
    config = schema(**{key: value for key, value in values.items() if key not in wrong})
    for keys, advice in config.contradictions(given):
        if not problems and wrong.keys().isdisjoint(keys):
            shown = " ".join(f"--{key}={getattr(config, key)}" for key in keys)
            messages.append(f"{shown}: {advice}")
    if messages:
        raise UserError("\n".join(messages))
    return config


def unknown_key(key: str, schema: type[Schema]) -> str:
    """Name the known key that is nearest to an unknown one."""
    near = difflib.get_close_matches(key, kinds_of(schema), n=1)
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key; see --help"


def kinds_of(schema: type[Schema]) -> dict[str, Any]:
    """Return the JSON schema of each key."""
    return model_json_schema(schema)["properties"]  # type: ignore[arg-type]


def read_word(word: str, kinds: Mapping[str, Any], typed: dict[str, Said]) -> None:
    """Add --key=value, or --key for True, to the typed keys. A list gets one more entry.

    A key that takes text only, or words, gets what was typed; others get the Python value of it.
    """
    name, equals, text = word.partition("=")
    key = name.lstrip("-").replace("-", "_")
    kind = kinds.get(key, {"type": "string"})
    types = {part.get("type") for part in kind.get("anyOf", [kind])}
    value: Any = text
    if not equals:
        value = True
    elif types == {"array"}:
        before = typed[key].value if key in typed else ()
        value = (*before, unescape(text))
    elif not types <= {"string", "null"}:
        value = parse(text)
    typed[key] = Said(value, word)


def parse(text: str) -> Any:
    """Return the Python value that a text stands for, in any case of letters; else the text."""
    try:
        return ast.literal_eval(text.capitalize())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def unescape(text: str) -> str:
    r"""Replace \n, \t and \\ by the characters that they stand for."""
    return re.sub(r"\\[nt\\]", lambda match: {"n": "\n", "t": "\t"}.get(match[0][1], "\\"), text)


# --------------------------------------------------------------------------------------------------
# Config files


def execute(name: str, present: Mapping[str, Any]) -> dict[str, Said]:
    """Execute a config file and return what it assigns.

    present: the values of all keys, which the file may read. Names that it may use for itself are
    modules, functions, names that begin with _, and keys of another script.
    Raises UserError if there is no such file or if it raises an exception.
    """
    if not exists(name):
        presets = [f"config/{path.name}" for path in (REPOSITORY / "config").glob("*.py")]
        near = difflib.get_close_matches(name, presets, n=1)
        advice = f"did you mean {near[0]}?" if near else "--help lists the presets"
        raise UserError(f"{name}: there is no such file; {advice}")
    names = {**present, "__file__": name, "__name__": "__main__"}
    try:
        tree = ast.parse(Path(name).read_bytes(), name)
        exec(compile(tree, name, "exec"), names)  # noqa: S102 (--help says it is code)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == name]
        line = getattr(error, "lineno", None) or [1, *lines][-1]
        raise UserError(f"{name}:{line}: {one_line(error)}") from error
    stored: dict[str, int] = {}  # the lines
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored[node.id] = node.lineno
    symbols = symtable.symtable(ast.unparse(tree), name, "exec").get_symbols()  # no function's
    assigned = {symbol.get_name() for symbol in symbols if symbol.is_assigned()}
    said = {}
    for key in stored | dict(present):
        if key not in names:
            continue
        value = names[key]
        own = key.startswith("_") or callable(value) or isinstance(value, ModuleType)
        # `from other import *` and a function's `global` change a key without an assignment here.
        changed = key in present and value is not present[key]
        if (changed or (key in stored and key in assigned)) and not own:
            if key not in ALL_KEYS - present.keys():
                said[key] = Said(value, f"{name}:{stored.get(key, 1)}: {key}={value!r}")
    return said


# --------------------------------------------------------------------------------------------------
# --help

HOW_TO_SET_KEYS = """\
Set a key with --key=value; --key alone means True. Dashes in keys work like underscores.
Values come from the defaults, then from config files in the order given, then from the keys that
you type. The last one wins. A config file is a Python program: read a stranger's before you use it.
"""


def help_page(schema: type[Schema]) -> str:
    """Return the text of --help: what the script does, its keys by group, and the presets."""
    lines = []
    for line in inspect.cleandoc(schema.__doc__ or "").splitlines():
        lines.append(f"  {line}" if line.startswith("python ") else line)
    lines += ["", *HOW_TO_SET_KEYS.splitlines()]
    inherited = asdict(TrainConfig()) if schema is BenchConfig else {}  # on train.py's own page
    for key, kind in kinds_of(schema).items():
        if key in inherited and inherited[key] == kind["default"]:
            continue
        if "group" in kind:
            lines += ["", kind["group"]]
        text = kind.get("description", "A field of GPTConfig in model.py.")
        if "enum" in kind:
            text += f" One of: {' or '.join(map(str, kind['enum']))}."
        default = str(kind["default"]).replace("\n", r"\n")
        wrapped = textwrap.wrap(text, 62, break_on_hyphens=False)
        lines.append(f"  --{key}={default:<{32 - len(key)}} {wrapped[0]}")
        lines += [" " * 38 + line for line in wrapped[1:]]
    lines += ["", "Presets"]
    for path in sorted((REPOSITORY / "config").glob("*.py")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"  config/{path.name:<29}{title}")
    return "\n".join(lines)
