"""gpt12/distributed.py: several processes train as one and end together; signals end a run."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from data.shards import Tokens
from data.windows import EvalWindows, TrainWindows
from gpt12.distributed import (
    Ranks,
    StopSignal,
    first_ranks_first,
    is_lost_rank,
    lost_rank_advice,
    reported_by_rank_0,
    torchrun_ranks,
)
from gpt12.errors import UserError
from gpt12.loss import IGNORE_INDEX
from tests.helpers import (
    CPU,
    ENDLESS,
    ROOT,
    TINY,
    command,
    environment,
    evaluations,
    losses,
    make_answers,
    resume,
    run,
    trainer,
    weights,
)
from train import TrainStep

pytestmark = pytest.mark.usefixtures("no_picture")

LIMIT_S = 180  # ranks that do not agree wait for each other
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


# --------------------------------------------------------------------------------------------------
# One process


def test_the_ranks_are_those_of_torchruns_environment(monkeypatch):
    assert torchrun_ranks() == Ranks(rank=0, world=1, local=0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert torchrun_ranks() == Ranks(rank=5, world=8, local=1)


def test_more_processes_than_gpus_are_refused_by_every_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 processes .* 2 GPU\(s\): --nproc_per_node=2"):
        train.main([*TINY, "--device=auto", "--gradient_accumulation_steps=3"])


def test_a_mistake_is_reported_once_on_each_machine_and_ends_all_with_the_same_status(monkeypatch):
    for rank, local in ((0, 0), (2, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        with pytest.raises(UserError), reported_by_rank_0():
            raise UserError("what is wrong")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end, reported_by_rank_0():
        raise UserError("what is wrong")
    assert end.value.code == 2


@pytest.mark.parametrize(("rank", "local", "turn"), [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_rank_0_prepares_first_then_one_rank_of_each_machine_then_all(
    monkeypatch, rank, local, turn
):
    """All ranks meet twice. Who comes later waits for those before, and not the other way round.

    Preparing may take longer than NCCL's 10 minutes.
    """
    met = []

    def new_group(backend, timeout):
        assert timeout > timedelta(days=1)
        return "group"

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "barrier", met.append)
    with first_ranks_first():
        assert met == ["group"] * turn
    assert met == ["group"] * 2


def test_only_the_end_of_another_process_counts_as_a_lost_rank():
    assert is_lost_rank(dist.DistBackendError("NCCL error"))
    assert is_lost_rank(RuntimeError("Connection closed by peer [127.0.0.1]:1234"))
    assert not is_lost_rank(RuntimeError("a bug"))


def test_a_lost_rank_is_told_how_the_run_goes_on(monkeypatch):
    """torchrun starts all again as often as --max_restarts says."""
    again = "with --init_from=auto they go on from the last checkpoint"
    by_hand = "torchrun line and --init_from=resume --out_dir='my run'"
    monkeypatch.setenv("RANK", "1")
    for restarts, advice in (("0", by_hand), ("1", by_hand), ("2", again)):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        said = lost_rank_advice(Path("my run"))
        assert said.startswith("rank 1 has lost the others")
        assert said.endswith(advice)


def test_what_a_rank_draws_in_a_step_is_its_own_also_after_resuming(dataset, tmp_path, monkeypatch):
    """Dropout's masks follow from seed, rank and step. A rank other than 0 saves nothing."""
    drawn = []
    make_step = TrainStep.__call__

    def draw_and_step(self, *args):
        drawn.append(torch.rand(()).item())
        make_step(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", draw_and_step)
    assert run(dataset, tmp_path, "--max_iters=2") == 0
    of_rank_0 = drawn.copy()
    monkeypatch.setenv("RANK", "1")
    drawn.clear()
    assert run(dataset, tmp_path, "--max_iters=4") == 0
    whole = drawn.copy()
    drawn.clear()
    assert resume(tmp_path, "--max_iters=4") == 0
    assert drawn == whole[2:]
    assert len({*of_rank_0, *whole}) == 6


# --------------------------------------------------------------------------------------------------
# Two processes


def torchrun(*argv: str) -> subprocess.Popen:
    """Start two ranks of a script, on a port that torchrun finds. They end after LIMIT_S."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*start, *argv],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    limit = threading.Timer(LIMIT_S, process.terminate)
    limit.daemon = True
    limit.start()
    return process


def torchrun_succeeds(*argv: str) -> str:
    """Run two ranks to their end and return what they printed."""
    process = torchrun(*argv)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


# train.py that prepares texts in the folder that comes first on its command line.
ELSEWHERE = """
import sys
import threading
import threading
from pathlib import Path

import data.dataset
import train
from gpt12.errors import run_main

data.dataset.DATA = Path(sys.argv.pop(1))
run_main(train.main)
"""


def test_two_ranks_prepare_a_text_once_and_train_like_one_process(tmp_path, monkeypatch):
    """The same windows and the same updates; and a single process can resume the run."""
    monkeypatch.setattr("data.dataset.DATA", tmp_path / "data")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    letters = np.cumsum(np.random.default_rng(0).integers(1, 4, 4000)) % 13
    text = tmp_path / "letters.txt"
    text.write_text("".join("abcdefghijklm"[i] for i in letters))
    # Two micro-batches a rank: gradients are averaged after the last one only.
    options = ["--max_iters=6", "--eval_interval=3", "--gradient_accumulation_steps=4"]
    options += ["--eval_iters=0", "--tokenizer=char"]
    places = [f"--dataset={text}", f"--out_dir={tmp_path / 'two'}"]
    script = [str(tmp_path / "elsewhere.py"), str(tmp_path / "data")]
    said = torchrun_succeeds(*script, *TINY, *places, *options)
    assert said.count("; curves: ") == 1  # only rank 0 tells
    (prepared,) = (tmp_path / "data/cache").iterdir()
    assert prepared.name.startswith("letters-")
    assert run(text, tmp_path / "one", *options) == 0
    for key in ("loss", "grad_norm", "val_loss"):
        one = losses(tmp_path / "one", key)
        two = losses(tmp_path / "two", key)
        assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-4)
    for name, tensor in weights(tmp_path / "one").items():
        assert torch.allclose(tensor, weights(tmp_path / "two")[name], atol=1e-5), name
    assert resume(tmp_path / "two", "--max_iters=8") == 0
    assert list(losses(tmp_path / "two")) == list(range(1, 9))


def test_two_machines_prepare_their_own_data_and_resume_the_run_of_the_first(tmp_path, monkeypatch):
    """They share no disk: each has a working folder. The second gets the checkpoint on resuming."""
    monkeypatch.setattr("data.dataset.DATA", tmp_path / "data")
    letters = np.cumsum(np.random.default_rng(0).integers(1, 4, 4000)) % 13
    text = "".join("abcdefghijklm"[i] for i in letters)
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        machine.mkdir()
        (machine / "letters.txt").write_text(text)
    # A run that the second machine had is not the one that goes on.
    options = [*TINY, "--tokenizer=char", "--decay_lr=False", "--dataset=letters.txt"]
    options += ["--out_dir=out", "--init_from=auto"]
    monkeypatch.chdir(machines[1])
    assert train.main([*options, "--max_iters=2"]) == 0
    shutil.rmtree(machines[1] / "out" / "best")
    for steps in (3, 6):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        started = []
        for number, machine in enumerate(machines):
            start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            start += [f"--node_rank={number}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            start += [str(tmp_path / "elsewhere.py"), "data", *options, f"--max_iters={steps}"]
            env = environment(PYTHONPATH=str(ROOT))
            started.append(
                subprocess.Popen(start, cwd=machine, env=env, stderr=subprocess.PIPE, text=True)
            )
        try:
            for process in started:
                _, said = process.communicate(timeout=LIMIT_S)
                assert process.returncode == 0, said
        finally:
            for process in started:
                process.terminate()
    monkeypatch.chdir(tmp_path)
    assert run(machines[0] / "letters.txt", tmp_path / "one", *options[:-3], "--max_iters=6") == 0
    one, two = losses(tmp_path / "one"), losses(machines[0] / "out")
    assert list(two) == list(range(1, 7))
    assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-4)
    second = machines[1] / "out"
    assert trainer(second)["step"] == 3  # where it resumed
    assert not (second / "best").exists()
    assert [len(list((machine / "data/cache").iterdir())) for machine in machines] == [1, 1]


def test_two_ranks_resume_the_run_of_one_although_they_share_the_targets_unevenly(tmp_path):
    """Rows with few targets, and steps in which one rank has none, count as in one process."""
    folder = make_answers(tmp_path / "rows")
    windows = TrainWindows(Tokens.open(folder, "train"), 16, 1337)
    _, y, _ = windows.batch(24, 24)  # of the three steps after resuming
    targets = (y.reshape(3, 2, -1) != IGNORE_INDEX).sum(2)  # by step and rank
    assert ((targets == 0).sum(1) == 1).any()
    fixed = ["--eval_interval=3", "--decay_lr=False"]
    assert run(folder, tmp_path / "one", *fixed, "--max_iters=6") == 0
    assert run(folder, tmp_path / "both", *fixed, "--max_iters=3") == 0
    both = tmp_path / "both"
    torchrun_succeeds("train.py", "--init_from=resume", f"--out_dir={both}", "--max_iters=6")
    assert list(losses(both)) == list(range(1, 7))
    expected = list(losses(tmp_path / "one").values())
    assert list(losses(both).values()) == pytest.approx(expected, abs=1e-5)
    for name, tensor in weights(tmp_path / "one").items():
        assert torch.allclose(tensor, weights(both)[name], atol=1e-5), name


def process_of_rank(process: subprocess.Popen, rank: int) -> int:
    """Return the process id of one of torchrun's children."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = []
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            found.append(int(child))
    [pid] = found
    return pid


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_rank_that_dies_is_started_again_with_all_and_else_a_checkpoint_is_left(
    dataset, tmp_path
):
    """The run goes on from last/, as often as torchrun may start it again."""
    places = [f"--dataset={dataset}", f"--out_dir={tmp_path}", "--init_from=auto"]
    options = [*TINY, *ENDLESS, *places, "--save_interval_s=0"]
    process = torchrun("--max_restarts=1", "train.py", *options)
    assert any(line.startswith("step 12:") for line in process.stdout), "it ended before"
    os.kill(process_of_rank(process, 1), signal.SIGKILL)
    told = next((line for line in process.stdout if line.startswith("resuming at step")), "")
    assert told, "it was not started again"
    assert int(told.split()[-1]) >= 11
    assert any(line.startswith("step ") for line in process.stdout), "it did not go on"
    os.kill(process_of_rank(process, 1), signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 1
    assert "rank      : 1" in said  # torchrun's own report: which rank, and how it ended
    assert "SIGKILL" in said
    # Rank 0 says so too, unless torchrun's signals end it before it notices.
    assert said.count("rank 0 has lost the others") <= 1
    assert "[rank0]: Traceback" not in said
    step = trainer(tmp_path)["step"]
    assert resume(tmp_path, f"--max_iters={step + 2}") == 0
    assert list(losses(tmp_path)) == list(range(1, step + 3))


def test_ranks_with_unequal_memory_decide_alike(tmp_path):
    script = tmp_path / "memory_of_ranks.py"
    script.write_text(
        "from gpt12 import memory\n"
        "from gpt12.distributed import process_group, torchrun_ranks\n"
        "from tests.helpers import CPU\n"
        "memory._own_memory = lambda machine: 5.0 - torchrun_ranks().rank\n"
        "with process_group('cpu', 'gloo'):\n"
        "    print(f'least {memory.available_memory(CPU)}\\n', end='')\n"  # in one piece
    )
    said, _ = torchrun(str(script)).communicate()
    assert said.count("least 4.0") == 2


# --------------------------------------------------------------------------------------------------
# Signals: StopSignal alone


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of gpt12/distributed.py, which the test moves."""
    found = SimpleNamespace(now=5.0)
    monkeypatch.setattr("gpt12.distributed.time", SimpleNamespace(monotonic=lambda: found.now))
    return found


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_is_remembered_and_told_once_and_a_second_one_ends_at_once(clock, number, name):
    said = []
    stop = StopSignal(CPU.device, said.append)
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
    stop = StopSignal(CPU.device, lambda text: None)
    stop.handle(signal.SIGTERM, None)
    clock.now += 0.2
    stop.handle(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM


def test_a_signal_that_another_rank_got_first_still_lets_this_one_save(clock, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "all_reduce", lambda flag, operation: flag.fill_(signal.SIGTERM))
    stop = StopSignal(CPU.device, lambda text: None)
    assert not stop.agreed()
    assert stop.agreed()
    clock.now += 0.2
    stop.handle(signal.SIGTERM, None)
    clock.now += 0.5
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)


@pytest.mark.parametrize("of_hangup", [signal.SIG_DFL, signal.SIG_IGN])
def test_the_handlers_of_before_are_restored(of_hangup):
    """A SIGHUP that nohup ignores stays ignored."""
    signal.signal(signal.SIGHUP, of_hangup)
    before = [signal.getsignal(number) for number in STOPS]
    stop = StopSignal(CPU.device, lambda text: None)
    ours = of_hangup if of_hangup == signal.SIG_IGN else stop.handle
    with stop.handling():
        found = [signal.getsignal(number) for number in STOPS]
        assert found == [stop.handle, stop.handle, ours]
    assert [signal.getsignal(number) for number in STOPS] == before
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_all_ranks_stop_after_the_same_step(monkeypatch):
    """Rank 1 gets the signal. Both learn of it one step later, at the same call."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    stops = [StopSignal(CPU.device, lambda text: None) for _ in range(2)]

    def stop_of(number_of_ranks: list[int]) -> list[bool]:
        """Call agreed() on both ranks; the flags are combined as all_reduce would."""
        largest = max(number_of_ranks)
        monkeypatch.setattr(
            "gpt12.distributed.dist.all_reduce", lambda flag, op: flag.fill_(largest)
        )
        return [stop.agreed() for stop in stops]

    assert stop_of([0, 0]) == [False, False]
    stops[1].handle(signal.SIGTERM, None)
    assert stop_of([0, signal.SIGTERM]) == [False, False]
    assert stop_of([0, signal.SIGTERM]) == [True, True]
    assert [stop.number for stop in stops] == [signal.SIGTERM, signal.SIGTERM]


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
    if step == 0:
        assert not (tmp_path / "last").exists()  # nothing was trained
        return
    state = trainer(tmp_path)
    assert state["step"] == step
    assert state["evaluated_step"] == evaluated[-1]
    assert state["best_step"] < step
    assert resume(tmp_path) == 0
    assert evaluations(tmp_path) == [0, 10, 20, 30]


# --------------------------------------------------------------------------------------------------
# train.py as typed, in a process of its own


# train.py in a terminal, whose every step first waits for a byte of a pipe, or for the pipe's end.
GATED = """
import fcntl
import os
import signal
import socket
import sys
import threading
import termios

import train
from gpt12.errors import run_main

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # closing the window sends SIGHUP here
gate = int(sys.argv.pop(1))
make_step = train.TrainStep.__call__


def wait_and_step(self, *args):
    os.read(gate, 1)
    make_step(self, *args)


train.TrainStep.__call__ = wait_and_step
run_main(train.main)
"""


def test_a_run_whose_terminal_is_closed_saves_and_ends(dataset, tmp_path):
    """The window is closed before the first step, which the gate holds back until then."""
    pytest.importorskip("termios")
    window, theirs = os.openpty()
    gate, opened = os.pipe()

    options = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=3"]
    argv = [sys.executable, "-c", GATED, str(gate), *options]
    streams = dict.fromkeys(["stdin", "stdout", "stderr"], theirs)
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment(), pass_fds=[gate], start_new_session=True, **streams
    ) as process:
        os.close(theirs)
        os.close(gate)
        shown = b""
        while b"step 0: train loss" not in shown:
            shown += os.read(window, 4096)
        os.close(window)  # sends SIGHUP
        os.close(opened)
        assert process.wait() == 129
    assert trainer(tmp_path)["step"] == 1


def test_a_run_saves_when_ctrl_c_also_ends_the_reader_of_its_log(dataset, tmp_path):
    """`python train.py | tee log`: the terminal interrupts both, and nobody reads what follows."""
    argv = command("train.py", *TINY, *ENDLESS, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=ROOT, env=environment(), **pipes) as process:
        assert any(line.startswith("step 12:") for line in process.stdout), "it ended before"
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == 130
    assert trainer(tmp_path)["step"] >= 12


def test_a_run_without_output_saves_all(dataset, tmp_path):
    options = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=2"]
    line = f"{shlex.join(command('train.py', *options))} >&- 2>&-"
    assert subprocess.run(line, shell=True, cwd=ROOT, env=environment()).returncode == 0
    assert trainer(tmp_path)["step"] == 2
