"""gpt12/start.py: what a run starts from, and what a resumed run may change."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.tokenizers import CharTokenizer
from gpt12.checkpoint import find_checkpoint
from gpt12.device import Machine
from gpt12.errors import UserError
from gpt12.run import (
    CPU_FLOPS_PER_CORE,
    is_worth_compiling,
    load_start,
    prepare_model,
    read_request,
    warn_of_long_run,
)
from gpt12.settings import TrainConfig
from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig, flops_per_token
from tests.helpers import (
    CPU,
    TINY,
    built_from,
    config,
    resume,
    run,
    same_tensors,
    small_gpt,
    trainer,
    weights,
)
from tests.models import save_nanogpt

pytestmark = pytest.mark.usefixtures("no_picture")


# --------------------------------------------------------------------------------------------------
# Reading the configuration


@pytest.mark.parametrize(("gpu", "preset"), [(True, "char"), (False, "cpu")])
def test_without_arguments_the_preset_that_suits_the_machine_is_used(
    monkeypatch, capsys, gpu, preset
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    request = read_request([])
    assert request.config.out_dir == f"out-shakespeare-{preset}"
    assert f"using config/train_shakespeare_{preset}.py" in capsys.readouterr().out


def test_evaluating_a_run_takes_its_own_data_unless_others_are_given(finished, dataset):
    own = read_request([f"--init_from={finished}", "--eval_only"]).config
    assert own.dataset == str(dataset)
    other = read_request([f"--init_from={finished}", "--eval_only", "--dataset=x.txt"]).config
    assert other.dataset == "x.txt"
    fine_tuned = read_request([f"--init_from={finished}"]).config
    assert fine_tuned.dataset == TrainConfig().dataset


@pytest.mark.parametrize(("micro_batches", "near"), [(1, 2), (3, 4)])
def test_micro_batches_that_the_ranks_cannot_share_are_refused(monkeypatch, micro_batches, near):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = f"={micro_batches} is not a multiple of 2 ranks.*_steps={near}$"
    with pytest.raises(UserError, match=message):
        read_request([f"--gradient_accumulation_steps={micro_batches}"])


# --------------------------------------------------------------------------------------------------
# Resuming


def write_run(out_dir: Path, keys: dict | None = None, **facts) -> Path:
    """Write the run.json of a run. keys: of its configuration. facts: beside it."""
    saved = asdict(TrainConfig(n_layer=3, n_head=3, n_embd=96))
    saved |= {"dtype": "float32", "recompute": "none"} | (keys or {})
    content = {"config": saved, "dtype": saved["dtype"]} | facts
    (out_dir / "run.json").write_text(json.dumps(content))
    return out_dir


def test_a_config_file_that_asks_to_resume_is_recognized(tmp_path):
    write_run(tmp_path)
    file = tmp_path / "again.py"
    file.write_text(f'init_from = "resume"\nout_dir = "{tmp_path}"\n')
    request = read_request([str(file), "--max_iters=7"])
    assert request.resumed
    made = request.config
    assert (made.n_layer, made.max_iters, made.init_from) == (3, 7, "scratch")
    assert request.given >= {"max_iters", "out_dir"}


def test_a_run_that_a_config_file_resumes_continues(finished, tmp_path):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    file = tmp_path / "again.py"
    file.write_text(f'init_from = "resume"\nout_dir = "{out_dir}"\nmax_iters = 6\n')
    import train

    assert train.main([str(file)]) == 0
    assert trainer(out_dir)["step"] == 6


def test_a_resumed_run_writes_into_the_folder_that_it_reads(finished, tmp_path, monkeypatch):
    """The folder was renamed, or is a stranger's, whose run.json names another place."""
    shutil.copytree(finished, tmp_path / "out")
    file = tmp_path / "out" / "run.json"
    facts = json.loads(file.read_text())
    facts["config"]["out_dir"] = str(tmp_path / "elsewhere")
    file.write_text(json.dumps(facts))
    monkeypatch.chdir(tmp_path)  # whose out/ is the default
    import train

    assert train.main(["--init_from=resume", "--max_iters=6"]) == 0
    assert trainer(tmp_path / "out")["step"] == 6
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("n_layer", 4), ("n_head", 2), ("n_embd", 48), ("bias", True), ("lora_rank", 2)),
        *(("optimizer", "muon"), ("val_fraction", 0.3)),
    ],
)
def test_keys_that_the_saved_weights_depend_on_cannot_change(tmp_path, key, value):
    write_run(tmp_path)
    argv = ["--init_from=resume", f"--out_dir={tmp_path}"]
    with pytest.raises(UserError, match=f"^{key}={value}, but the run in .*leave --{key} out"):
        read_request([*argv, f"--{key}={value}"])
    saved = json.loads((tmp_path / "run.json").read_text())["config"][key]
    assert read_request([*argv, f"--{key}={saved}"]).resumed  # the same value may be given


