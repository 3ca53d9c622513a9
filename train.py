"""Train or fine-tune a GPT: optimizer, learning rate, one update, evaluation, and the loop.

    python train.py                                          # tiny Shakespeare
    python train.py config/train_gpt2.py --batch_size=8      # a preset, and a changed key
    python train.py --init_from=resume --out_dir=out         # continue a run
    torchrun --nproc_per_node=2 train.py config/...          # one process per GPU

The file reads from top to bottom: the parameter groups, the learning rate, TrainStep (one
update), mean_loss (evaluation), Trainer (the loop), the commands.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt12.errors import UserError, ran_out_of_memory, require_packages, run_main, say

require_packages()
# Before torch is imported: let memory segments grow, so that less is lost to gaps between them.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.windows import NOT_TRAINED, EvalWindows, TrainWindows
from gpt12.check import check_model, check_start
from gpt12.checkpoint import Saver, load_trainer_state
from gpt12.device import Machine, open_machine, record
from gpt12.distributed import (
    StopSignal,
    data_parallel,
    is_lost_rank,
    least_of_ranks,
    lost_rank_advice,
    process_group,
    reported_by_rank_0,
)
from gpt12.fit import ADVICE, fit, tenth_is_free
from gpt12.introduction import introduction
from gpt12.log import RunLog, perplexity
from gpt12.optimizer import OPTIMIZERS, set_learning_rate, update_all
from gpt12.run import (
    Run,
    build_run,
    is_complete,
    lock_out_dir,
    read_request,
    refuse_unread_keys,
    schedule_jumps,
)
from gpt12.settings import CONTEXT_PARTS, TrainConfig, model_shape
from model import GPT, GPTConfig, StackedLinear

# The run stops after so many updates in a row whose loss or gradient is not finite.
MAX_BAD_STEPS = 20
# A CUDA graph of more layers than this, over all micro-batches, would have over 50,000 kernels.
MAX_GRAPH_LAYERS = 1000

# --------------------------------------------------------------------------------------------------
# Optimizer and learning rate


def parameter_groups(model: GPT, weight_decay: float) -> list[dict[str, Any]]:
    """Split what is trained: matrices and embeddings decay, biases and LayerNorms do not.

    Radford et al. 2018, GPT, section 4.1. The matrices of the blocks' linear layers, for which Muon
    is made, are groups of their own. "stacked" is the number of matrices that lie in one weight.
    """
    blocks: dict[int, list[nn.Parameter]] = {}
    taken: set[nn.Parameter] = set()  # two modules may share a matrix
    for module in model.transformer.h.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.get_parameter("weight")
        if weight.requires_grad and weight not in taken:
            taken.add(weight)
            stacked = module.layers if isinstance(module, StackedLinear) else 1
            blocks.setdefault(stacked, []).append(weight)
    groups: list[dict[str, Any]] = []
    for stacked, matrices in blocks.items():
        groups.append({"params": matrices, "weight_decay": weight_decay, "stacked": stacked})
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    groups.append({"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay})
    groups.append({"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of the next update, when `step` updates are finished.

    schedule=cosine: linear warm-up, then half a cosine to min_lr at lr_decay_iters (Loshchilov and
    Hutter 2016, arXiv:1608.03983, equation 5). schedule=wsd: warm-up, a plateau, then linear to
    min_lr over the last `decay_fraction` of the steps after the warm-up (Haegele et al. 2024,
    arXiv:2405.18392, section 3).

    warmup_iters and min_lr that nobody set depend on other keys: gpt12/run.py's resolve() has
    decided them before.
    """
    if not config.decay_lr:
        return config.learning_rate
    warmup = config.warmup_iters
    end = config.decay_end
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if step >= end:
        return config.min_lr
    if config.schedule == "wsd":
        decay_steps = max(1, config.decay_fraction * (end - warmup))
        height = min(1.0, (end - step) / decay_steps)  # 1: learning_rate, 0: min_lr
    else:
        height = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (end - warmup))
    return config.min_lr + height * (config.learning_rate - config.min_lr)


