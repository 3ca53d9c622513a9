"""gpt12/run.py: what a run starts from, what follows from several keys, and resuming."""

import contextlib
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data.tokenizers import CharTokenizer
from gpt12.folder import Progress, write_json
from gpt12.run import (
    Request,
    load_start,
    prepare_model,
    read_request,
    resolve,
)
from gpt12.settings import TrainConfig
from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import (
    CPU,
    OUT,
    RESUME,
    ROOT,
    TINY,
    built,
    built_from,
    config,
    edit_json,
    evaluations,
    losses,
    read_json,
    refused,
    resume,
    run,
    small_gpt,
    trainer,
    weights,
    write_shard,
)
from tests.models import save_nanogpt

pytestmark = pytest.mark.usefixtures("own_folder")


# --------------------------------------------------------------------------------------------------
# Reading the configuration


@pytest.mark.parametrize(("gpu", "preset"), [(True, "char"), (False, "cpu")])
def test_without_arguments_the_preset_that_suits_the_machine_is_used(
    monkeypatch, capsys, gpu, preset
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    request = read_request([])
    assert request.undecided.out_dir == f"out-shakespeare-{preset}"
    assert f"using config/train_shakespeare_{preset}.py" in capsys.readouterr().out


def test_evaluating_a_run_takes_its_own_data_unless_others_are_given(finished, dataset):
    for options, expected in (
        (["--eval_only"], str(dataset)),
        (["--eval_only", "--dataset=x.txt"], "x.txt"),
        ([], "openwebtext"),  # fine-tuned
    ):
        found = read_request([f"--init_from={finished}", *options]).undecided
        assert found.dataset == expected


@pytest.mark.parametrize(("micro_batches", "near"), [(1, 2), (3, 4)])
def test_micro_batches_that_the_ranks_cannot_share_are_refused(monkeypatch, micro_batches, near):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = f"={micro_batches} is not a multiple of 2 ranks.*_steps={near}$"
    refused(message, read_request, [f"--gradient_accumulation_steps={micro_batches}"])
    write_run({"gradient_accumulation_steps": micro_batches})  # of a single rank
    refused(message, resumed)
    assert resumed("--eval_only").resumed


def test_who_gives_keys_but_no_preset_is_told_of_the_small_ones(capsys):
    read_request(["--max_iters=300"])
    said = capsys.readouterr().out
    assert "GPT-2 124M on openwebtext" in said
    assert "python train.py config/train_shakespeare_c" in said
    preset = str(ROOT / "config/train_gpt2.py")
    for word in (preset, "--dataset=openwebtext", "--init_from=gpt2"):
        read_request([word])
        assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------
# What follows from several keys


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--max_iters=40", {"lr_decay_iters": 40, "max_iters": 40, "warmup_iters": 4}),
        ("--max_iters=40 --lr_decay_iters=30", {"lr_decay_iters": 30, "warmup_iters": 3}),
        ("--max_iters=50000", {"warmup_iters": 2000}),
        ("--max_iters=300 --warmup_iters=2000", {"warmup_iters": 2000}),
        ("--num_epochs=8", {"warmup_iters": 16}),
        ("--learning_rate=1e-5", {"min_lr": 1e-6}),
        ("--learning_rate=1e-4", {"min_lr": 6e-5}),
        ("--learning_rate=1e-5 --decay_lr=False", {"min_lr": 6e-5}),
    ],
)
def test_keys_that_follow_from_others_are_decided_once_and_told(options, expected):
    argv = [word for word in TINY if "warmup" not in word]
    found = built_from([*argv, *options.split()])
    assert {key: getattr(found.config, key) for key in expected} == pytest.approx(expected)
    assert found.request.asked.warmup_iters == 2000
    reason = "because it was not set: at most a tenth of all steps"
    note = f"warmup_iters={found.config.warmup_iters}, {reason}"
    assert (note in found.notes) == (found.config.warmup_iters < 2000)


def test_a_loaded_model_brings_its_own_shape(finished):
    options = [f"--init_from={finished}", "--n_layer=7", "--n_embd=64", "--lora_rank=2"]
    found = built(*options)
    shape = found.model.config
    assert (found.config.n_layer, found.config.n_embd) == (shape.n_layer, shape.n_embd) == (1, 16)
    assert found.config.lora_alpha == 4.0  # twice the rank


