"""The settings of train.py, sample.py and bench.py: each key with type, default and description.

Add a key by adding a line to one of the classes: reading (gpt12/config.py) and --help follow.
nanoGPT's keys keep their names, their meanings and, with few exceptions, their defaults.
A field added to GPTConfig in model.py is a key of train.py without a line here.

pydantic checks types, ranges, choices and unknown keys.
"""

from __future__ import annotations

import os.path
from collections.abc import Collection
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from model import GPTConfig

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
CONTEXT_PARTS = 8  # short_context_share cuts a sequence into this many parts
# Two keys for the length of a run: of two sources, the later one decides and ends the other's word.
REPLACES = {"max_iters": "num_epochs", "num_epochs": "max_iters"}


def refuse_bool(value: Any) -> Any:
    """Return the value unless it is True or False, which pydantic would read as 1 or 0."""
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


def expand_home(path: str) -> str:
    """Replace a ~ at the beginning by the home folder."""
    return os.path.expanduser(path)  # noqa: PTH111 (a Path would change hf:owner/name)


NotBool = BeforeValidator(refuse_bool)
Whole = Annotated[int, Field(ge=0), NotBool]
Count = Annotated[int, Field(ge=1), NotBool]
Amount = Annotated[float, Field(ge=0), NotBool]
Positive = Annotated[float, Field(gt=0), NotBool]
Share = Annotated[float, Field(ge=0, lt=1), NotBool]
OpenShare = Annotated[float, Field(gt=0, lt=1), NotBool]
FullShare = Annotated[float, Field(gt=0, le=1), NotBool]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expand_home)]
CudaDevice = Annotated[str, Field(pattern="^cuda:[0-9]+$", examples=["cuda:1"])]
Device = Literal["auto", "cpu", "mps", "cuda"] | CudaDevice
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto"] | bool
Recompute = Literal["none", "pointwise", "block"]

Contradictions = list[tuple[tuple[str, ...], str]]  # keys, and what to do
Schema = TypeVar("Schema")


def option(default: Any, description: str, group: str | None = None) -> Any:
    """Return the field of one key.

    description: what --help prints. group: title of the group that begins with this key, in --help.
    """
    return Field(default, description=description, json_schema_extra={"group": group})


def with_shape_keys(schema: type[Schema]) -> type[Schema]:
    """Add the fields of GPTConfig that a class of settings lacks.

    All but vocab_size, which comes from the tokenizer.
    """
    types = get_type_hints(GPTConfig)
    for field in fields(GPTConfig):
        if field.name != "vocab_size" and field.name not in schema.__annotations__:
            schema.__annotations__[field.name] = types[field.name]
            setattr(schema, field.name, option(field.default, "A field of GPTConfig in model.py."))
    return schema


