"""gpt12/clock.py: only training counts. The clock of these tests moves when they say so."""

from types import SimpleNamespace

import pytest
import torch

import train
from gpt12.clock import Clock
from gpt12.device import Machine
from gpt12.saver import Saver
from tests.helpers import CPU, losses, run
from train import TrainStep


class Time:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 100.0

    def read(self) -> float:
        return self.now

    def taking(self, seconds, function):
        """Return a function that does the same and takes so long."""

        def call(*args, **options):
            self.now += seconds
            return function(*args, **options)

        return call


@pytest.fixture
def time(monkeypatch) -> Time:
    found = Time()
    module = SimpleNamespace(perf_counter=found.read, monotonic=found.read)
    monkeypatch.setattr("gpt12.clock.time", module)
    monkeypatch.setattr("gpt12.saver.time", module)
    return found


def test_seconds_and_steps_count_only_while_the_clock_runs(time):
    clock = Clock(CPU, total=5.0)
    clock.count_step()
    time.now += 1
    assert clock.steps_per_second() is None
    clock.start()
    assert clock.running
    for _ in range(3):
        time.now += 2
        clock.count_step()
    assert clock.steps_per_second() == 0.5
    assert clock.steps_per_second() is None  # no step since then
    clock.stop()
    time.now += 100
    clock.stop()
    assert not clock.running
    assert clock.total == 11.0


def test_the_speed_leaves_out_what_happened_while_the_clock_stood(time):
    clock = Clock(CPU, total=0.0)
    clock.start()
    time.now += 1
    clock.count_step()
    clock.stop()
    time.now += 50
    clock.start()
    time.now += 1
    clock.count_step()
    assert clock.steps_per_second() == 1.0


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_starting_and_stopping_wait_for_the_device(time, monkeypatch, kind):
    waited = []
    monkeypatch.setattr(f"torch.{kind}.synchronize", lambda: waited.append(kind))
    clock = Clock(Machine(torch.device(kind), torch.float32, compiled=False), total=0.0)
    clock.start()
    clock.stop()
    assert waited == [kind, kind]


@pytest.mark.usefixtures("no_picture")
def test_a_run_counts_neither_compiling_nor_evaluations_nor_saves(
    dataset, tmp_path, monkeypatch, time
):
    """A step takes a second, an evaluation 100, a checkpoint 1,000. The first step compiles."""
    monkeypatch.setattr(TrainStep, "__call__", time.taking(1, TrainStep.__call__))
    monkeypatch.setattr(train, "mean_loss", time.taking(100, train.mean_loss))
    monkeypatch.setattr(Saver, "_write", time.taking(1000, Saver._write))
    options = ["--max_iters=6", "--eval_interval=3", "--save_interval_s=2"]
    assert run(dataset, tmp_path, *options, "--always_save_checkpoint=False") == 0
    assert losses(tmp_path, "elapsed_s") == {0: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    speed = 2 * 4 * 16  # tokens in a step
    assert losses(tmp_path, "tokens_per_s") == {1: None} | dict.fromkeys(range(2, 7), speed)
