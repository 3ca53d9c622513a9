"""README.md keeps its word: our programs take every command in it, and the files, links and names it mentions are there.

Each command is parsed by what it would start: by the script's schema, or by the module's own options. What is done within
a second is run as well, in a folder where a tiny run stands in for the reader's.
A fenced block without a language holds commands, or the tree (names, two spaces, what it is), or, right after a block of
commands, what they print. Any other text is marked as ```text.
"""

import argparse
import ast
import contextlib
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

import bench
import sample
import train
from data.shards import write_shard
from gpt12.config_loader import load
from gpt12.errors import UserError
from gpt12.settings import ALL_KEYS, BenchConfig, SampleConfig, TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SCHEMAS: dict[str, Any] = {"train.py": TrainConfig, "sample.py": SampleConfig, "bench.py": BenchConfig}
# Other people's: what they take is not ours to check.
FOREIGN = ("cd", "source", "echo", "git clone", "hf upload", "hf auth login", "optimum-cli export onnx", "llama-cli")
FOREIGN_SCRIPTS = {"convert_hf_to_gguf.py"}
FOREIGN_NAMES = {"Trainer"}
TOOLS = {"pytest", "ruff", "mypy", "venv", "pip"}  # started by python -m
MADE = {"data/cache"}  # not in the repository: it comes with the first run

