"""README.md and docs/results.md are true: their commands are accepted, and what they name exists.

Each command is parsed by what it would start: by the script's settings, or by the module's own
argument parser. Commands that take less than a second are run, too, in a folder where a tiny run
stands in for the reader's.

A fenced block without a language holds commands, or a file tree (name, two spaces, description),
or, directly after a block of commands, their output. Any other text is marked as ```text.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from torch.distributed.run import get_args_parser

import train
from data.shards import write_shard
from gpt12.config import check, load_config, read
from gpt12.errors import UserError
from gpt12.run import read_request
from gpt12.settings import ALL_KEYS, BenchConfig, SampleConfig, TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {"README.md": README, "docs/results.md": (ROOT / "docs/results.md").read_text("utf-8")}
SCHEMAS: dict[str, Any] = {
    "train.py": TrainConfig,
    "sample.py": SampleConfig,
    "bench.py": BenchConfig,
}
PUBLISHED_MODELS = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
# Programs, scripts and names of other projects. What they accept is not checked.
FOREIGN = (
    "cd",
    "source",
    "echo",
    "git clone",
    "hf upload",
    "hf auth login",
    "optimum-cli export onnx",
    "llama-cli",
    "lm_eval",
)
FOREIGN_SCRIPTS = {"convert_hf_to_gguf.py"}
FOREIGN_NAMES = {"Trainer"}
PYTHON_TOOLS = {"pytest", "ruff", "mypy", "venv", "pip"}  # started with python -m
MADE_BY_A_RUN = {"data/cache"}  # not in the repository

PROGRAMS = {"python", "python3", "torchrun", "pip", ".ci/run"}
PROGRAMS |= {name.split()[0] for name in FOREIGN}
FENCE = re.compile(r"^ *```([^\n`]*)\n(.*?)^ *```[ ]*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
TREE_LINE = re.compile(r"[\s│├└─]*(\S+)(\s{2,}\S.*)?")
PLACEHOLDER = re.compile(r"<[\w-]+>|\.\.\.|…|\bNAME\b")


def require(condition: object, message: str) -> None:
    """Raise UserError with the message if the condition is false."""
    if not condition:
        raise UserError(message)


def exists(path: str) -> bool:
    """Tell whether the repository has a file. Placeholders match anything.

    A name without a folder may be in any of the folders that a reader would look in.
    """
    pattern = PLACEHOLDER.sub("*", path).removeprefix("./").rstrip("/.,:;")
    if not pattern or pattern.startswith("/"):
        return False
    if pattern in MADE_BY_A_RUN:
        return True
    folders = [""]
    if "/" not in pattern:
        folders += ["config/", "data/", "data/*/", "gpt12/", "tests/", "tests/manual/"]
    return any(any(ROOT.glob(folder + pattern)) for folder in folders)


def is_in_cloned_repository(path: str) -> bool:
    """Tell whether a file is in a repository that README.md tells the reader to clone."""
    folder = re.escape(path.split("/")[0])
    return bool(re.search(rf"git clone \S+/{folder}(\.git)?\s", README))


# --------------------------------------------------------------------------------------------------
# Find the commands, names and paths in a page


def fences(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, language and content of each fenced block.

    Blocks without a language get one: "sh", "tree" or "output".
    """
    end = 0
    previous = ""
    for match in FENCE.finditer(text):
        language = match[1].strip()
        body = match[2]
        if not language:
            directly_after = not text[end : match.start()].strip()
            language = guess_language(body, previous if directly_after else "")
        if language in ("bash", "shell", "console"):
            language = "sh"
        yield text.count("\n", 0, match.start()) + 2, language, body
        end = match.end()
        previous = language


def guess_language(body: str, previous: str) -> str:
    """Return what a block without a language holds. previous: the block directly before it."""
    first = body.split(maxsplit=1)[0] if body.strip() else ""
    if first in PROGRAMS or first == "$" or "=" in first:
        return "sh"
    if all(TREE_LINE.fullmatch(line) for line in body.splitlines()):
        return "tree"
    if previous == "sh":
        return "output"
    return "sh"


