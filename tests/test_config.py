"""The configuration: what works in nanoGPT works here, and every mistake gets a clear message."""

import ast
import builtins
import contextlib
import inspect
import io
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt12.config import load_config
from gpt12.errors import UserError
from gpt12.run import read_request
from gpt12.settings import BenchConfig, SampleConfig, TrainConfig
from tests.harmless import harmless

REPOSITORY = Path(__file__).parents[1]
PRESETS = sorted(
    path for path in (REPOSITORY / "config").glob("*.py") if path.read_text().startswith("#")
)
SCHEMAS = [TrainConfig, SampleConfig, BenchConfig]

# Written down from nanoGPT's scripts, not taken from the schema.
NANOGPT_TRAIN = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "min_lr": 6e-5,
    "backend": "nccl",
}
NANOGPT_SAMPLE = {
    "init_from": "resume",
    "out_dir": "out",
    "start": "\n",
    "num_samples": 10,
    "max_new_tokens": 500,
    "temperature": 0.8,
    "top_k": 200,
    "seed": 1337,
}
NANOGPT_CPU_LINE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


@pytest.fixture
def write(tmp_path):
    def write(text, name="my.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refusal(argv, schema=TrainConfig, base=None):
    """Return the lines of the message with which argv is refused."""
    with pytest.raises(UserError) as caught:
        load_config(schema, argv, base)
    return str(caught.value).split("\n")


# --------------------------------------------------------------------------------------------------
# As in nanoGPT


def test_the_defaults_are_those_of_nanogpt():
    train = asdict(TrainConfig())
    sample = asdict(SampleConfig())
    assert {key: train[key] for key in NANOGPT_TRAIN} == NANOGPT_TRAIN
    assert {key: sample[key] for key in NANOGPT_SAMPLE} == NANOGPT_SAMPLE
    bench = {"batch_size": 12, "block_size": 1024, "bias": False, "profile": False, "seed": 1337}
    assert asdict(BenchConfig()).items() >= bench.items()


def test_the_cpu_command_of_nanogpts_readme_works():
    preset = str(REPOSITORY / "config/train_shakespeare_char.py")
    made, given = load_config(TrainConfig, [preset, *NANOGPT_CPU_LINE.split()])
    said = dict(pair.lstrip("-").split("=") for pair in NANOGPT_CPU_LINE.split())
    assert {key: str(getattr(made, key)) for key in said} == said
    alone, from_file = load_config(TrainConfig, [preset])
    rest = asdict(alone).keys() - said.keys()
    assert {key: getattr(made, key) for key in rest} == {key: getattr(alone, key) for key in rest}
    assert given == said.keys() | from_file
    assert (made.dataset, made.out_dir) == ("shakespeare_char", "out-shakespeare-char")


def test_a_config_file_written_for_nanogpt_works(write):
    path = write("""from __future__ import annotations
import time
from math import pi, floor
# a comment
out_dir = 'out-ft'
wandb_run_name = 'ft-' + str(time.time())
rows = 480  # a helper that the file reads
batch_size = 8
gradient_accumulation_steps = rows // batch_size * 2 # an expression
warmup_iters = max_iters // 100 # a default that the script had
weight_decay *= 2
_note = 'ignored'
def helper(x): return x
def patience(): return 'a function is no value'
for i in range(3): seed = 5 + i
min_lr = helper(learning_rate) / 10
device = 'cuda'; compile = False
top_k = 5 # sample.py's: one file may serve several scripts
""")
    made, given = load_config(TrainConfig, [path])
    assert re.fullmatch(r"ft-\d+\.\d+", made.wandb_run_name)
    assert (made.batch_size, made.gradient_accumulation_steps, made.warmup_iters) == (8, 120, 6000)
    assert (made.weight_decay, made.seed, made.device, made.compile) == (0.2, 7, "cuda", False)
    assert given == {
        "out_dir",
        "wandb_run_name",
        "batch_size",
        "gradient_accumulation_steps",
        "warmup_iters",
        "weight_decay",
        "seed",
        "min_lr",
        "device",
        "compile",
    }


def test_files_beat_defaults_and_the_command_line_beats_files(write):
    first = write("batch_size = 2\nn_layer = 2", "a.py")
    second = write("batch_size = 3", "b.py")
    assert load_config(TrainConfig, [first, second])[0].batch_size == 3
    assert load_config(TrainConfig, [first, "--batch_size=4"])[0].batch_size == 4
    assert load_config(TrainConfig, ["--batch_size=4", first])[0].batch_size == 4
    made, given = load_config(
        TrainConfig, [first, "--batch_size=4"], {"batch_size": 9, "n_head": 6, "gone": 1}
    )
    assert (made.batch_size, made.n_layer, made.n_head, given) == (
        4,
        2,
        6,
        {"batch_size", "n_layer"},
    )


@pytest.mark.parametrize("name", ["my.py", "my.cfg", "MY.PY", "my"])
def test_a_key_on_the_command_line_beats_a_file_of_any_name(write, name):
    path = write("batch_size = 3\nn_layer = 3", name)
    for argv in (
        ["--batch_size=4", path],
        [path, "--batch_size=4"],
        ["--eval_only", path, "--batch_size=4"],
    ):
        made, given = load_config(TrainConfig, argv)
        assert (made.batch_size, made.n_layer) == (4, 3)
        assert given >= {"batch_size", "n_layer"}


# --------------------------------------------------------------------------------------------------
# What a config file may do


def given_by(text, write):
    """Return the keys that a config file sets, with their values."""
    made, given = load_config(TrainConfig, [write(text)])
    return {key: getattr(made, key) for key in given}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("batch_size = 12", {"batch_size": 12}),  # also where it is the default
        ("if device == 'auto':\n    seed = 3\nelse:\n    n_head = 3", {"seed": 3}),
        ("def choose():\n    n_head = 3\n    return n_head\nseed = choose()", {"seed": 3}),
        ("def choose():\n    global seed\n    seed = 3\nchoose()", {"seed": 3}),
        ("globals()['seed'] = 3", {"seed": 3}),
        ("exec('seed = 3')", {"seed": 3}),
        ("base = 2\ndef twice(): return 2 * base\nseed = twice()", {"seed": 4}),
        ("base = 2\nseed = sum(base * n_head for n_head in range(3))", {"seed": 6}),
        ("seed = [n_layer := 5, 6][1]", {"n_layer": 5, "seed": 6}),
        ("for seed in range(3): pass", {"seed": 2}),
        ("seed: int = 3", {"seed": 3}),
        ("seed, (n_head, *_) = 3, (4, 5)", {"seed": 3, "n_head": 4}),
        ("seed = 3\ndel seed", {}),
        ("seed = 3\nseed += n_layer", {"seed": 15}),
        ("class Shape:\n    n_head = 3\nseed = Shape.n_head", {"seed": 3}),
        ("from fractions import Fraction\nlearning_rate = Fraction(1, 2)", {"learning_rate": 0.5}),
        ("from math import *\nseed = floor(pi)", {"seed": 3}),
        ("from contextlib import suppress as seed", {}),
        ("if __name__ == '__main__': seed = len(__file__) * 0", {"seed": 0}),
        ("seed = eval('n_layer')", {"seed": 12}),
    ],
)
def test_what_a_file_assigns_is_what_it_sets(text, given, write):
    assert given_by(text, write) == given


