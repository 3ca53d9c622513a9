"""What can be set, and how it is read: defaults, then config files, then --key=value; the later one wins.

A field of a schema is all there is to an option: its type says what is allowed, its comment is what --help prints.
A config file is Python and is executed: read it before you use a stranger's.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import inspect
import os
import re
import sys
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

# What a value must be, in the words of the error message, and the test itself.
Whole = Annotated[int, "a whole number >= 0", lambda n: 0 <= n < 2**63]
Count = Annotated[int, "a whole number >= 1", lambda n: 1 <= n < 2**63]
Texts = Annotated[int, "a whole number in [1, 100000]", lambda n: 1 <= n <= 100_000]  # they are made at once
Seed = Annotated[int, "a whole number in [0, 2**62)", lambda n: 0 <= n < 2**62]
Amount = Annotated[float, "a number >= 0", lambda x: 0 <= x < inf]
Positive = Annotated[float, "a number > 0", lambda x: 0 < x < inf]
Share = Annotated[float, "a number in [0, 1)", lambda x: 0 <= x < 1]
OpenShare = Annotated[float, "a number in (0, 1)", lambda x: 0 < x < 1]
FullShare = Annotated[float, "a number in (0, 1]", lambda x: 0 < x <= 1]
Prompt = Annotated[str, "text", lambda s: s.encode() is not None]  # which raises for what UTF-8 cannot write
Text = Annotated[str, "text, not empty", lambda s: s.encode() and "\0" not in s]
Device = Literal["auto", "cpu", "mps", "cuda"] | Annotated[str, "cuda:N", re.compile("cuda:[0-9]{1,3}").fullmatch]
LAYERS = {"c_attn", "c_proj", "c_fc"}
Layers = Literal["all"] | Annotated[str, "a list like c_attn,c_proj,c_fc", lambda s: LAYERS.issuperset(s.split(","))]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto"] | bool
Optimizer = Literal["adamw", "muon", "adamw8bit"]
Recompute = Literal["auto", "none", "pointwise", "block"]
Quantize = Literal["none", "int8"]


class UserError(Exception):
    """A mistake of the user's, not of the program's. The message is complete: what is wrong, where, what to do."""


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
    num_epochs: Amount = 0.0  # passes over the training split, in place of max_iters; 0: max_iters counts
    eval_only: bool = False  # train nothing: print loss and perplexity, then stop
    seed: Seed = 1337  # of weights, order of data and dropout
    # step
    batch_size: Count | Literal["auto"] = 12  # micro-batch: rows at once on a device; auto: measured
    gradient_accumulation_steps: Count = 5 * 8  # micro-batches a step over all devices; rows a step for batch_size=auto
    block_size: Count = 1024  # tokens a sequence: the longest context
    # model (a loaded one brings its own shape)
    n_layer: Count = 12  # blocks
    n_head: Count = 12  # attention heads a block; divides n_embd
    n_embd: Count = 768  # width
    dropout: Share = 0.0  # probability; 0 for pre-training, 0.1 or more for fine-tuning
    bias: bool = False  # biases in Linear and LayerNorm; GPT-2 has them
    # optimizer
    learning_rate: Amount = 6e-4  # the highest, after the warm-up
    optimizer: Optimizer = "adamw"  # muon: for the blocks' matrices, adamw for the rest; adamw8bit: less memory
    weight_decay: Amount = 1e-1  # of matrices and embeddings
    beta1: Share = 0.9  # decay of the mean of the gradient
    beta2: Share = 0.95  # decay of the mean of its square
    grad_clip: Amount = 1.0  # largest norm of the gradient; 0: any
    # schedule of the learning rate
    warmup_iters: Whole = 2000  # steps of linear warm-up
    decay_lr: bool = True  # False: learning_rate throughout
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, linear decay
    lr_decay_iters: Whole | None = None  # step at which min_lr is reached; None: max_iters
    min_lr: Amount = 6e-5  # the lowest; where only learning_rate is given and lies below this, a tenth of it
    decay_fraction: FullShare = 0.4  # share of the steps over which wsd decays
    # LoRA
    lora_rank: Whole = 0  # rank of the adapters; 0: none, all weights are trained
    lora_alpha: Positive | None = None  # adapters are scaled by alpha / rank; None: 2 * rank
    lora_dropout: Share = 0.0  # probability, on the adapters' input
    lora_targets: Layers = "all"  # which linear layers get one
    # your own text
    text_column: Text = "text"  # column of a .csv, or key of a .jsonl; line: each line of a .txt is a text of its own
    tokenizer: Literal["auto", "gpt2", "char", "bytes"] = "auto"  # auto: the model's or data set's own, else gpt2
    val_fraction: OpenShare = 0.1  # share of your own text kept for validation
    # machine
    device: Device = "auto"  # auto: the GPU if there is one
    dtype: Dtype = "auto"  # of the products; weights stay float32. auto: the best this device has
    compile: Switch = "auto"  # torch.compile; auto: where it works and pays
    recompute: Recompute = "auto"  # gradient checkpointing: less memory for more work; auto: the least that fits
    cuda_graph: Switch = "auto"  # replay a step as one graph; auto: where launching costs more than computing
    quantize: Quantize = "none"  # int8: smaller weights, with eval_only
    deterministic: bool = False  # the same bits on every run of this machine, slower
    backend: Text = "nccl"  # of torch.distributed on GPUs
    # evaluation, checkpoints, logs
    eval_interval: Count = 2000  # steps between evaluations
    eval_iters: Whole = 200  # batches an evaluation, at most one pass over the split; 0: one pass
    patience: Whole = 0  # evaluations without a new best before the run stops; 0: never
    always_save_checkpoint: bool = True  # write last/ at every evaluation
    save_interval_s: Amount = 600.0  # seconds between writes of last/ in any case
    max_bad_steps: Count = 20  # updates in a row that may be infinite or NaN (they are skipped) before the run stops
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
        yield "n_embd n_head", scratch and self.n_embd % self.n_head, "n_embd must be a multiple of n_head"
        yield "max_iters num_epochs", twice, "both say how long to train: give one of them"
        yield "min_lr learning_rate", rising, "the lowest rate is above the highest: lower min_lr, or --decay_lr=False"
        yield "quantize eval_only", trains, "quantized weights cannot be trained: add --eval_only, or drop quantize"
        yield " ".join(["lora_rank", *lora]), lora and not self.lora_rank, "no LoRA without a rank, say --lora_rank=16"
        yield "lora_rank n_embd", scratch and self.lora_rank > self.n_embd, "the rank is at most the width"

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
    start: Prompt = "\n"  # what to continue; FILE:prompt.txt reads it from a file, - from standard input
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
        yield "interactive json", self.interactive and self.json, "a conversation is not written as JSON: leave one out"


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
    sweep: Text | None = None  # KEY:VALUE,VALUE,... the step at each value of a key; a table and bench.png
    ladder: bool = False  # what each technique brings, from plain fp32 to the step as it is; a table and bench.png
    find_batch: bool = False  # the micro-batch that is fastest in the memory there is
    compare: Literal["none", "transformers"] = "none"  # the same work by GPT2LMHeadModel, with biases and AdamW
    profile: bool = False  # the costliest kernels, and trace.json for chrome://tracing
    sample: bool = False  # prefill and decoding at batch 1, 4, 16 and 64
    report: bool = False  # step, ladder and decoding in bench.json and bench.png, to publish
    plan: bool = False  # predicted memory and speed on a card, without a GPU
    # how
    steps: Count = 20  # timed steps, after the warm-up
    gradient_accumulation_steps: Count = 1  # micro-batches a step
    real_data: Switch = "auto"  # True: the data set's tokens, False: random ones; auto: whichever is there
    vocab_size: Count = 50257  # of random tokens
    attention: Literal["auto", "flash", "math"] = "auto"  # attention's kernel; auto: torch chooses, as in training
    max_new_tokens: Count = 256  # tokens that each text is continued by, with sample
    # card
    card: Text = "NVIDIA GeForce RTX 4070 Ti"  # the one to plan for, by the exact name that its driver gives
    vram_gb: Positive | None = None  # of that card, or to be emulated: the allocator gets 1 GiB less
    peak_tflops: Positive | None = None  # dense bf16 with fp32 accumulation, of a card that is not in the table
    bandwidth_gbs: Positive | None = None  # of that card's memory, GB/s

    def conflicts(self, given: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
        """train.py's, but quantized weights can be sampled from; half a card's figures are none, nor is one token's pace."""
        yield from (clash for clash in super().conflicts(given) if not (self.sample and "quantize" in clash[0]))
        half = (self.peak_tflops is None) != (self.bandwidth_gbs is None)
        yield "peak_tflops bandwidth_gbs", half, "a card is described by both: see its datasheet"
        few = (self.sample or self.report) and min(self.max_new_tokens, self.block_size - 1) < 2
        yield "max_new_tokens block_size", few, "decoding is timed from one new token to the next: make room for two"