PROGRAMS = {"python", "python3", "torchrun", "pip", ".ci/run", *(name.split()[0] for name in FOREIGN)}
FENCE = re.compile(r"^ *```([^\n`]*)\n(.*?)^ *```[ ]*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
TREE = re.compile(r"[\s│├└─]*(\S+)(\s{2,}\S.*)?")
PLACEHOLDER = re.compile(r"<[\w-]+>|\.\.\.|…")


def need(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def exists(path: str) -> bool:
    """Whether a path of ours is there; of data/<name>/prepare.py one is enough, and prepare.py alone is one of them."""
    pattern = PLACEHOLDER.sub("*", path).removeprefix("./").rstrip("/.,:;")
    places = [""] if "/" in pattern else ["", "config/", "data/", "data/*/", "tests/", "tests/manual/"]
    if not pattern or pattern.startswith("/"):
        return False
    return pattern in MADE or any(any(ROOT.glob(place + pattern)) for place in places)


def cloned(path: str) -> bool:
    """Whether it lies in a repository that README.md tells to clone."""
    return bool(re.search(rf"git clone \S+/{re.escape(path.split('/')[0])}(\.git)?\s", README))


# ----------------------------------------------------------------------------------------- what README.md says


def fences(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, language and text of each fenced block; 'tree' and 'output' for those that need none."""
    end, before = 0, ""
    for match in FENCE.finditer(text):
        language, body = match[1].strip(), match[2]
        if not language:
            first = body.split(maxsplit=1)[0] if body.strip() else ""
            command = first in PROGRAMS or first == "$" or "=" in first
            if not command and all(TREE.fullmatch(line) for line in body.splitlines()):
                language = "tree"
            elif not command and before == "sh" and not text[end : match.start()].strip():
                language = "output"
        language = "sh" if language in ("", "bash", "sh", "shell", "console") else language
        yield text.count("\n", 0, match.start()) + 2, language, body
        end, before = match.end(), language


def prose(text: str) -> str:
    """All but the fenced blocks, line by line where it was."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def inline(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each piece of code between backticks."""
    text = prose(text)
    for match in INLINE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(re.sub(r"\\(\||\n)", r"\1", match[1]).split())


def is_command(code: str) -> bool:
    """Whether code between backticks is one, and not a file or an option: `train.py` is a file, `train.py --help` not."""
    first, *rest = code.split()
    ours = first in PROGRAMS or first.endswith(".py")
    return not first.startswith("-") and bool(rest) and (ours or any(word.startswith("--") for word in rest))


def commands(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of every command."""
    for start, language, body in fences(text):
        prompt = "$ " if language == "sh" and re.search(r"^\$ ", body, re.MULTILINE) else ""
        whole = re.sub(r"\\\n", lambda _: "\\\0", body)  # a line that goes on in the next one
        at = start
        for row in whole.splitlines() if language == "sh" else ():
            said = row.replace("\\\0", " ").strip()
            if said.startswith(prompt) and said and not said.startswith("#"):
                yield at, said.removeprefix(prompt)
            at += 1 + row.count("\0")
    yield from ((line, code) for line, code in inline(text) if is_command(code))


def simple(command: str) -> Iterator[list[str]]:
    """The words of each program that a line of shell starts, without comment, redirection and variables in front."""
    command = PLACEHOLDER.sub("*", re.sub(r"(^|\s)#.*", "", command))
    lexer = shlex.shlex(command, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    tokens = list(lexer)
    for i, token in enumerate([*tokens, ";"]):
        if token in ("&&", "||", "|", ";", "&"):
            while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        elif token not in (">", ">>", "<") and (i == 0 or tokens[i - 1] not in (">", ">>", "<")):
            words.append(token)


def started(words: list[str]) -> tuple[str, list[str]]:
    """The script of ours that is started, and its arguments; an empty name where there is none."""
    words = words[1:] if words[0] in ("python", "python3") else words
    return (words[0].removeprefix("./"), words[1:]) if words and words[0].endswith(".py") else ("", [])


def out_dirs(text: str) -> set[str]:
    """The folders that training leaves, by a preset or by what README.md tells to type."""
    assigned = r"^out_dir = ['\"](.*)['\"]"
    found = {
        m[1] for path in (ROOT / "config").glob("*.py") for m in re.finditer(assigned, path.read_text(), re.MULTILINE)
    }
    for _, command in commands(text):
        if "train.py" in command and "resume" not in command:
            found |= set(re.findall(r"--out_dir=(\S+)", command))
    return found | {"out"}


# -------------------------------------------------------------------------------------------- is it true


class ParsedError(BaseException):
    """A program has understood its arguments: here it ends."""


def parse_only(script: str, words: list[str]) -> None:
    """Start one of our programs that has options of its own, and stop it as soon as it has read them."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_args(self, args=None, namespace=None):
        if unknown := original(self, args, namespace)[1]:
            self.error(f"unknown arguments {' '.join(unknown)}")
        raise ParsedError

    def parse_known_args(self, args=None, namespace=None):
        load(TrainConfig, original(self, args, namespace)[1])  # the rest is handed on to train.py
        raise ParsedError

    if words:
        need("import argparse" in (ROOT / script).read_text(), f"{script} takes no arguments")
        how: dict[str, Any] = {"parse_args": parse_args, "parse_known_args": parse_known_args}
        argv = mock.patch.object(sys, "argv", [script, *words])
        with mock.patch.multiple(argparse.ArgumentParser, **how), argv, contextlib.suppress(ParsedError):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def check_script(script: str, words: list[str], known: set[str]) -> None:
    if Path(script).name in FOREIGN_SCRIPTS:
        check_folders(words, known)
        return
    need(exists(script), f"{script} does not exist")
    if script not in SCHEMAS:
        parse_only(script, words)
    elif not {"--help", "-h"} & set(words):
        check_config(script, words, known)


def check_config(script: str, words: list[str], known: set[str], world: int = 1) -> None:
    """The words against the schema, and the schema's values against what there is."""
    config: Any
    resuming = script == "sample.py" or "--init_from=resume" in words
    if script == "train.py" and not resuming:
        config, given, _ = train.load_config(words)
    else:
        config, given = load(SCHEMAS[script], words, check=not resuming)
    if script == "bench.py":
        config.device = "cpu"
        bench.settle(config, given)
        if config.sweep:  # it reads all its values before the first is measured
            with mock.patch.multiple(bench, attempt=lambda *_: {}, show=list):
                bench.sweep(config, mock.Mock())
    if script != "sample.py":
        there = exists(f"data/{config.dataset}/prepare.py") or re.search(r"/|^hf:|\.(txt|csv|jsonl)$", config.dataset)
        need(there, f"dataset={config.dataset} is no folder in data/ and no file")
        need(
            script == "bench.py" or config.gradient_accumulation_steps % world == 0,
            f"{world} ranks do not divide its steps",
        )
    published = {"scratch", "resume", *bench.SHAPES}
    there = config.init_from in published | known or re.search(r"[/.]|^[A-Z]+$", config.init_from)
    need(there, f"init_from={config.init_from} is no model")
    if config.init_from == "resume":
        need(config.out_dir in known, f"nothing here trains into out_dir={config.out_dir}")


def check_folders(words: list[str], known: set[str]) -> None:
    """A run's folder that another program is told to read is one that a run leaves."""
    for word in words:
        if match := re.fullmatch(r"(?:\./)?(out[\w-]*)(/.*)?", word):
            need(match[1] in known, f"nothing here trains into {match[1]}")


def check_pip(words: list[str]) -> None:
    parser = argparse.ArgumentParser("pip")
    parser.add_argument("action", choices=["install"])
    parser.add_argument("-r", action="append", default=[])
    parser.add_argument("-U", "--upgrade", action="store_true")
    parser.add_argument("--index-url")
    parser.add_argument("packages", nargs="*")
    for file in parser.parse_args(words).r:
        need(exists(file) or cloned(file), f"{file} does not exist")


def check_module(module: str, words: list[str]) -> None:
    if module not in TOOLS:
        script = module.replace(".", "/") + ".py"
        need(exists(script), f"no module {module} here")
        parse_only(script, words)
    elif module == "pip":
        check_pip(words)
    else:
        need(importlib.util.find_spec(module), f"{module} is not installed")
        files = [word.split("::")[0] for word in words if re.search(r"/|\.py", word)]
        need(all(map(exists, files)), f"one of {files} does not exist")


def check_command(words: list[str], known: set[str]) -> None:
    """Raise for a command that would fail, or that nothing here can judge."""
    program, rest = words[0], words[1:]
    script, arguments = started(words)
    if script:
        check_script(script, arguments, known)
    elif program in ("python", "python3") and rest[:1] == ["-m"]:
        check_module(rest[1], rest[2:])
    elif program in ("python", "python3") and rest[:1] == ["-c"]:
        ast.parse(rest[1])
    elif program == "torchrun":
        options = get_args_parser().parse_args(rest)
        sizes = (options.nproc_per_node, options.nnodes)
        world = math.prod(
            int(size) for size in sizes if size.isdigit()
        )  # not 'gpu' or 1:4, which only a machine can tell
        need(options.training_script in SCHEMAS, f"{options.training_script} is no script of ours")
        check_config(options.training_script, options.training_script_args, known, world)
    elif program == "pip":
        check_pip(rest)
    elif program == ".ci/run":
        text = (ROOT / program).read_text()
        need(os.access(ROOT / program, os.X_OK) and all(word in text for word in rest), "no such option")
    else:
        foreign = any(words[: len(name.split())] == name.split() for name in FOREIGN)
        need(foreign, "a kind of command that this test does not know; if it is not ours, name it in FOREIGN")
        if program == "cd":
            need(
                rest[0] == ".." or exists(rest[0]) or cloned(rest[0]),
                f"no folder {rest[0]}, and nothing makes one",
            )
        check_folders(rest, known)


def check_line(command: str, known: set[str]) -> None:
    for words in simple(command):
        check_command(words, known)


def check_options(words: list[str], foreign: set[str]) -> None:
    """Options that the running text names belong to one of our scripts, or to a command elsewhere in README.md."""
    # Without a value, or with one to be filled in, only the key can be wrong.
    bare = [word for word in words if "=" not in word or re.search(r"=([A-Z]+|.*[<…*].*)$", word)]
    keys = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in bare if word.split("=")[0] not in foreign}
    known = [schema.__dataclass_fields__.keys() for schema in SCHEMAS.values()]
    need(any(keys <= names for names in known), f"unknown key in {sorted(keys)}")
    rest = [word for word in words if word not in bare and word.split("=")[0] not in foreign]
    problems = []
    for schema in SCHEMAS.values():
        try:
            load(schema, rest, check=False)
        except UserError as error:
            problems.append(str(error))
    need(len(problems) < len(SCHEMAS), min(problems, key=lambda text: "unknown key" in text, default=""))


def check_name(name: str, sources: str) -> None:
    """What looks like a class, a function, a key or a file that is written is a word in the sources."""
    file = re.fullmatch(r"[\w.-]+\.(jsonl?|png|safetensors|pt)", name)
    word = not exists(name) and re.fullmatch(r"([A-Z]\w*(\.\w+)+|[A-Z]\w*[a-z]\w*|\w+_\w+(\.\w+)*)(\(\))?", name)
    parts = [name] if file else name.removesuffix("()").split(".") if word else []
    for part in parts if parts and parts[0] not in FOREIGN_NAMES else ():
        there = re.search(rf"(?<![\w.]){re.escape(part)}(?!\w)|\.{re.escape(part)}(?!\w)", sources)
        need(there, f"no source has the word {part}; if it is not ours, name it in FOREIGN_NAMES")


def check_link(target: str, text: str) -> None:
    """A file is there, and is a picture where it says so; an anchor is a heading; an address has a host."""
    url = urlsplit(target)
    if url.scheme:
        need(url.scheme in ("https", "mailto") and (url.netloc or url.scheme == "mailto"), "no address")
        return
    if not url.path:
        titles = re.findall(r"^#+ (.*)", prose(text), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        need(url.fragment in anchors, "no heading of that name")
        return
    file = ROOT / url.path
    need(file.exists(), "no such file")
    if file.suffix == ".svg":
        need(ElementTree.parse(file).getroot().tag.endswith("svg"), "not an SVG")
    elif file.suffix == ".png":
        need(file.read_bytes().startswith(b"\x89PNG"), "not a PNG")


def check_block(language: str, body: str) -> None:
    if language == "tree":
        for line in body.splitlines():
            match = TREE.fullmatch(line)
            need(match and exists(match[1]), f"{line.strip()}: no such file")
    elif language == "python":
        ast.parse(body)
    elif language == "json":
        json.loads(body)


def problems(text: str) -> list[str]:
    """Everything that is not true, with its line."""
    found = []
    known = out_dirs(text)
    said = list(commands(text))
    flags = {word.split("=")[0] for _, command in said for word in command.split() if word.startswith("-")}
    foreign = {flag for flag in flags if flag.lstrip("-").replace("-", "_") not in ALL_KEYS}
    sources = "\n".join(path.read_text() for path in source_files())

    def check(line: int, what: str, function: Callable, *arguments: object) -> None:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                function(*arguments)
        except (
            UserError,
            SystemExit,
            ValueError,
            IndexError,
            OSError,
            SyntaxError,
        ) as error:  # argparse exits, 0 being --help
            if not isinstance(error, SystemExit) or error.code:
                found.append(f"README.md:{line}: {what}: {errors.getvalue().strip() or error}")

    for line, command in said:
        check(line, command, check_line, command, known)
    for line, code in inline(text):
        if code.startswith("--"):
            check(line, code, check_options, code.split(), foreign | {"--help"})
        elif not is_command(code):
            check(line, code, check_name, code, sources)
    for line, language, body in fences(text):
        check(line, f"block of {language}", check_block, language, body)
    for line, row in enumerate(prose(text).split("\n"), 1):
        row = re.sub(r"https?://[^\s)]+", "", row)
        for path in re.findall(r"(?<![\w./-])(?:(?:config|data|tests|\.ci|\.assets)/[\w.*<>/-]*|\w+\.py\b)", row):
            check(line, path, lambda p=path: need(exists(p) or p in FOREIGN_SCRIPTS, "no such file"))
    for match in re.finditer(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", prose(text)):
        check(text.count("\n", 0, match.start()) + 1, match[1] or match[2], check_link, match[1] or match[2], text)
    return found


def source_files() -> list[Path]:
    """Every Python file of ours but this one, whose examples are wrong on purpose."""
    found = [
        path
        for where in ("", "config/", "data/", "data/*/", "tests/", "tests/manual/")
        for path in ROOT.glob(f"{where}*.py")
    ]
    return [path for path in found if path != Path(__file__)]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_what_the_readme_says_is_true():
    assert len(list(commands(README))) > 20
    assert not problems(README), "\n".join(["", *problems(README)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\npython train.py config/train_gpt2.py --batch_sise=8\n```", "did you mean batch_size"),
        ("```\npython train.py config/train_gpt3.py\n```", "no config file"),
        ("```sh\n$ python bench.py --recompute=all\nsome output\n```", "recompute=all must be"),
        ("```\npython bench.py --sweep=batch:1,2\n```", "--batch=1"),
        ("```\ntorchrun --nproc_per_node=3 train.py config/train_gpt2.py\n```", "3 ranks"),
        ("```\ntorchrun --nnodes=3 --nproc_per_node=8 train.py config/train_gpt2.py\n```", "24 ranks"),
        (
            "```\ncd nowhere\npip install -r nowhere/requirements.txt\n```",
            "folder nowhere(.|\\n)*requirements.txt does not",
        ),
        ("```\npython -c 'import = 3'\n```", "README.md:2"),
        ("```\ntorchrun --nproc=2 train.py --seed=x\n```", "--seed=x"),
        ("```\ntorchrun --processes=2 train.py\n```", "torchrun|unrecognized"),
        ("```\npip install -r requirement.txt && python train.py\n```", "requirement.txt does not exist"),
        ("```\nmake all\n```", "kind of command"),
        ("Do `curl --silent x`.", "kind of command"),
        ("Do `python -m tests.manual.kill_loops --kills=2`.", "no module"),
        ("Do `python -m tests.manual.kill_loop --kill-all=2`.", "unknown arguments"),
        ("Do `python -m tests.manual.long_run --steps=9 --seeed=1`.", "did you mean seed"),
        ("Do `python data/nowhere/prepare.py` now.", "does not exist"),
        ("Do `python data/openwebtext/prepare.py --tokens=5`.", "takes no arguments"),
        ("Do `python sample.py --out_dir=out-nowhere`.", "nothing here trains into"),
        ("Do `hf upload me/mine out-nowhere/best`.", "nothing here trains into"),
        ("Do `python train.py \\\n --dataset=owt`.", "no folder in data/"),
        ("With `--recompute_all` less.", "unknown key"),
        ("Do `sample.py --top_p=0.5`, or with `--top_p=5`.", "top_p=5 must be"),
        ("1. Do\n   ```\n   make all\n   ```", "README.md:3: make all"),
        ("With `--recompute=all` less.", "recompute=all must be"),
        ("The class `Stepp` in `train.py`.", "word Stepp"),
        ("The method `GPT.foward`.", "word foward"),
        ("The key `max_worse_steps`.", "word max_worse_steps"),
        ("See tests/test_nothing.py.", "no such file"),
        ("![x](.assets/nothing.png)", "no such file"),
        ("[x](#nothing)", "no heading"),
        ("```\ntrain.py    trains\ntrainer.py  trains\n```", "trainer.py"),
        ("```python\nimport = 3\n```", "README.md:2"),
    ],
)
def test_a_mistake_in_a_readme_is_seen(text, message):
    found = problems(text)
    assert re.search(message, "\n".join(found)), found


@pytest.mark.parametrize(
    "text",
    [
        "```\npython train.py --help  # every key\n\n# a remark\nOMP_NUM_THREADS=1 python bench.py > log.txt\n```",
        "```\necho Hello | python sample.py --init_from=gpt2-xl \\\n    --start=-\n```\n\n```\nHello, make --it so\n```",
        "```text\nmake all\n```\nand `python data/<name>/prepare.py`, `--batch_size=N`, `--dataset`, [x](#y)\n# Y",
        "`python convert_hf_to_gguf.py out/best --outtype f16` has `--outtype`; `cd gpt12`, `.ci/run --here`",
        "```\ngit clone https://example.org/a\n```\n`python -m pytest tests/test_model.py -k x`, `Step`, `GPT.forward`",
    ],
)
def test_a_correct_readme_has_no_problems(text, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "README", "git clone https://example.org/gpt12\n")
    assert problems(text) == []


# ------------------------------------------------------------------------------------------ does it run


def fast(words: list[str]) -> bool:
    script, arguments = started(words)
    helped = script in SCHEMAS and "--help" in arguments
    resumed = script == "train.py" and "--init_from=resume" in arguments
    return helped or resumed or script == "sample.py" or (script == "bench.py" and "--plan" in arguments)


FAST = sorted({shlex.join(words) for _, command in commands(README) for words in simple(command) if fast(words)})


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """A run of two steps on bytes of text."""
    folder = tmp_path_factory.mktemp("readme")
    tokens = np.frombuffer(b"Once upon a time. " * 40, np.uint8).astype(np.uint16)
    (folder / "text").mkdir()
    for split in ("train", "val"):
        write_shard(folder / f"text/{split}_000000.bin", tokens)
    meta = {"tokenizer": "bytes", "vocab_size": 257, "documents": 1, "source_sha256": "0" * 64}
    (folder / "text/meta.json").write_text(json.dumps(meta))
    shape = "--block_size=32 --n_layer=1 --n_head=2 --n_embd=16 --batch_size=2 --gradient_accumulation_steps=1"
    how = "--max_iters=2 --eval_interval=2 --eval_iters=1 --device=cpu --dtype=float32 --compile=False"
    where = [f"--dataset={folder / 'text'}", f"--out_dir={folder / 'out'}"]
    assert train.main([*where, *shape.split(), *how.split()]) == 0
    return folder / "out"


@pytest.mark.parametrize("command", FAST)
def test_a_quick_command_of_the_readme_runs(command, tiny_run, tmp_path, monkeypatch, capsys):
    script, words = started(shlex.split(command))
    monkeypatch.chdir(tmp_path)
    for name in out_dirs(README):
        shutil.copytree(tiny_run, tmp_path / name)
    for name in re.findall(r"FILE:([\w.]+)", command):
        Path(name).write_text("Once")
    words = [re.sub(r"^--init_from=(?!resume).*", f"--init_from={tiny_run / 'best'}", word) for word in words]
    if script != "bench.py":  # the later one wins
        words += ["--device=cpu", "--dtype=float32", "--compile=False"]
        words += ["--max_iters=3"] if script == "train.py" else ["--max_new_tokens=8"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once\n"), "utf-8"))
    helped = pytest.raises(SystemExit, match="0") if "--help" in words else contextlib.nullcontext()
    with helped:
        assert not {"train.py": train, "sample.py": sample, "bench.py": bench}[script].main()
    printed = capsys.readouterr().out
    assert printed.strip()
    if "--json" in words:
        assert all(json.loads(line)["tokens"] for line in printed.splitlines())
