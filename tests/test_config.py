"""The configuration: what works in nanoGPT works here, and every mistake gets a clear message."""

import ast
import dataclasses
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

import gpt12.settings
from gpt12.config import load_config
from gpt12.errors import UserError
from gpt12.settings import BenchConfig, SampleConfig, TrainConfig, model_shape, with_shape_keys
from model import GPTConfig
from tests.helpers import ROOT

PRESETS = sorted((ROOT / "config").glob("*.py"))
SCHEMAS = [TrainConfig, SampleConfig, BenchConfig]

# Written down from nanoGPT's scripts, not taken from the settings.
NANOGPT_TRAIN = (
    "--out_dir=out --eval_interval=2000 --log_interval=1 --eval_iters=200 --eval_only=False "
    "--always_save_checkpoint=True --init_from=scratch --wandb_log=False --wandb_project=owt "
    "--wandb_run_name=gpt2 --dataset=openwebtext --gradient_accumulation_steps=40 --batch_size=12 "
    "--block_size=1024 --n_layer=12 --n_head=12 --n_embd=768 --dropout=0.0 --bias=False "
    "--learning_rate=6e-4 --max_iters=600000 --weight_decay=0.1 --beta1=0.9 --beta2=0.95 "
    "--grad_clip=1.0 --decay_lr=True --warmup_iters=2000 --min_lr=6e-5 --backend=nccl"
)
NANOGPT_SAMPLE = (
    "--init_from=resume --out_dir=out --start=\n --num_samples=10 --max_new_tokens=500 "
    "--temperature=0.8 --top_k=200 --seed=1337"
)
NANOGPT_BENCH = "--batch_size=12 --block_size=1024 --bias=False --profile=False"
NANOGPT_CPU_LINE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


