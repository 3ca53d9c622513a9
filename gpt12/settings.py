"""The settings of train.py, sample.py and bench.py: each key with type, default and description.

Add a key by adding a line to one of the classes: the configuration loader and --help read it there.
nanoGPT's keys keep their names, their meanings and, with few exceptions, their defaults.
"""
# ruff: noqa: RUF009  (option() returns a dataclass field, not a shared object)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from gpt12.option_types import (
    Amount,
    Count,
    Device,
    Dtype,
    FullShare,
    Layers,
    OpenShare,
    Positive,
    Prompt,
    Recompute,
    Seed,
    Share,
    Switch,
    Text,
    TextCount,
    Whole,
)

FIRST_GROUP = "The keys that people use first"
CONTEXT_PARTS = 8  # short_context_share cuts a sequence into this many parts


def option(default: Any, description: str, new_group: str | None = None) -> Any:
    """Return the dataclass field of one key.

    description: what --help prints.
    new_group: title of the group that begins with this key, in --help.
    """
    return field(default=default, metadata={"description": description, "new_group": new_group})


class Contradiction(NamedTuple):
    """Keys whose values cannot hold together, and what to do."""

    keys: tuple[str, ...]
    advice: str


@dataclass
class Settings:
    """What the settings of all scripts have: checks between keys, and keys that follow from others.

    sources: for each key that the user set, in the order of setting, the file it was set in or
    "command line".
    """

    def contradictions(self, sources: Mapping[str, str]) -> list[Contradiction]:
        """Return the values that cannot hold together."""
        return []

    def derive(self, sources: Mapping[str, str]) -> None:
        """Set the keys whose value follows from what the user set."""


