"""The settings of train.py, sample.py and bench.py: each key with type, default and description.

Add a key by adding it to one of the classes: reading (gpt12/config.py) and --help follow.
nanoGPT's keys keep their names, their meanings and, with few exceptions, their defaults.
A field added to GPTConfig in model.py is a key of train.py without a line here.

The text below a key is what --help prints of it. pydantic checks types, ranges, choices and unknown
keys.
"""

from __future__ import annotations

import math
import os.path
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from gpt12.optimizer import OPTIMIZERS
from model import GPTConfig

STRICT = ConfigDict(
    extra="forbid",
    allow_inf_nan=False,
    use_attribute_docstrings=True,
)
# Keys of bench.py that say what is measured, which a plan cannot do.
MEASURING = {"sweep", "ladder", "find_batch", "sample", "profile", "attention"}
CONTEXT_PARTS = 8  # short_context_share cuts a sequence into this many parts
# Both keys set the length of a run. A later source that sets one of them removes the other.
REPLACES = {"max_iters": "num_epochs", "num_epochs": "max_iters"}


def refuse_bool(value: Any) -> Any:
    """Return the value unless it is True or False, which pydantic would read as 1 or 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def registered(name: str) -> str:
    """Return the name of an optimizer if there is one of that name."""
    if name not in OPTIMIZERS:
        raise PydanticCustomError("optimizer", f"Input should be one of {', '.join(OPTIMIZERS)}")
    return name


NotBool = BeforeValidator(refuse_bool)
Whole = Annotated[int, Field(ge=0, lt=2**63), NotBool]  # as torch's seeds
Count = Annotated[int, Field(ge=1, lt=2**63), NotBool]
Amount = Annotated[float, Field(ge=0), NotBool]
Positive = Annotated[float, Field(gt=0), NotBool]
Share = Annotated[float, Field(ge=0, lt=1), NotBool]
OpenShare = Annotated[float, Field(gt=0, lt=1), NotBool]
FullShare = Annotated[float, Field(gt=0, le=1), NotBool]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Device = Annotated[str, Field(pattern="^(auto|cpu|mps|cuda|cuda:[0-9]+)$")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto", True, False]
Recompute = Literal["none", "pointwise", "block"]
OptimizerName = Annotated[str, AfterValidator(registered)]

Contradictions = list[tuple[tuple[str, ...], str]]  # keys, and what to do
Schema = TypeVar("Schema")


def first_of(group: str, default: Any) -> Any:
    """Return the field of a key that begins a group of keys in --help."""
    return Field(default, json_schema_extra={"group": group})


def shape_keys() -> list[str]:
    """Return the keys of a model's shape: all but vocab_size, which comes from the tokenizer."""
    return [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]


def with_shape_keys(schema: type[Schema]) -> type[Schema]:
    """Add the keys of a model's shape that a class of settings lacks."""
    types = get_type_hints(GPTConfig)
    for key in shape_keys():
        if key not in schema.__annotations__:
            schema.__annotations__[key] = types[key]
            setattr(schema, key, getattr(GPTConfig, key))
    return schema


