"""What can be set: one field a key, with its type, its default and a comment that --help prints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import Annotated, Literal

# What a value must be, in the words of the error message, and the test itself.
Whole = Annotated[int, "a whole number >= 0", lambda n: 0 <= n < 2**63]
Count = Annotated[int, "a whole number >= 1", lambda n: 1 <= n < 2**63]
Texts = Annotated[
    int, "a whole number in [1, 100000]", lambda n: 1 <= n <= 100_000
]  # they are made at once
Seed = Annotated[int, "a whole number in [0, 2**62)", lambda n: 0 <= n < 2**62]
Amount = Annotated[float, "a number >= 0", lambda x: 0 <= x < inf]
Positive = Annotated[float, "a number > 0", lambda x: 0 < x < inf]
Share = Annotated[float, "a number in [0, 1)", lambda x: 0 <= x < 1]
OpenShare = Annotated[float, "a number in (0, 1)", lambda x: 0 < x < 1]
FullShare = Annotated[float, "a number in (0, 1]", lambda x: 0 < x <= 1]
Prompt = Annotated[
    str, "text", lambda s: s.encode() is not None
]  # which raises for what UTF-8 cannot write
Text = Annotated[str, "text, not empty", lambda s: s.encode() and "\0" not in s]
Device = (
    Literal["auto", "cpu", "mps", "cuda"]
    | Annotated[str, "cuda:N", re.compile("cuda:[0-9]{1,3}").fullmatch]
)
LAYERS = {"c_attn", "c_proj", "c_fc"}
Layers = (
    Literal["all"]
    | Annotated[str, "a list like c_attn,c_proj,c_fc", lambda s: LAYERS.issuperset(s.split(","))]
)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto"] | bool
Optimizer = Literal["adamw", "muon", "adamw8bit"]
Recompute = Literal["auto", "none", "pointwise", "block"]
Quantize = Literal["none", "int8"]


@dataclass
class TrainConfig:
    """Train a GPT: from scratch, from GPT-2's weights (fine-tuning), or on from where a run stopped.

    python train.py                                       tiny Shakespeare, on whatever this machine is
    python train.py config/train_gpt2.py --batch_size=8   a preset, and a changed key
    python train.py config/finetune_gpt2.py --dataset=my.txt
    python train.py --init_from=resume --out_dir=out
    """

    # run
    dataset: Text = "openwebtext"  # a folder in data/, or your own .txt, .csv, .jsonl, a folder of them, hf:owner/name
    init_from: Text = "scratch"  # scratch, resume, gpt2, gpt2-medium, -large, -xl, a model's folder, a nanoGPT ckpt.pt
    out_dir: Text = "out"  # folder of this run: run.json, metrics.jsonl, loss.png, best/, last/
    max_iters: Whole = 600000  # steps in all
    num_epochs: Amount = (
        0.0  # passes over the training split, in place of max_iters; 0: max_iters counts
    )
    eval_only: bool = False  # train nothing: print loss and perplexity, then stop
    seed: Seed = 1337  # of weights, order of data and dropout
    # step
    batch_size: Count | Literal["auto"] = (
        12  # micro-batch: rows at once on a device; auto: measured
    )
    gradient_accumulation_steps: Count = (
        5 * 8
    )  # micro-batches a step over all devices; rows a step for batch_size=auto
    block_size: Count = 1024  # tokens a sequence: the longest context
    # model (a loaded one brings its own shape)
    n_layer: Count = 12  # blocks
    n_head: Count = 12  # attention heads a block; divides n_embd
    n_embd: Count = 768  # width
    dropout: Share = 0.0  # probability; 0 for pre-training, 0.1 or more for fine-tuning
    bias: bool = False  # biases in Linear and LayerNorm; GPT-2 has them
    # optimizer
    learning_rate: Amount = 6e-4  # the highest, after the warm-up
    optimizer: Optimizer = (
        "adamw"  # muon: for the blocks' matrices, adamw for the rest; adamw8bit: less memory
    )
    weight_decay: Amount = 1e-1  # of matrices and embeddings
    beta1: Share = 0.9  # decay of the mean of the gradient
    beta2: Share = 0.95  # decay of the mean of its square
    grad_clip: Amount = 1.0  # largest norm of the gradient; 0: any
    # schedule of the learning rate
    warmup_iters: Whole = 2000  # steps of linear warm-up
    decay_lr: bool = True  # False: learning_rate throughout
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, linear decay
    lr_decay_iters: Whole | None = None  # step at which min_lr is reached; None: max_iters
    min_lr: Amount = (
        6e-5  # the lowest; where only learning_rate is given and lies below this, a tenth of it
    )
    decay_fraction: FullShare = 0.4  # share of the steps over which wsd decays
    # LoRA
    lora_rank: Whole = 0  # rank of the adapters; 0: none, all weights are trained
    lora_alpha: Positive | None = None  # adapters are scaled by alpha / rank; None: 2 * rank
    lora_dropout: Share = 0.0  # probability, on the adapters' input
    lora_targets: Layers = "all"  # which linear layers get one
    # your own text
    text_column: Text = "text"  # column of a .csv, or key of a .jsonl; line: each line of a .txt is a text of its own
    tokenizer: Literal["auto", "gpt2", "char", "bytes"] = (
        "auto"  # auto: the model's or data set's own, else gpt2
    )
    val_fraction: OpenShare = 0.1  # share of your own text kept for validation
    # machine
    device: Device = "auto"  # auto: the GPU if there is one
    dtype: Dtype = "auto"  # of the products; weights stay float32. auto: the best this device has
    compile: Switch = "auto"  # torch.compile; auto: where it works and pays
    recompute: Recompute = (
        "auto"  # gradient checkpointing: less memory for more work; auto: the least that fits
    )
    cuda_graph: Switch = (
        "auto"  # replay a step as one graph; auto: where launching costs more than computing
    )
    quantize: Quantize = "none"  # int8: smaller weights, with eval_only
    deterministic: bool = False  # the same bits on every run of this machine, slower
    backend: Text = "nccl"  # of torch.distributed on GPUs
    # evaluation, checkpoints, logs
    eval_interval: Count = 2000  # steps between evaluations
    eval_iters: Whole = 200  # batches an evaluation, at most one pass over the split; 0: one pass
    patience: Whole = 0  # evaluations without a new best before the run stops; 0: never
    always_save_checkpoint: bool = True  # write last/ at every evaluation
    save_interval_s: Amount = 600.0  # seconds between writes of last/ in any case
    max_bad_steps: Count = (
        20  # updates in a row that may be infinite or NaN (they are skipped) before the run stops
    )
    log_interval: Count = 1  # steps between lines in metrics.jsonl
    wandb_log: bool = False  # log to Weights & Biases as well
    wandb_project: Text = "owt"  # project's name there
    wandb_run_name: Text = "gpt2"  # run's name there

    def conflicts(self, given: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
        """Fields that contradict each other: names, whether they do, what to do. given: key -> where it was set."""
        scratch = self.init_from == "scratch"
        lora = [key for key in ("lora_alpha", "lora_dropout", "lora_targets") if key in given]
        twice = self.num_epochs and given.get("max_iters", 0) == given.get("num_epochs", 1)
        rising = "min_lr" in given and self.decay_lr and self.min_lr > self.learning_rate
        trains = self.quantize != "none" and not self.eval_only
        yield (
            "n_embd n_head",
            scratch and self.n_embd % self.n_head,
            "n_embd must be a multiple of n_head",
        )
        yield "max_iters num_epochs", twice, "both say how long to train: give one of them"
        yield (
            "min_lr learning_rate",
            rising,
            "the lowest rate is above the highest: lower min_lr, or --decay_lr=False",
        )
        yield (
            "quantize eval_only",
            trains,
            "quantized weights cannot be trained: add --eval_only, or drop quantize",
        )
        yield (
            " ".join(["lora_rank", *lora]),
            lora and not self.lora_rank,
            "no LoRA without a rank, say --lora_rank=16",
        )
        yield (
            "lora_rank n_embd",
            scratch and self.lora_rank > self.n_embd,
            "the rank is at most the width",
        )

    def settle(self, given: Mapping[str, str]) -> None:
        """Of two keys that say the same the later one counts; a rate that was not given follows one that was."""
        if [key for key in given if key in ("max_iters", "num_epochs")][-1:] == ["max_iters"]:
            self.num_epochs = 0.0
        if self.decay_lr and "min_lr" not in given and self.min_lr > self.learning_rate:
            self.min_lr = self.learning_rate / 10


@dataclass
class SampleConfig:
    """Write text with a trained model.

    python sample.py --out_dir=out --start="Once upon a time"
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --num_samples=3 --temperature=0
    python sample.py --out_dir=out --interactive
    """

    # model
    out_dir: Text = "out"  # folder of the run that trained it
    init_from: Text = "resume"  # resume: out_dir's; gpt2, gpt2-medium, -large, -xl, a model's or run's folder, ckpt.pt
    checkpoint: Literal["auto", "best", "last"] = "auto"  # auto: best, where there is one
    # text
    start: Prompt = (
        "\n"  # what to continue; FILE:prompt.txt reads it from a file, - from standard input
    )
    interactive: bool = False  # a conversation, in place of start: prompts come from the keyboard
    num_samples: Texts = 10  # texts to write
    max_new_tokens: Count = 500  # length of each, in tokens
    stop: tuple[Text, ...] = ()  # end a text before this string; may be repeated; \n is a new line
    json: bool = False  # one line of JSON a text
    # choice of the next token
    temperature: Amount = 0.8  # below 1 safer, above 1 bolder; 0: always the likeliest
    top_k: Whole | None = 200  # only the k likeliest; 0 or None: all
    top_p: FullShare = 1.0  # only the likeliest that together have this probability
    min_p: Share = 0.0  # only those with at least this share of the likeliest one's probability
    repetition_penalty: Positive = 1.0  # above 1: makes tokens already seen less likely
    seed: Seed = 1337  # the same seed writes the same text
    # machine
    device: Device = "auto"  # auto: the GPU if there is one
    dtype: Dtype = "auto"  # auto: the best this device has
    compile: Switch = "auto"  # torch.compile; auto: where it works and pays
    quantize: Quantize = "none"  # of the weights: less memory, faster

    def conflicts(self, given: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
        """As TrainConfig's."""
        yield (
            "interactive json",
            self.interactive and self.json,
            "a conversation is not written as JSON: leave one out",
        )