def test_a_file_reads_the_values_of_the_file_before_it(write):
    first = write("n_layer = 3", "a.py")
    second = write("warmup_iters = n_layer * 2", "b.py")
    assert load_config(TrainConfig, [first, second])[0].warmup_iters == 6
    assert load_config(TrainConfig, [second], {"n_layer": 5})[0].warmup_iters == 10


def test_a_file_leaves_nothing_behind(write):
    before = vars(builtins).copy()
    load_config(TrainConfig, [write("seed = 3\nhelper = 4\nprint(helper, n_layer, end='')")])
    assert vars(builtins) == before


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lernrate = 3", "1: lernrate=3: unknown key; did you mean learning_rate?"),
        (
            "seed = 3\nfor lernrate in (1, 2): pass",
            "2: lernrate=2: unknown key; did you mean learning_rate?",
        ),
        (
            "lernrate = 3\nlearning_rate = lernrate / 10",
            None,
        ),  # a helper, because the file reads it
        ("_lernrate = 3", None),
        ("import lernrates_of_mine_that_are_not_there as a", "1: ModuleNotFoundError"),
        ("temperature = 3", None),  # a key of sample.py
    ],
)
def test_a_misspelt_key_in_a_file_is_reported_and_a_helper_is_not(text, problem, write):
    path = write(text)
    if problem is None:
        load_config(TrainConfig, [path])
    else:
        (line,) = refusal([path])
        assert line.startswith(f"{path}:{problem}")