@dataclass(frozen=True, config=STRICT)
@with_shape_keys
class TrainConfig:
    """Train a GPT-2 model: from scratch, from GPT-2's weights (fine-tuning), or continue a run.

    python train.py                                            train a first small model
    python train.py config/finetune_gpt2.py --dataset=my.txt   a preset, with one key changed
    python train.py --init_from=resume --out_dir=out           continue the run in out/
    """

    dataset: PathText = first_of("The keys that people use first", "openwebtext")
    """The text to learn: a folder in data/, your own .txt, .md, .csv or .jsonl file, a folder of
    such files, or hf:owner/name.
    """
    init_from: PathText = "scratch"
    """Where to start: scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a model's folder, or
    a nanoGPT ckpt.pt. auto resumes the run in out_dir if there is one, and otherwise starts it.
    """
    out_dir: PathText = "out"
    """Folder of the run: checkpoints, metrics and the loss curve."""
    max_iters: Whole = 600000
    """Number of steps (weight updates) in all."""
    num_epochs: Amount = 0.0
    """Passes over the training text, in place of max_iters. 0 means max_iters counts."""
    batch_size: Count = 12
    """Sequences that a device computes at once (a micro-batch)."""
    block_size: Count = 1024
    """Tokens in a sequence: the longest context of the model."""
    learning_rate: Amount = 6e-4
    """The highest learning rate, reached after the warm-up."""
    eval_interval: Count = 2000
    """Steps between two measurements of the validation loss."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1 or mps. auto is the GPU if there is one."""

    gradient_accumulation_steps: Count = first_of("Batch and order of the data", 5 * 8)
    """Micro-batches whose gradients one step adds up, over all GPUs."""
    short_context_share: Share = 0.0
    """Share of the steps, from the start, in which attention sees only an eighth of the sequence. A
    model learns from near words first, so it needs fewer tokens.
    """
    seed: Whole = 1337
    """Start of the random numbers: weights, order of data, dropout."""

    n_layer: Count = first_of("Model (a loaded model brings its own shape)", 12)
    """Number of transformer blocks."""
    n_head: Count = 12
    """Attention heads in a block. n_embd must be a multiple of it."""
    n_embd: Count = 768
    """Width: numbers that describe one token."""
    dropout: Share = 0.0
    """Share of values set to 0 in training. 0 suits pre-training, 0.1 fine-tuning."""
    bias: bool = False
    """Whether Linear and LayerNorm layers have biases, as GPT-2's do."""

    optimizer: OptimizerName = first_of("Optimizer", "adamw")
    """How weights are updated. muon is for the blocks' matrices, with adamw for the rest; adamw8bit
    takes less memory.
    """
    weight_decay: Amount = 0.1
    """How strongly matrices and embeddings are pulled to 0."""
    beta1: Share = 0.9
    """Decay of the running mean of the gradient; muon's momentum."""
    beta2: Share = 0.95
    """Decay of the running mean of the squared gradient."""
    grad_clip: Amount = 1.0
    """Longer gradients are shortened to this norm. 0 means never."""

    warmup_iters: Whole = first_of("Schedule of the learning rate", 2000)
    """Steps over which the learning rate rises at the start. If you do not set it, it is at most a
    tenth of the steps up to lr_decay_iters.
    """
    decay_lr: bool = True
    """Whether the learning rate changes. False keeps it constant."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """How the rate falls: along a cosine, or (wsd) level at first, then in a straight line."""
    lr_decay_iters: Whole | None = None
    """Step at which the rate has fallen to min_lr. None means max_iters."""
    min_lr: Amount = 6e-5
    """The lowest learning rate. If you set only learning_rate, to less than this, it is a tenth of
    learning_rate.
    """
    decay_fraction: FullShare = 0.4
    """Share of the steps after the warm-up over which wsd falls."""

    lora_rank: Whole = first_of("LoRA (fine-tuning in little memory)", 0)
    """Rank of the adapters that are trained in place of the weights. 0 trains all weights."""
    lora_alpha: Positive | None = None
    """Adapters are scaled by lora_alpha / lora_rank. None means twice lora_rank."""

    text_column: Text = first_of("Your own text", "text")
    """Column of a table or key of a .jsonl file that holds the text. line: each line of a .txt file
    is a text of its own.
    """
    encoding: Text = "utf-8"
    """Encoding of the text files. utf-8-replace: bytes that are not UTF-8 become U+FFFD."""
    tokenizer: Literal["auto", "gpt2", "char", "bytes"] = "auto"
    """How text becomes tokens. auto is the model's or the data set's own tokenizer, else gpt2."""
    val_fraction: OpenShare = 0.1
    """Share of your text that is kept for validation."""

    dtype: Dtype = first_of("Speed and memory", "auto")
    """Precision of the computation. auto is the best of this device. Weights that are trained stay
    float32, except with optimizer=adamw8bit.
    """
    compile: Switch = "auto"
    """Whether to use torch.compile. auto uses it where it works and saves time."""
    recompute: Recompute = "none"
    """Computes activations twice to save memory (gradient checkpointing): pointwise saves some,
    block saves most.
    """
    deterministic: bool = False
    """Whether every run on this machine gives exactly the same losses. It is slower."""
    backend: Text = "nccl"
    """How several GPUs communicate (torch.distributed)."""

    eval_only: bool = first_of("Evaluation, checkpoints and logs", False)
    """Train nothing: print the validation loss and the perplexity, and stop."""
    check: bool = False
    """Train nothing: try whether a changed model.py trains, saves, resumes and samples right."""
    eval_iters: Whole = 200
    """Portions of 12,288 tokens in an evaluation, at most one pass over the text. 0 means one pass.
    If you do not set it, an evaluation is at most a tenth of the steps before it.
    """
    patience: Whole = 0
    """Evaluations without a new best loss before the run stops. 0 means it never does."""
    always_save_checkpoint: bool = True
    """Whether to write the checkpoint last/ at every evaluation."""
    save_interval_s: Amount = 60.0
    """Seconds between writes of last/. Unless it is set, saving takes at most 2% of the time."""
    log_interval: Count = 1
    """Steps between two lines in metrics.jsonl."""
    wandb_log: bool = False
    """Whether to log to Weights & Biases, too."""
    wandb_project: Text = "owt"
    """Name of the project there."""
    wandb_run_name: Text = "gpt2"
    """Name of the run there."""

    @property
    def windows_per_step(self) -> int:
        """Return the number of windows in a step, over all micro-batches and ranks."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Return the number of tokens in a step."""
        return self.windows_per_step * self.block_size

    @property
    def decay_end(self) -> int:
        """Return the step at which the learning rate has fallen to min_lr."""
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def short_context_steps(self) -> int:
        """Return the number of steps with a short context."""
        return math.ceil(self.short_context_share * self.max_iters)

    def contradictions(self, given: Collection[str]) -> Contradictions:
        """Return the keys whose values cannot hold together, and what to do.

        given: the keys that the user set.
        """
        if self.init_from in ("resume", "auto"):
            return []  # the settings of an earlier run count
        new = self.init_from == "scratch"
        both_lengths = "max_iters" in given and "num_epochs" in given
        rules = [
            (
                new and self.n_embd % self.n_head != 0,
                ("n_embd", "n_head"),
                "n_embd must be a multiple of n_head",
            ),
            (
                both_lengths and self.num_epochs > 0,
                ("max_iters", "num_epochs"),
                "both say how long to train; give one of them",
            ),
            (
                self.short_context_share > 0 and self.block_size % CONTEXT_PARTS != 0,
                ("short_context_share", "block_size"),
                f"the first steps cut a sequence into {CONTEXT_PARTS} parts; choose a multiple",
            ),
            (
                self.decay_lr
                and {"lr_decay_iters", "warmup_iters"} <= set(given)
                and self.decay_end <= self.warmup_iters,
                ("lr_decay_iters", "warmup_iters"),
                "the rate would fall before it has risen; raise lr_decay_iters",
            ),
            (
                self.decay_lr and "min_lr" in given and self.min_lr > self.learning_rate,
                ("min_lr", "learning_rate"),
                "the lowest rate is above the highest; lower min_lr or add --decay_lr=False",
            ),
            (
                self.lora_rank == 0 and "lora_alpha" in given and self.lora_alpha is not None,
                ("lora_rank", "lora_alpha"),
                "there are no adapters without a rank; add --lora_rank=16",
            ),
        ]
        return [(keys, advice) for wrong, keys, advice in rules if wrong]


