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
import textwrap
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic.json_schema import model_json_schema

from gpt12.errors import UserError
from gpt12.settings import ALL_KEYS, REPLACES, BenchConfig, SampleConfig, TrainConfig

REPOSITORY = Path(__file__).parents[1]
MAX_SHOWN = 120  # characters of a value in a message
TEXT_FILES = (".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
Schema = TypeVar("Schema", TrainConfig, SampleConfig, BenchConfig)


class Said(NamedTuple):
    """A value that the user gave, and how: "--dropout=1" or "my.py:4: dropout=1.5"."""

    value: Any
    words: str


@dataclass(frozen=True)
class Reading:
    """What the user gave, not checked yet."""

    files: dict[str, Said]  # what the config files say, the last one counts
    typed: dict[str, Said]  # the keys on the command line
    problems: list[str]

    def all(self) -> dict[str, Said]:
        """Return what counts of the files and of the command line."""
        return merge(self.files, self.typed)


def load_config(schema: type[Schema], argv: Sequence[str]) -> tuple[Schema, set[str]]:
    """Return the configuration that the command line asks for, and the keys that it sets.

    schema: TrainConfig, SampleConfig or BenchConfig.
    argv: the command line without the program's name. --help prints the help page and exits.
    Raises UserError with every mistake, one a line.
    """
    reading = read(schema, argv)
    said = reading.all()
    return check(schema, said, set(said), reading.problems), set(said)


def read(schema: type[Schema], argv: Sequence[str]) -> Reading:
    """Execute the config files and read the keys on the command line; check no value.

    Files come first, wherever they stand, so that a key on the command line always wins.
    """
    if "-h" in argv or "--help" in argv:
        print(help_page(schema))
        raise SystemExit(0)
    kinds = kinds_of(schema)
    reading = Reading({}, {}, [])
    files: dict[str, Said] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            detached = words.pop(0) if words and is_value(words[0], word, kinds) else None
            if detached is not None:
                advice = f"needs its value after an equals sign: {word}={shorten(detached)}"
                reading.problems.append(f"{word} {advice}")
            else:
                read_word(word, kinds, reading.typed)
            continue
        present = asdict(schema()) | {key: said.value for key, said in files.items()}
        try:
            files = merge(files, execute(word, present))
        except UserError as problem:
            reading.problems.append(str(problem))
    reading.files.update(files)
    return reading


def merge(earlier: Mapping[str, Said], later: Mapping[str, Said]) -> dict[str, Said]:
    """Return both; of a key in both, and of two keys that replace each other, the later counts."""
    replaced = {REPLACES[key] for key in later if key in REPLACES}
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
    messages = list(problems)
    try:
        config = schema(**values)
    except ValidationError as error:
        wrong = {str(mistake["loc"][0]) for mistake in error.errors()}
        kinds = kinds_of(schema)
        messages += [explain(key, one.words, kinds) for key, one in said.items() if key in wrong]
        config = schema(**{key: value for key, value in values.items() if key not in wrong})
    else:
        wrong = set()
    if not problems:
        for keys, advice in config.contradictions(given):
            shown = " ".join(f"--{key}={getattr(config, key)}" for key in keys)
            if wrong.isdisjoint(keys):
                messages.append(f"{shown}: {advice}")
    if messages:
        raise UserError("\n".join(messages))
    return config


def explain(key: str, words: str, kinds: Mapping[str, Any]) -> str:
    """Say what is wrong with a value that pydantic refused, or with a key that it does not know."""
    if key in kinds:
        return f"{words} must be {describe(kinds[key])}"
    near = difflib.get_close_matches(key[:MAX_SHOWN], kinds, n=1)
    return f"{words}: unknown key; " + (f"did you mean {near[0]}?" if near else "see --help")


# --------------------------------------------------------------------------------------------------
# What a key takes, by its JSON schema

NOUNS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "True or False",
    "null": "None",
    "string": "text",
}
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def kinds_of(schema: Any) -> dict[str, Any]:
    """Return the JSON schema of each key."""
    return model_json_schema(schema)["properties"]


def describe(kind: Mapping[str, Any]) -> str:
    """Say what a key takes: "a number >= 0 and < 1", "auto or True or False"."""
    if "anyOf" in kind:
        return " or ".join(describe(part) for part in kind["anyOf"])
    if "const" in kind or "enum" in kind:
        return " or ".join(kind.get("enum", [kind.get("const")]))
    if "examples" in kind:
        return " or ".join(kind["examples"])
    if "items" in kind:
        return describe(kind["items"])
    if kind.get("minLength"):
        return "text, not empty"
    limits = [f"{sign} {kind[limit]}" for limit, sign in LIMITS.items() if limit in kind]
    return f"{NOUNS[kind['type']]} {' and '.join(limits)}".rstrip()


