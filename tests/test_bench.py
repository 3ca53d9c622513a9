"""bench.py: what is asked for is measured, shown and written.

No test looks at how long anything took: a shared machine would make it fail or pass by chance.
"""

import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from bench import OutOfMemory, StepResult, measure_step, step_runner
from gpt12 import measure
from gpt12.cards import CARDS, Card
from gpt12.errors import UserError
from gpt12.loader import Loader
from gpt12.memory import GIB, RECOMPUTE, predict
from gpt12.settings import model_shape
from model import GPTConfig, parameter_count
from tests.bench_helpers import GPU, arguments, fake_gpu_memory, make, make_124m
from tests.helpers import ROOT, environment, write_shard
from train import TrainStep

RTX_4070_TI = CARDS["NVIDIA GeForce RTX 4070 Ti"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run bench.py in an empty folder. Returns its JSON and the text that stood before it.

    The JSON has to be the last line.
    """
    monkeypatch.chdir(tmp_path)

    def describe_run(config, **facts):  # asking git every time would take seconds
        return {"config": config, "commit": None, "versions": {}, **facts}

    monkeypatch.setattr(bench, "describe_run", describe_run)

    def run(*flags, **keys):
        bench.main([*arguments(**keys), "--json", *flags])
        *text, last = capsys.readouterr().out.splitlines()
        return json.loads(last), "\n".join(text)

    return run


def fake_result(config, tokens_per_s, **changes):
    """A made-up result of a step."""
    result = StepResult(
        ms=1.0,
        ms_p10=1.0,
        ms_p90=1.0,
        steps=1,
        warmup_s=1.0,
        label="",
        tokens=16,
        tokens_per_s=tokens_per_s,
        batch_size=config.batch_size,
        block_size=config.block_size,
        micro_steps=1,
        data="random tokens",
        parameters=1,
        flops_per_token=1,
        dtype="float32",
        compile=False,
        recompute=config.recompute,
        attention=config.attention,
        cuda_graph=False,
        loss=1.0,
    )
    return replace(result, **changes)


def fake_steps(monkeypatch, limit, speed=float):
    """A step takes no time, and more rows than `limit` do not fit into memory."""

    def measure_step(config, label="", **techniques):
        if config.batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fake_result(config, speed(config.batch_size), label=label)

    monkeypatch.setattr(bench, "measure_step", measure_step)


def check_step(row: dict, tokens: int) -> None:
    """The times, speed and tokens of a measured step belong together."""
    assert row["tokens"] == tokens
    assert abs(row["tokens_per_s"] * row["ms"] / 1e3 - tokens) < 1e-6 * tokens
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert row["warmup_s"] > 0


def prepare(folder, vocab_size):
    """Write a data set of 2,000 tokens for each split."""
    for split in ("train", "val"):
        tokens = np.arange(2000, dtype=np.uint16) % vocab_size
        write_shard(folder / f"{split}_000000.bin", tokens)
    meta = {"tokenizer": None, "vocab_size": vocab_size, "documents": 1}
    (folder / "meta.json").write_text(json.dumps(meta))


# --------------------------------------------------------------------------------------------------
# What was asked for


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        (["--device=cpu"], (4, 4, 128, 64)),  # on a CPU the model is small unless a shape is given
        (["--device=cpu", "--n_layer=3"], (3, 12, 768, 1024)),
        (["--device=cpu", "--init_from=gpt2-medium"], (24, 16, 1024, 1024)),
        # Its 4 heads divide a width of 64; the 12 heads of GPT-2 do not.
        (["--device=cpu", "--sweep=n_embd:64"], (4, 4, 64, 64)),
        # The command line's own shape does not stay for the others.
        (["--device=cpu", "--n_layer=3", "--sweep=init_from:gpt2-medium"], (24, 16, 1024, 1024)),
    ],
)
def test_a_model_has_the_shape_that_was_asked_for(monkeypatch, run, flags, shape):
    measured = []

    def note(config, *_, **techniques):
        measured.append((config.n_layer, config.n_head, config.n_embd, config.block_size))
        assert config.bias == (config.init_from != "scratch")
        return fake_result(config, 1.0)

    monkeypatch.setattr(bench, "measure_step", note)
    bench.main(flags)
    assert measured == [shape]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_from=resume"], "one of scratch, gpt2, gpt2-medium"),
        (["--sample", "--max_new_tokens=1"], "should be greater than or equal to 2"),
        (["--sweep=batch_sise:1,2"], "batch_size"),
        (["--sweep=batch_size:1,none"], "batch_size=none"),
        (["--sweep=batch_size"], "KEY:VALUE"),
        (["--sweep=init_from:gpt2,gpt3"], "init_from=gpt3"),
        (["--find_batch", "--vram_gb=12"], "vram_gb=12 limits a GPU's memory"),
        (["--plan", "--card=RTX 4070 Laptop"], "NVIDIA GeForce RTX 4070 Ti"),
        (["--plan", "--card=Ti"], "card=Ti is unknown"),
        (["--plan", "--vram_gb=0.5"], "nothing fits"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(monkeypatch, flags, message):
    monkeypatch.setattr(bench, "measure_step", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        bench.main([*arguments(), *flags])


def test_several_processes_share_the_micro_batches_and_measure_only_the_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert bench.read([])[0].gradient_accumulation_steps == 4
    with pytest.raises(UserError, match="gradient_accumulation_steps=6 .* pass .*=8"):
        bench.read(["--gradient_accumulation_steps=6"])
    with pytest.raises(UserError, match="only the step can be measured"):
        bench.main(["--ladder"])


# --------------------------------------------------------------------------------------------------
# The step


def test_the_measured_step_is_train_pys_own_on_ever_new_windows():
    with step_runner(make(gradient_accumulation_steps=2)) as runner:
        assert type(runner.step) is TrainStep
        assert type(runner.loader) is Loader
        assert runner.model.training
        weights = [p.clone() for p in runner.model.parameters()]
        first = runner.step.x.clone()
        runner()
        assert runner.position == 2 * 3
        assert not torch.equal(first, runner.step.x)
        after = list(runner.model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(weights, after))


def test_the_data_set_is_used_if_it_is_prepared(tmp_path):
    prepare(tmp_path, 50)
    on_data = measure_step(make(dataset=tmp_path, real_data="auto"))
    assert on_data.data == str(tmp_path)
    assert on_data.parameters == parameter_count(GPTConfig(16, 50, 2, 2, 32, bias=False))
    for keys in ({"dataset": tmp_path, "real_data": False}, {"dataset": "nowhere"}):
        with step_runner(make(**{"real_data": "auto"} | keys)) as runner:
            assert runner.data == "random tokens"
    with pytest.raises(UserError, match="nowhere"):
        measure_step(make(dataset="nowhere", real_data=True))


def test_a_text_is_read_with_the_keys_that_say_how(monkeypatch):
    asked = {}

    def note(name, **options):
        asked.update(options, name=name)
        raise UserError("noted")

    monkeypatch.setattr(measure, "open_dataset", note)
    keys = {"tokenizer": "bytes", "val_fraction": 0.2, "text_column": "body"}
    keys |= {"encoding": "cp1251"}
    with pytest.raises(UserError, match="noted"):
        measure.open_windows(make(dataset="my.csv", real_data=True, **keys))
    assert asked == {"name": "my.csv", "block_size": make().block_size, **keys}


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_the_attention_kernel_can_be_chosen(attention):
    with step_runner(make(attention=attention)) as runner:
        with torch.profiler.profile() as profiler:
            runner()
    used = any("flash_attention" in event.key for event in profiler.key_averages())
    assert used == (attention == "flash")


def test_tf32_is_switched_off_for_the_measurement_only():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True  # as open_machine sets it on a GPU
        for allowed in (False, True):
            with step_runner(make(), tf32=allowed):
                assert torch.backends.cuda.matmul.allow_tf32 == allowed
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_step_reports_its_tokens_its_time_and_its_operations(run, tmp_path):
    result, text = run(gradient_accumulation_steps=2)
    check_step(result, 2 * 3 * 16)
    C, L, V, T = 32, 2, 64, 16
    weights = V * C + L * (12 * C * C + 2 * C) + C  # without positions; bias=False
    assert result["parameters"] == weights + T * C
    assert result["flops_per_token"] == 6 * weights + 12 * L * C * T
    assert (result["batch_size"], result["micro_steps"], result["steps"]) == (3, 2, 2)
    assert (result["dtype"], result["compile"], result["cuda_graph"]) == ("float32", False, False)
    assert (result["recompute"], result["data"]) == ("none", "random tokens")
    assert (result["mfu"], result["peak_gib"]) == (None, None)  # nobody knows them on a CPU
    assert 3 < result["loss"] < 6
    assert result["config"]["n_embd"] == 32
    assert "learning_rate" not in result["config"]  # a default
    assert result["device"].endswith("CPU cores")
    assert "96 tokens in micro-batches of 3 sequences x 16 tokens, random tokens" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lora_rank", "gib", "known"),
    [(0, 9.8, True), (2, 9.8, True), (0, 11.8, False)],  # 12 GB: another card of the same name
)
def test_mfu_and_prediction_follow_from_the_datasheet(monkeypatch, lora_rank, gib, known):
    card = Card(tflops=0.5, bandwidth_gbs=20, vram_gb=10, fp32_tflops=0.25)
    with step_runner(make(dtype="bfloat16", lora_rank=lora_rank)) as runner:
        monkeypatch.setattr(bench, "CARDS", {runner.machine.name: card})
        measured = fake_result(runner.config, 100.0, flops_per_token=7, total_gib=gib)
        result = bench.compare_with_datasheet(measured, runner)
        prediction = predict(runner.shape, runner.config, card)
    if not known:
        assert result == measured
        return
    # 6N + 12LCT counts a gradient for every weight, so LoRA has none.
    assert result.mfu == (None if lora_rank else pytest.approx(7 * 100.0 / 0.5e12))
    assert (result.predicted_ms, result.predicted_gib) == (prediction.ms, prediction.gib)


def test_a_card_is_imitated_by_a_limit_on_torchs_allocator(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    fake_gpu_memory(monkeypatch, 11.7)
    bench.imitate_card(8, GPU)
    assert shares == [pytest.approx(7 / 11.7)]
    for impossible in (0.5, 24):
        with pytest.raises(UserError, match="cannot be imitated"):
            bench.imitate_card(impossible, GPU)


def test_a_step_that_does_not_fit_is_said_and_not_made_smaller(run, monkeypatch):
    fake_steps(monkeypatch, limit=2)
    with pytest.raises(UserError, match="^out of memory.*--find_batch"):
        run(batch_size=8)


def test_under_torchrun_all_ranks_are_one_figure(tmp_path):
    """torchrun finds a port by itself, and puts what each rank prints into a file."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start += ["--redirects=1", f"--log-dir={tmp_path / 'logs'}"]
    command = [*start, str(Path(bench.__file__)), *arguments()]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = []
    for rank in (0, 1):
        (log,) = (tmp_path / "logs").glob(f"*/attempt_0/{rank}/stdout.log")
        printed.append(log.read_text())
    assert printed[1] == ""
    assert "wrote bench.json" in printed[0]
    check_step(json.loads((tmp_path / "bench.json").read_text()), 2 * 48)


# --------------------------------------------------------------------------------------------------
# Several steps


def test_every_rung_of_the_ladder_does_the_same_work(run, tmp_path):
    result, _ = run("--ladder", dtype="bfloat16", seed=3, vocab_size=50)
    rows = result["ladder"]
    labels = ["fp32, eager", "+ 16-bit autocast", "+ flash attention", "+ recomputation"]
    assert [row["label"] for row in rows] == labels
    for row in rows:
        check_step(row, 48)
        assert row["loss"] == pytest.approx(rows[0]["loss"], abs=0.02)
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "bfloat16", "bfloat16"]
    assert [row["attention"] for row in rows] == ["math", "math", "auto", "auto"]
    assert [row["recompute"] for row in rows] == ["none", "none", "none", "pointwise"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_on_a_gpu_the_ladder_has_all_rungs_and_each_switches_one_thing_on(monkeypatch):
    config = make(dtype="bfloat16", compile=True)
    rungs = []

    def note(label, config, **techniques):
        switches = (config.dtype, config.compile, config.attention, config.recompute)
        rungs.append((*switches, *techniques.values()))
        return OutOfMemory(label, 1)

    monkeypatch.setattr(bench, "try_to_measure", note)
    monkeypatch.setattr(bench, "decide", lambda config: (config, GPU))
    rows = bench.climb_ladder(config)
    assert [row.label for row in rows[1:]] == [f"+ {name}" for name in bench.TECHNIQUES]
    assert rungs[0] == ("float32", False, "math", "none", False, False)
    assert rungs[-1] == ("bfloat16", True, "auto", "pointwise", True, True)
    for before, after in pairwise(rungs):
        assert sum(a != b for a, b in zip(before, after)) == 1


def test_rungs_that_do_not_fit_are_rows_and_speeds_are_multiples_of_the_first(capsys):
    rows = [
        OutOfMemory("a", batch_size=3),
        fake_result(make(), 4.0, label="b", peak_gib=2.0),
        fake_result(make(), 10.0, label="c", mfu=0.5, peak_gib=3.0),
    ]
    bench.show_steps(rows)
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split()[-5:] == ["times", "first", "MFU", "peak", "GiB"]
    assert lines[0].split() == ["a", "out", "of", "memory"]
    assert lines[1].split()[-3:] == ["4", "1.00", "2.00"]
    assert lines[2].split()[-4:] == ["10", "2.50", "50.0%", "3.00"]


def test_a_sweep_changes_only_its_key_and_is_a_table_and_a_picture(run, tmp_path, monkeypatch):
    fake_steps(monkeypatch, limit=2)
    result, text = run("--sweep=batch-size:1,4,2")
    assert [row.get("error") for row in result["sweep"]] == [None, "out of memory", None]
    assert [row["batch_size"] for row in result["sweep"]] == [1, 4, 2]
    assert text.count("batch-size=2") == 2  # announced, and in the table
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_find_batch_doubles_the_rows_until_it_gets_slower_or_does_not_fit(run, monkeypatch):
    speed = {1: 1.0, 2: 2.0, 4: 9.0, 8: 8.7, 16: 3.0}
    fake_steps(monkeypatch, limit=4, speed=speed.get)
    result, text = run("--find_batch")
    tried = [(row["label"], row.get("error")) for row in result["find_batch"]]
    assert len(tried) == 4  # 1, 2, 4, 8 rows
    assert tried[-1] == ("--batch_size=8 --recompute=none", "out of memory")
    assert "fastest: --batch_size=4 --recompute=none, 9 tokens/s" in text
    fake_steps(monkeypatch, limit=100, speed=speed.get)
    result, _ = run("--find_batch", "--recompute=block")
    assert [row["batch_size"] for row in result["find_batch"]] == [1, 2, 4, 8, 16]
    monkeypatch.setattr(bench, "decide", lambda config: (config, GPU))
    rows = bench.find_batch(make(), set())
    assert {row.recompute for row in rows} == set(RECOMPUTE)  # on a GPU
    fake_steps(monkeypatch, limit=0)
    with pytest.raises(UserError, match="nothing fits"):
        bench.find_batch(make(), set())


def test_a_step_that_a_cpu_has_no_memory_for_is_not_begun(run, monkeypatch):
    """The system would kill the program."""
    monkeypatch.setattr(bench, "available_memory", lambda machine: 0.5 * GIB)
    result, _ = run("--sweep=batch_size:1,100000")
    assert [row.get("error") for row in result["sweep"]] == [None, "out of memory"]
    with pytest.raises(UserError, match="^out of memory"):
        run(batch_size=100000)


def test_another_error_is_not_taken_for_too_little_memory(monkeypatch):
    def fail(*_, **techniques):
        raise RuntimeError("a bug about memory")

    monkeypatch.setattr(bench, "measure_step", fail)
    for flags in ([], ["--ladder"]):
        with pytest.raises(RuntimeError, match="a bug about memory"):
            bench.main([*arguments(), *flags])


# --------------------------------------------------------------------------------------------------
# The other commands


def test_sample_measures_texts_as_sample_py_writes_them(run):
    result, text = run("--sample", max_new_tokens=500)
    assert [row["texts"] for row in result["sample"]] == [1, 4, 16, 64]
    for row in result["sample"]:
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(row["texts"])
        assert row["first_s"] > 0
    assert "prompts of 4 tokens, 12 new tokens" in text  # the context ends there


def test_profile_and_nanogpts_other_options_of_bench_are_taken(run, tmp_path, capsys):
    bench.main([*arguments(), "--profile", "--bias=True", "--real_data=False", "--seed=1"])
    assert "aten::mm" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # the figures of the last measurement stay


def test_the_plan_for_the_4070_ti(run, monkeypatch):
    """Without asking for a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    bench.main(["--plan"])
    found = json.loads(Path("plan.json").read_text())["plan"]
    assert not Path("bench.json").exists()  # a prediction does not replace what was measured
    assert found["card"] == "NVIDIA GeForce RTX 4070 Ti"
    for kind in RECOMPUTE:
        rows = [row for row in found["rows"] if row["recompute"] == kind]
        assert [row["batch_size"] for row in rows[:2]] == [1, 4]
        for row in rows:
            assert sum(row["memory_gib"].values()) == pytest.approx(row["gib"])
            assert row["gib"] <= 11
            assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(row["batch_size"] * 1024)
            # 798 MFLOP a token with causal attention: the datasheet allows no more than this.
            assert row["tokens_per_s"] < 80.2e12 / 798e6
    # The README's prediction.
    assert (found["best"]["batch_size"], found["best"]["recompute"]) == (30, "none")
    assert found["best"]["tokens_per_s"] == pytest.approx(65_000, rel=0.01)


def test_the_end_of_a_cards_name_is_enough_for_a_plan(run):
    result, text = run("--plan", "--card=h200", "--vram_gb=24")
    assert result["plan"]["card"] == "NVIDIA H200"
    assert "NVIDIA H200 with 23 GiB for the step" in text
    best = result["plan"]["best"]
    assert f"fastest: --batch_size={best['batch_size']} --recompute={best['recompute']}" in text


def prediction_of(*options: str):
    config, _ = bench.read([*options, "--dtype=bfloat16"])
    shape = model_shape(config, config.vocab_size)
    return config, predict(shape, config, RTX_4070_TI)


@pytest.mark.parametrize("name", ["train_gpt2.py", "train_gpt2_12gb.py", "train_gpt2_fast.py"])
def test_the_days_that_a_preset_and_the_results_name_are_the_predicted_ones(name):
    preset, prediction = prediction_of(f"{ROOT}/config/{name}")
    days = preset.max_iters * prediction.ms / 1e3 / 86400
    shown = f"{days:.0f} days" if days > 10 else f"{days:.1f} days"
    thousands = round(prediction.tokens_per_s / 1000)
    assert shown.replace(" days", " days on") in (ROOT / "config" / name).read_text()
    row = f"| {thousands},000 tokens/s, {shown}, {prediction.gib:.1f} GiB | `python train.py"
    assert f"{row} config/{name}` |" in (ROOT / "docs/results.md").read_text()


def test_the_other_prediction_in_the_results_is_that_of_the_program():
    options = "--block_size=512 --batch_size=4"
    thousands = round(prediction_of(*options.split())[1].tokens_per_s / 1000)
    row = f"| {thousands},000 tokens/s | `python bench.py --plan {options}` |"
    assert row in (ROOT / "docs/results.md").read_text()


# --------------------------------------------------------------------------------------------------
# What is written


def test_without_json_the_figures_are_written_to_a_file(run, tmp_path, capsys):
    run()
    bench.main(arguments())
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("wrote bench.json") for line in lines)
    assert not any(line.startswith("{") for line in lines)
    check_step(json.loads((tmp_path / "bench.json").read_text()), 48)


def test_a_step_on_a_known_card_is_told_with_its_limits(capsys):
    gpu = {"mfu": 0.5, "predicted_ms": 60.0, "predicted_gib": 4.3}
    memory = {"peak_gib": 4.25, "reserved_gib": 5.0, "total_gib": 11.7}
    bench.show_step(fake_result(make(), 1600.0, **gpu, **memory))
    text = capsys.readouterr().out
    for part in (
        "50.0% of the datasheet's",
        "60.0 ms, 4.30 GiB in tensors",
        "4.25 GiB in tensors at the peak, 5.00 GiB taken from the driver, of 11.7",
        "1,600 tokens/s",
    ):
        assert part in text


def test_a_folder_that_cannot_be_written_is_the_users_mistake(run, tmp_path):
    (tmp_path / "bench.json.tmp").mkdir()  # root may write everywhere, but not into a folder
    with pytest.raises(UserError, match="--json"):
        bench.finish(make(), "a card", {"ms": 1.0})


def test_only_rank_0_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    bench.finish(make(), "a card", {"ms": 1.0})
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
def test_every_rung_does_the_same_work_on_a_gpu():
    keys = {"n_embd": 128, "block_size": 256, "vocab_size": 50}
    config = make(device="cuda", dtype="auto", compile="auto", **keys)
    rows = bench.climb_ladder(config)
    labels = ["fp32, eager", *(f"+ {name}" for name in bench.TECHNIQUES)]
    assert [row.label for row in rows] == labels
    # With a CUDA graph three steps more are made before the clock starts, so the last loss is that
    # of a later step.
    recorded = labels.index("+ CUDA graph")
    for group in (rows[:recorded], rows[recorded:]):
        for row in group:
            assert row.loss == pytest.approx(group[0].loss, abs=0.02)
    assert [row.cuda_graph for row in rows] == [i >= recorded for i in range(len(rows))]
    assert json.dumps([asdict(row) for row in rows])


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_predicted_memory_is_the_allocators(recompute):
    config = make_124m(batch_size=8, recompute=recompute, real_data=False, steps=3, dtype="auto")
    gc.collect()
    left_by_other_tests = torch.cuda.memory_allocated() / GIB
    result = measure_step(config)
    step_gib = result.peak_gib - left_by_other_tests
    assert step_gib == pytest.approx(result.predicted_gib, rel=0.05)
    assert result.cuda_graph
    assert result.compile
    assert result.mfu > 0
