"""Read the configuration: defaults, then config files, then --key=value. The last one wins.

A config file is Python and is executed, as in nanoGPT: it may read the present values, import
modules, define helpers and compute. Read a stranger's before you use it.

A resumed run has its saved values between the defaults and the files. (gpt12/start.py first reads
without them, to compare.)

The way of a value: load() -> read() -> apply_saved_values(), apply_file(), apply_flag()
-> set_key() -> convert() (gpt12/option_types.py checks the type).
Then finish() -> contradictions() and derive() (gpt12/settings.py: keys that depend on each other).
All mistakes are collected and raised together. For train.py gpt12/start.py then checks the keys
that a resumed run cannot change, and the number of ranks.
"""

from __future__ import annotations

import ast
import difflib
import re
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

from gpt12.errors import UserError
from gpt12.help_page import build_help_page, preset_titles
from gpt12.option_types import accepts_true, choices, convert, is_list
from gpt12.settings import ALL_KEYS, Settings

COMMAND_LINE = "command line"
MAX_SHOWN = 120  # characters of a value in a message
Schema = TypeVar("Schema", bound=Settings)


def load(
    schema: type[Schema], argv: Sequence[str], base: Mapping[str, Any] | None = None
) -> tuple[Schema, set[str]]:
    """Return the configuration that the command line asks for, and the keys that it sets.

    schema: TrainConfig, SampleConfig or BenchConfig.
    argv: the command line without the program's name. --help prints the help page and exits.
    base: values between the defaults and argv, from a saved run. Keys that are not in the schema
        are ignored.
    Raises UserError with every problem, one a line.
    """
    return read(schema, argv, base).finish()


def read(
    schema: type[Schema], argv: Sequence[str], base: Mapping[str, Any] | None = None
) -> Reading[Schema]:
    """Read as load() does, but refuse nothing yet. `sources` says where each key was set."""
    if "-h" in argv or "--help" in argv:
        print(build_help_page(schema))
        raise SystemExit(0)
    reading = Reading(schema)
    if base is not None:
        reading.apply_saved_values(base)
    files, flags = split_command_line(argv, reading.types)
    for name in files:
        reading.apply_file(name)
    reading.before_flags = replace(reading.config)
    for flag in flags:
        reading.apply_flag(flag)
    return reading