@dataclass
class BenchConfig(TrainConfig):
    """Measure train.py's own step and sample.py's own generation on this machine.

    python bench.py
    python bench.py config/train_gpt2_12gb.py --recompute=block
    python bench.py --sweep=batch_size:4,8,16,32
    python bench.py --vram_gb=12 --find_batch
    python bench.py --plan --init_from=gpt2-xl --lora_rank=16

    Every key of train.py counts here too (see python train.py --help), and these. What is asked for
    is done in turn; without any of it the step is measured. Models have random weights: init_from
    gives their shape only.
    """

    # what to measure
    sweep: Text | None = (
        None  # KEY:VALUE,VALUE,... the step at each value of a key; a table and bench.png
    )
    ladder: bool = False  # what each technique brings, from plain fp32 to the step as it is; a table and bench.png
    find_batch: bool = False  # the micro-batch that is fastest in the memory there is
    compare: Literal["none", "transformers"] = (
        "none"  # the same work by GPT2LMHeadModel, with biases and AdamW
    )
    profile: bool = False  # the costliest kernels, and trace.json for chrome://tracing
    sample: bool = False  # prefill and decoding at batch 1, 4, 16 and 64
    report: bool = False  # step, ladder and decoding in bench.json and bench.png, to publish
    plan: bool = False  # predicted memory and speed on a card, without a GPU
    # how
    steps: Count = 20  # timed steps, after the warm-up
    gradient_accumulation_steps: Count = 1  # micro-batches a step
    real_data: Switch = (
        "auto"  # True: the data set's tokens, False: random ones; auto: whichever is there
    )
    vocab_size: Count = 50257  # of random tokens
    attention: Literal["auto", "flash", "math"] = (
        "auto"  # attention's kernel; auto: torch chooses, as in training
    )
    max_new_tokens: Count = 256  # tokens that each text is continued by, with sample
    # card
    card: Text = (
        "NVIDIA GeForce RTX 4070 Ti"  # the one to plan for, by the exact name that its driver gives
    )
    vram_gb: Positive | None = (
        None  # of that card, or to be emulated: the allocator gets 1 GiB less
    )
    peak_tflops: Positive | None = (
        None  # dense bf16 with fp32 accumulation, of a card that is not in the table
    )
    bandwidth_gbs: Positive | None = None  # of that card's memory, GB/s

    def conflicts(self, given: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
        """train.py's, but quantized weights can be sampled from; half a card's figures are none, nor is one token's pace."""
        yield from (
            clash
            for clash in super().conflicts(given)
            if not (self.sample and "quantize" in clash[0])
        )
        half = (self.peak_tflops is None) != (self.bandwidth_gbs is None)
        yield "peak_tflops bandwidth_gbs", half, "a card is described by both: see its datasheet"
        few = (self.sample or self.report) and min(self.max_new_tokens, self.block_size - 1) < 2
        yield (
            "max_new_tokens block_size",
            few,
            "decoding is timed from one new token to the next: make room for two",
        )


ANY_KEY = BenchConfig.__dataclass_fields__.keys() | SampleConfig.__dataclass_fields__.keys()

as_dict = asdict  # every key and its value, ready for JSON
