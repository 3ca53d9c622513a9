"""gpt12/device.py: what "auto" becomes, on machines that are acted where they are not there."""

import math
import os
from unittest.mock import Mock

import pytest
import torch

from gpt12 import device
from gpt12.device import COMPILE_THREADS, CUDA_WHEELS, Machine, open_machine
from gpt12.memory import COMPILED_GPU, GIB
from tests.helpers import CPU as ON_CPU
from tests.helpers import let_answer, refused

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU."""
    answers = {
        "torch.cuda.is_available": False,
        "torch.backends.mps.is_available": False,
        "gpt12.device.shutil.which": None,
        "gpt12.device.Path.exists": False,
    }
    let_answer(monkeypatch, answers)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs that have bfloat16 and a compiler that works."""
    answers = {
        "torch.cuda.is_available": True,
        "torch.cuda.get_device_name": "Some Card",
        "torch.cuda.device_count": 2,
        "torch.cuda.set_device": None,
        "torch.cuda.is_bf16_supported": True,
        "torch.empty": None,
        "gpt12.device._try_compiler": "",
    }
    let_answer(monkeypatch, answers)
    monkeypatch.setenv(COMPILE_THREADS, "1")  # open_machine sets it, and this takes it back


def test_auto_on_a_cpu_is_float32_and_not_compiled_and_says_why(no_gpu):
    machine = open_machine("auto", "auto", "auto")
    assert (machine.device, machine.dtype, machine.compiled) == (CPU, torch.float32, False)
    assert machine.notes == [
        "device: cpu",
        "compile: off, because on this device compiling takes longer than it saves",
    ]