class Reading(Generic[Schema]):
    """A configuration while it is read, with the problems found so far."""

    def __init__(self, schema: type[Schema]) -> None:
        self.config = schema()
        # The values without those of the command line: start.py asks what the preset alone says.
        self.before_flags = schema()
        self.types = get_type_hints(schema, include_extras=True)
        self.sources: dict[str, str] = {}  # key -> where; in the order of setting
        self.problems: list[str] = []
        # Keys whose value was refused. Contradictions with them would only repeat the mistake.
        self.doubtful: set[str] = set()

    def finish(self, check: bool = True) -> tuple[Schema, set[str]]:
        """Return the configuration and the keys that were set. Raises UserError for problems.

        check: whether values that cannot hold together are refused.
        """
        problems = list(self.problems)
        if check:
            problems += self._contradictions()
        if problems:
            raise UserError("\n".join(problems))
        self.config.derive(self.sources)
        return self.config, set(self.sources)

    def _contradictions(self) -> list[str]:
        """Return a message for each contradiction between values that the user meant."""
        messages = []
        for keys, advice in self.config.contradictions(self.sources):
            if self.doubtful.isdisjoint(keys):
                values = " ".join(f"--{key}={getattr(self.config, key)}" for key in keys)
                messages.append(f"{values}: {advice}")
        return messages

    def apply_saved_values(self, base: Mapping[str, Any]) -> None:
        """Set the values of a saved run. They do not count as set by the user."""
        for key, value in base.items():
            if key in self.types:
                self.set_key(key, [value], f"the saved run: {key}={show(value)}", source=None)

    def apply_file(self, name: str) -> None:
        """Execute a config file and set the keys that it assigns."""
        try:
            file = execute_config_file(name, present=vars(self.config))
        except UserError as problem:
            self.problems.append(str(problem))
            self.doubtful.update(self.types)  # the file might have set any key
            return
        for key, value in file.assigned.items():
            if callable(value) or isinstance(value, types.ModuleType):
                continue
            said = f"{name}:{file.line_of.get(key, 1)}: {key}={show(value)}"
            if key in self.types:
                self.set_key(key, [value], said, source=name)
            elif file.looks_like_a_key(key):
                self.report_unknown_key(key, said)

    def apply_flag(self, flag: Flag) -> None:
        """Set one key from the command line: --key=value, or --key alone for True."""
        _, equals, text = flag.word.partition("=")
        key = key_of(flag.word)
        said = shorten(flag.word)
        kind = self.types.get(key)
        if kind is None:
            self.report_unknown_key(key, said)
        elif not equals and (flag.detached_value is not None or not accepts_true(kind)):
            self.report_missing_value(key, said, flag.detached_value or "VALUE")
        elif not equals:
            self.set_key(key, [True], said, COMMAND_LINE)
        elif is_list(kind):
            before = ()
            if self.sources.get(key) == COMMAND_LINE:
                before = getattr(self.config, key)
            self.set_key(key, [(*before, unescape(text))], said, COMMAND_LINE)
        else:
            self.set_key(key, possible_meanings(text), said, COMMAND_LINE)

    def set_key(self, key: str, meanings: Sequence[Any], said: str, source: str | None) -> None:
        """Set a key to the first of `meanings` that its type allows, else report a problem.

        meanings: what the text may stand for, the preferred value first.
        said: how the user set it, for the message. source: where, None for a saved run's value.
        """
        if source is not None:
            self.sources.pop(key, None)  # to move it to the end: `derive` needs the order
            self.sources[key] = source
        for value in meanings:
            try:
                converted = convert(value, self.types[key])
            except Exception:  # noqa: S112 (an object made by a config file may raise anything)
                continue
            setattr(self.config, key, converted)
            return
        self.doubtful.add(key)
        self.problems.append(f"{said} must be {' or '.join(choices(self.types[key]))}")

    def report_unknown_key(self, key: str, said: str) -> None:
        near = difflib.get_close_matches(key[:MAX_SHOWN], self.types, n=1)
        advice = f"did you mean {near[0]}?" if near else "--help lists the keys"
        self.problems.append(f"{said}: unknown key; {advice}")

    def report_missing_value(self, key: str, said: str, value: str) -> None:
        self.doubtful.add(key)
        advice = f"{said}={shorten(value)}"
        self.problems.append(f"{said} needs its value after an equals sign: {advice}")


# --------------------------------------------------------------------------------------------------
# The command line


class Flag(NamedTuple):
    """A key on the command line."""

    word: str  # as typed: --key=value, or --key alone
    detached_value: str | None = None  # the next word, if it was meant as the value: --key value


def split_command_line(
    argv: Sequence[str], types: Mapping[str, Any]
) -> tuple[list[str], list[Flag]]:
    """Split the command line into config files and keys.

    Files are applied first, wherever they stand, so that a key on the command line always wins.
    types: the type of each known key.
    """
    files: list[str] = []
    flags: list[Flag] = []
    previous = ""
    for word in argv:
        if word.startswith("-"):
            flags.append(Flag(word))
        elif previous.startswith("-") and is_detached_value(word, previous, types):
            flags[-1] = Flag(previous, word)
        else:
            files.append(word)
        previous = word
    return files, flags


def is_detached_value(word: str, flag: str, types: Mapping[str, Any]) -> bool:
    """Whether a word was meant as the value of the key before it: --key value."""
    key = key_of(flag)
    if "=" in flag or key not in types or word.endswith(".py"):
        return False
    if not accepts_true(types[key]):
        return True
    return word.lower() in ("true", "false", "auto")


def key_of(flag: str) -> str:
    """Return the key of --some-key=value: some_key."""
    name = flag.partition("=")[0]
    return name.lstrip("-").replace("-", "_")


LOWER_CASE_CONSTANTS = {"true": True, "false": False, "none": None}


def possible_meanings(text: str) -> list[Any]:
    """Return what a value on the command line may mean: a Python value, then the text itself.

    true, false and none are understood, too. Quoted text is a Python string, as in nanoGPT.
    """
    if text in LOWER_CASE_CONSTANTS:
        return [LOWER_CASE_CONSTANTS[text], text]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about unknown escapes such as "\d"
            value = ast.literal_eval(text)
    except Exception:  # literal_eval raises many kinds for text that is no Python
        return [text]
    if isinstance(value, str):
        return [value]
    return [value, text]


ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def unescape(text: str) -> str:
    r"""Replace \n, \t and \\ by the characters that they stand for."""
    return re.sub(r"\\[nt\\]", lambda match: ESCAPES[match[0]], text)


