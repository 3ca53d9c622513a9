"""What all tests share: no network, one thread, how long hypothesis searches, the mark `gpu`, and the tiny data set."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Models this small are slower on two threads than on one, and another process on the machine makes it worse.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hugging Face's libraries read this as they are imported. No test may depend on what the hub answers.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

# HYPOTHESIS_PROFILE=long is the slow search, for before a release. Neither profile looks at the clock: on a busy machine
# a deadline, or the check that data come fast enough, would fail by chance.
NO_CLOCK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", NO_CLOCK, max_examples=300, derandomize=True, database=None)
settings.register_profile("long", NO_CLOCK, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A job in the background of a script inherits an ignored Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # slow to import, so only where a test asks for it

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """train.main, run in-process and killed in a test, leaves its handlers behind: give pytest its own back."""
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that draws random numbers without a seed gets the same ones in any order of the tests."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """loss.png is not drawn, which takes as long as a tiny run. A test with the mark `picture` gets it all the same."""
    import train

    if not request.node.get_closest_marker("picture"):
        monkeypatch.setattr(train.run_folder, "draw_losses", lambda rows, file: None)


@pytest.fixture(scope="session")
def gpt2() -> Any:
    """GPT-2's tokenizer. Its files are in the cache or come from the network; a machine that has neither skips the test."""
    from gpt12.errors import UserError
    from data.tokenizers import get_tokenizer

    try:
        return get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set of tests/helpers.py. A test that changes a file copies the folder first."""
    from tests.helpers import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "letters")