@pytest.fixture
def write(tmp_path):
    def write(text, name="my.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def load(schema, argv):
    """Return the configuration, and the keys that are given."""
    loaded = load_config(schema, argv)
    return loaded.config, loaded.given


def refusal(argv, schema=TrainConfig):
    """Return the lines of the message with which argv is refused."""
    with pytest.raises(UserError) as caught:
        load_config(schema, argv)
    return str(caught.value).split("\n")


# --------------------------------------------------------------------------------------------------
# As in nanoGPT


@pytest.mark.parametrize(
    ("schema", "theirs"),
    [
        (TrainConfig, NANOGPT_TRAIN),
        (SampleConfig, NANOGPT_SAMPLE),
        (BenchConfig, NANOGPT_BENCH),
    ],
)
def test_the_defaults_are_those_of_nanogpt(schema, theirs):
    """Who gives them on the command line changes nothing."""
    assert load(schema, theirs.split(" "))[0] == schema()


def test_the_cpu_command_of_nanogpts_readme_works():
    preset = str(ROOT / "config/train_shakespeare_char.py")
    made, given = load(TrainConfig, [preset, *NANOGPT_CPU_LINE.split()])
    said = dict(pair.lstrip("-").split("=") for pair in NANOGPT_CPU_LINE.split())
    assert {key: str(getattr(made, key)) for key in said} == said
    alone, from_file = load(TrainConfig, [preset])
    assert asdict(made) == asdict(alone) | {key: getattr(made, key) for key in said}
    assert given == said.keys() | from_file
    assert (made.dataset, made.out_dir) == ("shakespeare_char", "out-shakespeare-char")


def test_a_config_file_written_for_nanogpt_works(write):
    path = write("""from __future__ import annotations
import time
from math import pi, floor
# a comment
out_dir = 'out-ft'
wandb_run_name = 'ft-' + str(time.time())
_rows = 480
batch_size = 8
gradient_accumulation_steps = _rows // batch_size * 2 # an expression
warmup_iters = max_iters // 100 # a default that the script had
weight_decay *= 2
def helper(x): return x
def patience(): return 'a function is no value'
if device == 'auto': seed = 7
min_lr = helper(learning_rate) / 10
device = 'cuda'; compile = False
n_layer = 12 # the default
top_k = 5 # sample.py's: one file may serve several scripts
""")
    made, given = load(TrainConfig, [path])
    assert re.fullmatch(r"ft-\d+\.\d+", made.wandb_run_name)
    assert (made.batch_size, made.gradient_accumulation_steps, made.warmup_iters) == (8, 120, 6000)
    assert (made.weight_decay, made.seed, made.device, made.compile) == (0.2, 7, "cuda", False)
    keys = "out_dir wandb_run_name batch_size gradient_accumulation_steps warmup_iters weight_decay"
    assert given == {*keys.split(), *"seed min_lr device compile n_layer".split()}


def test_only_what_a_config_file_changes_for_itself_is_set(write, tmp_path, monkeypatch):
    """Names of functions, classes and comprehensions are their own; a `*` or `global` is not."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shared_keys.py").write_text("n_head = 3\nrows = 480\n")
    path = write("""from shared_keys import *
def helper():
    global dropout
    batch_size = 3
    dropout = 0.5
class Own:
    n_layer = 5
_many = [seed for seed in range(3)]
helper()
""")
    made, given = load(TrainConfig, [path])
    assert given == {"n_head", "dropout"}
    assert (made.n_head, made.dropout) == (3, 0.5)


def test_files_beat_defaults_and_the_command_line_beats_files(write):
    first = write("batch_size = 2\nn_layer = 2", "a.py")
    second = write("batch_size = 3\nwarmup_iters = n_layer * 2", "b.py")
    both, given = load(TrainConfig, [first, second])
    assert (both.batch_size, both.n_layer, both.warmup_iters) == (3, 2, 4)
    assert given == {"batch_size", "n_layer", "warmup_iters"}
    for argv in ([second, "--batch_size=4"], ["--batch_size=4", "--eval_only", second]):
        assert load(TrainConfig, argv)[0].batch_size == 4


def test_of_max_iters_and_num_epochs_the_last_one_given_wins(write):
    epochs = write("num_epochs = 3", "epochs.py")
    steps = write("max_iters = 20", "steps.py")
    for num_epochs, *argv in (
        (3, epochs),
        (0, epochs, "--max_iters=5"),
        (2, steps, "--num_epochs=2"),
        (3, steps, epochs),
        (0, epochs, steps),
    ):
        assert load(TrainConfig, argv)[0].num_epochs == num_epochs, argv
    assert len(refusal([write("num_epochs = 3\nmax_iters = 20", "both.py")])) == 1


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--learning_rate=1e-3", 1e-3),
        ("--max_iters=5e3", 5000),
        ("--max-iters=7", 7),
        ("--eval-only", True),
        ("--eval_only=true", True),
        ("--compile=auto", "auto"),
        ("--compile=false", False),
        ("--lr_decay_iters=none", None),
        ("--lora_alpha=8", 8.0),
        ("--recompute=none", "none"),
        ("--dataset=hf:me/it=b", "hf:me/it=b"),
        ("--out_dir=2024", "2024"),
        ("--out_dir=~/out", str(Path.home() / "out")),
        ("--device=cuda:1", "cuda:1"),
    ],
)
def test_text_on_the_command_line_becomes_a_typed_value(word, value):
    key = word.partition("=")[0].lstrip("-").replace("-", "_")
    found = getattr(load(TrainConfig, ["--lora_rank=4", word])[0], key)
    assert (found, type(found)) == (value, type(value))


def test_text_on_the_command_line_of_sampling_becomes_a_typed_value(write):
    words = ["--start=42", "--top_k=None", "--temperature=0", r"--stop=\n\n", "--stop=End"]
    made, _ = load(SampleConfig, words)
    assert (made.start, made.top_k, made.temperature) == ("42", None, 0.0)
    assert made.stop == ("\n\n", "End")
    path = write("import json\nstop = ['a', 'b']\n")
    made, _ = load(SampleConfig, [path])
    assert (made.stop, made.json) == (("a", "b"), False)
    assert load(SampleConfig, [path, "--stop=c", "--stop=d"])[0].stop == ("c", "d")


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("--dropout=1", "Input should be less than 1"),
        ("--dropout=nan", "Input should be a finite number"),
        ("--dropout=True", "Input should be a number"),
        ("--learning_rate=1e999", "Input should be a finite number"),
        ("--learning_rate=", "Input should be a valid number, .*"),
        ("--n_layer=0", "Input should be greater than or equal to 1"),
        ("--n_layer=2.5", "Input should be a valid integer, .*"),
        ("--n_layer", "Input should be a number"),
        ("--lr_decay_iters=never", "Input should be a valid integer, .*"),
        ("--eval_only=2", "Input should be a valid boolean, .*"),
        ("--compile=maybe", "Input should be 'auto', True or False"),
        ("--recompute=all", "Input should be 'none', 'pointwise' or 'block'"),
        ("--optimizer=adam", "Input should be one of adamw, muon, adamw8bit"),
        ("--device=gpu", "String should match pattern .*"),
        ("--out_dir=", "String should have at least 1 character"),
        ("--out_dir", "Input should be a valid string"),
    ],
)
def test_a_wrong_value_is_refused_with_what_it_should_be(word, problem):
    [line] = refusal([word])
    assert re.fullmatch(f"{word}: {problem}", line)


# --------------------------------------------------------------------------------------------------
# Mistakes, all told


def test_all_mistakes_are_reported_at_once(write):
    path = write("\nbatch_size = 0\nlernrate = 3\ndropout = 1.5\n")
    lines = refusal([path, "--n_embd=100", "--n_head=7", "--dropuot=0.1", "--dtype=int8"])
    assert lines == [
        f"{path}:2: batch_size=0: Input should be greater than or equal to 1",
        f"{path}:3: lernrate=3: unknown key; did you mean learning_rate?",
        f"{path}:4: dropout=1.5: Input should be less than 1",
        "--dropuot=0.1: unknown key; did you mean dropout?",
        "--dtype=int8: Input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        "--n_embd=100 --n_head=7: n_embd must be a multiple of n_head",
    ]
    # n_embd and n_head may be what a missing file would have set.
    lines = refusal(["no.py", "--n_embd=100", "--n_head=7", "--dropuot=0.1"])
    assert [line.split(":")[0] for line in lines] == ["no.py", "--dropuot=0.1"]


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("--qqqq=3", ": unknown key; see --help"),
        ("-", ": unknown key; see --help"),
        ("my.txt", ": .* your own text is given by --dataset=my.txt"),
        ("qqqq.py", ": there is no such file; --help lists the presets"),
        ("config/train_gtp2.py", ": there is no such file; did you mean config/train_gpt2.py\\?"),
    ],
)
def test_a_mistake_on_the_command_line_gets_advice(word, advice):
    [line] = refusal([word])
    assert re.fullmatch(f"{word}{advice}", line)


def test_from_another_folder_a_preset_is_named_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [line] = refusal(["config/train_gpt2.py"])
    assert line.endswith(f"did you mean {ROOT / 'config/train_gpt2.py'}?")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("n_layer = 2\nn_head = 1 / 0\n", "2: ZeroDivisionError: division by zero"),
        ("def f():\n    return undefined\nn_layer = f()\n", "2: NameError: "),
        ("n_layer = 2\nn_head = = 2\n", "2: SyntaxError: "),
        ("import no_such_module_at_all\n", "1: ModuleNotFoundError: "),
        ("raise SystemExit('enough')\n", "1: SystemExit: enough"),
        ("out_dir = 3", "1: out_dir=3: Input should be a valid string"),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_its_line(text, problem, write):
    path = write(text)
    [line] = refusal([path, "--n_embd=96"])
    assert line.startswith(f"{path}:{problem}")


def test_a_windows_path_in_a_file_gets_advice(write):
    [line] = refusal([write('dataset = "C:\\Users\\me.txt"\n')])
    assert line.endswith("; write a Windows path with / for \\")


# --------------------------------------------------------------------------------------------------
# Contradictions


@pytest.mark.parametrize(
    ("schema", "line", "keys"),
    [
        (TrainConfig, "--n_embd=100 --n_head=7", "n_embd n_head"),
        (TrainConfig, "--num_epochs=2 --max_iters=10", "max_iters num_epochs"),
        (TrainConfig, "--min_lr=1e-2", "min_lr learning_rate"),
        (TrainConfig, "--lr_decay_iters=9 --warmup_iters=9", "lr_decay_iters warmup_iters"),
        (TrainConfig, "--lr_decay_iters=0 --warmup_iters=9", "lr_decay_iters warmup_iters"),
        (TrainConfig, "--lora_alpha=8", "lora_rank lora_alpha"),
        (
            TrainConfig,
            "--short_context_share=0.5 --block_size=12",
            "short_context_share block_size",
        ),
        (SampleConfig, "--interactive --json", "interactive json"),
    ],
)
def test_values_that_contradict_each_other_are_refused(schema, line, keys):
    [message] = refusal(line.split(), schema)
    assert re.findall(r"--(\w+)=", message.split(": ")[0]) == keys.split()


@pytest.mark.parametrize(
    "line",
    [
        "--lr_decay_iters=10 --max_iters=5",
        "--lr_decay_iters=9 --warmup_iters=9 --decay_lr=False",
        "--warmup_iters=100 --max_iters=5",
        "--max_iters=0",
        "--min_lr=1e-3 --learning_rate=1e-4 --decay_lr=False",
        "--num_epochs=0 --max_iters=10",
        "--init_from=gpt2-xl --n_head=25",
    ],
)
def test_unusual_values_that_do_not_contradict_each_other_are_accepted(line):
    load_config(TrainConfig, line.split())


# --------------------------------------------------------------------------------------------------
# The model's shape, and saved values


def test_a_field_of_gptconfig_is_a_key(monkeypatch):
    """Somebody who adds a field to model.py edits nothing else."""

    @dataclasses.dataclass(frozen=True)
    class Changed(GPTConfig):
        n_kv_head: int = 3

    monkeypatch.setattr("gpt12.settings.GPTConfig", Changed)

    @gpt12.settings.dataclass(frozen=True, config=gpt12.settings.STRICT)
    @with_shape_keys
    class Config:
        block_size: int = 8
        n_layer: int = 2
        n_head: int = 2
        n_embd: int = 8
        dropout: float = 0.0
        bias: bool = False

    assert "vocab_size" not in asdict(Config())
    found = model_shape(Config(n_kv_head=1), vocab_size=13)
    assert (found.n_kv_head, found.n_layer, found.vocab_size) == (1, 2, 13)
    assert Config().n_kv_head == 3
    with pytest.raises(ValueError, match="n_kv_head"):
        Config(n_kv_head="many")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_settings_that_are_saved_can_be_read_again(schema, write):
    path = write("seed = 3\nout_dir = 'b'\nstop = ('a', 'b')\nlr_decay_iters = 5000")
    first = load_config(schema, [path]).config
    assert schema(**json.loads(json.dumps(asdict(first), allow_nan=False))) == first


# --------------------------------------------------------------------------------------------------
# Help, and presets


def help_page(schema, capsys):
    with pytest.raises(SystemExit) as done:
        load_config(schema, ["--nonsense", "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_has_examples_every_key_and_every_preset(schema, capsys):
    page = help_page(schema, capsys)
    lines = page.splitlines()
    assert max(map(len, lines)) <= 100
    assert len([line for line in lines if line.startswith("  python ")]) == 3
    shown = set(re.findall(r"^  --(\w+)=", page, re.MULTILINE))
    elsewhere = asdict(TrainConfig()).keys() if schema is BenchConfig else set()
    assert asdict(schema()).keys() - elsewhere <= shown <= asdict(schema()).keys()
    for preset in PRESETS:
        title = preset.read_text().splitlines()[0].removeprefix("# ")
        assert re.search(rf"^  config/{preset.name} +{re.escape(title)}$", page, re.MULTILINE)


def test_help_shows_defaults_and_choices(capsys):
    text = " ".join(help_page(TrainConfig, capsys).split())
    assert "--weight_decay=0.1 How strongly" in text
    assert "--recompute=none Computes" in text
    assert "One of: none or pointwise or block." in text
    assert "Optimizer --optimizer=adamw How" in text
    assert r"--start=\n The text" in " ".join(help_page(SampleConfig, capsys).split())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_loads_and_its_head_has_command_result_time_and_memory(path):
    text = path.read_text()
    head = text.split("\n\n")[0]
    assert f"config/{path.name}" in head
    assert re.search("^# Result +.*\n# Time +.*\n# VRAM +.*", head, re.MULTILINE)
    assert all(isinstance(node, (ast.Assign, ast.Import)) for node in ast.parse(text).body)
    _, given = load(TrainConfig, [str(path)])
    assert given
    load_config(BenchConfig, [str(path)])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("eval_gpt2", "--init_from=gpt2 --batch_size=8 --eval_iters=500 --eval_only=True"),
        ("eval_gpt2_xl", "--init_from=gpt2-xl --batch_size=8 --eval_only=True"),
        (
            "train_gpt2",
            "--batch_size=12 --block_size=1024 --gradient_accumulation_steps=40 --max_iters=600000 "
            "--lr_decay_iters=600000 --eval_interval=1000 --eval_iters=200 --weight_decay=0.1",
        ),
        (
            "finetune_shakespeare",
            "--dataset=shakespeare --init_from=gpt2-xl --batch_size=1 "
            "--gradient_accumulation_steps=32 --max_iters=20 --learning_rate=3e-5 "
            "--decay_lr=False --eval_interval=5 --eval_iters=40",
        ),
    ],
)
def test_presets_that_nanogpt_has_keep_its_values(monkeypatch, name, theirs):
    monkeypatch.setattr("time.time", lambda: 0.0)  # it is in the name of a run
    preset = str(ROOT / f"config/{name}.py")
    assert load(TrainConfig, [preset, *theirs.split()])[0] == load(TrainConfig, [preset])[0]
