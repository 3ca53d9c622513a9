"""Write a run's checkpoints best/ and last/, and tell when last/ is due again.

Trainer in train.py calls this: evaluate, train and finish say when.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from gpt12.checkpoint import locate_checkpoint, save_checkpoint
from gpt12.lora import save_adapter
from gpt12.run import Run
from gpt12.run_folder import is_run
from gpt12.trainer_state import TrainerState, save_trainer_state, state_bytes
from gpt12.weights import save_pretrained


class Saver:
    """Saves a run. All ranks call it; rank 0 writes."""

    def __init__(self, run: Run, state: TrainerState, say: Callable[[str], None]):
        """state: what resuming needs besides the weights. say: prints a line."""
        self.run = run
        self.state = state
        self.say = say
        self.timer = SaveTimer(run.config.save_interval_s, self.size_of("last"))
        # What last/ holds, as _how_far() tells it. -1 stands for nothing.
        self.last_holds = self._how_far() if run.request.resumed else (-1, -1)
        self.adapter_note_shown = False

    def save(self, name: str) -> bool:
        """Write the checkpoint "best" or "last" and tell whether that worked.

        If it did not, the older checkpoint stays and training can go on.
        """
        began = time.perf_counter()
        saved = self._write(name)
        if name == "last":
            self.timer.saved(time.perf_counter() - began)
            if saved:
                self.last_holds = self._how_far()
        return saved

    def is_saved(self) -> bool:
        """Tell whether last/ holds all that was trained and evaluated."""
        return self.last_holds == self._how_far()

    def _how_far(self) -> tuple[int, int]:
        """Return the number of finished steps, and the step of the last evaluation."""
        return self.run.progress.step, self.run.progress.evaluated_step

    def _write(self, name: str) -> bool:
        folder = self.run.out_dir / name
        finite = torch.stack([p.isfinite().all() for p in self.run.model.parameters()])
        if not finite.all():
            self.say(f"not saving {folder}: weights are not finite. Try a lower learning_rate")
            return False
        if self.run.machine.rank != 0:
            return True
        write_files = self._write_best if name == "best" else self._write_last
        try:
            save_checkpoint(folder, write_files, self.run.progress, self.size_of(name))
        except OSError as error:
            self.say(
                f"could not save {folder}: {error}. What was there before is untouched; make room"
            )
            return False
        return True

    def _write_best(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder; for LoRA also the adapter alone."""
        self._write_model(folder)
        if self.run.config.lora_rank:
            note = save_adapter(self.run.model, folder / "adapter", self._base_of_adapters())
            if note is not None and not self.adapter_note_shown:
                self.adapter_note_shown = True
                self.say(note)

    def _base_of_adapters(self) -> str:
        """Return the folder or hub name from which the adapters' base weights were read.

        If init_from is a run, that is one of its checkpoints.
        """
        init_from = self.run.config.init_from
        checkpoint = None
        if is_run(Path(init_from)):
            checkpoint = locate_checkpoint(Path(init_from), ("best", "last"))
        return init_from if checkpoint is None else str(checkpoint)

    def _write_last(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder, and what resuming needs.

        A resumed LoRA run does not read this model, whose adapters are merged: it starts from its
        base model and the adapters among the trainer's state.
        """
        self._write_model(folder)
        save_trainer_state(folder, self.state)

    def _write_model(self, folder: Path) -> None:
        """Write weights, config.json and the tokenizer's files. LoRA's adapters are merged in."""
        tokenizer = self.run.dataset.tokenizer
        end_of_text = None if tokenizer is None else tokenizer.eot
        save_pretrained(self.run.model, folder, eot=end_of_text)
        if tokenizer is not None:
            tokenizer.save(folder, context=self.run.model.config.block_size)

    def size_of(self, name: str) -> int:
        """Return about how many bytes the checkpoint "best" or "last" takes."""
        size = 0
        for parameter_name, parameter in self.run.model.named_parameters():
            if "lora_" not in parameter_name:
                # LoRA's merged weights are written in float32.
                bytes_each = 4 if self.run.config.lora_rank else parameter.element_size()
                size += bytes_each * parameter.numel()
        if name == "last":
            size += state_bytes(self.state)
        return size


class SaveTimer:
    """Decides when last/ is due: save_interval_s seconds after the last save, or "auto".

    "auto" spends about 1% of the time on saving: the interval is 100 times what a save takes.
    Whatever a save costs, the interval is at least five seconds. It is at most one minute in the
    first ten minutes of a run, and at most ten minutes after that.
    """

    SHORTEST = 5.0
    AT_FIRST = 600.0  # LONGEST_AT_FIRST holds for this many seconds
    LONGEST_AT_FIRST = 60.0
    LONGEST = 600.0
    BYTES_PER_SECOND = 1e9  # a guess at the disk's speed, until a save has been measured

    def __init__(self, interval: float | str, size: int):
        """size: bytes of a checkpoint."""
        self.interval = interval
        self.cost = size / self.BYTES_PER_SECOND  # seconds of one save
        self.started = time.monotonic()
        self.last = self.started

    def is_due(self) -> bool:
        """Tell whether it is time to save."""
        now = time.monotonic()
        return now - self.last >= self._interval(now - self.started)

    def _interval(self, running: float) -> float:
        """Return the seconds between two saves, `running` seconds after the start."""
        if not isinstance(self.interval, str):
            return self.interval
        longest = self.LONGEST_AT_FIRST if running < self.AT_FIRST else self.LONGEST
        return min(longest, max(self.SHORTEST, 100 * self.cost))

    def saved(self, seconds: float) -> None:
        """Record that a save has just ended; it took `seconds`."""
        self.last = time.monotonic()
        self.cost = seconds
