"""The changes of docs/changes/, each applied to a copy of the tree: all else goes on working."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import CHANGES, ROOT, changed_copy
from tests.manual.changes import changed_lines

# What a change needs at tiny size to make a difference.
OPTIONS = {
    "lion": ["--optimizer=lion", "--learning_rate=3e-3"],
    "sliding_window": ["--optimizer=muon", "--window=5"],
}
NAMES = sorted(file.stem for file in CHANGES.glob("*.diff"))


def python(copy: Path, *argv: str) -> subprocess.CompletedProcess:
    """Run Python in a copy of the tree."""
    return subprocess.run([sys.executable, *argv], cwd=copy, capture_output=True, text=True)


@pytest.mark.changes
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_model_trains_resumes_and_writes_as_before(name, tmp_path):
    copy = changed_copy(tmp_path / "copy", name)
    options = OPTIONS.get(name, ["--optimizer=muon"])
    done = python(copy, "-m", "tests.train_changed", str(tmp_path), *options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_model_is_compiled_and_recorded_on_a_gpu(name, tmp_path):
    copy = changed_copy(tmp_path / "copy", name)
    options = [*OPTIONS.get(name, ["--optimizer=muon"]), "--device=cuda"]
    done = python(copy, "-m", "tests.train_changed", str(tmp_path), *options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_change_says_what_it_does_in_two_sentences_and_touches_one_file():
    assert len(NAMES) == 11  # ten, and five of them together
    table = (ROOT / "docs" / "changes.md").read_text()
    for name in NAMES:
        assert re.search(
            rf"^\| \[{name}\].* {re.escape(changed_lines(name))} \|", table, re.MULTILINE
        )
        text = (CHANGES / f"{name}.diff").read_text()
        head, *files = text.split("diff --git ")
        assert head.endswith(".\n\n")
        assert sum(line.startswith("new file") for line in text.splitlines()) == len(files) - 1
