"""The whole program under Windows' rules for files: prepare, train, resume, start anew, sample."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from data.dataset import open_dataset
from gpt12.files import write_atomically
from tests.helpers import TINY, losses, resume, trainer

pytestmark = pytest.mark.usefixtures("windows", "own_cache")
TEXT = "to be, or not to be: that is the question.\n" * 40


def train_on(text: Path, out_dir: Path, *options: str) -> int:
    import train

    argv = [*TINY, f"--dataset={text}", f"--out_dir={out_dir}", "--save_interval_s=0", *options]
    return train.main(argv)


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "play.txt"
    file.write_text(TEXT)
    return file


def test_the_rules_are_enforced(tmp_path):
    file = tmp_path / "a.bin"
    write_atomically(file, bytes(64))
    with file.open("rb") as reader, pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(reader.fileno())
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    mapped = np.memmap(file, mode="r")
    for change in (file.unlink, lambda: write_atomically(file, b"")):
        with pytest.raises(PermissionError, match="open or mapped"):
            change()
    with pytest.raises(PermissionError, match="open or mapped"):
        tmp_path.rename(tmp_path.with_name("other"))
    del mapped
    write_atomically(file, b"")
    with pytest.raises(FileExistsError):
        file.rename(file)
    with pytest.raises(OSError, match="Invalid argument"):
        (tmp_path / "hf:owner").mkdir()


def test_a_run_on_a_text_saves_resumes_starts_anew_and_writes(text, tmp_path, monkeypatch, capsys):
    """Every save replaces files that an earlier start, resume or sample has read."""
    import sample

    out_dir = tmp_path / "out"
    options = ["--tokenizer=char", "--eval_interval=1", "--eval_iters=1"]
    assert train_on(text, out_dir, *options, "--max_iters=2") == 0
    resume(f"--out_dir={out_dir}", "--max_iters=3")
    monkeypatch.setattr(
        sys, "argv", ["sample.py", f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=8"]
    )
    assert not sample.main()
    assert train_on(text, out_dir, *options, "--max_iters=1") == 0
    assert trainer(out_dir)["step"] == 1
    assert trainer(out_dir / "previous")["step"] == 3
    fine = [f"--init_from={out_dir / 'previous'}", "--lora_rank=2", "--max_iters=1"]
    assert train_on(text, tmp_path / "lora", *fine) == 0
    resume(f"--out_dir={tmp_path / 'lora'}", "--max_iters=2")
    assert list(losses(tmp_path / "lora")) == [1, 2]
    assert "could not save" not in capsys.readouterr().out


def test_a_text_is_prepared_again_with_another_tokenizer_while_the_first_is_open(text):
    first = open_dataset(str(text), tokenizer="bytes", block_size=16)
    first.val.gather(np.array([0]), 4)
    again = open_dataset(str(text), tokenizer="char", block_size=16)
    assert again.folder != first.folder


def test_prompts_and_answers_are_prepared(tmp_path):
    file = tmp_path / "qa.jsonl"
    file.write_text('{"prompt": "What?\\n", "completion": "That."}\n' * 30)
    assert open_dataset(str(file), tokenizer="bytes", block_size=16).document_count == 30


def test_a_data_set_of_the_hub_becomes_a_folder_whose_name_windows_allows(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": TEXT[:43]}] * 30).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    assert (
        open_dataset("hf:owner/name:config", tokenizer="bytes", block_size=16).document_count == 30
    )
