"""The whole program under Windows' rules for files: prepare, train, resume, start anew, sample."""

import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from data.dataset import open_dataset
from gpt12.files import write_atomically
from tests.helpers import losses, resume, run, trainer

pytestmark = pytest.mark.usefixtures("windows", "own_cache", "own_folder")
TEXT = "to be, or not to be: that is the question.\n" * 40


@pytest.fixture
def text(own_folder) -> str:
    Path("play.txt").write_text(TEXT)
    return "play.txt"


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


def test_a_run_on_a_text_saves_resumes_starts_anew_and_writes(text, monkeypatch, capsys):
    """Every save replaces files that an earlier start, resume or sample has read."""
    import sample

    options = [f"--dataset={text}", "--save_interval_s=0"]
    anew = [*options, "--tokenizer=char", "--eval_interval=1", "--eval_iters=1"]
    run(*anew, "--max_iters=2")
    resume("--max_iters=3")
    monkeypatch.setattr("sys.argv", ["sample.py", "--device=cpu", "--max_new_tokens=8"])
    assert not sample.main()
    run(*anew, "--max_iters=1")
    assert trainer()["step"] == 1
    assert trainer("out/previous")["step"] == 3
    lora = ["--out_dir=lora", "--init_from=out/previous", "--lora_rank=2", "--max_iters=1"]
    run(*options, *lora)
    resume("--out_dir=lora", "--max_iters=2")
    assert list(losses("lora")) == [1, 2]
    assert "could not save" not in capsys.readouterr().out


def test_a_text_is_prepared_again_with_another_tokenizer_while_the_first_is_open(text):
    first = open_dataset(text, tokenizer="bytes", block_size=16)
    first.val.gather(np.array([0]), 4)
    again = open_dataset(text, tokenizer="char", block_size=16)
    assert again.folder != first.folder


def test_prompts_and_answers_are_prepared():
    Path("qa.jsonl").write_text('{"prompt": "What?\\n", "completion": "That."}\n' * 30)
    assert open_dataset("qa.jsonl", tokenizer="bytes", block_size=16).document_count == 30


def test_a_data_set_of_the_hub_becomes_a_folder_whose_name_windows_allows(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": TEXT[:43]}] * 30).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", Mock(return_value=rows))
    assert (
        open_dataset("hf:owner/name:config", tokenizer="bytes", block_size=16).document_count == 30
    )