@dataclass
class TrainConfig(Settings):
    """Train a GPT-2 model: from scratch, from GPT-2's weights (fine-tuning), or continue a run.

    python train.py                                            train a first small model
    python train.py config/finetune_gpt2.py --dataset=my.txt   a preset, with one key changed
    python train.py --init_from=resume --out_dir=out           continue the run in out/
    """

    dataset: Text = option(
        "openwebtext",
        "The text to learn: a folder in data/, your own .txt, .md, .csv or .jsonl file, a folder "
        "of such files, or hf:owner/name.",
        new_group=FIRST_GROUP,
    )
    init_from: Text = option(
        "scratch",
        "Where to start: scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a model's "
        "folder, or a nanoGPT ckpt.pt.",
    )
    out_dir: Text = option("out", "Folder of the run: checkpoints, metrics and the loss curve.")
    max_iters: Whole = option(600000, "Number of steps (weight updates) in all.")
    num_epochs: Amount = option(
        0.0, "Passes over the training text, in place of max_iters. 0 means max_iters counts."
    )
    batch_size: Count | Literal["auto"] = option(
        12, "Sequences that a device computes at once (a micro-batch). auto fits it to the memory."
    )
    block_size: Count = option(1024, "Tokens in a sequence: the longest context of the model.")
    learning_rate: Amount = option(6e-4, "The highest learning rate, reached after the warm-up.")
    eval_interval: Count = option(2000, "Steps between two measurements of the validation loss.")
    device: Device = option("auto", "Where to compute. auto is the GPU if there is one.")

    gradient_accumulation_steps: Count = option(
        5 * 8,
        "Micro-batches whose gradients one step adds up, over all GPUs. Given with "
        "batch_size=auto, it counts sequences.",
        new_group="Batch and order of the data",
    )
    short_context_share: Share = option(
        0.0,
        "Share of the steps, from the start, in which attention sees only an eighth of the "
        "sequence. A model learns from near words first, so it needs fewer tokens.",
    )
    seed: Seed = option(1337, "Start of the random numbers: weights, order of data, dropout.")

    n_layer: Count = option(
        12, "Number of transformer blocks.", new_group="Model (a loaded model brings its own shape)"
    )
    n_head: Count = option(12, "Attention heads in a block. n_embd must be a multiple of it.")
    n_embd: Count = option(768, "Width: numbers that describe one token.")
    dropout: Share = option(
        0.0, "Share of values set to 0 in training. 0 suits pre-training, 0.1 fine-tuning."
    )
    bias: bool = option(False, "Whether Linear and LayerNorm layers have biases, as GPT-2's do.")

    optimizer: Text = option(
        "adamw",
        "How weights are updated. muon is for the blocks' matrices, with adamw for the rest; "
        "adamw8bit takes less memory.",
        new_group="Optimizer",
    )
    weight_decay: Amount = option(0.1, "How strongly matrices and embeddings are pulled to 0.")
    beta1: Share = option(0.9, "Decay of the running mean of the gradient; muon's momentum.")
    beta2: Share = option(0.95, "Decay of the running mean of the squared gradient.")
    grad_clip: Amount = option(1.0, "Longer gradients are shortened to this norm. 0 means never.")

    warmup_iters: Whole = option(
        2000,
        "Steps over which the learning rate rises at the start.",
        new_group="Schedule of the learning rate",
    )
    decay_lr: bool = option(True, "Whether the learning rate changes. False keeps it constant.")
    schedule: Literal["cosine", "wsd"] = option(
        "cosine",
        "How the rate falls: along a cosine, or (wsd) level at first, then in a straight line.",
    )
    lr_decay_iters: Whole | None = option(
        None, "Step at which the rate has fallen to min_lr. None means max_iters."
    )
    min_lr: Amount = option(
        6e-5,
        "The lowest learning rate. If you set only learning_rate, to less than this, it is a "
        "tenth of learning_rate.",
    )
    decay_fraction: FullShare = option(
        0.4, "Share of the steps after the warm-up over which wsd falls."
    )

    lora_rank: Whole = option(
        0,
        "Rank of the adapters that are trained in place of the weights. 0 trains all weights.",
        new_group="LoRA (fine-tuning in little memory)",
    )
    lora_alpha: Positive | None = option(
        None, "Adapters are scaled by lora_alpha / lora_rank. None means twice lora_rank."
    )
    lora_dropout: Share = option(0.0, "Dropout on the input of the adapters.")
    lora_targets: Layers = option("all", "Which linear layers get an adapter.")

    text_column: Text = option(
        "text",
        "Column of a .csv file or key of a .jsonl file that holds the text. line: each line of a "
        ".txt file is a text of its own.",
        new_group="Your own text",
    )
    tokenizer: Literal["auto", "gpt2", "char", "bytes"] = option(
        "auto",
        "How text becomes tokens. auto is the model's or the data set's own tokenizer, else gpt2.",
    )
    val_fraction: OpenShare = option(0.1, "Share of your text that is kept for validation.")

    dtype: Dtype = option(
        "auto",
        "Precision of the computation. auto is the best of this device. Weights that are trained "
        "stay float32, except with optimizer=adamw8bit.",
        new_group="Speed and memory",
    )
    compile: Switch = option(
        "auto", "Whether to use torch.compile. auto uses it where it works and saves time."
    )
    recompute: Recompute = option(
        "auto",
        "Computes activations twice to save memory (gradient checkpointing): pointwise saves some, "
        "block saves most. auto takes the least that fits.",
    )
    cuda_graph: Switch = option(
        "auto", "Whether to replay a step as one CUDA graph. auto does so for small models."
    )
    deterministic: bool = option(
        False, "Whether every run on this machine gives exactly the same losses. It is slower."
    )
    backend: Text = option("nccl", "How several GPUs communicate (torch.distributed).")

    eval_only: bool = option(
        False,
        "Train nothing: print the validation loss and the perplexity, and stop.",
        new_group="Evaluation, checkpoints and logs",
    )
    eval_iters: Whole = option(
        200, "Batches in an evaluation, at most one pass over the text. 0 means one pass."
    )
    patience: Whole = option(
        0, "Evaluations without a new best loss before the run stops. 0 means it never does."
    )
    always_save_checkpoint: bool = option(
        True, "Whether to write the checkpoint last/ at every evaluation."
    )
    save_interval_s: Amount | Literal["auto"] = option(
        "auto",
        "Seconds between writes of last/. auto spends about 1% of the time on them, and writes at "
        "least every 10 minutes.",
    )
    max_bad_steps: Count = option(
        20, "The run stops after this many steps in a row whose loss is not a finite number."
    )
    log_interval: Count = option(1, "Steps between two lines in metrics.jsonl.")
    wandb_log: bool = option(False, "Whether to log to Weights & Biases, too.")
    wandb_project: Text = option("owt", "Name of the project there.")
    wandb_run_name: Text = option("gpt2", "Name of the run there.")

    def contradictions(self, sources: Mapping[str, str]) -> list[Contradiction]:
        """Return the values that cannot hold together."""
        found = []
        if self.init_from == "scratch" and self.n_embd % self.n_head != 0:
            found.append(Contradiction(("n_embd", "n_head"), "n_embd must be a multiple of n_head"))
        if self._both_lengths_are_given(sources):
            advice = "both say how long to train; give one of them"
            found.append(Contradiction(("max_iters", "num_epochs"), advice))
        if self.decay_lr and "min_lr" in sources and self.min_lr > self.learning_rate:
            advice = "the lowest rate is above the highest; lower min_lr or add --decay_lr=False"
            found.append(Contradiction(("min_lr", "learning_rate"), advice))
        lora_keys = []
        for key in ("lora_alpha", "lora_dropout", "lora_targets"):
            if key in sources:
                lora_keys.append(key)
        if self.lora_rank == 0 and lora_keys:
            advice = "there are no adapters without a rank; add --lora_rank=16"
            found.append(Contradiction(("lora_rank", *lora_keys), advice))
        if self.init_from == "scratch" and self.lora_rank > self.n_embd:
            advice = "the rank can be at most n_embd"
            found.append(Contradiction(("lora_rank", "n_embd"), advice))
        return found

    def _both_lengths_are_given(self, sources: Mapping[str, str]) -> bool:
        """Whether one file, or the command line, sets both max_iters and num_epochs."""
        if self.num_epochs == 0 or "max_iters" not in sources or "num_epochs" not in sources:
            return False
        return sources["max_iters"] == sources["num_epochs"]

    def derive(self, sources: Mapping[str, str]) -> None:
        """Set the keys whose value follows from what the user set.

        If two sources set max_iters and num_epochs, the last one wins (in one source they are a
        contradiction, see above). If min_lr is not set and the learning rate is below its default,
        min_lr becomes a tenth of the learning rate.
        """
        lengths = [key for key in sources if key in ("max_iters", "num_epochs")]
        if lengths and lengths[-1] == "max_iters":
            self.num_epochs = 0.0
        if self.decay_lr and "min_lr" not in sources and self.min_lr > self.learning_rate:
            self.min_lr = self.learning_rate / 10