@pytest.mark.parametrize(("eval_iters", "windows"), [(1, 6), (4, 24), (5, 25), (0, 25)])
@pytest.mark.parametrize("batch", [(8, 1), (2, 4)])
def test_eval_iters_counts_portions_whatever_the_micro_batch_up_to_one_pass(
    monkeypatch, eval_iters, windows, batch
):
    monkeypatch.setattr("gpt12.run.EVAL_TOKENS", 6 * 16)
    options = [f"--batch_size={batch[0]}", f"--gradient_accumulation_steps={batch[1]}"]
    assert built(f"--eval_iters={eval_iters}", *options).eval_count == windows


@pytest.mark.parametrize(
    ("interval", "max_iters", "eval_iters"),
    # An evaluation of 2 splits x 4 windows is a tenth of 10 steps of 8 windows.
    [(10, 100, 1), (25, 100, 2), (3, 100, 1), (1000, 30, 3), (10**6, 10**6, 200)],
)
def test_an_evaluation_that_nobody_set_is_at_most_a_tenth_of_the_steps_before_it(
    monkeypatch, interval, max_iters, eval_iters
):
    monkeypatch.setattr("gpt12.run.EVAL_TOKENS", 4 * 16)
    argv = [word for word in TINY if "eval_i" not in word]
    argv += [f"--max_iters={max_iters}", f"--eval_interval={interval}"]
    found = built_from(argv)
    assert found.config.eval_iters == eval_iters
    reason = "an evaluation is at most a tenth of the steps between two"
    note = f"eval_iters={eval_iters}, because it was not set: {reason}"
    assert (note in found.notes) == (eval_iters < 200)
    given = built_from([*argv, "--eval_iters=5"])
    assert (given.config.eval_iters, given.eval_count) == (5, 20)
    # A resumed run evaluates the windows that its best loss is of.
    asked = asdict(found.request.asked)
    write_run(asdict(found.config), requested=asked, given=sorted(found.request.given))
    assert resolved(resumed("--eval_interval=1")).eval_iters == eval_iters


def test_what_was_asked_is_saved_apart_from_what_it_became():
    run("--num_epochs=0.1", "--dtype=auto")
    saved = read_json("out/run.json")
    asked, became = saved["requested"], saved["config"]
    assert (asked["max_iters"], asked["lr_decay_iters"], asked["dtype"]) == (600000, None, "auto")
    assert became["max_iters"] == became["lr_decay_iters"] == 3
    assert became["dtype"] == "float32"
    assert {"num_epochs", "dtype", "n_layer"} <= set(saved["given"])
    assert not {"max_iters", "seed"} & set(saved["given"])


# --------------------------------------------------------------------------------------------------
# Resuming: the run's settings, then the keys that are typed


def write_run(keys: dict, **facts) -> None:
    """Write the run.json of a run in out/. keys: of its configuration. facts: beside it."""
    saved = asdict(TrainConfig(n_layer=3, n_head=3, n_embd=96, dtype="float32")) | keys
    OUT.mkdir(exist_ok=True)
    write_json(OUT / "run.json", {"config": saved} | facts)


def resumed(*options: str) -> Request:
    """Return what is asked of the run in out/ by resuming it."""
    return read_request([*RESUME, *options])


def resolved(request: Request) -> TrainConfig:
    """Return the settings of a run that has no data and no progress."""
    return resolve(request.undecided, request, None, Progress())


@contextlib.contextmanager
def killed_at(monkeypatch, step: int):
    """Let the run in the block end as if it were killed when this step is finished and saved."""
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr("train.Trainer.evaluation_is_due", lambda self: self.progress.step == step)
        m.setattr("train.Trainer.evaluate", lambda self: sys.exit("killed"))
        yield


@pytest.mark.parametrize("asks", ["again.py", "--init_from=resume", "--init-from=resume"])
def test_a_run_is_resumed_wherever_init_from_was_set(asks):
    """The folder may have been renamed, or be a stranger's, whose run.json names another place."""
    write_run({"out_dir": "/elsewhere"})
    Path("again.py").write_text('init_from = "resume"\nout_dir = "out"\n')
    request = read_request([asks, "--max_iters=7"])
    assert request.resumed
    made = request.undecided
    assert (made.n_layer, made.max_iters, made.init_from) == (3, 7, "scratch")
    assert made.out_dir == "out"
    assert request.given >= {"max_iters"}
    assert request.notes == []


