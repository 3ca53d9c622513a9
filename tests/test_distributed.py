"""gpt12/distributed.py: several processes train as one and end together; signals end a run."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data.dataset
import train
from data.shards import Tokens
from data.windows import EvalWindows, TrainWindows
from gpt12 import device
from gpt12.distributed import (
    Ranks,
    StopSignal,
    first_ranks_first,
    is_lost_rank,
    lost_rank_advice,
    process_group,
    reported_by_rank_0,
    torchrun_ranks,
)
from gpt12.errors import UserError
from gpt12.loss import IGNORE_INDEX
from tests.helpers import (
    CPU,
    ENDLESS,
    OUT,
    RESUME,
    ROOT,
    TINY,
    evaluations,
    losses,
    make_answers,
    refused,
    resume,
    run,
    trainer,
    weights,
)
from tests.processes import Started, start, start_ranks
from train import TrainStep

pytestmark = pytest.mark.usefixtures("own_folder")

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
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    message = r"3 processes .* 2 GPU\(s\): --nproc_per_node=2"
    refused(message, run, "--device=auto", "--gradient_accumulation_steps=3")


def test_a_mistake_is_reported_once_on_each_machine_and_ends_all_with_the_same_status(monkeypatch):
    for rank in "02":  # the first of each machine
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(UserError), reported_by_rank_0():
            raise UserError("what is wrong")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end, reported_by_rank_0():
        raise UserError("what is wrong")
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("rank", "local", "turn"), [("0", "0", 0), ("1", "1", 2), ("2", "0", 1), ("3", "1", 2)]
)
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

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.new_group", new_group)
    monkeypatch.setattr("torch.distributed.barrier", met.append)
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


def test_what_a_rank_draws_in_a_step_is_its_own_also_after_resuming(monkeypatch):
    """Dropout's masks follow from seed, rank and step. A rank other than 0 saves nothing."""
    drawn = []
    make_step = TrainStep.__call__

    def draw_and_step(self, *args):
        drawn.append(torch.rand(()).item())
        make_step(self, *args)

    monkeypatch.setattr("train.TrainStep.__call__", draw_and_step)
    run("--max_iters=2")
    monkeypatch.setenv("RANK", "1")
    run("--max_iters=4")
    resume("--max_iters=4")
    assert drawn[6:] == drawn[4:6]
    assert len({*drawn}) == 6


# --------------------------------------------------------------------------------------------------
# Two processes


def train_elsewhere() -> int:
    """Train, with prepared texts in the folder that comes first on the command line."""
    data.dataset.DATA = Path(sys.argv.pop(1))
    return train.main()


def end_well(processes: list[Started]) -> list[str]:
    """Wait for the end of processes that succeed, and return what they printed."""
    ends = [process.end() for process in processes]
    assert [status for status, _ in ends] == [0] * len(ends), ends
    return [said for _, said in ends]


def write_letters(file: str) -> None:
    """Write a text over 13 letters."""
    letters = np.cumsum(np.random.default_rng(0).integers(1, 4, 4000)) % 13
    Path(file).write_text("".join("abcdefghijklm"[i] for i in letters))


def assert_same_run(one: str, other: str, keys: tuple[str, ...] = ("loss",)) -> None:
    """Compare the curves and the weights of two runs, up to rounding."""
    for key in keys:
        expected = losses(one, key)
        found = losses(other, key)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-4)
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(other)[name], atol=1e-5), name


def test_two_ranks_prepare_a_text_once_and_train_like_one_process(monkeypatch):
    """The same windows and the same updates; and a single process can resume the run."""
    monkeypatch.setattr("data.dataset.DATA", Path("data"))
    write_letters("letters.txt")
    # Two micro-batches a rank: gradients are averaged after the last one only.
    options = ["--max_iters=4", "--eval_interval=2", "--gradient_accumulation_steps=4"]
    options += ["--eval_iters=0", "--tokenizer=char", "--dataset=letters.txt"]
    ranks = start_ranks(train_elsewhere, "data", *TINY, *options)
    assert ["; curves: " in said for said in end_well(ranks)] == [True, False]
    (prepared,) = Path("data/cache").iterdir()
    assert prepared.name.startswith("letters-")
    run("--out_dir=one", *options)
    assert_same_run("one", "out", ("loss", "grad_norm", "val_loss"))
    resume("--max_iters=6")
    assert list(losses()) == list(range(1, 7))