def prose(text: str) -> str:
    """Return the text without fenced blocks; line numbers stay."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def inline_code(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and content of each piece of code between backticks."""
    text = prose(text)
    for match in INLINE.finditer(text):
        code = re.sub(r"\\(\||\n)", r"\1", match[1])
        yield text.count("\n", 0, match.start()) + 1, " ".join(code.split())


def is_command(code: str) -> bool:
    """Tell whether inline code is a command: `train.py --help` is one, `train.py` is a file."""
    first, *rest = code.split()
    if first.startswith("-") or not rest:
        return False
    ours = first in PROGRAMS or first.endswith(".py")
    return ours or any(word.startswith("--") for word in rest)


def commands(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every command."""
    for start, language, body in fences(text):
        if language == "sh":
            yield from block_commands(start, body)
    for line, code in inline_code(text):
        if is_command(code):
            yield line, code


def block_commands(start: int, body: str) -> Iterator[tuple[int, str]]:
    """Yield the commands of a block; with prompts ($), only the lines that have one."""
    prompt = "$ " if re.search(r"^\$ ", body, re.MULTILINE) else ""
    joined = re.sub(r"\\\n", lambda _: "\\\0", body)  # a line that continues in the next one
    line = start
    for row in joined.splitlines():
        command = row.replace("\\\0", " ").strip()
        if command.startswith(prompt) and command and not command.startswith("#"):
            yield line, command.removeprefix(prompt)
        line += 1 + row.count("\0")


def split_shell_line(command: str) -> Iterator[list[str]]:
    """Yield the words of each program in a shell line.

    Comments, redirections and variables before the program are left out.
    """
    command = PLACEHOLDER.sub("*", re.sub(r"(^|\s)#.*", "", command))
    lexer = shlex.shlex(command, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    previous = ""
    for token in [*lexer, ";"]:
        if token in ("&&", "||", "|", ";", "&"):
            while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        elif token not in (">", ">>", "<") and previous not in (">", ">>", "<"):
            words.append(token)
        previous = token


def our_script(words: list[str]) -> tuple[str, list[str]]:
    """Return the script that a command starts and its arguments; ("", []) if it starts none."""
    if words[0] in ("python", "python3"):
        words = words[1:]
    if words and words[0].endswith(".py"):
        return words[0].removeprefix("./"), words[1:]
    return "", []


def run_folders(text: str) -> set[str]:
    """Return the folders that training leaves: those of the presets and of the page's commands."""
    found = {"out"}
    for path in (ROOT / "config").glob("*.py"):
        found |= set(re.findall(r"(?m)^out_dir = ['\"](.*)['\"]", path.read_text("utf-8")))
    for _, command in commands(text):
        if "train.py" in command and "resume" not in command:
            found |= set(re.findall(r"--out_dir=(\S+)", command))
    return found


# --------------------------------------------------------------------------------------------------
# Check commands


class ArgumentsWereReadError(BaseException):
    """A program has accepted its arguments; it must not run any further."""


def parse_only(script: str, words: list[str]) -> None:
    """Start a script that has an argument parser of its own, and stop it after parsing."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_args(self, args=None, namespace=None):
        unknown = original(self, args, namespace)[1]
        if unknown:
            self.error(f"unknown arguments {' '.join(unknown)}")
        raise ArgumentsWereReadError

    def parse_known_args(self, args=None, namespace=None):
        load_config(TrainConfig, original(self, args, namespace)[1])  # the rest is for train.py
        raise ArgumentsWereReadError

    if not words:
        return
    source = (ROOT / script).read_text("utf-8")
    require("import argparse" in source, f"{script} takes no arguments")
    parsers = mock.patch.multiple(
        argparse.ArgumentParser, parse_args=parse_args, parse_known_args=parse_known_args
    )
    argv = mock.patch.object(sys, "argv", [script, *words])
    with parsers, argv, contextlib.suppress(ArgumentsWereReadError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def check_script(script: str, words: list[str], folders: set[str]) -> None:
    if Path(script).name in FOREIGN_SCRIPTS:
        check_folders(words, folders)
        return
    require(exists(script), f"{script} does not exist")
    if script not in SCHEMAS:
        parse_only(script, words)
    elif "--help" not in words and "-h" not in words:
        check_config(script, words, folders)


def check_config(script: str, words: list[str], folders: set[str], world: int = 1) -> None:
    """Check the words against the script's settings, and the values against the repository."""
    config: Any
    resumes = script == "sample.py" or "--init_from=resume" in words
    if script == "train.py" and not resumes:
        config = read_request(words).config
    else:
        config, _ = load_config(SCHEMAS[script], words)
    if script == "bench.py" and config.sweep:
        key, _, values = config.sweep.partition(":")
        for value in values.split(","):
            load_config(BenchConfig, [*words, f"--{key}={value}"])
    if script != "sample.py":
        own_text = re.search(r"/|^hf:|\.(txt|md|csv|jsonl)$", config.dataset)
        require(
            own_text or exists(f"data/{config.dataset}/prepare.py"),
            f"dataset={config.dataset} is no folder in data/ and no file",
        )
    if script == "train.py":
        rest = config.gradient_accumulation_steps % world
        require(rest == 0, f"{world} ranks do not divide its steps")
    known = {"scratch", "resume"} | PUBLISHED_MODELS | folders
    require(
        config.init_from in known or re.search(r"[/.]|^[A-Z]+$", config.init_from),
        f"init_from={config.init_from} is no model",
    )
    if config.init_from == "resume":
        require(config.out_dir in folders, f"nothing here trains into out_dir={config.out_dir}")


def check_folders(words: list[str], folders: set[str]) -> None:
    """A run's folder that another program shall read must be one that a run leaves."""
    for word in words:
        match = re.search(r"(?:^|=)(?:\./)?(out[\w-]*)(?:/.*)?$", word)
        if match and not word.startswith("--"):
            require(match[1] in folders, f"nothing here trains into {match[1]}")


def check_pip(words: list[str]) -> None:
    parser = argparse.ArgumentParser("pip")
    parser.add_argument("action", choices=["install"])
    parser.add_argument("-r", action="append", default=[])
    parser.add_argument("-U", "--upgrade", action="store_true")
    parser.add_argument("--index-url")
    parser.add_argument("packages", nargs="*")
    for file in parser.parse_args(words).r:
        require(exists(file) or is_in_cloned_repository(file), f"{file} does not exist")


def check_module(module: str, words: list[str]) -> None:
    if module not in PYTHON_TOOLS:
        script = module.replace(".", "/") + ".py"
        require(exists(script), f"no module {module} here")
        parse_only(script, words)
    elif module == "pip":
        check_pip(words)
    else:
        require(importlib.util.find_spec(module), f"{module} is not installed")
        files = [word.split("::")[0] for word in words if re.search(r"/|\.py", word)]
        require(all(map(exists, files)), f"one of {files} does not exist")


def check_torchrun(words: list[str], folders: set[str]) -> None:
    options = get_args_parser().parse_args(words)
    # Only a machine can tell what "gpu" or "1:4" would be.
    sizes = [int(n) for n in (options.nproc_per_node, options.nnodes) if n.isdigit()]
    script = options.training_script
    require(script in SCHEMAS, f"{script} is no script of ours")
    check_config(script, options.training_script_args, folders, math.prod(sizes))


def check_ci(words: list[str]) -> None:
    text = (ROOT / ".ci/run").read_text("utf-8")
    require(os.access(ROOT / ".ci/run", os.X_OK), ".ci/run cannot be executed")
    require(all(word in text for word in words), "no such option")


def check_foreign(words: list[str], folders: set[str]) -> None:
    known = any(words[: len(name.split())] == name.split() for name in FOREIGN)
    require(
        known,
        "a kind of command that this test does not know; if it is not ours, name it in FOREIGN",
    )
    if words[0] == "cd":
        folder = words[1]
        there = folder == ".." or exists(folder) or is_in_cloned_repository(folder)
        require(there, f"no folder {folder}, and nothing makes one")
    check_folders(words[1:], folders)


def check_command(words: list[str], folders: set[str]) -> None:
    """Raise an error for a command that would fail, or that this test does not know."""
    program = words[0]
    rest = words[1:]
    script, arguments = our_script(words)
    if script:
        check_script(script, arguments, folders)
    elif program in ("python", "python3") and rest[:1] == ["-m"]:
        check_module(rest[1], rest[2:])
    elif program in ("python", "python3") and rest[:1] == ["-c"]:
        ast.parse(rest[1])
    elif program == "torchrun":
        check_torchrun(rest, folders)
    elif program == "pip":
        check_pip(rest)
    elif program == ".ci/run":
        check_ci(rest)
    else:
        check_foreign(words, folders)


def check_line(command: str, folders: set[str]) -> None:
    for words in split_shell_line(command):
        check_command(words, folders)


# --------------------------------------------------------------------------------------------------
# Check everything else


def check_options(words: list[str], foreign: set[str]) -> None:
    """Options in the text must belong to one of our scripts, or to a command of another program.

    foreign: options of other programs' commands.
    """
    ours = [word for word in words if word.split("=")[0] not in foreign]
    # Without a value, or with a placeholder as value, only the key can be wrong.
    keys_only = []
    complete = []
    for word in ours:
        if "=" not in word or re.search(r"=([A-Z]+|.*[<…*].*)$", word):
            keys_only.append(word.partition("=")[0].lstrip("-").replace("-", "_"))
        else:
            complete.append(word)
    known = [schema.__dataclass_fields__.keys() for schema in SCHEMAS.values()]
    require(any(set(keys_only) <= keys for keys in known), f"unknown key in {sorted(keys_only)}")
    errors = []
    for schema in SCHEMAS.values():
        try:
            reading = read(schema, complete)
            check(schema, reading.all(), set(), reading.problems)
        except UserError as error:
            errors.append(str(error))
    if len(errors) == len(SCHEMAS):
        errors.sort(key=lambda text: "unknown key" in text)  # a wrong value says more
        raise UserError(errors[0])


def check_name(name: str, sources: str) -> None:
    """A class, function, key or written file that a page names must be a word in the sources."""
    if exists(name):
        return
    if re.fullmatch(r"[\w.-]+\.(jsonl?|png|safetensors|pt)", name):
        parts = [name]
    elif re.fullmatch(r"([A-Z]\w*(\.\w+)+|[A-Z]\w*[a-z]\w*|[a-zA-Z]+\w*_\w+(\.\w+)*)(\(\))?", name):
        parts = name.removesuffix("()").split(".")
    else:
        return
    if parts[0] in FOREIGN_NAMES:
        return
    for part in parts:
        word = re.escape(part)
        found = re.search(rf"(?<![\w.]){word}(?!\w)|\.{word}(?!\w)", sources)
        require(found, f"no source has the word {part}; if not ours, name it in FOREIGN_NAMES")
    if parts[0] in members_of_classes() and len(parts) == 2:
        require(parts[1] in members_of_classes()[parts[0]], f"{parts[0]} has no {parts[1]}")


@functools.cache
def members_of_classes() -> dict[str, set[str]]:
    """Return the methods and attributes of each of our classes."""
    members: dict[str, set[str]] = {}
    for path in source_files():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                names = members.setdefault(node.name, set())
                names.update(filter(None, map(member_name, ast.walk(node))))
    return members


def member_name(node: ast.AST) -> str | None:
    """Return the name of a method, of a declared field, or of an attribute `self.name`."""
    if isinstance(node, ast.FunctionDef):
        return node.name
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else None
    return None


def check_link(target: str, text: str, folder: Path) -> None:
    """A linked file must exist, an anchor must be a heading, an address must have a host."""
    url = urlsplit(target)
    if url.scheme:
        is_address = url.scheme == "mailto" or (url.scheme == "https" and url.netloc)
        require(is_address, "no address")
        return
    if not url.path:
        titles = re.findall(r"^#+ (.*)", prose(text), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        require(url.fragment in anchors, "no heading of that name")
        return
    file = folder / url.path
    require(file.exists(), "no such file")
    if file.suffix == ".svg":
        require(ElementTree.parse(file).getroot().tag.endswith("svg"), "not an SVG")
    elif file.suffix == ".png":
        require(file.read_bytes().startswith(b"\x89PNG"), "not a PNG")


def check_block(language: str, body: str) -> None:
    if language == "tree":
        for line in body.splitlines():
            match = TREE_LINE.fullmatch(line)
            require(match and exists(match[1]), f"{line.strip()}: no such file")
    elif language == "python":
        ast.parse(body)
    elif language == "json":
        json.loads(body)


def check_path(path: str) -> None:
    require(exists(path) or path in FOREIGN_SCRIPTS, "no such file")


class Findings:
    """Collects what is wrong in a page."""

    def __init__(self, page: str):
        self.page = page
        self.found: list[str] = []

    def check(self, line: int, what: str, function: Callable, *arguments: object) -> None:
        """Call a check and keep its error."""
        errors = io.StringIO()
        silence = contextlib.redirect_stdout(io.StringIO())
        try:
            with contextlib.redirect_stderr(errors), silence:
                function(*arguments)
        except SystemExit as error:  # argparse exits: with 0 after --help
            if error.code:
                self.found.append(f"{self.page}:{line}: {what}: {errors.getvalue().strip()}")
        except (UserError, ValueError, IndexError, OSError, SyntaxError, ImportError) as error:
            self.found.append(f"{self.page}:{line}: {what}: {error}")


def problems(text: str, page: str = "README.md") -> list[str]:
    """Return everything in a page that is not true, with its line number."""
    findings = Findings(page)
    folders = run_folders(README + text)
    all_commands = list(commands(text))
    options = set()
    for _, command in all_commands:
        options |= {word.split("=")[0] for word in command.split() if word.startswith("-")}
    foreign = {word for word in options if word.lstrip("-").replace("-", "_") not in ALL_KEYS}
    sources = "\n".join(path.read_text("utf-8") for path in source_files())

    for line, command in all_commands:
        findings.check(line, command, check_line, command, folders)
    for line, code in inline_code(text):
        if code.startswith("--"):
            findings.check(line, code, check_options, code.split(), foreign | {"--help"})
        elif not is_command(code):
            findings.check(line, code, check_name, code, sources)
    for line, language, body in fences(text):
        findings.check(line, f"block of {language}", check_block, language, body)
    for line, row in enumerate(prose(text).split("\n"), 1):
        row = re.sub(r"https?://[^\s)]+", "", row)
        in_our_folders = r"(?:config|data|gpt12|tests|docs|\.ci)/[\w.*<>/-]*"
        for path in re.findall(rf"(?<![\w./-])(?:{in_our_folders}|\w+\.py\b)", row):
            findings.check(line, path, check_path, path)
    folder = (ROOT / page).parent
    for match in re.finditer(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", prose(text)):
        target = match[1] or match[2]
        line = text.count("\n", 0, match.start()) + 1
        findings.check(line, target, check_link, target, text, folder)
    return findings.found


def source_files() -> list[Path]:
    """Return every Python file of ours but this one, whose examples are wrong on purpose."""
    folders = ("", "config/", "data/", "data/*/", "gpt12/", "tests/", "tests/manual/")
    found = [path for folder in folders for path in ROOT.glob(f"{folder}*.py")]
    return [path for path in found if path != Path(__file__)]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES)
def test_commands_names_and_links_in_a_page_are_right(page):
    assert len(list(commands(PAGES[page]))) > 20
    assert not problems(PAGES[page], page), "\n".join(["", *problems(PAGES[page], page)])


def test_the_readme_is_short_enough_to_be_read():
    lines = README.splitlines()
    too_long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert len(lines) <= 220
    assert not too_long
    assert len(README.split()) <= 2400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "```\npython train.py config/train_gpt2.py --batch_sise=8\n```",
            "did you mean batch_size",
        ),
        ("```\npython train.py config/train_gpt3.py\n```", "no such file"),
        ("```sh\n$ python bench.py --recompute=all\nsome output\n```", "recompute=all must be"),
        ("```\npython bench.py --sweep=batch:1,2\n```", "--batch=1"),
        ("```\ntorchrun --nproc_per_node=3 train.py config/train_gpt2.py\n```", "3 ranks"),
        (
            "```\ntorchrun --nnodes=3 --nproc_per_node=8 train.py config/train_gpt2.py\n```",
            "24 ranks",
        ),
        (
            "```\ncd nowhere\npip install -r nowhere/requirements.txt\n```",
            "folder nowhere(.|\\n)*requirements.txt does not",
        ),
        ("```\npython -c 'import = 3'\n```", "README.md:2"),
        ("```\ntorchrun --nproc=2 train.py --seed=x\n```", "--seed=x"),
        ("```\ntorchrun --processes=2 train.py\n```", "torchrun|unrecognized"),
        (
            "```\npip install -r requirement.txt && python train.py\n```",
            "requirement.txt does not exist",
        ),
        ("```\nmake all\n```", "kind of command"),
        ("Do `curl --silent x`.", "kind of command"),
        ("Do `python -m tests.manual.kill_loops --kills=2`.", "no module"),
        ("Do `python -m tests.manual.kill_loop --kill-all=2`.", "unknown arguments"),
        ("Do `python -m tests.manual.long_run --steps=9 --seeed=1`.", "did you mean seed"),
        ("Do `python data/nowhere/prepare.py` now.", "does not exist"),
        ("Do `python data/openwebtext/prepare.py --tokens=5`.", "takes no arguments"),
        ("Do `python sample.py --out_dir=out-nowhere`.", "nothing here trains into"),
        ("Do `hf upload me/mine out-nowhere/best`.", "nothing here trains into"),
        ("Do `lm_eval --model hf --model_args pretrained=out-nowhere/best`.", "nothing here"),
        ("Do `python train.py \\\n --dataset=owt`.", "no folder in data/"),
        ("With `--recompute_all` less.", "unknown key"),
        ("Do `sample.py --top_p=0.5`, or with `--top_p=5`.", "top_p=5 must be"),
        ("1. Do\n   ```\n   make all\n   ```", "README.md:3: make all"),
        ("With `--recompute=all` less.", "recompute=all must be"),
        ("The class `Stepp` in `train.py`.", "word Stepp"),
        ("The method `GPT.foward`.", "word foward"),
        ("The method `Decoder.step`.", "Decoder has no step"),
        ("The key `max_worse_steps`.", "word max_worse_steps"),
        ("See tests/test_nothing.py.", "no such file"),
        ("See gpt12/nothing.py.", "no such file"),
        ("![x](docs/nothing.png)", "no such file"),
        ("[x](#nothing)", "no heading"),
        ("```\ntrain.py    trains\ntrainer.py  trains\n```", "trainer.py"),
        ("```python\nimport = 3\n```", "README.md:2"),
    ],
)
def test_a_mistake_in_a_page_is_found(text, message):
    found = problems(text)
    assert re.search(message, "\n".join(found)), found