# --------------------------------------------------------------------------------------------------
# Resuming


@pytest.fixture
def saved_run(tmp_path):
    """Write the run.json of a run with 3 blocks."""
    config = asdict(TrainConfig(n_layer=3, n_head=3, n_embd=96))
    (tmp_path / "run.json").write_text(json.dumps({"config": config}))
    return str(tmp_path)


@pytest.mark.parametrize(
    "asks", ["file", "--init_from=resume", "--init-from=resume", "--init_from='resume'"]
)
def test_a_run_is_resumed_wherever_init_from_was_set(asks, saved_run, write):
    argv = [write("init_from = 'resume'")] if asks == "file" else [asks]
    request = read_request([*argv, f"--out_dir={saved_run}", "--max_iters=7"])
    assert request.resumed
    made = request.config
    assert (made.n_layer, made.max_iters, made.init_from) == (3, 7, "scratch")
    assert "max_iters" in request.given


@pytest.mark.parametrize("asks", ["file", "--init_from=resume"])
def test_contradictions_are_checked_with_the_saved_values(asks, saved_run, write):
    """Dropout of adapters contradicts the default rank, which is 0, but not the saved one."""
    file = Path(saved_run, "run.json")
    saved = json.loads(file.read_text())
    saved["config"] |= {"lora_rank": 8}
    file.write_text(json.dumps(saved))
    argv = [write("init_from = 'resume'")] if asks == "file" else [asks]
    made = read_request([*argv, f"--out_dir={saved_run}", "--lora_dropout=0.1"]).config
    assert (made.lora_rank, made.lora_dropout) == (8, 0.1)


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--learning_rate=1e-3", 1e-3),
        ("--learning_rate=1", 1.0),
        ("--max_iters=5e3", 5000),
        ("--max_iters=1_000", 1000),
        ("--max-iters=7", 7),
        ("--eval-only", True),
        ("--eval_only=true", True),
        ("--eval_only=False", False),
        ("--compile", True),
        ("--compile=auto", "auto"),
        ("--compile=False", False),
        ("--lr_decay_iters=None", None),
        ("--lr_decay_iters=none", None),
        ("--lora_alpha=8", 8.0),
        ("--batch_size=auto", "auto"),
        ("--dataset=my.txt", "my.txt"),
        ("--dataset='my.txt'", "my.txt"),
        ('--dataset="my.txt"', "my.txt"),
        ("--dataset=hf:me/it=b", "hf:me/it=b"),
        ("--out_dir=17", "17"),
        ("--out_dir=None", "None"),
        ("--device=cuda:1", "cuda:1"),
        ("--lora_targets=c_fc,c_proj", "c_fc,c_proj"),
        ("--save_interval_s=5", 5.0),
        ("--save_interval_s=auto", "auto"),
    ],
)
def test_text_on_the_command_line_becomes_a_typed_value(word, value):
    key = re.split("[=]", word)[0].lstrip("-").replace("-", "_")
    found = getattr(load_config(TrainConfig, ["--lora_rank=4", word])[0], key)
    assert (found, type(found)) == (value, type(value))


def test_text_on_the_command_line_of_sampling_becomes_a_typed_value():
    made, _ = load_config(
        SampleConfig,
        ["--start=What is \\n?", "--top_k=0", "--temperature=0", r"--stop=\n\n", "--stop=End\\\\"],
    )
    assert (made.start, made.top_k, made.temperature, made.stop) == (
        "What is \\n?",
        0,
        0.0,
        ("\n\n", "End\\"),
    )
    assert load_config(SampleConfig, ["--top_k=None", "--start="])[0].top_k is None
    # Quoted text is read as Python, as in nanoGPT.
    assert load_config(SampleConfig, ["--start='a\\nb'"])[0].start == "a\nb"


