"""README.md is true: its commands are accepted, and the files and names in it exist.

A block of ```sh holds commands. Those for our scripts are read by the script's own settings; the
quick ones are run, in a folder where a tiny run stands in for the reader's.
"""

from __future__ import annotations

import importlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from gpt12.config import load_config
from gpt12.errors import UserError
from gpt12.settings import ALL_KEYS, BenchConfig, SampleConfig, TrainConfig
from tests.helpers import ROOT, run

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {"README.md": README, "docs/results.md": (ROOT / "docs/results.md").read_text("utf-8")}
SCHEMAS = {"train.py": TrainConfig, "sample.py": SampleConfig, "bench.py": BenchConfig}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
FILE = re.compile(r"^[\w./-]+\.(?:py|md|txt|png|svg|toml|diff)$")
MADE_BY_USERS = {"my.txt", "prompt.txt", "requirements.txt"}
FOLDERS = ("", "config/", "data/", "gpt12/", "tests/", "tests/manual/", "docs/")


def commands(text: str) -> list[list[str]]:
    """Return the words of each command in the page's sh blocks and between its backticks."""
    lines: list[str] = []
    for match in BLOCK.finditer(text):
        if match[1] == "sh":
            lines += match[2].replace("\\\n", " ").splitlines()
    inline = CODE.findall(BLOCK.sub("", text))
    lines += [code for code in inline if re.match(r"(python|torchrun|pip) \S", code)]
    found = []
    for line in lines:
        for part in re.split(r"&&|\|", line.replace("$'", "'")):
            words = shlex.split(part, comments=True)
            if words:
                found.append(words)
    return found


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the script of ours that a command starts, "" for another program; and its keys."""
    for i, word in enumerate(words):
        if word in SCHEMAS and words[0] in ("python", "torchrun"):
            return word, words[i + 1 :]
    return "", []


def problem_of(words: list[str]) -> str | None:
    """Return what is wrong with a command, or None."""
    line = shlex.join(words)
    files = re.findall(r"\S+/prepare\.py|(?<=^git apply )\S+|(?<= -r )\S+", line)
    modules = re.findall(r"(?<=^python -m )tests\.\S+", line)
    files += [f"{module.replace('.', '/')}.py" for module in modules]
    missing = [file for file in files if not (ROOT / file).is_file()]
    if missing:
        return f"{line}: there is no {missing[0]}"
    script, keys = script_of(words)
    try:
        if script and "--help" not in keys and "PRESET" not in keys:
            load_config(SCHEMAS[script], keys)
    except UserError as error:
        return f"{line}: {error}"
    return None


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_accepted(page):
    found = commands(PAGES[page])
    assert len(found) > 8
    assert [problem_of(words) for words in found if problem_of(words)] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_keys_that_a_page_names_exist(page):
    text = BLOCK.sub("", PAGES[page])
    for name in LINK.findall(text):
        assert (ROOT / page).parent.joinpath(name).exists(), name
    for code in CODE.findall(text):
        if FILE.match(code) and code not in MADE_BY_USERS and "NAME" not in code:
            assert any(any(ROOT.glob(folder + code)) for folder in FOLDERS), code
        key = re.match(r"--([\w-]+)(=|$)", code)
        if key:
            assert key[1].replace("-", "_") in {*ALL_KEYS, "help"}, code


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 200
    assert max(len(line) for line in README.splitlines()) <= 100
    assert len(README.split()) <= 1800


def test_a_wrong_command_is_found():
    for line in (
        "python train.py config/train_gpt2.py --batch_sise=8",
        "python train.py config/train_gpt3.py",
        "torchrun --nproc_per_node=2 train.py --seed=x",
        "pip install -r requirement.txt",
        "python -m tests.manual.kill_loops",
        "python data/nowhere/prepare.py",
        "git apply docs/changes/rotarry.diff",
    ):
        assert problem_of(line.split()), line


def is_quick(words: list[str]) -> bool:
    script, keys = script_of(words)
    if script == "sample.py" or (script and "--help" in keys):
        return True
    return script == "bench.py" and "--plan" in keys


QUICK = sorted({shlex.join(words) for words in commands(README) if is_quick(words)})


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """Return the folder of a run of two steps on bytes of text."""
    folder = tmp_path_factory.mktemp("readme")
    text = folder / "text.txt"
    text.write_text("Once upon a time. " * 40)
    keys = "--block_size=32 --max_iters=2 --eval_interval=2 --tokenizer=bytes".split()
    with pytest.MonkeyPatch.context() as patch:  # another worker may prepare the same text
        patch.setattr("data.dataset.DATA", folder / "data")
        run(f"--dataset={text}", f"--out_dir={folder / 'out'}", *keys)
    return folder / "out"


@pytest.mark.parametrize("command", QUICK)
def test_a_quick_command_of_the_readme_runs(command, tiny_run, tmp_path, monkeypatch, capsys):
    script, words = script_of(shlex.split(command))
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r"--out_dir=(\S+)", README)):
        shutil.copytree(tiny_run, name)
    words = [re.sub(r"^--init_from=.*", f"--init_from={tiny_run}", word) for word in words]
    if script == "sample.py":
        words += ["--max_new_tokens=8", "--device=cpu"]
    monkeypatch.setattr("sys.argv", [script, *words])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Once\n"), "utf-8"))
    program = importlib.import_module(script.removesuffix(".py"))
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            program.main()
    else:
        assert not program.main()
    assert capsys.readouterr().out.strip()