def types_of(kind: Mapping[str, Any]) -> set[str]:
    """Return the types that a key takes: {"string", "boolean"} for compile."""
    return {part["type"] for part in kind.get("anyOf", [kind])}


# --------------------------------------------------------------------------------------------------
# The command line


def is_value(word: str, flag: str, kinds: Mapping[str, Any]) -> bool:
    """Tell whether a word was meant as the value of the key before it: --key value."""
    kind = kinds.get(key_of(flag))
    if "=" in flag or kind is None or word.startswith("-") or word.endswith(".py"):
        return False
    return "boolean" not in types_of(kind) or word.lower() in ("true", "false", "auto")


def key_of(word: str) -> str:
    """Return the key of --some-key=value: some_key."""
    return word.partition("=")[0].lstrip("-").replace("-", "_")


def read_word(word: str, kinds: Mapping[str, Any], typed: dict[str, Said]) -> None:
    """Add --key=value, or --key for True, to the typed keys. A list gets one more entry."""
    key = key_of(word)
    _, equals, text = word.partition("=")
    types = types_of(kinds[key]) if key in kinds else {"string"}
    value: Any = text
    if not equals:
        value = True
    elif types == {"array"}:
        before = typed[key].value if key in typed else ()
        value = (*before, unescape(text))
    elif not types <= {"string", "null"}:
        value = parse(text)
    typed[key] = Said(value, shorten(word))


def parse(text: str) -> Any:
    """Return the Python value that a text stands for; none means None. Else the text itself."""
    if text.lower() == "none":
        return None
    try:
        return ast.literal_eval(text)
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
    Raises UserError if the file cannot be read or raises an exception.
    """
    source = read_file(name, present)
    names = {**present, "__file__": name, "__name__": "__main__"}
    try:
        tree = ast.parse(source, name)
        exec(compile(tree, name, "exec"), names)  # noqa: S102 (--help says it is code)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        text = f"{type(error).__name__}: {error}"
        raise UserError(f"{name}:{line_of_error(error, name)}: {shorten(text)}") from error
    said = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Store):
            continue
        key = node.id
        if key.startswith("_") or key not in names or key in ALL_KEYS - present.keys():
            continue
        value = names[key]
        if not callable(value) and not isinstance(value, ModuleType):
            said[key] = Said(value, f"{name}:{node.lineno}: {key}={shorten(repr(value))}")
    return said


def read_file(name: str, present: Mapping[str, Any]) -> bytes:
    """Return the content of a config file. Raises UserError with advice if there is none."""
    if name.startswith("hf:") or name.lower().endswith(TEXT_FILES):
        own_text = "--dataset=" if "dataset" in present else "--start=FILE:"
        raise UserError(
            f"{name}: a config file is Python; your own text is given as {own_text}{name}"
        )
    try:
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        presets = {path.stem: path for path in preset_titles()}
        near = difflib.get_close_matches(Path(name).stem[:MAX_SHOWN], presets, n=1, cutoff=0.5)
        advice = "--help lists the presets"
        if "=" in name:
            advice = f"a key is set with two dashes: --{name}"
        elif near:
            advice = f"did you mean {presets[near[0]]}?"
        problem = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f"{shorten(name)}: {shorten(problem)}; {advice}") from error


def line_of_error(error: BaseException, name: str) -> int:
    """Return the line of a config file at which it raised an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == name]
    return (lines[-1] if lines else getattr(error, "lineno", None)) or 1


def shorten(text: str) -> str:
    """Return text as one line of at most MAX_SHOWN characters."""
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


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
        if kind["group"]:
            lines += ["", kind["group"]]
        text = kind["description"]
        if "enum" in str(kind) or "const" in str(kind):
            text += f" One of: {describe(kind)}."
        default = str(kind["default"]).replace("\n", r"\n")
        wrapped = textwrap.wrap(text, 62, break_on_hyphens=False)
        lines.append(f"  --{key}={default:<{32 - len(key)}} {wrapped[0]}")
        lines += [" " * 38 + line for line in wrapped[1:]]
    lines += ["", "Presets"]
    lines += [f"  config/{path.name:<29}{title}" for path, title in preset_titles().items()]
    return "\n".join(lines)


def preset_titles() -> dict[Path, str]:
    """Return each preset in config/ with its title, the comment that the file begins with."""
    titles = {}
    for path in sorted((REPOSITORY / "config").glob("*.py")):
        titles[path] = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    return titles
