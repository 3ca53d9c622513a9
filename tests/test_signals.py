"""gpt12/signals.py: Ctrl-C, SIGTERM and a closed terminal end a run after its step, with a save."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.windows import EvalWindows
from gpt12.device import Machine
from gpt12.signals import StopSignal, stop_signals
from tests.helpers import (
    CPU,
    ENDLESS,
    ROOT,
    TINY,
    command,
    environment,
    evaluations,
    losses,
    resume,
    run,
    trainer,
)

pytestmark = pytest.mark.usefixtures("no_picture")


# --------------------------------------------------------------------------------------------------
# StopSignal alone


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of gpt12/signals.py, which the test moves."""
    found = SimpleNamespace(now=5.0)
    monkeypatch.setattr("gpt12.signals.time", SimpleNamespace(monotonic=lambda: found.now))
    return found


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_is_remembered_and_told_once_and_a_second_one_ends_at_once(clock, number, name):
    said = []
    stop = StopSignal(CPU, said.append)
    assert not stop.agreed()
    stop.handle(number, None)
    assert stop.agreed()
    assert stop.number == number
    assert said == [f"\n{name}: finishing this step, then saving (press again to quit at once)"]
    clock.now += 0.5
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_a_signal_that_arrives_twice_at_once_still_lets_the_run_save(clock):
    """`timeout` signals the process and then its whole group."""
    stop = StopSignal(CPU, lambda text: None)
    stop.handle(signal.SIGTERM, None)
    clock.now += 0.2
    stop.handle(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM


def test_the_handlers_of_before_are_restored(monkeypatch):
    before = {number: signal.getsignal(number) for number in stop_signals()}
    stop = StopSignal(CPU, lambda text: None)
    with stop.handling():
        for number in before:
            assert signal.getsignal(number) == stop.handle
    for number, handler in before.items():
        assert signal.getsignal(number) == handler


def test_a_system_without_sighup_has_two_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    assert stop_signals() == [signal.SIGINT, signal.SIGTERM]


def test_all_ranks_stop_after_the_same_step(monkeypatch):
    """Rank 1 gets the signal. Both learn of it one step later, at the same call."""
    stops = []
    for rank in range(2):
        machine = Machine(CPU.device, CPU.dtype, compiled=False, rank=rank, world=2)
        stops.append(StopSignal(machine, lambda text: None))

    def stop_of(number_of_ranks: list[int]) -> list[bool]:
        """Call agreed() on both ranks; the flags are combined as all_reduce would."""
        largest = max(number_of_ranks)
        monkeypatch.setattr("gpt12.signals.dist.all_reduce", lambda flag, op: flag.fill_(largest))
        return [stop.agreed() for stop in stops]

    assert stop_of([0, 0]) == [False, False]
    stops[1].handle(signal.SIGTERM, None)
    assert stop_of([0, signal.SIGTERM]) == [False, False]
    assert stop_of([0, signal.SIGTERM]) == [True, True]
    assert [stop.number for stop in stops] == [signal.SIGTERM, signal.SIGTERM]


# --------------------------------------------------------------------------------------------------
# A run in this process


@pytest.mark.parametrize("step", [0, 20, 30])
def test_a_signal_ends_a_long_evaluation_early(dataset, tmp_path, monkeypatch, step):
    """At the start, on the way and at the end: no result of half a split is kept.

    A resumed run evaluates again.
    """
    batch = EvalWindows.batch
    sent = []

    def interrupted(self, indices):
        if (step == 0 or step in losses(tmp_path)) and not sent:
            sent.append(True)
            signal.raise_signal(signal.SIGINT)
        return batch(self, indices)

    options = ["--max_iters=30", "--eval_iters=0", "--always_save_checkpoint=False"]
    with monkeypatch.context() as m:
        m.setattr(EvalWindows, "batch", interrupted)
        assert run(dataset, tmp_path, *options) == 130
    assert sent
    evaluated = [*range(0, step, 10)]
    assert evaluations(tmp_path) == evaluated
    state = trainer(tmp_path)
    assert state["step"] == step
    assert state["evaluated_step"] == (evaluated[-1] if evaluated else -1)
    assert state["best_step"] < max(step, 1)
    assert resume(tmp_path) == 0
    assert evaluations(tmp_path) == [0, 10, 20, 30]


# --------------------------------------------------------------------------------------------------
# train.py as typed, in a process of its own


def start_endless_run(dataset, out_dir, **streams) -> subprocess.Popen:
    argv = command("train.py", *TINY, *ENDLESS, f"--dataset={dataset}", f"--out_dir={out_dir}")
    streams.setdefault("env", environment())
    return subprocess.Popen(argv, cwd=ROOT, text=True, **streams)


def wait_for_line(process: subprocess.Popen, beginning: str) -> None:
    """Read what a process prints up to a line that begins so."""
    assert process.stdout is not None
    assert any(line.startswith(beginning) for line in process.stdout), "it ended before"


def test_a_run_that_gets_sigterm_saves_and_ends_with_143(dataset, tmp_path):
    with start_endless_run(dataset, tmp_path, stdout=subprocess.PIPE) as process:
        wait_for_line(process, "step 12:")
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait() == 143
    assert f"go on with: python train.py --init_from=resume --out_dir={tmp_path}" in rest
    step = trainer(tmp_path)["step"]
    assert step >= 12
    assert resume(tmp_path, f"--max_iters={step + 2}") == 0


# train.py in a terminal, whose every step first waits for a byte of a pipe, or for the pipe's end.
GATED = """
import fcntl
import os
import signal
import sys
import termios

import train
from gpt12.errors import run_main

# Set both ways: the tests themselves may have been started under nohup.
nohup = sys.argv.pop(1) == "nohup"
signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # closing the window sends SIGHUP here
gate = int(sys.argv.pop(1))
make_step = train.TrainStep.__call__


def wait_and_step(self, *args):
    os.read(gate, 1)
    make_step(self, *args)


train.TrainStep.__call__ = wait_and_step
run_main(train.main)
"""


@pytest.mark.parametrize("nohup", [False, True])
def test_a_run_whose_terminal_is_closed_saves_and_ends_but_goes_on_under_nohup(
    dataset, tmp_path, nohup
):
    """The window is closed before the first step, which the gate holds back until then."""
    pytest.importorskip("termios")
    window, theirs = os.openpty()
    gate, opened = os.pipe()

    options = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=3"]
    argv = [sys.executable, "-c", GATED, "nohup" if nohup else "plain", str(gate), *options]
    with subprocess.Popen(
        argv,
        cwd=ROOT,
        env=environment(),
        pass_fds=[gate],
        start_new_session=True,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        os.close(gate)
        shown = b""
        while b"step 0: train loss" not in shown:
            shown += os.read(window, 4096)
        os.close(window)  # sends SIGHUP
        os.close(opened)
        assert process.wait() == (0 if nohup else 129)
    assert trainer(tmp_path)["step"] == (3 if nohup else 1)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_saves_when_ctrl_c_also_ends_the_reader_of_its_log(dataset, tmp_path, unbuffered):
    """`python train.py | tee log`: the terminal interrupts both, and nobody reads what follows."""
    env = environment(PYTHONUNBUFFERED=unbuffered)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_endless_run(dataset, tmp_path, env=env, **pipes) as process:
        wait_for_line(process, "step 12:")
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == 130
    assert trainer(tmp_path)["step"] >= 12


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_is_reported_after_all_is_saved(dataset, tmp_path):
    options = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=2"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            command("train.py", *options),
            cwd=ROOT,
            env=environment(PYTHONUNBUFFERED=""),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    told = "error: not all of the output could be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (2, told)
    assert trainer(tmp_path)["step"] == 2