@dataclass(frozen=True, config=STRICT)
class SampleConfig:
    """Write text with a trained model.

    python sample.py --out_dir=out --start="Once upon a time"
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --num_samples=3 --temperature=0
    python sample.py --out_dir=out --interactive
    """

    out_dir: PathText = first_of("The keys that people use first", "out")
    """Folder of the run that trained the model."""
    init_from: PathText = "resume"
    """Which model: resume (the one in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, the folder
    of a model or a run, or a nanoGPT ckpt.pt.
    """
    start: str = "\n"
    r"""The text to continue; \n is a new line. FILE:prompt.txt reads a file; - standard input."""
    interactive: bool = False
    """Hold a conversation: you type, the model answers."""
    num_samples: Count = 10
    """Number of texts to write."""
    max_new_tokens: Count = 500
    """Length of each text, in tokens."""
    temperature: Amount = 0.8
    """Below 1 the text gets safer, above 1 bolder. 0 always takes the likeliest token."""
    top_k: Whole | None = 200
    """Choose among the k likeliest tokens only. 0 or None means all tokens."""
    seed: Whole = 1337
    """The same seed writes the same text on the same device; H100 and H200 may now and then differ,
    because cuDNN's attention is not exact to the last bit there.
    """
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1 or mps. auto is the GPU if there is one."""

    top_p: FullShare = first_of("Choice of the next token", 1.0)
    """Choose among the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Leave out tokens with less than this share of the likeliest token's probability."""
    repetition_penalty: Positive = 1.0
    """Above 1, tokens that the text already has become less likely."""

    stop: tuple[Text, ...] = first_of("Input and output", ())
    r"""End a text before this string. May be repeated; \n is a new line."""
    system: Text | None = None
    """The system message of a conversation. None means the one that the model was trained with."""
    json: bool = False
    """Print each text as one line of JSON."""
    checkpoint: Literal["auto", "best", "last"] = "auto"
    """Which checkpoint of the run. auto is best/ if there is one, else last/."""

    dtype: Dtype = first_of("Speed and memory", "auto")
    """Precision of the computation. auto is the best of this device."""
    compile: Switch = "auto"
    """Has no effect. nanoGPT's sample.py has this key."""

    def contradictions(self, given: Collection[str]) -> Contradictions:
        """Return the keys whose values cannot hold together, and what to do."""
        if self.interactive and self.json:
            advice = "a conversation cannot be printed as JSON; leave one of them out"
            return [(("interactive", "json"), advice)]
        return []