def test_auto_on_a_gpu_is_cuda_bfloat16_and_compiled_if_there_is_work(two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    machine = open_machine("auto", "auto", "auto")
    assert machine.device == torch.device("cuda", 1)
    assert machine.dtype == torch.bfloat16
    assert (machine.compiled, machine.rank, machine.world) == (True, 1, 3)
    assert machine.notes == ["device: cuda (Some Card)", "dtype: bfloat16"]
    short = open_machine("cuda", "bfloat16", "auto", long=False)
    assert not short.compiled
    assert short.notes == ["compile: off, because for so little work it takes longer than it saves"]
    assert open_machine("cuda", "bfloat16", True, long=False).compiled  # asked for


@pytest.mark.parametrize(("in_hardware", "dtype"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_takes_bfloat16_only_where_it_has_it_in_hardware(monkeypatch, in_hardware, dtype):
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported",
        lambda including_emulation: in_hardware or including_emulation,
    )
    notes: list[str] = []
    assert device._best_dtype(CUDA, notes) == getattr(torch, dtype)
    assert notes[0].startswith(f"dtype: {dtype}")


@pytest.mark.parametrize("built_for", [None, "13.0"])
def test_an_nvidia_card_that_torch_cannot_use_is_reported_with_the_line_that_fixes_it(
    no_gpu, monkeypatch, built_for
):
    monkeypatch.setattr("gpt12.device.shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("torch.version.cuda", built_for)
    notes = open_machine("auto", "auto", False).notes
    assert notes[0].startswith("device: cpu, although there is an NVIDIA card.")
    assert f"pip install --force-reinstall torch --index-url {CUDA_WHEELS}" in notes[0]
    assert ("built without CUDA" in notes[0]) == (built_for is None)
    message = "device=cuda cannot be used: This torch .*--device=cpu"
    refused(message, open_machine, "cuda", "auto", False)


def test_an_apple_gpu_that_is_not_there_is_refused(no_gpu):
    message = "device=mps cannot be used: .* Or pass --device=cpu"
    refused(message, open_machine, "mps", "auto", False)


def test_a_gpu_that_fails_at_its_first_tensor_is_refused(two_gpus, monkeypatch):
    error = RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore lines")
    monkeypatch.setattr("torch.empty", Mock(side_effect=error))
    message = r"device=cuda:1 cannot be used: RuntimeError: CUDA error: .* are busy\. Or pass"
    refused(message, open_machine, "cuda:1", "auto", False)


def test_a_compiler_that_fails_is_told_and_refused_where_it_was_asked_for(two_gpus, monkeypatch):
    monkeypatch.setattr("gpt12.device._try_compiler", lambda place: "there is no compiler")
    machine = open_machine("cuda", "bfloat16", "auto")
    assert not machine.compiled
    assert machine.notes == ["compile: off, because there is no compiler"]
    message = "compile=True, but there is no compiler. Pass --compile=False"
    refused(message, open_machine, "cuda", "bfloat16", True)


def test_whatever_the_compiler_raises_becomes_one_line(monkeypatch):
    error = OSError("no C++ compiler\nmore lines")
    monkeypatch.setattr("torch.compile", Mock(side_effect=error))
    assert device._try_compiler(CPU) == "torch.compile fails here: OSError: no C++ compiler"


def test_kernels_of_a_gpu_are_compiled_in_this_process_unless_the_user_says_otherwise(
    two_gpus, monkeypatch
):
    """torch waits at the end of a program for its pool of compiling processes to start."""
    monkeypatch.setenv(COMPILE_THREADS, "4")
    open_machine("cuda", "bfloat16", True)
    assert os.environ[COMPILE_THREADS] == "4"
    monkeypatch.delenv(COMPILE_THREADS)
    open_machine("cpu", "float32", True)
    assert COMPILE_THREADS not in os.environ
    open_machine("cuda", "bfloat16", True)
    assert os.environ[COMPILE_THREADS] == "1"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_have_the_lower_precision_under_autocast_and_weights_stay_float32(dtype):
    layer = torch.nn.Linear(4, 4)
    with Machine(CPU, dtype, compiled=False).autocast():
        assert layer(torch.ones(1, 4)).dtype == dtype
    with Machine(CPU, torch.float32, compiled=False).autocast():
        assert layer(torch.ones(1, 4)).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Memory of the machine


def test_memory_that_this_process_holds_counts_as_free_and_a_cap_counts(monkeypatch):
    for share, usable in ((1.0, 5.0), (0.25, 3.0)):
        answers = {
            "torch.cuda.mem_get_info": (3 * GIB, 12 * GIB),
            "torch.cuda.memory_reserved": 2 * GIB,
            "torch.cuda.get_per_process_memory_fraction": share,
        }
        let_answer(monkeypatch, answers)
        assert device.available_memory(COMPILED_GPU) == usable * GIB


@pytest.mark.parametrize(
    ("limit_file", "used_file", "limit", "available"),
    [
        ("none", "none", "", 2 + 7),
        ("memory.max", "memory.current", "1000000", 5),
        ("memory.max", "memory.current", "max", 2 + 7),
    ],
)
def test_free_ram_and_what_the_process_holds_are_available_up_to_a_containers_limit(
    monkeypatch, tmp_path, limit_file, used_file, limit, available
):
    """Files as Linux shows them, with a cgroup of version 2. Unused pages of files are free."""
    cgroups = tmp_path / "sys/fs/cgroup"
    contents = {
        tmp_path / "proc/meminfo": "MemTotal: 12 kB\nMemAvailable: 7 kB\n",
        tmp_path / "proc/self/status": "VmRSS:\t2 kB\n",
        cgroups / limit_file: limit,
        cgroups / used_file: "997952",
        (cgroups / limit_file).parent / "memory.stat": "file 9999\ninactive_file 1024\n",
    }
    for file, content in contents.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    monkeypatch.setattr("gpt12.device.ROOT", tmp_path)
    assert device.available_memory(ON_CPU) == available * 1024


def test_a_system_that_does_not_tell_its_free_ram_counts_as_unlimited(monkeypatch, tmp_path):
    monkeypatch.setattr("gpt12.device.ROOT", tmp_path)
    assert device.available_memory(ON_CPU) == math.inf
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 12 kB\n")
    assert device.available_memory(ON_CPU) == math.inf