@dataclass
class SampleConfig(Settings):
    """Write text with a trained model.

    python sample.py --out_dir=out --start="Once upon a time"
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --num_samples=3 --temperature=0
    python sample.py --out_dir=out --interactive
    """

    out_dir: Text = option(
        "out", "Folder of the run that trained the model.", new_group=FIRST_GROUP
    )
    init_from: Text = option(
        "resume",
        "Which model: resume (the one in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, the "
        "folder of a model or a run, or a nanoGPT ckpt.pt.",
    )
    start: Prompt = option(
        "\n", "The text to continue. FILE:prompt.txt reads a file; - reads standard input."
    )
    interactive: bool = option(False, "Hold a conversation: you type, the model answers.")
    num_samples: TextCount = option(10, "Number of texts to write.")
    max_new_tokens: Count = option(500, "Length of each text, in tokens.")
    temperature: Amount = option(
        0.8, "Below 1 the text gets safer, above 1 bolder. 0 always takes the likeliest token."
    )
    top_k: Whole | None = option(
        200, "Choose among the k likeliest tokens only. 0 or None means all tokens."
    )
    seed: Seed = option(1337, "The same seed writes the same text.")
    device: Device = option("auto", "Where to compute. auto is the GPU if there is one.")

    top_p: FullShare = option(
        1.0,
        "Choose among the likeliest tokens that together have this probability.",
        new_group="Choice of the next token",
    )
    min_p: Share = option(
        0.0, "Leave out tokens with less than this share of the likeliest token's probability."
    )
    repetition_penalty: Positive = option(
        1.0, "Above 1, tokens that the text already has become less likely."
    )

    stop: tuple[Text, ...] = option(
        (),
        r"End a text before this string. May be repeated; \n is a new line.",
        new_group="Input and output",
    )
    json: bool = option(False, "Print each text as one line of JSON.")
    checkpoint: Literal["auto", "best", "last"] = option(
        "auto", "Which checkpoint of the run. auto is best/ if there is one, else last/."
    )

    dtype: Dtype = option(
        "auto",
        "Precision of the computation. auto is the best of this device.",
        new_group="Speed and memory",
    )
    compile: Switch = option("auto", "Has no effect. nanoGPT's sample.py has this key.")

    def contradictions(self, sources: Mapping[str, str]) -> list[Contradiction]:
        """Return the values that cannot hold together."""
        if self.interactive and self.json:
            advice = "a conversation cannot be printed as JSON; leave one of them out"
            return [Contradiction(("interactive", "json"), advice)]
        return []