@pytest.mark.parametrize(
    "text",
    [
        "```\npython train.py --help  # every key\n\n# a remark\n"
        "OMP_NUM_THREADS=1 python bench.py > log.txt\n```",
        "```\necho Hello | python sample.py --init_from=gpt2-xl \\\n    --start=-\n```\n\n"
        "```\nHello, make --it so\n```",
        "```text\nmake all\n```\nand `python data/<name>/prepare.py`, `--batch_size=N`, "
        "`--dataset`, [x](#y)\n# Y",
        "`python convert_hf_to_gguf.py out/best --outtype f16` has `--outtype`; `cd gpt12`, "
        "`.ci/run --here`",
        "```\ngit clone https://example.org/a\n```\n"
        "`python -m pytest tests/test_model.py -k x`, `TrainStep`, `GPT.forward`",
    ],
)
def test_a_correct_page_has_no_problems(text, monkeypatch):
    clone = "git clone https://example.org/gpt12\n"
    monkeypatch.setattr(sys.modules[__name__], "README", clone)
    assert problems(text) == []


# --------------------------------------------------------------------------------------------------
# Run the quick commands


def is_quick(words: list[str]) -> bool:
    """Tell whether a command takes less than a second once a tiny model stands in."""
    script, arguments = our_script(words)
    if script in SCHEMAS and "--help" in arguments:
        return True
    if script == "train.py":
        return "--init_from=resume" in arguments
    if script == "bench.py":
        return "--plan" in arguments
    return script == "sample.py"