def test_a_config_file_changes_nothing_of_a_resumed_run_and_each_key_is_told():
    """nanoGPT's habit: the preset is named again, and is not the one that the run began with."""
    write_run({"learning_rate": 1e-3, "dataset": "mine"})
    text = "learning_rate = 5e-4\ndataset = 'other'\nn_layer = 3\nn_embd = 12\nseed = 4\n"
    Path("preset.py").write_text(text)
    request = resumed("preset.py", "--seed=5")
    made = request.undecided
    assert (made.learning_rate, made.dataset, made.n_embd, made.seed) == (1e-3, "mine", 96, 5)
    assert request.notes == [
        "preset.py:1: learning_rate=0.0005 does not count: this run has learning_rate=0.001",
        "preset.py:2: dataset='other' does not count: this run has dataset=mine",
        "preset.py:4: n_embd=12 does not count: this run has n_embd=96",
        "a resumed run keeps its settings; type a key, as --KEY=VALUE, to change it",
    ]


def test_typed_keys_are_checked_together_with_the_saved_ones():
    write_run({"learning_rate": 1e-2})
    message = r"--dropout=2: .* less than 1\n--sed=3: .* seed"
    refused(message, resumed, "--dropout=2", "--sed=3")
    assert resumed("--min_lr=5e-3").undecided.min_lr == 5e-3
    refused("min_lr", resumed, "--min_lr=5e-2")


@pytest.mark.parametrize(
    ("options", "saved", "expected"),
    [
        (["--max_iters=9"], {"num_epochs": 3.0, "max_iters": 60}, {"num_epochs": 0.0}),
        (["--num_epochs=9"], {"max_iters": 60}, {"num_epochs": 9.0}),
        (["--batch_size=9"], {"num_epochs": 3.0, "max_iters": 60}, {"num_epochs": 3.0}),
        ([], {"save_interval_s": "auto", "cuda_graph": "auto", "max_bad_steps": 20}, {}),
    ],
)
def test_saved_keys_and_typed_keys_are_joined(options, saved, expected):
    given = [key for key in saved if key in ("num_epochs", "max_iters")][:1]
    write_run(saved, given=given)
    made = resumed(*options).undecided
    assert {key: getattr(made, key) for key in expected} == expected


def memory_keys(config: TrainConfig) -> tuple:
    return config.batch_size, config.gradient_accumulation_steps, config.recompute


MEMORY = {"batch_size": 6, "gradient_accumulation_steps": 8, "recompute": "pointwise"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (6, 8, "pointwise")),
        (["--learning_rate=1e-4"], (6, 8, "pointwise")),
        (["--recompute=block"], (12, 4, "block")),
        (["--batch_size=24"], (24, 4, "none")),
        (["--batch_size=12"], (12, 4, "none")),
        (["--init_from=auto", "--batch_size=12"], (6, 8, "pointwise")),
        (["--init_from=auto", "--batch_size=12", "--recompute=block"], (12, 4, "block")),
    ],
)
def test_what_a_run_fitted_into_memory_stays_until_such_a_key_is_typed(options, expected):
    asked = {"batch_size": 12, "gradient_accumulation_steps": 4, "recompute": "none"}
    write_run(MEMORY, requested=asked, given=[])
    (OUT / "last.prev").mkdir()
    request = resumed(*options)
    assert memory_keys(request.undecided) == expected
    typed = {word.strip("-").partition("=")[0] for word in options}
    for key in asked.keys() - typed:
        assert getattr(request.asked, key) == asked[key]


def test_values_that_an_older_program_chose_stay_as_they_became():
    became = MEMORY | {"lr_decay_iters": 77, "warmup_iters": 50, "max_iters": 100}
    write_run(became, requested={"batch_size": "auto", "recompute": "auto"})
    made = resolved(resumed("--recompute=none"))
    assert memory_keys(made) == (6, 8, "none")
    assert (made.lr_decay_iters, made.warmup_iters) == (77, 50)