def test_two_machines_prepare_their_own_data_and_resume_the_run_of_the_first(tmp_path, monkeypatch):
    """They share no disk: each has a working folder. The second gets the checkpoint on resuming."""
    monkeypatch.setattr("data.dataset.DATA", Path("data"))
    machines = ("first", "second")
    for machine in machines:
        Path(machine).mkdir()
        write_letters(f"{machine}/letters.txt")
    # A run that the second machine had is not the one that goes on.
    options = ["--tokenizer=char", "--decay_lr=False", "--dataset=letters.txt"]
    monkeypatch.chdir("second")
    run(*options, "--max_iters=1")
    shutil.rmtree("out/best")
    monkeypatch.chdir(tmp_path)
    for steps in (2, 4):
        argv = ["data", *TINY, *options, "--init_from=auto", f"--max_iters={steps}"]
        end_well(start_ranks(train_elsewhere, *argv, folders=machines))
    run(*options, "--dataset=first/letters.txt", "--max_iters=4")
    assert_same_run("out", "first/out")
    assert trainer("second/out")["step"] == 2  # where it resumed
    assert not Path("second/out/best").exists()
    assert [len(list(Path(machine, "data/cache").iterdir())) for machine in machines] == [1, 1]


def test_two_ranks_resume_the_run_of_one_although_they_share_the_targets_unevenly():
    """Rows with few targets, and steps in which one rank has none, count as in one process."""
    folder = make_answers(Path("rows"))
    windows = TrainWindows(Tokens(folder, "train"), 16, 1337)
    _, y, _ = windows.batch(24, 24)  # of the three steps after resuming
    targets = (y.reshape(3, 2, -1) != IGNORE_INDEX).sum(2)  # by step and rank
    assert ((targets == 0).sum(1) == 1).any()
    fixed = ["--dataset=rows", "--eval_interval=3", "--decay_lr=False"]
    run("--out_dir=one", *fixed, "--max_iters=6")
    run(*fixed, "--max_iters=3")
    end_well(start_ranks(train.main, *RESUME, "--max_iters=6"))
    assert_same_run("one", "out")


def tell_least_memory() -> None:
    device._own_memory = lambda machine: 5.0 - torchrun_ranks().rank
    with process_group("cpu", "gloo"):
        print("least", device.available_memory(CPU))


def test_ranks_with_unequal_memory_decide_alike():
    assert end_well(start_ranks(tell_least_memory)) == ["least 4.0\n"] * 2