# --------------------------------------------------------------------------------------------------
# Config files


class ConfigFile(NamedTuple):
    """What a config file did when it was executed."""

    assigned: dict[str, Any]  # the names that it assigned, with their values at the end
    line_of: dict[str, int]  # the line on which it assigns a name
    names_it_reads: set[str]

    def looks_like_a_key(self, name: str) -> bool:
        """Whether a name that is no key of this script is probably a misspelt one.

        It is not if the file itself reads it (a helper), or if another script has such a key: one
        file may serve several scripts.
        """
        if name.startswith("_") or name in ALL_KEYS or name in self.names_it_reads:
            return False
        return name in self.line_of


class RecordingNamespace(MutableMapping[str, Any]):
    """The names that a config file sees while it runs. Remembers those that it assigns."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.assigned: dict[str, None] = {}  # in order; a dict keeps it and a set does not

    def __setitem__(self, name: str, value: Any) -> None:
        self.names[name] = value
        self.assigned[name] = None

    def __delitem__(self, name: str) -> None:
        del self.names[name]
        self.assigned.pop(name, None)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def execute_config_file(name: str, present: Mapping[str, Any]) -> ConfigFile:
    """Execute a config file, which can read the present values of all keys.

    Raises UserError if the file cannot be read or raises an exception.
    """
    source = read_config_file(name, present)
    values = {**present, "__file__": name, "__name__": "__main__"}
    namespace = RecordingNamespace(values)
    try:
        tree = ast.parse(source, name)
        exec(compile(tree, name, "exec"), values, namespace)  # noqa: S102 (--help says it is code)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        line = line_of_error(error, name)
        raise UserError(f"{name}:{line}: {type(error).__name__}: {show(error, str)}") from error
    assigned = {key: values[key] for key in namespace.assigned}
    # Functions that declare a name `global`, and globals()["name"], bypass the namespace.
    for key in present:
        if key not in assigned and key in values and values[key] is not present[key]:
            assigned[key] = values[key]
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return ConfigFile(
        assigned=assigned,
        line_of={node.id: node.lineno for node in names if isinstance(node.ctx, ast.Store)},
        names_it_reads={node.id for node in names if isinstance(node.ctx, ast.Load)},
    )


def read_config_file(name: str, present: Mapping[str, Any]) -> bytes:
    """Return the content of a config file. Raises UserError with advice if there is none."""
    shown = shorten(name)
    if name.startswith("hf:") or name.lower().endswith((".txt", ".md", ".csv", ".jsonl")):
        own_text = "--dataset=" if "dataset" in present else "--start=FILE:"
        raise UserError(
            f"{shown}: a config file is Python; your own text is given as {own_text}{shown}"
        )
    try:
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if "=" in name:
            advice = f"a key is set with two dashes: --{shown}"
        else:
            advice = nearest_preset(name)
        missing = isinstance(error, FileNotFoundError)
        problem = "there is no such file" if missing else "no config file that can be read"
        raise UserError(f"{shown}: {problem}; {advice}") from error


def nearest_preset(name: str) -> str:
    """Return advice that names the preset which is spelt most like a missing file."""
    presets = {path.stem: path for path in preset_titles()}
    near = difflib.get_close_matches(Path(name).stem[:MAX_SHOWN], presets, n=1, cutoff=0.5)
    if near:
        preset = presets[near[0]]
        if preset.is_relative_to(Path.cwd()):
            preset = preset.relative_to(Path.cwd())
        return f"did you mean {preset}?"
    return "--help lists the presets"


def line_of_error(error: BaseException, name: str) -> int:
    """Return the line of a config file at which it raised an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == name]
    return (lines[-1] if lines else getattr(error, "lineno", None)) or 1


# --------------------------------------------------------------------------------------------------
# Values in messages


def show(value: Any, to_text: Callable[[Any], str] = repr) -> str:
    """Return any value as one short line."""
    try:
        text = to_text(value)
    except Exception:  # the repr of an object that a config file made
        text = f"a {type(value).__name__}"
    return shorten(text)


def shorten(text: str) -> str:
    """Return text as one line of at most MAX_SHOWN characters."""
    if not text.isprintable():
        text = repr(text)
    if len(text) > MAX_SHOWN:
        text = text[: MAX_SHOWN - 3] + "..."
    return text