def test_one_command_starts_a_run_goes_on_with_it_and_finds_it_complete(
    finished, monkeypatch, capsys
):
    """Nothing in the line changes: neither the preset's start nor a shape that the model brings."""
    Path("mine.py").write_text(f'init_from = "{finished}"\nlearning_rate = 3e-3\n')
    command = ["mine.py", "--n_embd=32", "--max_iters=6", "--save_interval_s=0"]
    run(*command, "--out_dir=first")
    # What a start without a checkpoint left behind is no run.
    OUT.mkdir()
    shutil.copy("first/run.json", OUT)
    command.append("--init_from=auto")
    with killed_at(monkeypatch, 3):
        run(*command)
    assert trainer()["step"] == 3
    assert not (OUT / "previous").exists()
    run(*command)
    assert losses("first") == losses()
    assert not (OUT / "previous").exists()
    capsys.readouterr()
    run(*command)
    assert "this run is complete (6 of 6 steps)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("n_layer", 4), ("n_head", 2), ("n_embd", 48), ("bias", True), ("lora_rank", 2)),
        *(("optimizer", "muon"), ("val_fraction", 0.3), ("lora_alpha", 2.0)),
    ],
)
def test_keys_that_the_saved_weights_depend_on_cannot_change(key, value):
    """Another lora_alpha would turn what is trained up or down at once."""
    write_run({"lora_rank": 4, "lora_alpha": 8.0, "init_from": "gpt2"})
    message = f"^{key}={value}, but the run in .*leave --{key} out"
    refused(message, resumed, f"--{key}={value}")
    saved = read_json("out/run.json")["config"][key]
    assert resumed(f"--{key}={saved}").resumed  # the same value may be given


def test_a_resumed_run_keeps_the_precision_and_the_context_that_it_got():
    became = {"dtype": "bfloat16", "block_size": 64}
    write_run(became, requested={"dtype": "auto", "block_size": 1024}, given=[])
    made = resumed().undecided
    assert (made.dtype, made.block_size) == ("bfloat16", 64)
    assert resumed("--block_size=32").undecided.block_size == 32
    write_run({"dtype": "load"})
    refused(r"run\.json: dtype='load': Input should be 'auto', 'float32'", resumed)


def test_resuming_a_finished_run_says_that_it_is_complete_and_changes_nothing(
    finished_copy, capsys
):
    before = {file: file.stat().st_mtime_ns for file in OUT.rglob("*")}
    capsys.readouterr()
    for steps in (4, 3):
        resume(f"--max_iters={steps}")
        told = f"this run is complete (4 of {steps} steps); go on with --max_iters=8\n"
        assert capsys.readouterr().out == told
    assert {file: file.stat().st_mtime_ns for file in OUT.rglob("*")} == before


def test_epochs_are_counted_in_data_whatever_a_step_took_of_them_before(capsys):
    """An epoch of 161 windows takes 21 steps of 8; 154 windows of the next are left."""
    run("--num_epochs=1", "--decay_lr=False")
    assert (trainer()["step"], trainer()["position"]) == (21, 168)
    capsys.readouterr()
    for options in ([], ["--batch_size=1"], ["--num_epochs=0.5"]):
        resume(*options)
        told = "this run is complete (21 of 21 steps); go on with --num_epochs=2\n"
        assert capsys.readouterr().out == told
    resume("--num_epochs=2", "--batch_size=8")
    assert "31 steps end after 2.04 epochs" in capsys.readouterr().out
    assert (trainer()["step"], trainer()["position"]) == (31, 328)


def test_a_longer_run_says_what_jumps_and_its_short_context_does_not_come_back(monkeypatch, capsys):
    lengths = []
    load = train.Trainer.load

    def noted(self):
        targets = load(self)
        lengths.append(self.train_step.context_length)
        return targets

    monkeypatch.setattr("train.Trainer.load", noted)
    over = (
        "short_context_share=0, because that phase is over and does not come back in a longer run\n"
    )
    schedule = ["--short_context_share=0.5", "--min_lr=1e-4", "--warmup_iters=0"]
    run(*schedule, "--max_iters=4")
    assert lengths == [2, 2, 16, 16, 16]
    for steps, lr in ((16, "0.00855"), (40, "0.00658")):
        capsys.readouterr()
        resume(f"--max_iters={steps}")
        said = capsys.readouterr().out
        assert f"the learning rate goes on at {lr} and not at 0.0001, by the keys typed" in said
        assert (over in said) == (steps == 16)  # then run.json says that the phase is over
    assert set(lengths[5:]) == {16}