def test_importing_a_module_with_the_name_of_a_key_sets_nothing(write):
    assert (
        load_config(SampleConfig, [write("import json\nseed = len(json.dumps(3))")])[0].json
        is False
    )


def test_stop_strings_of_the_command_line_replace_those_of_a_file(write):
    path = write("stop = ['a', 'b']")
    assert load_config(SampleConfig, [path])[0].stop == ("a", "b")
    assert load_config(SampleConfig, [path, "--stop=c", "--stop=d"])[0].stop == ("c", "d")


@pytest.mark.parametrize(
    ("word", "must_be"),
    [
        ("--dropout=1", "a number in [0, 1)"),
        ("--dropout=-0.1", "a number in [0, 1)"),
        ("--dropout=nan", "a number in [0, 1)"),
        ("--learning_rate=1e999", "a number >= 0"),
        ("--learning_rate=fast", "a number >= 0"),
        ("--learning_rate=", "a number >= 0"),
        ("--n_layer=0", "a whole number >= 1"),
        ("--n_layer=2.5", "a whole number >= 1"),
        ("--n_layer=True", "a whole number >= 1"),
        ("--n_layer=1e40", "a whole number >= 1"),
        ("--max_iters=1e40", "a whole number >= 0"),
        ("--batch_size=-1", "a whole number >= 1 or auto"),
        ("--batch_size=AUTO", "a whole number >= 1 or auto"),
        ("--eval_only=1", "True or False"),
        ("--compile=yes", "auto or True or False"),
        ("--save_interval_s=-1", "a number >= 0 or auto"),
        ("--optimizer=sgd", "adamw or muon or adamw8bit"),
        ("--lr_decay_iters=never", "a whole number >= 0 or None"),
        ("--lora_alpha=0", "a number > 0 or None"),
        ("--lora_rank=-1", "a whole number >= 0"),
        ("--lora_targets=c_attn,wte", "all or a list like c_attn,c_proj,c_fc"),
        ("--val_fraction=1", "a number in (0, 1)"),
        ("--decay_fraction=0", "a number in (0, 1]"),
        ("--device=gpu", "auto or cpu or mps or cuda or cuda:N"),
        ("--out_dir=", "text, not empty"),
        (r"--out_dir='a\0b'", "text, not empty"),
        ("--out_dir=\udcff", "text, not empty"),
        ("--seed=-1", "a whole number in [0, 2**62)"),
    ],
)
def test_a_wrong_value_is_refused_with_what_it_must_be(word, must_be):
    shown = word if word.isprintable() else repr(word)
    assert refusal([word]) == [f"{shown} must be {must_be}"]


@pytest.mark.parametrize(
    "word",
    [
        "--temperature=-1",
        "--top_k=-1",
        "--top_p=0",
        "--top_p=1.01",
        "--min_p=1",
        "--repetition_penalty=0",
        "--stop=",
        "--num_samples=0",
        "--num_samples=1e9",
        "--max_new_tokens=0",
        "--checkpoint=first",
        "--stop",
    ],
)
def test_a_wrong_value_for_sampling_is_refused(word):
    assert len(refusal([word], SampleConfig)) == 1


def test_a_wrong_value_in_a_file_is_refused_with_its_line(write):
    path = write("\nn_layer = 4\n\ndropout = 1.5\nout_dir = 3\nlearning_rate = '1e-3'\n")
    assert refusal([path]) == [
        f"{path}:4: dropout=1.5 must be a number in [0, 1)",
        f"{path}:5: out_dir=3 must be text, not empty",
        f"{path}:6: learning_rate='1e-3' must be a number >= 0",
    ]


def test_objects_that_raise_on_every_operation_are_refused(write):
    path = write("""
class Nasty:
    def __repr__(self): raise RuntimeError
    __eq__ = __lt__ = __le__ = __hash__ = __mod__ = __float__ = __repr__
n_layer = Nasty()
dropout = [1] * 10**6
optimizer = {}
compile = Nasty()
learning_rate = 10**400
class Yes:
    __eq__ = lambda self, other: True
schedule = Yes()
""")
    lines = refusal([path])
    found = [line.removeprefix(path).split("=")[0] for line in lines]
    assert found == [
        ":5: n_layer",
        ":6: dropout",
        ":7: optimizer",
        ":8: compile",
        ":9: learning_rate",
        ":12: schedule",
    ]
    assert max(map(len, lines)) < 300