def context_of_step(step: int, config: TrainConfig) -> int:
    """Return how many tokens attention sees at once in the update that follows `step` updates.

    The first steps may cut each window into CONTEXT_PARTS parts: a model learns from near words
    first (sequence length warm-up, Li et al. 2022, arXiv:2108.06084). Positions continue from
    part to part, so that all of them are trained from the start.
    """
    short = step < config.short_context_steps
    return config.block_size // CONTEXT_PARTS if short else config.block_size


def seed_of_step(seed: int, rank: int, step: int) -> int:
    """Return the seed of what a rank draws in the update that follows `step` updates."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])


# --------------------------------------------------------------------------------------------------
# One update


def use_graph_for_training(config: TrainConfig, n_layer: int, machine: Machine) -> bool:
    """Decide whether the training step is recorded.

    Not possible with several ranks, with float16 (its loss scale lives on the host), with an
    optimizer that asks the device for values, and with recomputation under dropout (torch then asks
    the host for the generator's state).
    """
    if not machine.on_gpu or machine.world > 1 or machine.dtype == torch.float16:
        return False
    if not OPTIMIZERS[config.optimizer].recordable:
        return False
    if config.recompute != "none" and config.dropout > 0:
        return False
    return config.gradient_accumulation_steps * n_layer <= MAX_GRAPH_LAYERS


class TrainStep:
    """One update of the weights: all gradients, their norm, then the optimizers' steps.

    load() brings the windows of a step to the device. Then a call makes the update:

    1. accumulate_gradients: for each micro-batch, forward under autocast, then backward.
    2. update_weights: the gradients' norm, whether to skip, and the optimizers' steps.

    The host does not wait for the device, if the optimizer clips and skips there (Entry.on_device
    in gpt12/optimizer.py). The results are tensors on the device:
        loss        mean over the targets of the step, in nats per token
        grad_norm   norm of all gradients before clipping
        bad         how many updates in a row, ending with the latest, were skipped as not finite
        skipped     number of updates skipped so far; each counts as a step
    On a GPU, a small step on plain text is recorded as a CUDA graph in its fourth call and replayed
    from then on. bench.py measures this object.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        machine: Machine,
        packed: bool = False,
        cuda_graph: bool = True,
    ):
        """model: on the device. config: dtype is no longer "auto".

        packed: a window holds several examples, which self.example_starts tells apart.
        cuda_graph: record the step if that is possible and pays off.
        """
        self.model = model
        self.config = config
        self.machine = machine
        self.forward: Any = data_parallel(model, machine.world, machine.device)
        kind = OPTIMIZERS[config.optimizer]
        self.on_device = kind.on_device and machine.device.type != "mps"
        rate: Tensor | float = float(config.learning_rate)
        if self.on_device:  # a CUDA graph reads the rate from this tensor
            rate = torch.tensor(rate, device=machine.device)
        groups = parameter_groups(model, config.weight_decay)
        self.optimizers = kind.build(groups, rate, (config.beta1, config.beta2))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Small gradients would be 0 in float16: the loss is scaled up, the gradients down again.
        half = machine.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=half)

        self.micro_steps = config.gradient_accumulation_steps // machine.world
        shape = (3 if packed else 2, self.micro_steps, config.batch_size, config.block_size)
        # Inputs, targets, and which examples begin where: three of (micro-steps, B, T).
        self.batch = torch.zeros(shape, dtype=torch.int64, device=machine.device)
        self.x = self.batch[0]
        self.y = self.batch[1]
        self.example_starts = self.batch[2] if packed else None
        # How many positions of each micro-batch are targets: of plain text all.
        self.targets_per_batch = [self.x[0].numel()] * self.micro_steps
        self.context_length = config.block_size  # tokens that attention sees at once
        self.divisor = torch.ones((), device=machine.device)
        # 1.0 if no rank has a target in this step: momentum must not move the weights then.
        self.without_target = torch.zeros((), device=machine.device)

        self.results = torch.zeros(4, device=machine.device)
        self.loss, self.grad_norm, self.bad, self.skipped = self.results  # views

        self.calls = 0
        self.use_graph = (
            cuda_graph
            and not packed
            and use_graph_for_training(config, model.config.n_layer, machine)
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warmup_calls = 4 if self.use_graph else 1  # then all is compiled and recorded

    @functools.cached_property
    def on_host(self) -> Tensor:
        """Return the batch in page-locked memory, which a GPU can copy without the host's help."""
        on_gpu = self.machine.on_gpu
        return torch.zeros(self.batch.shape, dtype=torch.int64, pin_memory=on_gpu)

    @functools.cached_property
    def copied(self) -> torch.cuda.Event | None:
        """Return what tells that a copy is over. Other devices than CUDA's finish it in copy_()."""
        return torch.cuda.Event() if self.machine.on_gpu else None

    def load(self, windows: TrainWindows, position: int) -> None:
        """Load the windows of the step that begins at `position`.

        Micro-batch m of a step belongs to rank m % world, so a step has the same windows with any
        number of ranks. A GPU may still be computing the previous step: the copy waits behind it,
        and the host goes on.
        """
        if self.copied is not None:
            self.copied.synchronize()  # the GPU may still be reading the host's arrays
        batch_size = self.config.batch_size
        for m in range(self.micro_steps):
            micro_batch = m * self.machine.world + self.machine.rank
            arrays = windows.batch(position + micro_batch * batch_size, batch_size)
            for buffer, array in zip(self.on_host[:, m], arrays, strict=True):
                buffer.copy_(torch.from_numpy(array))
        self.batch.copy_(self.on_host, non_blocking=self.machine.on_gpu)
        if self.copied is not None:
            self.copied.record()
        if self.example_starts is not None:
            targets = self.on_host[1] != NOT_TRAINED
            self.targets_per_batch = targets.sum((1, 2)).tolist()

    def __call__(self, lr: float) -> None:
        """Update the weights once from the windows that are loaded."""
        set_learning_rate(self.optimizers, lr)
        self.set_divisor()
        self.calls += 1
        if self.use_graph and self.calls == self.warmup_calls:
            self.model.zero_grad(set_to_none=True)  # their memory is for the graph
            self.graph = record(self.compute)
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()

    def set_context_length(self, context_length: int) -> None:
        """Cut the windows into parts of this length. The step is compiled and recorded again."""
        self.context_length = context_length
        self.calls = 0
        self.graph = None  # frees its memory

    def set_divisor(self) -> None:
        """Set what each loss is divided by: the number of targets of the whole step.

        Dividing each micro-batch by its own number of targets would give a target more weight
        where the answers are short.
        """
        targets_of_rank = sum(self.targets_per_batch)
        world = self.machine.world
        # Each rank divides its losses by N / world, where N is the number of targets on all ranks.
        # DistributedDataParallel takes the mean over the ranks: (all losses / (N / world)) / world,
        # which is all losses / N.
        self.divisor.fill_(targets_of_rank / world)
        if world > 1:
            dist.all_reduce(self.divisor)  # the sum over the ranks, N / world
        self.without_target.copy_(self.divisor == 0)
        self.divisor.clamp_(min=1 / world)  # a step without any target must not divide by 0

    def compute(self) -> None:
        """Compute the gradients of all micro-batches, then update the weights."""
        self.accumulate_gradients()
        self.update_weights()

    def accumulate_gradients(self) -> None:
        """Compute the loss and the gradients of the step, one micro-batch after another.

        Gradient accumulation: backward() adds to the gradients, so several micro-batches act as
        one large batch.
        """
        self.model.zero_grad()
        self.loss.zero_()
        for m, batch_targets in enumerate(self.targets_per_batch):
            starts = None if self.example_starts is None else self.example_starts[m]
            averaging: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if self.machine.world > 1 and m < self.micro_steps - 1:
                averaging = self.forward.no_sync()  # the ranks average their sums, at the end
            with averaging:
                with self.machine.autocast():  # mixed precision
                    _, loss = self.forward(
                        self.x[m],
                        self.y[m],
                        starts,
                        divisor=self.divisor,
                        batch_targets=batch_targets,
                        context_length=self.context_length,
                    )
                self.scaler.scale(loss).backward()
            self.loss += loss.detach()
        if self.machine.world > 1:
            # The mean over the ranks, as of the gradients. All of them see the same loss, so that
            # all skip an update or none does.
            dist.all_reduce(self.loss)
            self.loss /= self.machine.world

    @torch.no_grad()
    def update_weights(self) -> None:
        """Clip the gradients by their global norm and update, unless something is not finite.

        Clipping: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler.is_enabled():
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            # No scaler.step(): it would wait for the device. The optimizers get `skip` instead.
        self.grad_norm.copy_(nn.utils.get_total_norm(gradients))
        # 1.0 if the update must be skipped, else 0.0. It is a tensor, so nothing waits for it.
        skip = 1 - torch.isfinite(self.grad_norm + self.loss).float()
        self.bad.copy_((self.bad + 1) * skip)  # in a row: a good update resets it to 0
        self.skipped.add_(skip)
        skip = skip.maximum(self.without_target)
        divide_by = (self.grad_norm / (self.config.grad_clip or math.inf)).clamp(min=1)
        update_all(self.optimizers, gradients, divide_by, skip, self.on_device)
        if self.scaler.is_enabled():
            self.scaler.update()  # adjusts the scale to the infinities that unscale_ found

    def make_states(self) -> None:
        """Let the optimizers make their states in an update of length 0 from gradients of 0."""
        set_learning_rate(self.optimizers, 0.0)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        one = torch.ones((), device=self.machine.device)
        update_all(self.optimizers, [], one, 1 - one, self.on_device)


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def mean_loss(run: Run, windows: EvalWindows, cut_short: Callable[[], bool] | None = None) -> float:
    """Return the mean loss in nats per token over the run's fixed windows of a split.

    Dropout is off. No random number is drawn and the position in the training data does not move.
    cut_short: asked before each batch. True ends the evaluation, and the result means nothing.
    """
    model = run.model
    machine = run.machine
    chosen = windows.choose(run.eval_count)
    batch = 2 * run.config.batch_size  # without gradients it needs less memory than a step
    losses = [torch.zeros((), device=machine.device)]
    targets = 0
    was_training = model.training
    model.eval()
    with machine.autocast():
        for first in range(machine.rank * batch, len(chosen), machine.world * batch):
            if cut_short is not None and cut_short():
                break
            part = chosen[first : first + batch]
            # The last batch is filled up, so that there is one shape to compile.
            inputs, outputs, *starts = windows.batch(np.resize(part, batch))
            outputs[len(part) :] = NOT_TRAINED
            arrays = [inputs, outputs, *starts]
            tensors = [torch.from_numpy(array).to(machine.device) for array in arrays]
            _, loss = model(*tensors, divisor=1.0)
            losses.append(loss)
            targets += int((outputs != NOT_TRAINED).sum())
    model.train(was_training)
    total = sum(torch.stack(losses).tolist())  # Python adds in float64
    if machine.world > 1:
        sums = torch.tensor([total, targets], dtype=torch.float64, device=machine.device)
        dist.all_reduce(sums)
        total, targets = sums.tolist()
    return total / max(1, targets)


# --------------------------------------------------------------------------------------------------
# The loop


class Trainer:
    """Trains until the last step, until patience ends, a signal comes, or updates keep failing."""

    def __init__(self, run: Run, cuda_graph: bool = True):
        """cuda_graph: whether the memory suffices to record the step."""
        self.run = run
        self.config = run.config
        self.progress = run.progress
        self.train_step = TrainStep(run.model, run.config, run.machine, run.packed, cuda_graph)
        self.windows = run.train_windows
        if run.checkpoint is not None:
            load_trainer_state(run.checkpoint, self.train_step)
        self.log = RunLog(run)
        self.clock = self.log.clock
        self.stop = StopSignal(run.machine.device)
        self.saver = Saver(run, self.train_step)
        self.updating = False  # whether an update is under way

    def train(self) -> int:
        """Train, save what was trained, and return the exit status."""
        self.log.introduce(introduction(self.run))
        self.saver.open()
        self.log.open()
        self.run.model.train()
        with self.stop.handling():
            try:
                status = self.loop()
            except Exception:  # no KeyboardInterrupt: a second Ctrl-C saves nothing
                # Weights that an update has half changed are not saved: the older last/ stays.
                if not self.updating:
                    self.finish(status=1, failed=True)
                raise
            return self.finish(status)

    def loop(self) -> int:
        """Train until something ends the run, and return the exit status."""
        config = self.config
        progress = self.progress
        self.load()
        while True:
            if self.evaluation_is_due() and not self.evaluate():
                return 128 + self.stop.number  # a signal has cut it short
            if self.patience_is_over() or progress.step >= config.max_iters:
                return 0
            # Dropout draws other masks on each rank and in each step, resumed or not.
            torch.manual_seed(seed_of_step(config.seed, self.run.machine.rank, progress.step))
            lr = learning_rate(progress.step, config)
            self.updating = True
            self.train_step(lr)
            progress.step += 1
            progress.position += config.windows_per_step
            progress.tokens += config.tokens_per_step
            self.updating = False
            self.load()  # the host loads while the device still computes
            if progress.step % config.log_interval == 0 or progress.step == config.max_iters:
                self.log.log_step(lr, *self.train_step.results.tolist())
            if self.updates_keep_failing():
                return 1
            if self.train_step.calls == self.train_step.warmup_calls:
                self.clock.start()  # all is compiled and recorded from now on
            if self.stop.agreed():
                return 128 + self.stop.number
            if self.saver.is_due():
                with self.clock.stopped():
                    self.saver.save("last")

    def load(self) -> None:
        """Load the next step's windows and set the context length."""
        length = context_of_step(self.progress.step, self.config)
        if length != self.train_step.context_length:
            self.clock.stop()  # compiling for another length is not training time
            self.train_step.set_context_length(length)
        self.train_step.load(self.windows, self.progress.position)

    def updates_keep_failing(self) -> bool:
        """Tell whether the last MAX_BAD_STEPS updates were skipped, every so many steps."""
        if self.progress.step % MAX_BAD_STEPS != 0:
            return False  # looking waits for the device
        bad = int(self.train_step.bad)
        if bad < MAX_BAD_STEPS:
            return False
        say(
            f"stopping at step {self.progress.step}: the last {bad} updates had a loss or gradient "
            "that is not finite. The weights are as before the first of them. Try a lower "
            "learning_rate or --dtype=float32"
        )
        return True

    def evaluation_is_due(self) -> bool:
        """Tell whether to evaluate now: at step 0, at every eval_interval, and at the end."""
        step = self.progress.step
        due = step % self.config.eval_interval == 0 or step >= self.config.max_iters
        return due and self.progress.evaluated_step != step

    def evaluate(self) -> bool:
        """Evaluate both splits, and save the model if it is the best so far.

        Returns whether it was finished: a signal cuts it short and leaves everything as it was.
        With several ranks it runs to its end: to stop together, the ranks would have to wait for
        each other at every batch.
        """
        progress = self.progress
        with self.clock.stopped():
            signal_arrived = self.stop.arrived_in_one_process
            train_loss = mean_loss(self.run, self.run.train_eval_windows, signal_arrived)
            val_loss = mean_loss(self.run, self.run.val_windows, signal_arrived)
            if signal_arrived():
                return False
            progress.evaluated_step = progress.step
            in_best = False
            if self.is_better(val_loss):
                progress.worse_evaluations = 0
                in_best = self.save_best(val_loss)
            elif progress.step > 0:
                progress.worse_evaluations += 1
            self.log.log_evaluation(train_loss, val_loss, in_best)
            if progress.step > 0 and self.config.always_save_checkpoint:
                self.saver.save("last")
        return True

    def is_better(self, val_loss: float) -> bool:
        """Tell whether this is the lowest validation loss after step 0. NaN never is."""
        best = self.progress.best_val_loss
        return self.progress.step > 0 and val_loss < (math.inf if best is None else best)

    def patience_is_over(self) -> bool:
        """Tell whether there were too many evaluations without a new best."""
        patience = self.config.patience
        if patience == 0 or self.progress.worse_evaluations < patience:
            return False
        say(f"stopping: no better validation loss in {patience} evaluations")
        return True

    def save_best(self, val_loss: float) -> bool:
        """Write best/ and tell whether that worked. If not, the previous best still counts."""
        progress = self.progress
        previous = (progress.best_val_loss, progress.best_step)
        progress.best_val_loss = val_loss
        progress.best_step = progress.step
        saved = False
        try:
            # Only rank 0 writes; on the others save() succeeds.
            saved = least_of_ranks(self.saver.save("best"), self.run.machine.device) > 0
        finally:
            if not saved:
                progress.best_val_loss, progress.best_step = previous
        return saved

    def finish(self, status: int, failed: bool = False) -> int:
        """Save what is not saved yet, say what came out, and return the exit status.

        Where nothing was trained there is nothing to save.
        failed: an exception ends the run.
        """
        self.clock.stop()
        trained = self.progress.step > 0
        saved = trained and self.saver.save("last")
        if trained and not saved:
            status = status or 1
        self.log.close(status, saved, failed)
        return status


# --------------------------------------------------------------------------------------------------
# The commands


def evaluate_only(run: Run) -> int:
    """Print the validation loss and perplexity."""
    for note in run.notes:
        say(note)
    loss = mean_loss(run, run.val_windows)
    say(
        f"{run.dataset.name}: val loss {loss:.4f}, perplexity {perplexity(loss):.2f} "
        f"over {run.eval_count:,} windows of {run.config.block_size:,} tokens"
    )
    return 0


def train(run: Run) -> int:
    """Train, or say that the run is complete."""
    if is_complete(run):
        return 0
    check_start(run.model.config)
    run.request.notes.extend(schedule_jumps(run, learning_rate))
    run = fit(run, TrainStep)
    return Trainer(run, cuda_graph=tenth_is_free(run.machine)).train()


def main(argv: list[str] | None = None) -> int:
    """Read the configuration, join the other ranks, build the run, train; return the status."""
    with reported_by_rank_0():
        request = read_request(sys.argv[1:] if argv is None else argv)
    config = request.undecided
    if config.check:
        with reported_by_rank_0():
            refuse_unread_keys(request, model_shape(config, GPTConfig.vocab_size))
        return check_model(
            config, open_machine(config.device, "float32", config.compile), TrainStep
        )
    try:
        with (
            reported_by_rank_0(),
            process_group(config.device, config.backend),
            lock_out_dir(config),
        ):
            run = build_run(request)
            return evaluate_only(run) if config.eval_only else train(run)
    except RuntimeError as error:
        # Memory runs out perhaps on one rank only, so each reports it (run_main in errors.py).
        if ran_out_of_memory(error) or not is_lost_rank(error):
            raise
        with reported_by_rank_0():
            raise UserError(lost_rank_advice(Path(config.out_dir))) from None


if __name__ == "__main__":
    run_main(main, out_of_memory=ADVICE)
