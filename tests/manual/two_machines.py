"""Train on two machines, lose one of them and then the other, and see that nothing is lost.

    python -m tests.manual.two_machines      # about a minute on an idle machine

The machines are two clones of the working tree in a temporary folder, each with a torchrun agent of
its own that is told to wait for the other on the loopback address.

1. The second machine is lost: its agent and its process get SIGKILL. Its agent is started again, by
   the same command. torchrun then starts the process of the first machine again, too, and the run
   goes on from the last/ of the first machine.
2. The first machine is lost, which holds the run's folder and the agents' meeting place. torchrun
   ends the agent of the other one. Both are started again, by the same commands.

In the end the losses of all steps must be those of one process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.helpers import TINY, changed_copy, losses, trainer

os.environ["OMP_NUM_THREADS"] = "1"  # for all processes

OPTIONS = [
    *TINY,
    *"--dataset=letters.txt --tokenizer=char --out_dir=out --init_from=auto".split(),
    *"--max_iters=150 --eval_interval=50 --save_interval_s=0".split(),
]
LIMIT_S = 300  # for all that is waited for


class Machine:
    """A clone of the working tree with a torchrun agent."""

    def __init__(self, folder: Path, port: int):
        """port: where the agents meet."""
        self.folder = changed_copy(folder, None)
        self.log = folder.with_suffix(".log")
        self.port = port
        meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=run"]
        restarts = ["--nnodes=2", "--max_restarts=3"]
        agent = [sys.executable, "-m", "torch.distributed.run", *restarts, *meeting]
        self.argv = [*agent, "train.py", *OPTIONS]
        letters = np.cumsum(np.random.default_rng(0).integers(1, 4, 4000)) % 13
        text = "".join("abcdefghijklm"[i] for i in letters)
        (self.folder / "letters.txt").write_text(text)

    def start(self) -> None:
        """Start the agent."""
        # Else torch 2.13's agent does not tell one that comes later where to meet.
        own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.log, "a") as log:
            self.agent = subprocess.Popen(
                self.argv, cwd=self.folder, env=os.environ | own_store, stdout=log, stderr=log
            )

    def lose(self) -> None:
        """Kill the agent and its process at once, if it runs."""
        if self.agent.poll() is not None:
            return
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text()
        for pid in (self.agent.pid, *map(int, children.split())):
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()


def step_of(machine: Machine) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    try:
        return trainer(machine.folder / "out")["step"]
    except OSError:  # none yet, or it is being replaced
        return 0


def wait_for_step(machine: Machine, step: int) -> None:
    """Wait until the run has saved this step. Raises AssertionError if it takes too long."""
    end = time.monotonic() + LIMIT_S
    while step_of(machine) < step:
        assert time.monotonic() < end, f"no step {step}: {machine.log.read_text()}"
        time.sleep(0.02)


def lose_both(first: Machine, second: Machine) -> str:
    """Lose one machine and then the other. Return what the first says on resuming."""
    start_both(first, second)
    wait_for_step(first, 20)
    second.lose()
    print(f"the second machine is lost after step {step_of(first)}", flush=True)
    second.start()
    wait_for_step(first, 80)
    first.lose()
    print(f"the first machine is lost after step {step_of(first)}", flush=True)
    second.agent.wait(LIMIT_S)
    start_both(first, second)
    for machine in (first, second):
        assert machine.agent.wait(LIMIT_S) == 0, machine.log.read_text()
    said = first.log.read_text().splitlines()
    return "; ".join(line for line in said if line.startswith("resuming"))


def start_both(first: Machine, second: Machine) -> None:
    """Start both agents. The first one is where they meet, as if the other could not be it."""
    first.start()
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", first.port)).close()
            break
        time.sleep(0.1)
    second.start()


def main() -> int:
    if not Path("/proc/self/task").exists():
        print("skipped: the processes of an agent are found in Linux' /proc")
        return 0
    began = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        first, second = (Machine(Path(name) / which, port) for which in ("first", "second"))
        try:
            told = lose_both(first, second)
        finally:
            for machine in (first, second):
                machine.lose()
        alone = [sys.executable, "train.py", *OPTIONS, "--out_dir=alone"]
        subprocess.run(alone, cwd=first.folder, check=True, capture_output=True)
        two, one = losses(first.folder / "out"), losses(first.folder / "alone")
        assert list(two) == list(one), "steps are missing"
        apart = max(abs(two[step] - one[step]) for step in one)
        print(f"{told}; {len(one)} losses, at most {apart:.1e} from those of one process")
        print(f"seconds {time.perf_counter() - began:.0f}")
        return 0 if apart < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