# --------------------------------------------------------------------------------------------------
# Mistakes, all told


def test_all_mistakes_are_reported_at_once(write):
    path = write("batch_size = 0\nlernrate = 3\n")
    lines = refusal(
        [
            path,
            "--n_embd=100",
            "--n_head=7",
            "--dropuot=0.1",
            "--dtype=int8",
            "config/train_shakespeer.py",
        ]
    )
    assert len(lines) == 5  # n_embd and n_head may be what the missing file would have set
    assert lines[0].startswith(f"{path}:1: batch_size=0 must be")
    assert lines[1] == f"{path}:2: lernrate=3: unknown key; did you mean learning_rate?"
    assert "train_shakespeare_c" in lines[2] and lines[2].startswith(
        "config/train_shakespeer.py: there is no such file; did you mean "
    )
    assert lines[3] == "--dropuot=0.1: unknown key; did you mean dropout?"
    assert lines[4].startswith("--dtype=int8 must be auto or float32")
    both = refusal(["--n_embd=100", "--n_head=7", "--dropuot=0.1"])
    assert both[1] == "--n_embd=100 --n_head=7: n_embd must be a multiple of n_head"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--batch_size", "8"],
            "--batch_size needs its value after an equals sign: --batch_size=8",
        ),
        (
            ["--batch_size", "--eval_only"],
            "--batch_size needs its value after an equals sign: --batch_size=VALUE",
        ),
        (
            ["--batch_size", "config/eval_gpt2.py"],
            "--batch_size needs its value after an equals sign: --batch_size=VALUE",
        ),
        (["--compile", "False"], "--compile needs its value after an equals sign: --compile=False"),
        (
            ["--eval_only", "true"],
            "--eval_only needs its value after an equals sign: --eval_only=true",
        ),
        (
            ["batch_size=8"],
            "batch_size=8: there is no such file; a key is set with two dashes: --batch_size=8",
        ),
        (["--=3"], "--=3: unknown key; --help lists the keys"),
        (["-"], "-: unknown key; --help lists the keys"),
        (["--qqqq=3"], "--qqqq=3: unknown key; --help lists the keys"),
        ([""], ": no config file that can be read; --help lists the presets"),
        (["config"], "config: no config file that can be read; --help lists the presets"),
        (["a\0b"], r"'a\x00b': no config file that can be read; --help lists the presets"),
    ],
)
def test_a_mistake_on_the_command_line_gets_advice(argv, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert refusal(argv) == [message]


@pytest.mark.parametrize("there", [True, False])
def test_a_text_given_as_a_config_file_gets_advice(write, there):
    for name in ("my.txt", "My.TXT", "my.md", "my.csv", "my.jsonl"):
        path = write("seed = 3\n", name) if there else name
        assert refusal([path]) == [
            f"{path}: a config file is Python; your own text is given as --dataset={path}"
        ]
        assert refusal([path], SampleConfig)[0].endswith(f" given as --start=FILE:{path}")
    assert refusal(["hf:me/it"])[0].endswith(" given as --dataset=hf:me/it")


def test_a_misspelt_preset_gets_the_path_of_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "config/train_gtp2.py: there is no such file; did you mean {}?"
    preset = Path("config/train_gpt2.py")
    assert refusal(["config/train_gtp2.py"]) == [message.format(REPOSITORY / preset)]
    monkeypatch.chdir(REPOSITORY)
    assert refusal(["config/train_gtp2.py"]) == [message.format(preset)]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("n_layer = 2\nn_head = 1 / 0\n", 2, "ZeroDivisionError"),
        ("def f():\n    return undefined\nn_layer = f()\n", 2, "NameError"),
        ("n_layer = 2\nn_head = = 2\n", 2, "SyntaxError"),
        ("import no_such_module_at_all\n", 1, "ModuleNotFoundError"),
        ("open('/no/such/file')\n", 1, "FileNotFoundError"),
        ("n_layer = int('x')\n", 1, "ValueError"),
        ("raise SystemExit('enough')\n", 1, "SystemExit: enough"),
        ("raise RuntimeError('two\\nlines')\n", 1, r"RuntimeError: 'two\nlines'"),
        (b"n_layer = 2\0\n", 1, ""),
        (b"out_dir = '\xff'\n", 1, "SyntaxError"),
        ("(" * 1000, 1, ""),
        ("x = " + "-" * 100_000 + "1", 1, ""),
    ],
)
def test_a_file_that_raises_is_refused_with_the_line(text, where, what, write):
    path = write(text)
    (line,) = refusal([path, "--n_embd=100"])  # n_head may be what the file would have set
    assert line.startswith(f"{path}:{where}: ") and what in line