QUICK = sorted(
    {
        shlex.join(words)
        for _, command in commands(README)
        for words in split_shell_line(command)
        if is_quick(words)
    }
)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """Return the folder of a run of two steps on bytes of text."""
    folder = tmp_path_factory.mktemp("readme")
    tokens = np.frombuffer(b"Once upon a time. " * 40, np.uint8).astype(np.uint16)
    (folder / "text").mkdir()
    for split in ("train", "val"):
        write_shard(folder / f"text/{split}_000000.bin", tokens)
    meta = {"tokenizer": "bytes", "vocab_size": 257, "documents": 1, "source_sha256": "0" * 64}
    (folder / "text/meta.json").write_text(json.dumps(meta))
    words = f"--dataset={folder / 'text'} --out_dir={folder / 'out'} --block_size=32 --n_layer=1"
    words += " --n_head=2 --n_embd=16 --batch_size=2 --gradient_accumulation_steps=1 --max_iters=2"
    words += " --eval_interval=2 --eval_iters=1 --device=cpu --dtype=float32 --compile=False"
    assert train.main(words.split()) == 0
    return folder / "out"


@pytest.mark.parametrize("command", QUICK)
def test_a_quick_command_of_the_readme_runs(command, tiny_run, tmp_path, monkeypatch, capsys):
    script, words = our_script(shlex.split(command))
    monkeypatch.chdir(tmp_path)
    for name in run_folders(README):
        shutil.copytree(tiny_run, tmp_path / name)
    for name in re.findall(r"FILE:([\w.]+)", command):
        Path(name).write_text("Once")
    words = [
        re.sub(r"^--init_from=(?!resume).*", f"--init_from={tiny_run / 'best'}", word)
        for word in words
    ]
    # The last of two equal keys wins.
    if script != "bench.py":
        words += ["--device=cpu", "--dtype=float32", "--compile=False"]
    if script == "train.py":
        words += ["--max_iters=3"]
    if script == "sample.py":
        words += ["--max_new_tokens=8"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once\n"), "utf-8"))
    program = importlib.import_module(script.removesuffix(".py"))
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            program.main()
    else:
        assert not program.main()
    printed = capsys.readouterr().out
    assert printed.strip()
    if "--json" in words:
        assert all(json.loads(line)["tokens"] for line in printed.splitlines())
