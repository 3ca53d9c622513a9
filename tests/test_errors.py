"""run_main: what a script prints and returns for mistakes, bugs, Ctrl-C and lost output."""

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from gpt12.errors import UserError, one_line, printable, run_main, say
from tests.helpers import ROOT


def exit_status_of(main, help_page=None):
    with pytest.raises(SystemExit) as done:
        run_main(main, help_page)
    return done.value.code


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (UserError("two\nlines"), 2, "error: two\nlines\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_an_exception_becomes_a_status_and_a_message(raised, status, printed, capsys):
    assert exit_status_of(Mock(side_effect=raised)) == status
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (143, 143)])
def test_the_returned_value_is_the_exit_status(returned, status):
    assert exit_status_of(lambda: returned) == status


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("argument", "status", "stream", "printed"),
    [("-h", 0, "out", "the page\nwraps"), ("--tokens=5", 2, "err", "arguments: --tokens=5")],
)
def test_a_script_without_options_answers_help_and_refuses_an_argument(
    argument, status, stream, printed, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["prepare.py", argument])
    assert exit_status_of(pytest.fail, "the page\nwraps") == status
    assert printed in getattr(capsys.readouterr(), stream)


SCRIPT = """
import sys
from gpt12.errors import UserError, run_main
def main():
{body}
run_main(main)
"""


def python(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
    """Run Python in the repository and return how it ended."""
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, stdout=stdout, stderr=stderr, text=True, env=environment
    )


@pytest.fixture
def unread_pipe():
    """The writing end of a pipe whose reader has ended, as in `python train.py --help | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(
    ("body", "status", "printed"),
    [
        ("    print('page')\n    raise SystemExit(0)", 141, ""),  # as --help does
        ("    print('x')\n    raise UserError('no such key')", 2, "error: no such key\n"),
        ("    print('x')\n    1 // 0", 1, "ZeroDivisionError: "),
    ],
)
def test_output_that_nobody_reads_prints_no_traceback_of_its_own(
    body, status, printed, unbuffered, unread_pipe
):
    # An unbuffered stdout fails in print, a buffered one when it is flushed.
    options = ["-u"] if unbuffered else []
    done = python(*options, "-c", SCRIPT.format(body=body), stdout=unread_pipe)
    if unbuffered:
        status, printed = 141, ""
    assert done.returncode == status
    assert printed in done.stderr
    assert done.stderr.count("Traceback") == (status == 1)


def test_another_broken_pipe_than_standard_output_is_a_bug():
    with pytest.raises(BrokenPipeError):
        run_main(Mock(side_effect=BrokenPipeError(32, "another pipe")))


def test_a_mistake_keeps_its_status_if_nobody_reads_the_messages(unread_pipe):
    script = SCRIPT.format(body="    raise UserError('x')")
    assert python("-c", script, stderr=unread_pipe).returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    with Path("/dev/full").open("w") as full:
        done = python("-c", SCRIPT.format(body="    print('a result')"), stdout=full)
    assert done.returncode == 2
    assert done.stderr == "error: not all of the output could be written: No space left on device\n"


def test_a_program_without_standard_output_runs():
    """Python sets sys.stdout to None if it was closed before the start."""
    done = python("-c", "import sys; sys.stdout = None" + SCRIPT.format(body="    print('x')"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py"])
def test_a_missing_package_is_named_with_what_to_do(script):
    """With -S Python knows no installed package."""
    done = python("-S", script)
    assert (done.returncode, done.stderr) == (
        2,
        "error: numpy is not installed: activate the environment, or pip install -r "
        "requirements.txt\n",
    )


@pytest.mark.parametrize(
    ("script", "advice"),
    [
        ("train.py", "end other programs that use it"),
        ("sample.py", "ask for fewer --num_samples"),
        ("bench.py", "bench.py measures what was asked for"),
    ],
)
@pytest.mark.parametrize("text", ["CUDA out of memory", "DefaultCPUAllocator: not enough memory"])
def test_where_memory_does_not_suffice_a_script_says_what_helps(
    monkeypatch, capsys, script, advice, text
):
    """A GPU has an error of its own; of a CPU only the message tells. Other errors are bugs."""
    kind = torch.OutOfMemoryError if text.startswith("CUDA") else RuntimeError
    errors = [kind(text), RuntimeError("illegal access")]
    for module in ("gpt12.config", "gpt12.run"):  # where the scripts get it from
        monkeypatch.setattr(f"{module}.load_config", Mock(side_effect=errors))
    monkeypatch.setattr("sys.argv", [script, "--seed=1"])
    for error, said in ((SystemExit, "^2$"), (RuntimeError, "illegal access")):
        with pytest.raises(error, match=said):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert capsys.readouterr().err.startswith(f"error: out of memory: {advice}")


def test_without_advice_a_lack_of_memory_is_a_bug():
    """A script that reads no model has none."""
    with pytest.raises(torch.OutOfMemoryError):
        run_main(Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("not this")
    monkeypatch.setenv("RANK", "0")
    say("this")
    assert capsys.readouterr().out == "this\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("reentrant call")])
def test_a_line_that_cannot_be_written_costs_no_run(monkeypatch, error):
    """The log's disk is full, or a signal comes in the middle of a line."""

    broken = Mock(write=Mock(side_effect=error), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", broken)
    say("a line")


def test_a_console_in_cp1252_gets_question_marks_for_what_it_cannot_show():
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    console.write(printable("caf\u00e9 \u6f22", console))
    console.flush()
    assert console.buffer.getvalue() == b"caf\xe9 ?"


def test_characters_that_control_a_terminal_are_not_printed(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    text = "\x1b[31m\x9b\x00\x7f\r\n\tred"
    say(text)
    with pytest.raises(SystemExit):
        run_main(Mock(side_effect=UserError(text)))
    shown = "?[31m???\n\tred\n"
    assert capsys.readouterr() == (shown, f"error: {shown}")


def test_an_exception_becomes_one_line():
    assert one_line(ValueError("\nfirst\nsecond")) == "ValueError: first"
    assert one_line(OSError()) == "OSError: "
