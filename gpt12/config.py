"""The configuration of a script: the order of its sources, and how values are checked.

    order    defaults (gpt12/settings.py), then config files, then --key=value: the last one wins.
             A resumed run begins with its own settings instead of these: gpt12/run.py, resume().
    checks   pydantic checks each value by its type in gpt12/settings.py, whose contradictions()
             names values that cannot hold together. All mistakes are reported at once.

load_config() does all of this. A config file is Python and is executed, as in nanoGPT: it may read
the present values, import modules, define functions and compute. Read a stranger's before you use
it.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import inspect
import re
import textwrap
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

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


@dataclass(frozen=True)
class Loaded(Generic[Schema]):
    """A configuration that is checked, and who set its keys."""

    config: Schema
    files: dict[str, Said]  # what the config files set
    typed: dict[str, Said]  # what the command line sets

    @property
    def given(self) -> frozenset[str]:
        """Return the keys that the user set."""
        return frozenset(merge(self.files, self.typed))


def load_config(schema: type[Schema], argv: Sequence[str]) -> Loaded[Schema]:
    """Return the configuration that the command line asks for. --help prints a page and exits.

    schema: TrainConfig, SampleConfig or BenchConfig.
    argv: the command line without the program's name. Config files count before typed keys,
    wherever they stand.
    Raises UserError with every mistake, one a line.
    """
    if "-h" in argv or "--help" in argv:
        print(help_page(schema))
        raise SystemExit(0)
    kinds = kinds_of(schema)
    defaults = asdict(schema())
    files: dict[str, Said] = {}
    typed: dict[str, Said] = {}
    mistakes = []
    for word in argv:
        if word.startswith("-"):
            read_word(word, kinds, typed)
        elif word.endswith(".py"):
            present = defaults | {key: said.value for key, said in files.items()}
            try:
                files = merge(files, execute(word, present))
            except UserError as mistake:
                mistakes.append(str(mistake))
        else:
            mistakes.append(
                f"{word}: a key is set by --key={word}, a config file ends with .py, and your own "
                f"text is given by {'--start=FILE:' if schema is SampleConfig else '--dataset='}"
                f"{word}"
            )
    said = merge(files, typed)
    return Loaded(checked(schema, said, said.keys(), mistakes), files, typed)


def merge(earlier: Mapping[str, Said], later: Mapping[str, Said]) -> dict[str, Said]:
    """Return both. A later key removes the same earlier one, and the one that it replaces.

    max_iters and num_epochs replace each other.
    """
    replaced = {REPLACES.get(key) for key in later}
    return {key: said for key, said in earlier.items() if key not in replaced} | dict(later)


def checked(
    schema: type[Schema],
    said: Mapping[str, Said],
    given: Collection[str],
    mistakes: Sequence[str] = (),
) -> Schema:
    """Return the configuration of what was said, or raise UserError with every mistake.

    Each value is checked by its annotation in the schema, with pydantic.
    given: the keys that the user set. Only these may contradict each other. In a new run they are
    all of `said`; what run.json says also has keys that nobody set.
    mistakes: those found so far. If there are any, keys are not compared with each other: a file
    that was not read might have changed them.
    """
    values = {key: one.value for key, one in said.items()}
    wrong: dict[str, str] = {}
    try:
        schema(**values)
    except ValidationError as error:
        for found in error.errors():
            key = str(found["loc"][0])
            unknown = found["type"] == "unexpected_keyword_argument"
            wrong[key] = unknown_key(key, schema) if unknown else found["msg"]
    messages = [*mistakes, *(f"{said[key].words}: {wrong[key]}" for key in said if key in wrong)]
    # Keys with a wrong value get their defaults, so that the others can be compared.
    config = schema(**{key: value for key, value in values.items() if key not in wrong})
    for keys, advice in config.contradictions(given):
        if not mistakes and wrong.keys().isdisjoint(keys):
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
        advice = "--help lists the presets"
        if near:  # we may be in another folder
            advice = f"did you mean {near[0] if exists(near[0]) else REPOSITORY / near[0]}?"
        raise UserError(f"{name}: there is no such file; {advice}")
    # Python looks for a name among the builtins last. So the file can read every key there, and
    # `names` holds only what the file has set itself.
    readable = {**vars(builtins), **present}
    names: dict[str, Any] = {"__builtins__": readable, "__file__": name, "__name__": "__main__"}
    try:
        tree = ast.parse(Path(name).read_bytes(), name)
        exec(compile(tree, name, "exec"), names)  # noqa: S102 (--help says it is code)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == name]
        line = getattr(error, "lineno", None) or [1, *lines][-1]
        advice = "; write a Windows path with / for \\" if "unicodeescape" in str(error) else ""
        raise UserError(f"{name}:{line}: {one_line(error)}{advice}") from error
    assigned: dict[str, int] = {}  # the lines
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assigned[node.id] = node.lineno
    # Settings are the keys of this script, and assigned names that no script knows, which are
    # refused later as unknown keys. A key of another script is left to that one.
    keys = present.keys() | (assigned.keys() - ALL_KEYS)
    said = {}
    for key, value in names.items():
        own = key.startswith("_") or callable(value) or isinstance(value, ModuleType)
        if key in keys and not own:
            said[key] = Said(value, f"{name}:{assigned.get(key, 1)}: {key}={value!r}")
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
    inherited = asdict(TrainConfig()) if schema is BenchConfig else {}  # train.py --help shows them
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