@dataclass
class BenchConfig(TrainConfig):
    """Measure how fast this machine trains and writes text, and how much memory that takes.

    python bench.py                                          one training step
    python bench.py config/train_gpt2_12gb.py --sweep=batch_size:4,8,16
    python bench.py --plan --init_from=gpt2-xl --lora_rank=16

    All keys of train.py work here, too (python train.py --help), besides those below. Measurements
    run one after the other; without any, the training step is measured. Weights are random:
    init_from only gives the shape of the model.
    """

    sweep: Text | None = option(
        None,
        "KEY:VALUE,VALUE measures the step at each value of a key; writes a table and bench.png.",
        new_group=FIRST_GROUP,
    )
    ladder: bool = option(
        False,
        "Show what each technique gains, from plain float32 on; a table and bench.png.",
    )
    find_batch: bool = option(False, "Find the batch size that is fastest in this memory.")
    sample: bool = option(False, "Measure generation at batch size 1, 4, 16 and 64.")
    compare: Literal["none", "transformers"] = option(
        "none", "Measure the same work in another library, side by side."
    )
    profile: bool = option(
        False, "List the slowest kernels; write trace.json for chrome://tracing."
    )
    report: bool = option(
        False, "Measure step, ladder and generation; write bench.json and bench.png to publish."
    )
    plan: bool = option(False, "Predict memory and speed on a card, without a GPU.")
    card: Text = option(
        "NVIDIA GeForce RTX 4070 Ti",
        "The card to plan for: the name that its driver reports, or the end of it (RTX 4070 Ti).",
    )
    vram_gb: Positive | None = option(
        None, "Memory of the card to plan for or to imitate, in GB. 1 GiB of it stays free."
    )

    steps: Count = option(20, "Measured steps, after the warm-up.", new_group="How to measure")
    json: bool = option(
        False,
        "Print all figures as JSON, as the last line of the output. Otherwise they are written to "
        "bench.json.",
    )
    gradient_accumulation_steps: Count = option(1, "Micro-batches in a step, over all GPUs.")
    real_data: Switch = option(
        "auto", "True reads the data set, False draws random tokens. auto reads it if it is there."
    )
    vocab_size: Count = option(50257, "Number of different random tokens.")
    attention: Literal["auto", "flash", "math"] = option(
        "auto", "Which attention kernel. auto leaves the choice to torch, as training does."
    )
    max_new_tokens: Count = option(256, "Tokens that each text is continued by, with --sample.")

    peak_tflops: Positive | None = option(
        None,
        "Dense bf16 TFLOP/s with fp32 accumulation, from its datasheet.",
        new_group="A card that the program does not know",
    )
    bandwidth_gbs: Positive | None = option(None, "Memory bandwidth in GB/s, from its datasheet.")

    def contradictions(self, sources: Mapping[str, str]) -> list[Contradiction]:
        """Return the values that cannot hold together."""
        found = super().contradictions(sources)
        if (self.peak_tflops is None) != (self.bandwidth_gbs is None):
            advice = "a card is described by both; its datasheet has them"
            found.append(Contradiction(("peak_tflops", "bandwidth_gbs"), advice))
        generates = self.sample or self.report
        if generates and min(self.max_new_tokens, self.block_size - 1) < 2:
            advice = "generation is timed from one new token to the next; it needs at least two"
            found.append(Contradiction(("max_new_tokens", "block_size"), advice))
        return found


ALL_KEYS = frozenset(key.name for schema in (BenchConfig, SampleConfig) for key in fields(schema))