def test_a_run_that_was_stopped_before_its_last_evaluation_is_not_complete(monkeypatch):
    with killed_at(monkeypatch, 3):
        run("--max_iters=3", "--save_interval_s=0")
    assert trainer()["step"] == 3
    resume()
    assert evaluations() == [3]


def test_a_run_resumes_exactly_before_and_after_its_rows_get_longer(monkeypatch):
    options = ["--short_context_share=0.5", "--max_iters=6", "--save_interval_s=0"]
    run("--out_dir=whole", *options)
    for step in (2, 3):
        with killed_at(monkeypatch, step):
            run(*options)
        resume()
        assert losses() == losses("whole")
        assert trainer()["position"] == trainer("whole")["position"]
    run("--out_dir=long", "--max_iters=1")
    assert losses("long")[1] != losses("whole")[1]


def test_a_run_on_other_data_says_so_and_forgets_its_best(finished_copy):
    """A loss on other text says nothing: best/ would never be written, and patience would end."""
    edit_json("out/last/trainer.json", worse_evaluations=3, best_step=2)
    argv = [*RESUME, "--dataset=letters"]
    for digit, other in (("0", False), ("1", True)):
        edit_json("letters/meta.json", val_sha256=digit * 64)
        found = built_from([*argv, "--max_iters=9"])
        said = "".join(found.notes)
        assert ("the data are not those that this run began with" in said) == other
        assert (found.progress.best_val_loss is None) == other
        progress = (found.progress.worse_evaluations, found.progress.best_step)
        assert progress == ((0, 0) if other else (3, 2))
    evaluated = built_from([*argv, "--eval_only"])  # which replaces nothing
    assert evaluated.progress.best_val_loss is not None


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("change", ["training tokens", "validation tokens", "one letter"])
def test_other_data_are_noticed_without_a_hash_too(change):
    """Shards made elsewhere have no hash; the folder of a text has the hash of all of it."""
    write_json(Path("letters/meta.json"), {"documents": 1})
    Path("text.txt").write_text("ab cd ef gh\n" * 100)
    data = "text.txt" if change == "one letter" else "letters"
    run(f"--dataset={data}", "--tokenizer=auto", "--max_iters=2")
    again = [*RESUME, "--max_iters=4"]
    assert built_from(again).progress.best_val_loss is not None
    if change == "one letter":
        Path(data).write_text("bb cd ef gh\n" + "ab cd ef gh\n" * 99)
    else:
        split = "train_000001" if change == "training tokens" else "val_000000"
        write_shard(Path(f"letters/{split}.bin"), np.arange(99, dtype=np.uint16) % 13)
    found = built_from(again)
    assert found.progress.best_val_loss is None
    assert "the data are not those that this run began with" in found.notes[-1]
    # What an earlier version did not write counts as equal.
    facts = read_json("out/run.json")["data"]
    for key in ("folder", "tokens", "val_tokens"):
        del facts[key]
    edit_json("out/run.json", data=facts)
    assert built_from(again).progress.best_val_loss is not None


@pytest.mark.parametrize(
    ("option", "position", "kept"),
    [("--block_size=8", 32, False), ("--eval_iters=1", 16, False), ("--max_iters=9", 16, True)],
)
def test_progress_is_counted_anew_where_windows_are_others(option, position, kept):
    run("--max_iters=2")
    found = built_from([*RESUME, option])
    assert found.progress.position == position
    assert (found.progress.best_val_loss is not None) == kept
    told = "an evaluation reads other windows than before (eval_iters, block_size): the best loss"
    assert any(note.startswith(told) for note in found.notes) == (not kept)


def test_a_run_that_patience_has_ended_stays_ended_until_it_gets_more(capsys):
    options = ["--eval_interval=1", "--learning_rate=0", "--min_lr=0", "--max_iters=30"]
    run(*options, "--patience=2")
    assert trainer()["step"] == 3
    capsys.readouterr()
    resume()
    told = "this run ended at step 3, after 2 evaluations without a better loss; go on with "
    assert capsys.readouterr().out == f"{told}--patience=4\n"
    resume("--patience=4")
    assert trainer()["step"] == 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max_iters=300"], 30),
        ([], 500),
        (["--max_iters=200000"], 2000),
        (["--warmup_iters=2000"], 2000),
    ],
)
def test_a_warm_up_that_nobody_set_follows_the_length_of_the_run(options, expected):
    asked = {"lr_decay_iters": None, "warmup_iters": 2000, "max_iters": 5000}
    write_run({"max_iters": 5000, "warmup_iters": 500}, requested=asked, given=[])
    assert resolved(resumed(*options)).warmup_iters == expected