Schema = TypeVar("Schema", bound=TrainConfig | SampleConfig)
ANY_KEY = BenchConfig.__dataclass_fields__.keys() | SampleConfig.__dataclass_fields__.keys()


def load(
    schema: type[Schema], argv: Sequence[str], base: Mapping[str, Any] | None = None, check: bool = True
) -> tuple[Schema, set[str]]:
    """The configuration that argv (without the program's name) asks for, and the keys that it sets.

    base: values between the defaults and argv, a saved run's; keys that the schema lacks are ignored.
    check: whether fields that contradict each other are refused.
    Raises UserError with every problem found, one a line. --help prints the page and exits with 0.
    """
    if {"-h", "--help"} & set(argv):
        print(help_page(schema))
        raise SystemExit(0)
    loader = _Loader(schema())
    for key, value in (base or {}).items():
        if key in loader.kinds:
            loader.set(key, [value], f"the saved run: {key}={_show(value)}", "")
    loader.given.clear()
    # Files first: what is typed counts, wherever it stands. Values typed without an equals sign stay with their key.
    files = [word for word in argv if word.endswith(".py") and not word.startswith("-")]
    words = [*files, *(word for word in argv if word not in files)]
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            loader.flag(word, words)
        else:
            loader.file(word)
    return loader.finish(check), set(loader.given)