@dataclass(frozen=True, config=STRICT)
class BenchConfig(TrainConfig):
    """Measure how fast this machine trains and writes text, and how much memory that takes.

    python bench.py                                          one training step
    python bench.py config/train_gpt2_12gb.py --sweep=batch_size:4,8,16
    python bench.py --plan --init_from=gpt2-xl --lora_rank=16

    All keys of train.py work here, too (python train.py --help), besides those below. Measurements
    run one after the other; without any, the training step is measured. Weights are random:
    init_from only gives the shape of the model.
    """

    sweep: Text | None = first_of("The keys that people use first", None)
    """KEY:VALUE,VALUE measures the step at each value of a key, as a table."""
    ladder: bool = False
    """Show what each technique gains, from float32 on; draw it as bench.png."""
    find_batch: bool = False
    """Find the batch size that is fastest in this memory."""
    sample: bool = False
    """Measure sample.py: 1, 4, 16 and 64 texts at once."""
    profile: bool = False
    """Print torch's table of the slowest kernels."""
    plan: bool = False
    """Predict memory and speed on a card, without a GPU."""
    card: Text = "NVIDIA GeForce RTX 4070 Ti"
    """The card to plan for: the name that its driver reports, or the end of it (RTX 4070 Ti)."""
    vram_gb: Annotated[float, Field(gt=1), NotBool] | None = None
    """Memory of the card to plan for or to imitate, in GB. 1 GiB of it stays free."""

    steps: Count = first_of("How to measure", 20)
    """Measured steps, after the warm-up."""
    json: bool = False
    """Print all figures as JSON, as the last line of the output. Otherwise they are written to
    bench.json.
    """
    gradient_accumulation_steps: Count = first_of("A step", 1)
    """Micro-batches in a step, over all GPUs."""
    real_data: Switch = "auto"
    """True reads the data set, False draws random tokens. auto reads it if it is there."""
    vocab_size: Count = 50257
    """Number of different random tokens."""
    attention: Literal["auto", "flash", "math"] = "auto"
    """Which attention kernel. auto leaves the choice to torch, as training does."""
    max_new_tokens: Annotated[int, Field(ge=2), NotBool] = 500
    """Tokens that each text is continued by, with --sample. Time is taken between two of them."""

    def contradictions(self, given: Collection[str]) -> Contradictions:
        """Return the keys whose values cannot hold together, and what to do."""
        unread = MEASURING if self.plan else {"card"}
        advice = "does not count with --plan" if self.plan else "counts only with --plan"
        unfit = [((key,), advice) for key in sorted(unread.intersection(given))]
        return super().contradictions(given) + unfit


def model_shape(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """Return the shape of the model that the settings describe."""
    keys = {key: getattr(config, key) for key in shape_keys()}
    return GPTConfig(**keys, vocab_size=vocab_size)


def with_shape(config: TrainConfig, shape: GPTConfig) -> TrainConfig:
    """Return the settings with the shape of a model."""
    return replace(config, **{key: getattr(shape, key) for key in shape_keys()})


ALL_KEYS = frozenset(key.name for schema in (BenchConfig, SampleConfig) for key in fields(schema))