def test_a_data_set_without_a_training_split_can_only_be_evaluated():
    for file in Path("letters").glob("train_*.bin"):
        file.unlink()
    refused(r"no training shards .*only --eval_only works", run, "--max_iters=1")
    run("--eval_only", "--out_dir=evaluated")
    assert not Path("evaluated").exists()


# --------------------------------------------------------------------------------------------------
# Weights


def test_nanogpts_checkpoint_starts_with_the_tokenizer_beside_it(finished, tmp_path):
    model = from_pretrained(finished / "best")
    save_nanogpt(tmp_path / "ckpt.pt", model, model.config.vocab_size)
    request = read_request(["--init_from=ckpt.pt"])
    assert load_start(request, None)[1] is None
    CharTokenizer("abcdefghijklm").save(tmp_path)
    assert load_start(request, None)[1].name == "char"


def test_a_run_as_start_means_its_best_and_else_its_last(finished_copy):
    # A step so long that the model becomes worse: best/ stays as it is.
    resume("--max_iters=5", "--learning_rate=1", "--decay_lr=False")
    for name in ("best", "last"):
        model, tokenizer = load_start(read_request([*TINY, "--init_from=out"]), None)
        wpe = weights(name=name)["transformer.wpe.weight"]
        assert torch.equal(model.transformer.wpe.weight, wpe)
        assert tokenizer.vocab_size == 13
        shutil.rmtree(OUT / "best", ignore_errors=True)


def test_adapters_on_an_untrained_model_are_refused():
    request = read_request([*TINY, "--lora_rank=2"])
    refused("lora_rank with init_from=scratch.*--init_from=", load_start, request, None)


def test_adapters_on_a_model_that_the_run_replaces_are_refused(finished):
    """Resuming would put them a second time on the model into which best/ has merged them."""
    argv = [*TINY, f"--init_from={finished / 'best'}", "--lora_rank=4"]
    request = read_request([*argv, f"--out_dir={finished}"])
    refused("choose another --out_dir=", load_start, request, None)
    model, _ = load_start(read_request([*argv, f"--out_dir={finished}-2"]), None)
    assert model.config.n_layer == 1


def test_data_of_another_tokenizer_than_the_models_are_refused(tmp_path):
    save_pretrained(GPT(GPTConfig(16, 9, 1, 2, 16)), tmp_path / "model")
    refused("another tokenizer.*13 tokens.*9 tokens", run, "--init_from=model")


# --------------------------------------------------------------------------------------------------
# The form of the model, and the length of the run


BF16 = replace(CPU, dtype=torch.bfloat16)


def test_8_bit_adamw_is_refused_unless_weights_may_be_bfloat16():
    model = small_gpt()
    asked = config(optimizer="adamw8bit")
    message = "adamw8bit keeps the weights in bfloat16.*--dtype="
    refused(message, prepare_model, model, asked, CPU)
    prepare_model(model, asked, BF16)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_frozen_weights_of_lora_have_the_products_precision_and_adapters_float32():
    model = small_gpt()
    prepare_model(model, config(lora_rank=2, lora_alpha=4.0, recompute="block"), BF16)
    adapters = 0
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        adapters += "lora_" in name
    assert adapters == 2 * 2 * 4  # two matrices for each of four layers in two blocks
    assert model.transformer.h[0].recompute == "block"


def test_only_a_compiled_run_compiles_its_layers(monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda self, **_: compiled.append(self))
    for wanted in (False, True):
        model = small_gpt()
        prepare_model(model, config(), replace(CPU, compiled=wanted))
        assert len(compiled) == (3 if wanted else 0)  # two layers and the last norm
        assert not model.fused_loss  # a GPU's kernel


@pytest.mark.parametrize(("key", "value"), [("lora_dropout", 0.1), ("lora_targets", "c_attn")])
def test_a_run_with_adapters_that_are_gone_is_refused_by_name(key, value):
    write_run({key: value})
    refused(f"{key}={value}, which this version cannot train", resumed)
