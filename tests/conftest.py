"""What all tests share: no network, one thread, hypothesis profiles, the mark `gpu`, fixtures."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Models this small are slower on two threads than on one, all the more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hugging Face's libraries read this when they are imported. No test may depend on the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

# Runs wait for the disk in each of their saves. All tests together write 0.1 GB.
MEMORY = Path("/dev/shm")
if MEMORY.exists() and shutil.disk_usage(MEMORY).free > 1e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# HYPOTHESIS_PROFILE=long is the slow search, for before a release. Neither profile looks at the
# clock: on a busy machine a deadline, or the check that data come fast enough, would fail by
# chance.
NO_CLOCK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", NO_CLOCK, max_examples=300, derandomize=True, database=None)
settings.register_profile("long", NO_CLOCK, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A job in the background of a script inherits an ignored Ctrl-C, and so would every process that a
# test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none; leave out `changes` unless -m says it."""
    if "changes" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("changes")]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    for item in marked:
        item.add_marker(pytest.mark.xdist_group("gpu"))
    import torch  # slow to import, so only where a test asks for it

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restore the signal handlers, which a run that dies in a test leaves behind."""
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give a test that sets no seed the same random numbers in any order of the tests."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forgetful_twin() -> Iterator[None]:
    """Forget what a changed model computes, once the test that changes it is over."""
    yield
    twin = sys.modules.get("gpt12.twin")
    if twin is not None:
        twin.examine.cache_clear()
        sys.modules["model"].meta_model.cache_clear()


@pytest.fixture
def fresh_compiler() -> None:
    """Let torch forget what it compiled in earlier tests.

    It compiles a function for at most 8 kinds of arguments in a process; then it runs it as it is.
    """
    import torch

    torch.compiler.reset()


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not draw loss.png, which takes thrice as long as a tiny run. The mark `picture` draws."""
    if "gpt12.log" in sys.modules and not request.node.get_closest_marker("picture"):
        monkeypatch.setattr("gpt12.log.draw_losses", lambda *arguments: None)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files follow the rules of Windows (tests/windows_rules.py)."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("what is open and mapped is read from Linux' /proc")
    from tests.windows_rules import enforce

    enforce(monkeypatch)


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let texts be prepared into a folder of the test's own, and not into data/cache/."""
    monkeypatch.setattr("data.dataset.DATA", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return a random GPT-2 of `transformers`, and the folder that it was saved in."""
    from tests.models import random_transformers_model

    model = random_transformers_model()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def batch() -> Any:
    """Return inputs and targets for the model of `theirs`."""
    from tests.models import random_batch

    return random_batch()


@pytest.fixture(scope="session")
def gpt2() -> Any:
    """Return GPT-2's tokenizer. Skip where its files are neither cached nor on the network."""
    from data.tokenizers import get_tokenizer
    from gpt12.errors import UserError

    try:
        return get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny data set of tests/helpers.py. A test that changes a file copies it first."""
    from tests.helpers import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "letters")


@pytest.fixture(scope="session")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of four steps. A test that changes it takes finished_copy."""
    from tests.helpers import run

    out_dir = tmp_path_factory.mktemp("finished") / "out"
    places = [f"--dataset={dataset}", f"--out_dir={out_dir}"]
    run(*places, "--max_iters=4", "--eval_interval=2")
    return out_dir


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in tmp_path, an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_folder(dataset: Path, here: None) -> None:
    """Work in a folder with a copy of the tiny data set in letters/, so that runs are in out/."""
    shutil.copytree(dataset, "letters")


@pytest.fixture
def finished_copy(finished: Path, own_folder: None) -> None:
    """Let out/ be a copy of the run of four steps."""
    shutil.copytree(finished, "out")