# --------------------------------------------------------------------------------------------------
# Contradictions


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("--n_embd=100 --n_head=7", "n_embd n_head"),
        ("--num_epochs=2 --max_iters=10", "max_iters num_epochs"),
        ("--min_lr=1e-2", "min_lr learning_rate"),
        ("--min_lr=1e-3 --learning_rate=1e-4", "min_lr learning_rate"),
        ("--lora_alpha=8", "lora_rank lora_alpha"),
        ("--lora_rank=0 --lora_dropout=0.1", "lora_rank lora_dropout"),
        ("--lora_rank=1000", "lora_rank n_embd"),
    ],
)
def test_values_that_contradict_each_other_are_refused(line, keys):
    (message,) = refusal(line.split())
    assert re.findall(r"--(\w+)=", message.split(": ")[0]) == keys.split()


def test_a_conversation_as_json_is_refused():
    (message,) = refusal(["--interactive", "--json"], SampleConfig)
    assert message.startswith("--interactive=True --json=True: ")
    load_config(SampleConfig, ["--interactive", "--json=False"])


@pytest.mark.parametrize(
    "line",
    [
        "--lr_decay_iters=10 --max_iters=5",
        "--warmup_iters=100 --max_iters=5",
        "--eval_interval=100 --max_iters=5",
        "--max_iters=0",
        "--min_lr=1e-3 --learning_rate=1e-4 --decay_lr=False",
        "--num_epochs=0 --max_iters=10",
        "--init_from=gpt2-xl --n_head=25",
        "--lora_rank=0",
        "--lora_rank=8 --lora_alpha=1",
        "--init_from=gpt2-xl --lora_rank=1000",
    ],
)
def test_unusual_values_that_do_not_contradict_each_other_are_accepted(line):
    load_config(TrainConfig, line.split())


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("--peak_tflops=80", "peak_tflops bandwidth_gbs"),
        ("--bandwidth_gbs=500", "peak_tflops bandwidth_gbs"),
        ("--sample --max_new_tokens=1", "max_new_tokens block_size"),
        ("--report --block_size=2", "max_new_tokens block_size"),
    ],
)
def test_values_that_contradict_each_other_in_a_benchmark_are_refused(line, keys):
    (message,) = refusal(line.split(), BenchConfig)
    assert re.findall(r"--(\w+)=", message.split(": ")[0]) == keys.split()


@pytest.mark.parametrize("line", ["--peak_tflops=80 --bandwidth_gbs=500", "--block_size=2"])
def test_unusual_values_of_a_benchmark_are_accepted(line):
    load_config(BenchConfig, line.split())


def test_a_low_learning_rate_lowers_min_lr():
    assert load_config(TrainConfig, ["--learning_rate=1e-5"])[0].min_lr == pytest.approx(1e-6)
    assert load_config(TrainConfig, ["--learning_rate=1e-4"])[0].min_lr == 6e-5
    assert load_config(TrainConfig, ["--learning_rate=1e-5", "--decay_lr=False"])[0].min_lr == 6e-5


def test_of_max_iters_and_num_epochs_the_last_one_given_wins(write):
    epochs = write("num_epochs = 3", "epochs.py")
    steps = write("max_iters = 20", "steps.py")
    cases = [
        ([epochs], None, 3),
        ([epochs, "--max_iters=5"], None, 0),
        ([steps, "--num_epochs=2"], None, 2),
        ([steps, epochs], None, 3),
        ([epochs, steps], None, 0),
        ([steps, epochs, "--max_iters=5"], None, 0),
        (["--max_iters=5"], {"num_epochs": 3.0, "max_iters": 60}, 0),
        (["--batch_size=5"], {"num_epochs": 3.0, "max_iters": 60}, 3),
    ]
    for argv, base, num_epochs in cases:
        assert load_config(TrainConfig, argv, base)[0].num_epochs == num_epochs, argv
    assert len(refusal([write("num_epochs = 3\nmax_iters = 20", "both.py")])) == 1