@dataclass(frozen=True, config=STRICT)
@with_shape_keys
class TrainConfig:
    """Train a GPT-2 model: from scratch, from GPT-2's weights (fine-tuning), or continue a run.

    python train.py                                            train a first small model
    python train.py config/finetune_gpt2.py --dataset=my.txt   a preset, with one key changed
    python train.py --init_from=resume --out_dir=out           continue the run in out/
    """

    dataset: PathText = option(
        "openwebtext",
        "The text to learn: a folder in data/, your own .txt, .md, .csv or .jsonl file, a "
        "folder of such files, or hf:owner/name.",
        group="The keys that people use first",
    )
    init_from: PathText = option(
        "scratch",
        "Where to start: scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a model's "
        "folder, or a nanoGPT ckpt.pt. auto resumes the run in out_dir if there is one, and "
        "otherwise starts it.",
    )
    out_dir: PathText = option("out", "Folder of the run: checkpoints, metrics and the loss curve.")
    max_iters: Whole = option(600000, "Number of steps (weight updates) in all.")
    num_epochs: Amount = option(
        0.0,
        "Passes over the training text, in place of max_iters. 0 means max_iters counts.",
    )
    batch_size: Count = option(12, "Sequences that a device computes at once (a micro-batch).")
    block_size: Count = option(1024, "Tokens in a sequence: the longest context of the model.")
    learning_rate: Amount = option(6e-4, "The highest learning rate, reached after the warm-up.")
    eval_interval: Count = option(2000, "Steps between two measurements of the validation loss.")
    device: Device = option("auto", "Where to compute. auto is the GPU if there is one.")

    gradient_accumulation_steps: Count = option(
        5 * 8,
        "Micro-batches whose gradients one step adds up, over all GPUs.",
        group="Batch and order of the data",
    )
    short_context_share: Share = option(
        0.0,
        "Share of the steps, from the start, in which attention sees only an eighth of the "
        "sequence. A model learns from near words first, so it needs fewer tokens.",
    )
    seed: Whole = option(1337, "Start of the random numbers: weights, order of data, dropout.")

    n_layer: Count = option(
        12,
        "Number of transformer blocks.",
        group="Model (a loaded model brings its own shape)",
    )
    n_head: Count = option(12, "Attention heads in a block. n_embd must be a multiple of it.")
    n_embd: Count = option(768, "Width: numbers that describe one token.")
    dropout: Share = option(
        0.0,
        "Share of values set to 0 in training. 0 suits pre-training, 0.1 fine-tuning.",
    )
    bias: bool = option(False, "Whether Linear and LayerNorm layers have biases, as GPT-2's do.")

    optimizer: Text = option(
        "adamw",
        "How weights are updated. muon is for the blocks' matrices, with adamw for the rest; "
        "adamw8bit takes less memory.",
        group="Optimizer",
    )
    weight_decay: Amount = option(0.1, "How strongly matrices and embeddings are pulled to 0.")
    beta1: Share = option(0.9, "Decay of the running mean of the gradient; muon's momentum.")
    beta2: Share = option(0.95, "Decay of the running mean of the squared gradient.")
    grad_clip: Amount = option(1.0, "Longer gradients are shortened to this norm. 0 means never.")

    warmup_iters: Whole = option(
        2000,
        "Steps over which the learning rate rises at the start. If you do not set it, it is at "
        "most a tenth of all steps.",
        group="Schedule of the learning rate",
    )
    decay_lr: bool = option(True, "Whether the learning rate changes. False keeps it constant.")
    schedule: Literal["cosine", "wsd"] = option(
        "cosine",
        "How the rate falls: along a cosine, or (wsd) level at first, then in a straight line.",
    )
    lr_decay_iters: Whole | None = option(
        None,
        "Step at which the rate has fallen to min_lr. None means max_iters.",
    )
    min_lr: Amount = option(
        6e-5,
        "The lowest learning rate. If you set only learning_rate, to less than this, it is a "
        "tenth of learning_rate.",
    )
    decay_fraction: FullShare = option(
        0.4,
        "Share of the steps after the warm-up over which wsd falls.",
    )

    lora_rank: Whole = option(
        0,
        "Rank of the adapters that are trained in place of the weights. 0 trains all weights.",
        group="LoRA (fine-tuning in little memory)",
    )
    lora_alpha: Positive | None = option(
        None,
        "Adapters are scaled by lora_alpha / lora_rank. None means twice lora_rank.",
    )

    text_column: Text = option(
        "text",
        "Column of a table or key of a .jsonl file that holds the text. line: each line of "
        "a .txt file is a text of its own.",
        group="Your own text",
    )
    encoding: Text = option(
        "utf-8",
        "Encoding of the text files. utf-8-replace: bytes that are not UTF-8 become U+FFFD.",
    )
    tokenizer: Literal["auto", "gpt2", "char", "bytes"] = option(
        "auto",
        "How text becomes tokens. auto is the model's or the data set's own tokenizer, else gpt2.",
    )
    val_fraction: OpenShare = option(0.1, "Share of your text that is kept for validation.")

    dtype: Dtype = option(
        "auto",
        "Precision of the computation. auto is the best of this device. Weights that are "
        "trained stay float32, except with optimizer=adamw8bit.",
        group="Speed and memory",
    )
    compile: Switch = option(
        "auto",
        "Whether to use torch.compile. auto uses it where it works and saves time.",
    )
    recompute: Recompute = option(
        "none",
        "Computes activations twice to save memory (gradient checkpointing): pointwise saves some, "
        "block saves most.",
    )
    deterministic: bool = option(
        False,
        "Whether every run on this machine gives exactly the same losses. It is slower.",
    )
    backend: Text = option("nccl", "How several GPUs communicate (torch.distributed).")

    eval_only: bool = option(
        False,
        "Train nothing: print the validation loss and the perplexity, and stop.",
        group="Evaluation, checkpoints and logs",
    )
    check: bool = option(
        False,
        "Train nothing: try whether a changed model.py trains, saves, resumes and samples right.",
    )
    eval_iters: Whole = option(
        200,
        "Portions of 12,288 tokens in an evaluation, at most one pass over the text. 0 means one "
        "pass. If you do not set it, an evaluation is at most a tenth of the steps before it.",
    )
    patience: Whole = option(
        0,
        "Evaluations without a new best loss before the run stops. 0 means it never does.",
    )
    always_save_checkpoint: bool = option(
        True,
        "Whether to write the checkpoint last/ at every evaluation.",
    )
    save_interval_s: Amount = option(
        60.0,
        "Seconds between writes of last/. Unless it is set, saving takes at most 2% of the time.",
    )
    log_interval: Count = option(1, "Steps between two lines in metrics.jsonl.")
    wandb_log: bool = option(False, "Whether to log to Weights & Biases, too.")
    wandb_project: Text = option("owt", "Name of the project there.")
    wandb_run_name: Text = option("gpt2", "Name of the run there.")

    def contradictions(self, given: Collection[str]) -> Contradictions:
        """Return the keys whose values cannot hold together, and what to do.

        given: the keys that the user set.
        """
        new = self.init_from == "scratch"
        end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
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
                self.decay_lr and "min_lr" in given and self.min_lr > self.learning_rate,
                ("min_lr", "learning_rate"),
                "the lowest rate is above the highest; lower min_lr or add --decay_lr=False",
            ),
            (
                self.decay_lr
                and {"lr_decay_iters", "warmup_iters"} <= set(given)
                and end <= self.warmup_iters,
                ("lr_decay_iters", "warmup_iters"),
                "the rate would fall before it has risen; raise lr_decay_iters",
            ),
            (
                self.lora_rank == 0 and "lora_alpha" in given and self.lora_alpha is not None,
                ("lora_rank", "lora_alpha"),
                "there are no adapters without a rank; add --lora_rank=16",
            ),
            (
                new and self.lora_rank > self.n_embd,
                ("lora_rank", "n_embd"),
                "the rank can be at most n_embd",
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

    out_dir: PathText = option(
        "out",
        "Folder of the run that trained the model.",
        group="The keys that people use first",
    )
    init_from: PathText = option(
        "resume",
        "Which model: resume (the one in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, the "
        "folder of a model or a run, or a nanoGPT ckpt.pt.",
    )
    start: str = option(
        "\n",
        r"The text to continue; \n is a new line. FILE:prompt.txt reads a file; - standard input.",
    )
    interactive: bool = option(False, "Hold a conversation: you type, the model answers.")
    num_samples: Count = option(10, "Number of texts to write.")
    max_new_tokens: Count = option(500, "Length of each text, in tokens.")
    temperature: Amount = option(
        0.8,
        "Below 1 the text gets safer, above 1 bolder. 0 always takes the likeliest token.",
    )
    top_k: Whole | None = option(
        200,
        "Choose among the k likeliest tokens only. 0 or None means all tokens.",
    )
    seed: Whole = option(1337, "The same seed writes the same text.")
    device: Device = option("auto", "Where to compute. auto is the GPU if there is one.")

    top_p: FullShare = option(
        1.0,
        "Choose among the likeliest tokens that together have this probability.",
        group="Choice of the next token",
    )
    min_p: Share = option(
        0.0,
        "Leave out tokens with less than this share of the likeliest token's probability.",
    )
    repetition_penalty: Positive = option(
        1.0,
        "Above 1, tokens that the text already has become less likely.",
    )

    stop: tuple[Text, ...] = option(
        (),
        r"End a text before this string. May be repeated; \n is a new line.",
        group="Input and output",
    )
    system: Text | None = option(
        None,
        "The system message of a conversation. None means the one that the model was trained with.",
    )
    json: bool = option(False, "Print each text as one line of JSON.")
    checkpoint: Literal["auto", "best", "last"] = option(
        "auto",
        "Which checkpoint of the run. auto is best/ if there is one, else last/.",
    )

    dtype: Dtype = option(
        "auto",
        "Precision of the computation. auto is the best of this device.",
        group="Speed and memory",
    )
    compile: Switch = option("auto", "Has no effect. nanoGPT's sample.py has this key.")

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

    sweep: Text | None = option(
        None,
        "KEY:VALUE,VALUE measures the step at each value of a key; writes a table and bench.png.",
        group="The keys that people use first",
    )
    ladder: bool = option(
        False,
        "Show what each technique gains, from plain float32 on; a table and bench.png.",
    )
    find_batch: bool = option(False, "Find the batch size that is fastest in this memory.")
    sample: bool = option(False, "Measure sample.py: 1, 4, 16 and 64 texts at once.")
    profile: bool = option(False, "Print torch's table of the slowest kernels.")
    plan: bool = option(False, "Predict memory and speed on a card, without a GPU.")
    card: Text = option(
        "NVIDIA GeForce RTX 4070 Ti",
        "The card to plan for: the name that its driver reports, or the end of it (RTX 4070 Ti).",
    )
    vram_gb: Positive | None = option(
        None,
        "Memory of the card to plan for or to imitate, in GB. 1 GiB of it stays free.",
    )

    steps: Count = option(
        20,
        "Measured steps, after the warm-up.",
        group="How to measure",
    )
    json: bool = option(
        False,
        "Print all figures as JSON, as the last line of the output. Otherwise they are written "
        "to bench.json.",
    )
    gradient_accumulation_steps: Count = option(
        1, "Micro-batches in a step, over all GPUs.", group="A step"
    )
    real_data: Switch = option(
        "auto",
        "True reads the data set, False draws random tokens. auto reads it if it is there.",
    )
    vocab_size: Count = option(50257, "Number of different random tokens.")
    attention: Literal["auto", "flash", "math"] = option(
        "auto",
        "Which attention kernel. auto leaves the choice to torch, as training does.",
    )
    max_new_tokens: Count = option(500, "Tokens that each text is continued by, with --sample.")

    def contradictions(self, given: Collection[str]) -> Contradictions:
        """Return the keys whose values cannot hold together, and what to do."""
        found = super().contradictions(given)
        if self.sample and min(self.max_new_tokens, self.block_size - 1) < 2:
            advice = "generation is timed from one new token to the next; it needs at least two"
            found.append((("max_new_tokens", "block_size"), advice))
        return found


def model_shape(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """Return the shape of the model that the settings describe."""
    keys = {}
    for field in fields(GPTConfig):
        if field.name != "vocab_size":
            keys[field.name] = getattr(config, field.name)
    return GPTConfig(**keys, vocab_size=vocab_size)


def with_shape(config: TrainConfig, shape: GPTConfig) -> TrainConfig:
    """Return the settings with the shape of a model."""
    keys = asdict(shape)
    del keys["vocab_size"]
    return replace(config, **keys)


ALL_KEYS = frozenset(key.name for schema in (BenchConfig, SampleConfig) for key in fields(schema))