def test_a_rank_that_has_lost_the_others_says_how_the_run_goes_on():
    ranks = start_ranks(train.main, *TINY, *ENDLESS, "--save_interval_s=0")
    assert any(line.startswith("step 12:") for line in ranks[0].stdout), "it ended before"
    ranks[1].send(signal.SIGKILL)
    status, said = ranks[0].end()
    assert (status, ranks[1].end()[0]) == (2, -signal.SIGKILL)
    assert "error: rank 0 has lost the others" in said
    assert "Traceback" not in said
    step = trainer()["step"]
    resume(f"--max_iters={step + 2}")
    assert list(losses()) == list(range(1, step + 3))


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
def test_torchrun_starts_all_ranks_again_if_one_dies_and_the_run_goes_on():
    line = "-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=1"
    script = [str(ROOT / "train.py"), *TINY, *ENDLESS, "--init_from=auto", "--save_interval_s=0"]
    argv = [sys.executable, *line.split(), *script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(argv, **pipes) as process:
        limit = threading.Timer(LIMIT_S, process.terminate)
        limit.start()
        assert any(line.startswith("step 12:") for line in process.stdout), "it ended before"
        os.kill(process_of_rank(process, 1), signal.SIGKILL)
        told = next((line for line in process.stdout if line.startswith("resuming at step")), "")
        assert told, "it was not started again"
        assert int(told.split()[-1]) >= 11
        assert any(line.startswith("step ") for line in process.stdout), "it did not go on"
        process.terminate()
        limit.cancel()


# --------------------------------------------------------------------------------------------------
# Signals: StopSignal alone


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of gpt12/distributed.py, which the test moves."""
    found = SimpleNamespace(now=5.0)
    monkeypatch.setattr("gpt12.distributed.time", SimpleNamespace(monotonic=lambda: found.now))
    return found


@pytest.fixture
def stop() -> StopSignal:
    return StopSignal(CPU.device)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_is_remembered_and_told_once_and_a_second_one_ends_at_once(
    stop, clock, capsys, number, name
):
    assert not stop.agreed()
    stop.handle(number, None)
    assert stop.agreed()
    assert stop.number == number
    told = f"\n{name}: finishing this step, then saving (press again to quit at once)\n"
    assert capsys.readouterr().out == told
    clock.now += 0.5
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_a_signal_that_arrives_twice_at_once_still_lets_the_run_save(stop, clock):
    """`timeout` signals the process and then its whole group."""
    stop.handle(signal.SIGTERM, None)
    clock.now += 0.2
    stop.handle(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM


def test_a_signal_that_another_rank_got_first_still_lets_this_one_save(stop, clock, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda flag, operation: flag.fill_(signal.SIGTERM)
    )
    assert not stop.agreed()
    assert stop.agreed()
    clock.now += 0.2
    stop.handle(signal.SIGTERM, None)
    clock.now += 0.5
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)


@pytest.mark.parametrize("of_hangup", [signal.SIG_DFL, signal.SIG_IGN])
def test_the_handlers_of_before_are_restored(stop, of_hangup):
    """A SIGHUP that nohup ignores stays ignored."""
    signal.signal(signal.SIGHUP, of_hangup)
    before = [*map(signal.getsignal, STOPS)]
    ours = of_hangup if of_hangup == signal.SIG_IGN else stop.handle
    with stop.handling():
        assert [*map(signal.getsignal, STOPS)] == [stop.handle, stop.handle, ours]
    assert [*map(signal.getsignal, STOPS)] == before


def test_all_ranks_stop_after_the_same_step(monkeypatch):
    """Rank 1 gets the signal. Both learn of it one step later, at the same call."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    stops = [StopSignal(CPU.device) for _ in range(2)]

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
def test_a_signal_ends_a_long_evaluation_early(monkeypatch, step):
    """At the start, on the way and at the end: no result of half a split is kept.

    A resumed run evaluates again.
    """
    batch = EvalWindows.batch
    sent = []

    def interrupted(self, indices):
        if (step == 0 or step in losses()) and not sent:
            sent.append(True)
            signal.raise_signal(signal.SIGINT)
        return batch(self, indices)

    options = ["--max_iters=30", "--eval_iters=0", "--always_save_checkpoint=False"]
    with monkeypatch.context() as m:
        m.setattr("data.windows.EvalWindows.batch", interrupted)
        run(*options, status=130)
    assert sent
    evaluated = [*range(0, step, 10)]
    assert evaluations() == evaluated
    if step == 0:
        assert not (OUT / "last").exists()  # nothing was trained
        return
    state = trainer()
    assert state["step"] == step
    assert state["evaluated_step"] == evaluated[-1]
    assert state["best_step"] < step
    resume()
    assert evaluations() == [0, 10, 20, 30]


# --------------------------------------------------------------------------------------------------
# A run in a process of its own


def train_in_a_terminal() -> int:
    """Train in the terminal of the command line; each step first waits for the file `gate`."""
    os.setsid()
    opened = os.open(sys.argv.pop(1), os.O_RDWR)  # closing the window sends SIGHUP here
    for stream in range(3):
        os.dup2(opened, stream)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started under nohup
    make_step = TrainStep.__call__

    def wait_and_step(self, *args):
        while not Path("gate").exists():
            time.sleep(0.01)
        make_step(self, *args)

    pytest.MonkeyPatch().setattr("train.TrainStep.__call__", wait_and_step)
    return train.main()


def test_a_run_whose_terminal_is_closed_saves_and_ends():
    """The window is closed before the first step, which the gate holds back until then."""
    pytest.importorskip("termios")
    window, theirs = os.openpty()
    process = start(train_in_a_terminal, os.ttyname(theirs), *TINY, "--max_iters=3")
    shown = b""
    while b"step 0: train loss" not in shown:
        shown += os.read(window, 4096)
    os.close(theirs)
    os.close(window)  # sends SIGHUP
    Path("gate").touch()
    assert process.end()[0] == 129
    assert trainer()["step"] == 1


def test_a_run_saves_when_ctrl_c_also_ends_the_reader_of_its_log(tmp_path):
    """`python train.py | tee log`: the terminal interrupts both, and nobody reads what follows."""
    process = start(train.main, *TINY, *ENDLESS, errors=tmp_path / "errors")
    assert any(line.startswith("step 12:") for line in process.stdout), "it ended before"
    process.stdout.close()
    process.send(signal.SIGINT)
    assert process.end()[0] == 130
    assert (tmp_path / "errors").read_text() == ""
    assert trainer()["step"] >= 12


def train_without_output() -> int:
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None
    return train.main()


def test_a_run_without_output_saves_all():
    end_well([start(train_without_output, *TINY, "--max_iters=2")])
    assert trainer()["step"] == 2