# --------------------------------------------------------------------------------------------------
# The saved run


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_saved_configuration_can_be_loaded_again(schema, write):
    first, _ = load_config(
        schema, [write("seed = 3\nout_dir = 'b'\nstop = ('a', 'b')\nlr_decay_iters = 7")]
    )
    saved = json.loads(json.dumps(asdict(first)))
    again, given = load_config(schema, [], saved)
    assert again == first and given == set()


def test_a_wrong_value_in_a_saved_run_is_refused():
    assert refusal([], base={"n_layer": "many"}) == [
        "the saved run: n_layer='many' must be a whole number >= 1"
    ]


# --------------------------------------------------------------------------------------------------
# Help, and presets


def help_page(schema, capsys):
    with pytest.raises(SystemExit) as done:
        load_config(schema, ["--nonsense", "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


def help_groups(page):
    """Return the groups of keys on a help page: title -> key -> its text in one line."""
    groups = {}
    for line in page.splitlines():
        if line and line[0] != " ":
            title = line
        elif line.startswith("  --"):
            key, _, text = line[4:].partition("=")
            groups.setdefault(title, {})[key] = text
        elif line.startswith(" " * 38):
            groups[title][key] += " " + line.strip()
    return groups


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_explains_every_key_of_the_script(schema, capsys):
    page = help_page(schema, capsys)
    assert max(map(len, page.splitlines())) <= 100
    explained = {}
    for group in help_groups(page).values():
        explained |= group
    assert list(explained) == list(inspect.get_annotations(schema))
    for text in explained.values():
        assert text.endswith(".")
        assert len(text.split()) > 4


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_begins_with_examples_and_ten_keys(schema, capsys):
    page = help_page(schema, capsys)
    examples = [line for line in page.splitlines() if line.startswith("  python ")]
    assert 2 <= len(examples) <= 3
    assert page.index(examples[-1]) < page.index("  --")
    groups = help_groups(page)
    first = next(iter(groups))
    assert first == "The keys that people use first"
    assert len(groups[first]) == 10


def test_help_shows_defaults_and_choices(capsys):
    page = help_page(TrainConfig, capsys)
    keys = help_groups(page)
    assert "gpt2-medium" in keys["The keys that people use first"]["init_from"]
    assert keys["Optimizer"]["weight_decay"].startswith("0.1 ")
    assert keys["Optimizer"]["optimizer"].endswith("Choices: adamw, muon, adamw8bit.")
    assert keys["Speed and memory"]["compile"].endswith("Choices: auto, True, False.")
    assert keys["The keys that people use first"]["batch_size"].endswith(
        "a whole number >= 1, auto."
    )
    keys = help_groups(help_page(SampleConfig, capsys))
    assert keys["The keys that people use first"]["start"].startswith(r"$'\n' ")
    keys = help_groups(help_page(BenchConfig, capsys))
    assert keys["The keys that people use first"]["card"].startswith(
        '"NVIDIA GeForce RTX 4070 Ti" '
    )


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_lists_the_presets_with_their_titles(schema, capsys):
    presets = help_page(schema, capsys).split("\nPresets\n")[1].splitlines()
    assert len(presets) == len(PRESETS)
    for line, preset in zip(presets, PRESETS):
        title = preset.read_text().splitlines()[0].removeprefix("# ")
        assert line.split(maxsplit=1) == [f"config/{preset.name}", title]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_loads_and_its_head_has_command_result_time_and_memory(path):
    text = path.read_text()
    head = text.split("\n\n")[0]
    assert f"config/{path.name}" in head
    assert re.search("^# Result +.*\n# Time +.*\n# VRAM +.*", head, re.MULTILINE)
    assert all(isinstance(node, (ast.Assign, ast.Import)) for node in ast.parse(text).body)
    _, given = load_config(TrainConfig, [str(path)])
    assert given
    load_config(BenchConfig, [str(path)])


def test_no_preset_is_missing():
    names = """
        train_shakespeare_char train_shakespeare_cpu
        train_gpt2 train_gpt2_12gb train_gpt2_fast compare_optimizers
        eval_gpt2 eval_gpt2_medium eval_gpt2_large eval_gpt2_xl
        finetune_shakespeare finetune_instruct
        finetune_gpt2 finetune_gpt2_medium finetune_gpt2_large finetune_gpt2_xl_lora
    """
    assert sorted(path.stem for path in PRESETS) == sorted(names.split())


def test_presets_that_nanogpt_has_keep_its_values():
    def made(name):
        return asdict(load_config(TrainConfig, [str(REPOSITORY / f"config/{name}.py")])[0])

    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        theirs = {
            "batch_size": 8,
            "eval_iters": 500,
            "eval_only": True,
            "wandb_log": False,
            "init_from": name,
        }
        assert made("eval_" + name.replace("-", "_")).items() >= theirs.items()
    theirs = {
        "batch_size": 12,
        "block_size": 1024,
        "gradient_accumulation_steps": 40,
        "max_iters": 600000,
    }
    theirs |= {
        "lr_decay_iters": 600000,
        "eval_interval": 1000,
        "eval_iters": 200,
        "weight_decay": 0.1,
    }
    assert made("train_gpt2").items() >= theirs.items()
    theirs = {
        "dataset": "shakespeare",
        "init_from": "gpt2-xl",
        "batch_size": 1,
        "gradient_accumulation_steps": 32,
    }
    theirs |= {
        "max_iters": 20,
        "learning_rate": 3e-5,
        "decay_lr": False,
        "eval_interval": 5,
        "eval_iters": 40,
    }
    assert made("finetune_shakespeare").items() >= theirs.items()


def test_importing_the_loader_imports_neither_torch_nor_numpy():
    code = "import sys, gpt12.config_loader; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


# --------------------------------------------------------------------------------------------------
# Fuzz

KEYS = sorted({key for schema in SCHEMAS for key in asdict(schema())})
WORDS = [
    "",
    "0",
    "1",
    "-1",
    "0.5",
    "1e999",
    "nan",
    "None",
    "True",
    "auto",
    "none",
    "'",
    "'a'",
    "[]",
    "()",
    "9" * 5000,
    "\\n",
]
values = (
    st.sampled_from(WORDS) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=20)
)
keys = (
    st.sampled_from(KEYS)
    | st.sampled_from(KEYS).map(lambda key: key.replace("_", "-"))
    | st.text(max_size=8)
)
flags = st.builds("--{}={}".format, keys, values) | keys.map("--{}".format) | st.text(max_size=12)
objects = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)
names = st.sampled_from(KEYS) | st.sampled_from(["_x", "helper", "n_layr", "class", "é"])
# Python that cannot loop or compute for long: without letters that spell names, without * and <.
scraps = st.text(alphabet="=+-/()[]{}:,.'\"#\\\n\t 0123456789_\0é", max_size=20)
lines = (
    st.builds("{} = {!r}".format, names, objects)
    | st.builds("{} = {}".format, names, names)
    | scraps
)


def accepts_or_refuses(schema, argv, folder):
    """Load argv. A configuration that is accepted must survive the way to JSON and back."""
    try:
        with harmless(folder), contextlib.redirect_stdout(io.StringIO()):
            made, _ = load_config(schema, argv)
    except UserError as problem:
        assert str(problem)
    except SystemExit as done:
        assert {"-h", "--help"} & set(argv) and done.code == 0
    else:
        saved = json.loads(json.dumps(asdict(made), allow_nan=False))
        assert load_config(schema, [], saved)[0] == made


@given(schema=st.sampled_from(SCHEMAS), argv=st.lists(flags, max_size=5))
def test_fuzz_any_command_line_is_accepted_or_refused(schema, argv):
    accepts_or_refuses(schema, argv, "/nowhere")


@given(schema=st.sampled_from(SCHEMAS), text=st.lists(lines, max_size=6).map("\n".join) | scraps)
def test_fuzz_any_config_file_is_accepted_or_refused(schema, text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzz.py")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        accepts_or_refuses(schema, [str(path)], folder)
