"""How the configuration is read: defaults, then config files, then --key=value; the later one wins.

A config file is Python and is executed: read it before you use a stranger's.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import inspect
import re
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gpt12.errors import UserError
from gpt12.settings import ANY_KEY, SampleConfig, TrainConfig

PRESETS = Path(__file__).parents[1] / "config"

Schema = TypeVar("Schema", bound=TrainConfig | SampleConfig)


def load(
    schema: type[Schema],
    argv: Sequence[str],
    base: Mapping[str, Any] | None = None,
    check: bool = True,
) -> tuple[Schema, set[str]]:
    """The configuration that argv (without the program's name) asks for, and the keys that it sets.

    base: values between the defaults and argv, a saved run's; keys that the schema lacks are ignored.
    check: whether fields that contradict each other are refused.
    Raises UserError with every problem found, one a line. --help prints the page and exits with 0.
    """
    if {"-h", "--help"} & set(argv):
        print(help_page(schema))
        raise SystemExit(0)
    loader = _Loader(schema())
    for key, value in (base or {}).items():
        if key in loader.kinds:
            loader.set(key, [value], f"the saved run: {key}={_show(value)}", "")
    loader.given.clear()
    # Files first: what is typed counts, wherever it stands. Values typed without an equals sign stay with their key.
    files = [word for word in argv if word.endswith(".py") and not word.startswith("-")]
    words = [*files, *(word for word in argv if word not in files)]
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            loader.flag(word, words)
        else:
            loader.file(word)
    return loader.finish(check), set(loader.given)


class _Loader:
    """Collects values and problems, source by source."""

    def __init__(self, config: Any) -> None:
        self.config, self.kinds = config, get_type_hints(type(config), include_extras=True)
        self.given: dict[str, str] = {}  # key -> where it was set, the latest last
        self.problems: list[str] = []
        self.doubtful: set[str] = set()  # keys that do not hold what the user meant

    def set(self, key: str, readings: Sequence[Any], said: str, source: str) -> None:
        """Set a field to the first reading of its value that its type admits."""
        self.given.pop(key, None)
        self.given[key] = source
        for value in readings:
            with suppress(
                Exception
            ):  # a config file's value may be any object, and comparing it raise anything
                setattr(self.config, key, _convert(value, self.kinds[key]))
                return
        self.doubtful.add(key)
        self.problems.append(f"{said} must be {_words(self.kinds[key]).replace(' | ', ' or ')}")

    def unknown(self, key: str, said: str) -> None:
        near = difflib.get_close_matches(key[:80], self.kinds, 1)
        self.problems.append(
            f"{said}: unknown key; " + (f"did you mean {near[0]}?" if near else "--help lists them")
        )

    def flag(self, word: str, following: list[str]) -> None:
        """One --key=value, or --key alone for True."""
        name, equals, text = word.partition("=")
        key, said = name.lstrip("-").replace("-", "_"), _show(word, str)
        kind = self.kinds.get(key)
        if kind is None:
            self.unknown(key, said)
        elif get_origin(kind) is tuple and equals:  # a key that may be repeated
            text = re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text)
            before = getattr(self.config, key) if self.given.get(key) == "command line" else ()
            self.set(key, [(*before, text)], said, "command line")
        elif equals or bool in (kind, *get_args(kind)):
            self.set(key, _readings(text) if equals else [True], said, "command line")
        else:
            text = following.pop(0) if following and not following[0].startswith("-") else "VALUE"
            self.problems.append(
                f"{said} needs its value after an equals sign: {said}={_show(text, str)}"
            )
            self.doubtful.add(key)

    def file(self, name: str) -> None:
        """Execute a config file and take over what it assigns."""
        try:
            tree, space = _execute(name, vars(self.config))
        except UserError as problem:
            self.problems.append(str(problem))
            self.doubtful.update(self.kinds)
            return
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        read = {
            node.id for node in names if isinstance(node.ctx, ast.Load)
        }  # helpers, not misspelt keys
        line_of = {node.id: node.lineno for node in names if isinstance(node.ctx, ast.Store)}
        for key, value in space.items():
            said = f"{name}:{line_of.get(key, 1)}: {key}={_show(value)}"
            if callable(value) or isinstance(value, types.ModuleType):
                continue
            if key in self.kinds:
                self.set(key, [value], said, name)
            elif key in line_of and not key.startswith("_") and key not in read | ANY_KEY:
                self.unknown(key, said)

    def finish(self, check: bool) -> Any:
        """The configuration, if nothing speaks against it."""
        for names, clash, advice in self.config.conflicts(self.given):
            if check and clash and self.doubtful.isdisjoint(names.split()):
                values = " ".join(f"--{key}={getattr(self.config, key)}" for key in names.split())
                self.problems.append(f"{values}: {advice}")
        if self.problems:
            raise UserError("\n".join(self.problems))
        getattr(self.config, "settle", lambda given: None)(self.given)
        return self.config


def _execute(name: str, present: Mapping[str, Any]) -> tuple[ast.Module, dict[str, Any]]:
    """Run a config file: its syntax tree and the names it leaves. It can read the present values, as in nanoGPT."""
    if name.startswith("hf:") or name.lower().endswith((".txt", ".csv", ".jsonl")):
        said, key = _show(name, str), "--dataset=" if "dataset" in present else "--start=FILE:"
        raise UserError(f"{said}: a config file is Python; your own text is given as {key}{said}")
    try:
        source = Path(name).read_bytes()
    except (OSError, ValueError) as error:
        presets = {Path(path).stem: path for path in _presets()}
        near = difflib.get_close_matches(Path(name).stem[:80], presets, 1, 0.5)
        hint = f"the nearest is {presets[near[0]]}" if near else "--help lists the presets"
        hint = f"a key is set with two dashes: --{_show(name, str)}" if "=" in name else hint
        raise UserError(f"{_show(name, str)}: no config file that can be read; {hint}") from error
    # Values lie where Python looks last, among the builtins: what is in `space` afterwards was set by the file.
    space: dict[str, Any] = {"__builtins__": {**vars(builtins), **present}, "__file__": name}
    try:
        tree = ast.parse(source, name)
        exec(compile(tree, name, "exec"), space)  # noqa: S102  (a config file is code, as --help says)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == name
        ]
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1
        raise UserError(f"{name}:{line}: {type(error).__name__}: {_show(error, str)}") from error
    return tree, space


def _convert(value: Any, kind: Any) -> Any:
    """value as a field's type has it: 5e3 is a whole number too, 1 also a float. Raises ValueError where it is none."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in args:
            with suppress(ValueError):
                return _convert(value, option)
    elif origin is Annotated:
        value = _convert(value, args[0])
        if args[2](value):
            return value
    elif origin is tuple:
        return tuple(
            _convert(part, args[0]) for part in ([value] if isinstance(value, str) else value)
        )
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif kind in (int, float):
        real = type(value) is not bool and isinstance(value, Real)
        if real and (kind is float or value % 1 == 0):
            return kind(value)
    elif isinstance(value, kind):
        return value
    raise ValueError


def _words(kind: Any) -> str:
    """What a field's type admits."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return args[1]
    if origin is tuple:
        return _words(args[0])
    choices = [arg if isinstance(arg, str) else _words(arg) for arg in args]
    return " | ".join(choices) or ("True | False" if kind is bool else "None")


def _readings(text: str) -> list[Any]:
    """What a command line's text may mean: a Python value (true, false and none are understood too), then itself."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        value = ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
        return [value] if isinstance(value, str) else [value, text]
    return [text]


def _show(value: Any, form: Callable[[Any], str] = repr) -> str:
    """Any value in one line of at most 120 characters."""
    try:
        text = form(value)
    except Exception:  # the repr of an object out of a config file
        text = f"a {type(value).__name__}"
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 120 else text[:117] + "..."


def _presets() -> dict[str, str]:
    """Path of each preset in config/, and its title: the comment that it begins with."""
    files = {str(path): path.read_text(encoding="utf-8") for path in sorted(PRESETS.glob("*.py"))}
    return {
        path: text.splitlines()[0].lstrip("# ")
        for path, text in files.items()
        if text.startswith("#")
    }


def help_page(schema: type) -> str:
    """What --help prints: the schema's docstring, its fields with their comments, and the presets."""
    page = [inspect.cleandoc(schema.__doc__ or "")]
    page += [
        "",
        "Config files are applied in order, then --key=value; the later one wins; --key alone means True.",
    ]
    page += ["A config file is Python and is executed: read a stranger's before you use it."]
    page += ["", "Keys and their defaults:"]
    kinds, defaults = get_type_hints(schema, include_extras=True), vars(schema())
    for line in inspect.getsource(schema).splitlines():
        if group := re.match(r"    # (.*)", line):
            page += ["", group[1]]
        elif field := re.match(r"    (\w+): .*  # (.*)", line):
            kind, default = kinds[field[1]], defaults[field[1]]
            head = f"  --{field[1]}={default if str(default).isprintable() else repr(default)}"
            body = textwrap.wrap(
                field[2] + (f" ({_words(kind)})" if "Literal" in str(kind) else ""), 62
            )
            page += [f"{head:<36}  {body[0]}", *(" " * 38 + more for more in body[1:])]
    page += [
        "",
        "presets",
        *(f"  config/{Path(path).name:<29}{title}" for path, title in _presets().items()),
    ]
    return "\n".join(page)