as_dict = asdict  # every key and its value, ready for JSON


def run_main(main: Callable[[], int | None], *also: type[Exception], page: str | None = None) -> NoReturn:
    """Run a script's main: its status; 2 and a message for UserError or `also`; 130 for Ctrl-C; a bug's traceback.

    141 where what reads its output has ended, as a program in C would (`| head`).

    page: what --help prints, of a script that takes no other argument.
    """
    mistakes: tuple[type[Exception], ...] = (UserError, *also)
    try:
        if page and {"-h", "--help"} & set(sys.argv):
            print(page.strip())
            sys.exit(0)
        if page and sys.argv[1:]:
            raise UserError(f"{_show(sys.argv[1], str)}: this script has no options; --help says what it does")
        sys.exit(main())
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    finally:
        status = getattr(sys.exc_info()[1], "code", 1)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError as error:
                # Else Python's own attempt, when it ends, would fail as well.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                if not isinstance(error, BrokenPipeError) and not status:
                    print(f"error: not all of the output could be written: {error.strerror}", file=sys.stderr)
                    sys.exit(2)


class _Loader:
    """Collects values and problems, source by source."""

    def __init__(self, config: Any) -> None:
        self.config, self.kinds = config, get_type_hints(type(config), include_extras=True)
        self.given: dict[str, str] = {}  # key -> where it was set, the latest last
        self.problems: list[str] = []
        self.doubtful: set[str] = set()  # keys that do not hold what the user meant

    def set(self, key: str, readings: Sequence[Any], said: str, source: str) -> None:
        """Set a field to the first reading of its value that its type admits."""
        self.given.pop(key, None)
        self.given[key] = source
        for value in readings:
            with suppress(Exception):  # a config file's value may be any object, and comparing it raise anything
                setattr(self.config, key, _convert(value, self.kinds[key]))
                return
        self.doubtful.add(key)
        self.problems.append(f"{said} must be {_words(self.kinds[key]).replace(' | ', ' or ')}")

    def unknown(self, key: str, said: str) -> None:
        near = difflib.get_close_matches(key[:80], self.kinds, 1)
        self.problems.append(f"{said}: unknown key; " + (f"did you mean {near[0]}?" if near else "--help lists them"))

    def flag(self, word: str, following: list[str]) -> None:
        """One --key=value, or --key alone for True."""
        name, equals, text = word.partition("=")
        key, said = name.lstrip("-").replace("-", "_"), _show(word, str)
        kind = self.kinds.get(key)
        if kind is None:
            self.unknown(key, said)
        elif get_origin(kind) is tuple and equals:  # a key that may be repeated
            text = re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text)
            before = getattr(self.config, key) if self.given.get(key) == "command line" else ()
            self.set(key, [(*before, text)], said, "command line")
        elif equals or bool in (kind, *get_args(kind)):
            self.set(key, _readings(text) if equals else [True], said, "command line")
        else:
            text = following.pop(0) if following and not following[0].startswith("-") else "VALUE"
            self.problems.append(f"{said} needs its value after an equals sign: {said}={_show(text, str)}")
            self.doubtful.add(key)

    def file(self, name: str) -> None:
        """Execute a config file and take over what it assigns."""
        try:
            tree, space = _execute(name, vars(self.config))
        except UserError as problem:
            self.problems.append(str(problem))
            self.doubtful.update(self.kinds)
            return
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        read = {node.id for node in names if isinstance(node.ctx, ast.Load)}  # helpers, not misspelt keys
        line_of = {node.id: node.lineno for node in names if isinstance(node.ctx, ast.Store)}
        for key, value in space.items():
            said = f"{name}:{line_of.get(key, 1)}: {key}={_show(value)}"
            if callable(value) or isinstance(value, types.ModuleType):
                continue
            if key in self.kinds:
                self.set(key, [value], said, name)
            elif key in line_of and not key.startswith("_") and key not in read | ANY_KEY:
                self.unknown(key, said)

    def finish(self, check: bool) -> Any:
        """The configuration, if nothing speaks against it."""
        for names, clash, advice in self.config.conflicts(self.given):
            if check and clash and self.doubtful.isdisjoint(names.split()):
                values = " ".join(f"--{key}={getattr(self.config, key)}" for key in names.split())
                self.problems.append(f"{values}: {advice}")
        if self.problems:
            raise UserError("\n".join(self.problems))
        getattr(self.config, "settle", lambda given: None)(self.given)
        return self.config


