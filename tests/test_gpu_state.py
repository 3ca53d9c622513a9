"""What is said about a GPU's state, with torch and the driver made up."""

from types import SimpleNamespace

import pytest
import torch

from gpt12.errors import UserError
from gpt12.gpu_state import imitate_card, read_gpu_state
from tests.bench_helpers import CPU, fake_gpu_memory

GIB = 2**30
STEADY = [10.0] * 20
FINE = "575.57, 2610, 3105, 284.9, 0x0000000000000004"
TOO_HOT = "575.57, 1005, 3105, 90.0, 0x0000000000000020"


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU has 11.7 GiB, of which torch holds 0.5."""
    fake_gpu_memory(monkeypatch, 11.7)
    held = {"memory_reserved": 0.5, "max_memory_reserved": 0.5, "max_memory_allocated": 0.25}
    for name, gib in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda gib=gib: int(gib * GIB))
    return SimpleNamespace(on_gpu=True, world=1)


def answer(text):
    """nvidia-smi's process after it has printed this."""
    return SimpleNamespace(communicate=lambda: (text, ""))


def test_memory_and_clock_are_reported(gpu):
    state = read_gpu_state(gpu, STEADY, answer(FINE))
    assert state.warnings == []
    assert (state.peak_gib, state.reserved_gib) == (0.25, 0.5)
    assert state.total_gib == pytest.approx(11.7)
    assert state.driver["driver_version"] == "575.57"
    assert state.driver["clocks.sm"] == "2610"


def test_without_nvidia_smi_the_rest_is_reported(gpu):
    assert read_gpu_state(gpu, STEADY, None).driver == {}
    for text in ("", "N/A, N/A, N/A, N/A, N/A"):
        assert read_gpu_state(gpu, STEADY, answer(text)).warnings == []


def test_steps_that_become_slower_are_a_warning(gpu):
    (warning,) = read_gpu_state(gpu, [10.0] * 15 + [13.0] * 5, answer(FINE)).warnings
    assert "30% slower" in warning


def test_a_clock_held_because_of_heat_is_a_warning(gpu):
    (warning,) = read_gpu_state(gpu, STEADY, answer(TOO_HOT)).warnings
    assert "1005 MHz" in warning


def test_memory_of_other_programs_is_a_warning(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: -3 * GIB)  # 3 GiB more in use
    (warning,) = read_gpu_state(gpu, STEADY, None).warnings
    assert "other programs hold 3.2 GiB" in warning
    gpu.world = 2  # then the other ranks' memory would look like other programs'
    assert read_gpu_state(gpu, STEADY, None).warnings == []


def test_more_memory_than_the_card_has_is_a_warning(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 12 * GIB)
    (warning,) = read_gpu_state(gpu, STEADY, None).warnings
    assert "spills" in warning


def test_a_cpu_has_no_state():
    state = read_gpu_state(CPU, STEADY, None)
    assert (state.peak_gib, state.driver, state.warnings) == (None, {}, [])


def test_a_card_is_imitated_by_a_limit_on_torchs_allocator(gpu, monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    imitate_card(8, gpu)
    assert shares == [pytest.approx(7 / 11.7)]
    for impossible in (0.5, 24):
        with pytest.raises(UserError, match="cannot be imitated on a card of 11.7 GiB"):
            imitate_card(impossible, gpu)
    with pytest.raises(UserError, match="vram_gb=12 limits a GPU's memory"):
        imitate_card(12, CPU)