def test_options_given_on_resuming_are_checked_together_with_the_saved_ones(tmp_path):
    write_run(tmp_path, {"learning_rate": 1e-2})
    argv = ["--init_from=resume", f"--out_dir={tmp_path}"]
    assert read_request([*argv, "--min_lr=5e-3"]).config.min_lr == 5e-3
    with pytest.raises(UserError, match="min_lr"):
        read_request([*argv, "--min_lr=5e-2"])


def test_the_scale_of_adapters_cannot_change(tmp_path):
    """Another alpha would turn what is trained up or down at once."""
    write_run(tmp_path, {"lora_rank": 4, "lora_alpha": 8.0, "init_from": "gpt2"})
    argv = ["--init_from=resume", f"--out_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"lora_alpha=2\.0, but the run in .* has 8\.0"):
        read_request([*argv, "--lora_alpha=2"])
    assert read_request([*argv, "--lora_alpha=8"]).config.lora_alpha == 8.0


def test_a_resumed_run_keeps_the_precision_that_auto_became(finished, tmp_path):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    file = out_dir / "run.json"
    facts = json.loads(file.read_text())
    facts["config"]["dtype"] = "auto"
    for dtype in ("bfloat16", "float32"):
        file.write_text(json.dumps(facts | {"dtype": dtype}))
        request = read_request(["--init_from=resume", f"--out_dir={out_dir}"])
        assert request.config.dtype == dtype
    for damage in ("load", ["float32"]):
        file.write_text(json.dumps(facts | {"dtype": damage}))
        with pytest.raises(UserError, match="dtype"):
            read_request(["--init_from=resume", f"--out_dir={out_dir}"])


# --------------------------------------------------------------------------------------------------
# Resuming on another GPU

AUTO = {"recompute": "auto", "batch_size": "auto"}


def act_gpu(monkeypatch, name: str, gib: float) -> None:
    properties = SimpleNamespace(name=name, total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def moved(tmp_path, requested=AUTO, keys: dict | None = None, *options: str):
    """Return the request that resumes a run of 40 x 12 rows, begun on a card of 24 GiB."""
    keys = {"dtype": "bfloat16", "recompute": "pointwise"} | (keys or {})
    facts = {"device": "Large", "device_memory_gib": 24.0, "requested": requested}
    write_run(tmp_path, keys, **facts)
    return read_request(["--init_from=resume", f"--out_dir={tmp_path}", *options])


@pytest.mark.parametrize(("name", "gib"), [("Small", 12), ("Large", 12), ("Other", 24)])
def test_on_another_gpu_recompute_and_batch_size_are_decided_again(
    tmp_path, monkeypatch, name, gib
):
    act_gpu(monkeypatch, name, gib)
    request = moved(tmp_path)
    made = request.config
    assert (made.recompute, made.batch_size) == ("auto", "auto")
    assert made.gradient_accumulation_steps == 40 * 12  # rows: the tokens of a step stay
    assert made.dtype == "bfloat16"  # another precision would be another run
    [note] = request.notes
    assert f"began on Large and continues on {name}, so recompute and batch_size are" in note
    assert "Losses may differ in the last digits" in note


def test_on_the_same_gpu_nothing_is_decided_again(tmp_path, monkeypatch):
    act_gpu(monkeypatch, "Large", 24.04)  # memory is compared by its first decimal
    request = moved(tmp_path)
    assert (request.config.recompute, request.config.batch_size) == ("pointwise", 12)
    assert request.config.gradient_accumulation_steps == 40
    assert request.notes == []


def test_a_deterministic_run_keeps_its_steps_on_another_gpu(tmp_path, monkeypatch):
    act_gpu(monkeypatch, "Small", 12)
    request = moved(tmp_path, AUTO, {"deterministic": True})
    assert (request.config.recompute, request.config.batch_size) == ("pointwise", 12)
    assert request.notes == []


@pytest.mark.parametrize(
    ("requested", "options", "expected"),
    [
        # What the user chose when the run began.
        ({"recompute": "pointwise", "batch_size": 12}, [], ("pointwise", 12, 40)),
        ({"recompute": "auto", "batch_size": 12}, [], ("auto", 12, 40)),
        ({"recompute": "pointwise", "batch_size": "auto"}, [], ("pointwise", "auto", 480)),
        # What the user gives now.
        (AUTO, ["--recompute=block"], ("block", "auto", 480)),
        (AUTO, ["--batch_size=4"], ("auto", 4, 40)),
        (AUTO, ["--gradient_accumulation_steps=80"], ("auto", 12, 80)),
        (AUTO, ["--batch_size=auto"], ("auto", "auto", 480)),
        # A run of an older program, which did not note what was asked for.
        ({}, [], ("pointwise", 12, 40)),
    ],
)
def test_what_the_user_chose_is_not_decided_again(
    tmp_path, monkeypatch, requested, options, expected
):
    act_gpu(monkeypatch, "Small", 12)
    made = moved(tmp_path, requested, None, *options).config
    assert (made.recompute, made.batch_size, made.gradient_accumulation_steps) == expected


def test_the_note_names_only_what_is_decided_again(tmp_path, monkeypatch):
    act_gpu(monkeypatch, "Small", 12)
    [note] = moved(tmp_path, AUTO, None, "--recompute=block").notes
    assert "Small, so batch_size is chosen again" in note


def test_what_was_asked_for_first_is_remembered_over_several_resumes(tmp_path, monkeypatch):
    """On the same card twice, and then on a smaller one."""
    act_gpu(monkeypatch, "Large", 24)
    request = moved(tmp_path)
    for _ in range(2):
        assert {key: request.requested[key] for key in AUTO} == AUTO
        request = moved(tmp_path, request.requested)
    act_gpu(monkeypatch, "Small", 12)
    assert moved(tmp_path, request.requested).config.recompute == "auto"


def test_a_run_begun_on_a_cpu_is_continued_as_it_is(tmp_path, monkeypatch):
    act_gpu(monkeypatch, "Small", 12)
    write_run(tmp_path, device="2 CPU cores", device_memory_gib=None, requested=AUTO)
    request = read_request(["--init_from=resume", f"--out_dir={tmp_path}"])
    assert (request.config.recompute, request.notes) == ("none", [])


@pytest.mark.parametrize("size", ["char", "cpu"])
def test_who_gives_keys_but_no_preset_is_told_how_to_change_the_first_run(monkeypatch, size):
    """The data set is then OpenWebText, which is not prepared here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: size == "char")
    monkeypatch.setattr("data.dataset.find_shards", lambda folder, split: [])
    with pytest.raises(UserError, match="openwebtext is not prepared") as error:
        built_from(["--max_iters=300", "--out_dir=my run"])
    assert str(error.value).splitlines()[-1] == (
        "You gave no preset. To change a key of the first run, name its preset: python train.py "
        f"config/train_shakespeare_{size}.py --max_iters=300 '--out_dir=my run'"
    )


@pytest.mark.parametrize("argv", [["config/train_gpt2.py"], ["--dataset=openwebtext"]])
def test_who_names_a_preset_or_the_data_gets_no_such_advice(monkeypatch, argv):
    monkeypatch.setattr("data.dataset.find_shards", lambda folder, split: [])
    with pytest.raises(UserError, match="openwebtext is not prepared") as error:
        built_from(argv)
    assert "You gave no preset" not in str(error.value)


@pytest.mark.parametrize(
    ("preset", "options", "rows"),
    [
        ("batch_size = 16\ngradient_accumulation_steps = 2", [], 32),
        (
            "batch_size = 16\ngradient_accumulation_steps = 2",
            ["--gradient_accumulation_steps=6"],
            6,
        ),
        ("batch_size = 4", [], 4 * 40),
        ("seed = 1", [], 12 * 40),
    ],
)
def test_batch_size_auto_keeps_the_sequences_of_a_step(tmp_path, preset, options, rows):
    file = tmp_path / "my.py"
    file.write_text(preset)
    found = read_request([str(file), "--batch_size=auto", *options]).config
    assert (found.batch_size, found.gradient_accumulation_steps) == ("auto", rows)


def test_a_preset_with_batch_size_auto_counts_sequences_itself(tmp_path):
    (tmp_path / "my.py").write_text("batch_size = 'auto'\ngradient_accumulation_steps = 30\n")
    found = read_request([str(tmp_path / "my.py"), "--batch_size=auto"]).config
    assert found.gradient_accumulation_steps == 30


def test_batch_size_auto_given_on_resuming_keeps_the_rows_of_a_step(tmp_path):
    write_run(tmp_path, {"batch_size": 3, "gradient_accumulation_steps": 2})
    request = read_request(["--init_from=resume", f"--out_dir={tmp_path}", "--batch_size=auto"])
    assert request.config.gradient_accumulation_steps == 6


# --------------------------------------------------------------------------------------------------
# Weights


def test_nanogpts_checkpoint_starts_with_the_tokenizer_beside_it(finished, tmp_path):
    file = tmp_path / "ckpt.pt"
    model = from_pretrained(finished / "best")
    save_nanogpt(file, model, model.config.vocab_size)
    request = read_request([f"--init_from={file}"])
    assert load_start(request, None)[1] is None
    letters = "".join(chr(97 + i) for i in range(model.config.vocab_size))
    CharTokenizer(letters).save(tmp_path)
    _, tokenizer = load_start(request, None)
    assert tokenizer.name == "char"


@pytest.mark.parametrize("argv", [[], ["--eval_only"]])
def test_a_start_with_a_name_that_no_file_can_have_does_not_exist(argv):
    with pytest.raises(UserError, match="a{300}"):
        built_from([f"--init_from={'a' * 300}", "--dataset=shakespeare_char", *argv])


def test_a_run_as_start_means_its_best_and_else_its_last(finished, tmp_path):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    # A step so long that the model becomes worse: best/ stays as it is.
    assert resume(out_dir, "--max_iters=5", "--learning_rate=1", "--decay_lr=False") == 0
    assert (trainer(out_dir, "best")["step"], trainer(out_dir, "last")["step"]) == (4, 5)
    for name in ("best", "last"):
        request = read_request([*TINY, f"--init_from={out_dir}"])
        model, tokenizer = load_start(request, None)
        wpe = weights(out_dir, name)["transformer.wpe.weight"]
        assert torch.equal(model.transformer.wpe.weight, wpe)
        assert tokenizer.vocab_size == 13
        shutil.rmtree(out_dir / "best", ignore_errors=True)


def test_resuming_reads_each_file_of_the_checkpoint_once_to_verify_it(
    finished, tmp_path, monkeypatch
):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    read = []
    from gpt12 import checkpoint

    verify = checkpoint.read_checkpoint

    def noted(folder):
        read.append(folder)
        return verify(folder)

    monkeypatch.setattr(checkpoint, "read_checkpoint", noted)
    assert resume(out_dir) == 0
    assert read == [out_dir / "last"]


def test_adapters_on_an_untrained_model_are_refused():
    with pytest.raises(UserError, match=r"lora_rank with init_from=scratch.*--init_from="):
        load_start(read_request([*TINY, "--lora_rank=2"]), None)


@pytest.mark.parametrize("inside", ["", "best"])
def test_adapters_on_a_model_that_the_run_replaces_are_refused(finished, inside):
    """Resuming would put them a second time on the model into which best/ has merged them."""
    argv = [*TINY, f"--init_from={finished / inside}", "--lora_rank=4"]
    with pytest.raises(UserError, match="choose another --out_dir="):
        load_start(read_request([*argv, f"--out_dir={finished}"]), None)
    model, _ = load_start(read_request([*argv, f"--out_dir={finished}-2"]), None)
    assert model.config.n_layer == 1


def test_data_of_another_tokenizer_than_the_models_are_refused(dataset, tmp_path):
    save_pretrained(GPT(GPTConfig(16, 9, 1, 2, 16)), tmp_path / "model")
    with pytest.raises(UserError, match=r"another tokenizer.*13 tokens.*9 tokens.*no tokenizer"):
        run(dataset, tmp_path / "out", f"--init_from={tmp_path / 'model'}")


# --------------------------------------------------------------------------------------------------
# The form of the model


def test_8_bit_adamw_is_refused_unless_weights_may_be_bfloat16():
    for dtype in (torch.float32, torch.float16):
        machine = Machine(CPU.device, dtype, compiled=False)
        with pytest.raises(UserError, match=r"adamw8bit keeps the weights in bfloat16.*--dtype="):
            prepare_model(small_gpt(), config(optimizer="adamw8bit"), machine)
    model = small_gpt()
    machine = Machine(CPU.device, torch.bfloat16, compiled=False)
    prepare_model(model, config(optimizer="adamw8bit"), machine)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_frozen_weights_of_lora_have_the_products_precision_and_adapters_float32():
    model = small_gpt()
    machine = Machine(CPU.device, torch.bfloat16, compiled=False)
    changes = {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": "c_attn", "recompute": "block"}
    prepare_model(model, config(**changes), machine)
    adapters = 0
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        if "lora_" in name:
            assert "c_attn" in name
            adapters += 1
    assert adapters == 2 * 2
    assert model.transformer.h[0].recompute == "block"


def test_only_a_compiled_run_compiles_its_layers(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    for wanted in (False, True):
        model = small_gpt()
        machine = Machine(CPU.device, torch.float32, compiled=wanted)
        prepare_model(model, config(), machine)
        assert len(compiled) == (3 if wanted else 0)  # two layers and the last norm
        assert not model.fused_loss  # a GPU's kernel


# --------------------------------------------------------------------------------------------------
# Length


def test_a_run_is_compiled_from_a_number_of_operations_on():
    shape = GPTConfig(8, 13, 1, 1, 8)
    steps = math.ceil(6e15 / (flops_per_token(shape) * 3 * 2 * 8))
    for max_iters, worth in ((steps, True), (steps - 1, False)):
        length = config(gradient_accumulation_steps=3, max_iters=max_iters)
        assert is_worth_compiling(shape, length) == worth
    # With num_epochs the length is not known yet, so it counts as long.
    assert is_worth_compiling(shape, config(num_epochs=1.0, max_iters=1))


def test_a_run_of_hours_on_a_cpu_is_warned_of_and_the_small_preset_named():
    shape = GPTConfig(bias=False)
    a_second = CPU_FLOPS_PER_CORE / flops_per_token(shape)  # tokens
    for hours, said in ((1.9, None), (5, "5 hours"), (30, "30 hours"), (96, "4 days")):
        tokens = hours * 3600 * 2 * a_second
        length = config(batch_size=1, block_size=1024, max_iters=round(tokens / 1024))
        # Only the steps that are left count, and max_iters may come from num_epochs.
        begun = replace(length, max_iters=length.max_iters + 10**6, num_epochs=3.0)
        warning = warn_of_long_run(shape, length, length.max_iters, cores=2)
        assert warn_of_long_run(shape, begun, length.max_iters, cores=2) == warning
        if said is None:
            assert warning is None
        else:
            assert f"about {said} on this CPU. config/train_shakespeare_cpu.py" in warning
            assert "--dataset=my.txt --tokenizer=char" in warning


def test_a_run_starts_from_the_checkpoint_and_not_from_its_seed(finished, tmp_path):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    found = built_from(["--init_from=resume", f"--out_dir={out_dir}", "--max_iters=9"])
    assert found.checkpoint == find_checkpoint(out_dir, ("last",))[0]
    assert found.progress.step == 4
    save_pretrained(found.model, tmp_path / "model")
    assert same_tensors(weights(tmp_path, "model"), weights(finished, "last"))