def _execute(name: str, present: Mapping[str, Any]) -> tuple[ast.Module, dict[str, Any]]:
    """Run a config file: its syntax tree and the names it leaves. It can read the present values, as in nanoGPT."""
    if name.startswith("hf:") or name.lower().endswith((".txt", ".csv", ".jsonl")):
        said, key = _show(name, str), "--dataset=" if "dataset" in present else "--start=FILE:"
        raise UserError(f"{said}: a config file is Python; your own text is given as {key}{said}")
    try:
        source = Path(name).read_bytes()
    except (OSError, ValueError) as error:
        presets = {Path(path).stem: path for path in _presets()}
        near = difflib.get_close_matches(Path(name).stem[:80], presets, 1, 0.5)
        hint = f"the nearest is {presets[near[0]]}" if near else "--help lists the presets"
        hint = f"a key is set with two dashes: --{_show(name, str)}" if "=" in name else hint
        raise UserError(f"{_show(name, str)}: no config file that can be read; {hint}") from error
    # Values lie where Python looks last, among the builtins: what is in `space` afterwards was set by the file.
    space: dict[str, Any] = {"__builtins__": {**vars(builtins), **present}, "__file__": name}
    try:
        tree = ast.parse(source, name)
        exec(compile(tree, name, "exec"), space)  # noqa: S102  (a config file is code, as --help says)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1
        raise UserError(f"{name}:{line}: {type(error).__name__}: {_show(error, str)}") from error
    return tree, space


def _convert(value: Any, kind: Any) -> Any:
    """value as a field's type has it: 5e3 is a whole number too, 1 also a float. Raises ValueError where it is none."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in args:
            with suppress(ValueError):
                return _convert(value, option)
    elif origin is Annotated:
        value = _convert(value, args[0])
        if args[2](value):
            return value
    elif origin is tuple:
        return tuple(_convert(part, args[0]) for part in ([value] if isinstance(value, str) else value))
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif kind in (int, float):
        real = type(value) is not bool and isinstance(value, Real)
        if real and (kind is float or value % 1 == 0):
            return kind(value)
    elif isinstance(value, kind):
        return value
    raise ValueError


def _words(kind: Any) -> str:
    """What a field's type admits."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return args[1]
    if origin is tuple:
        return _words(args[0])
    choices = [arg if isinstance(arg, str) else _words(arg) for arg in args]
    return " | ".join(choices) or ("True | False" if kind is bool else "None")


def _readings(text: str) -> list[Any]:
    """What a command line's text may mean: a Python value (true, false and none are understood too), then itself."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        value = ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
        return [value] if isinstance(value, str) else [value, text]
    return [text]


def _show(value: Any, form: Callable[[Any], str] = repr) -> str:
    """Any value in one line of at most 120 characters."""
    try:
        text = form(value)
    except Exception:  # the repr of an object out of a config file
        text = f"a {type(value).__name__}"
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 120 else text[:117] + "..."


def _presets() -> dict[str, str]:
    """Path of each preset in config/, and its title: the comment that it begins with."""
    files = {str(path): path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}
    return {path: text.splitlines()[0].lstrip("# ") for path, text in files.items() if text.startswith("#")}


def help_page(schema: type) -> str:
    """What --help prints: the schema's docstring, its fields with their comments, and the presets."""
    page = [inspect.cleandoc(schema.__doc__ or "")]
    page += ["", "Config files are applied in order, then --key=value; the later one wins; --key alone means True."]
    page += ["A config file is Python and is executed: read a stranger's before you use it."]
    page += ["", "Keys and their defaults:"]
    kinds, defaults = get_type_hints(schema, include_extras=True), vars(schema())
    for line in inspect.getsource(schema).splitlines():
        if group := re.match(r"    # (.*)", line):
            page += ["", group[1]]
        elif field := re.match(r"    (\w+): .*  # (.*)", line):
            kind, default = kinds[field[1]], defaults[field[1]]
            head = f"  --{field[1]}={default if str(default).isprintable() else repr(default)}"
            body = textwrap.wrap(field[2] + (f" ({_words(kind)})" if "Literal" in str(kind) else ""), 62)
            page += [f"{head:<36}  {body[0]}", *(" " * 38 + more for more in body[1:])]
    page += ["", "presets", *(f"  config/{Path(path).name:<29}{title}" for path, title in _presets().items())]
    return "\n".join(page)
