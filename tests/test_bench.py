"""bench.py: what is asked for is measured, shown and written.

No test looks at how long anything took: a shared machine would make it fail or pass by chance.
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from bench import StepRunner, predict, predict_sizes, product_flops
from gpt12.cards import CARDS, Card, find_card
from gpt12.measure import show_rows, show_step
from gpt12.memory import GIB, RECOMPUTE, step_memory
from gpt12.muon import orthogonalize
from model import GPT
from tests.bench_helpers import GPU, SHAPE, arguments, make, make_124m, shape_of
from tests.helpers import ROOT, make_dataset, refused, same_weights
from tests.processes import start_ranks
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

    monkeypatch.setattr("bench.describe_run", describe_run)

    def run(*flags, **keys):
        bench.main([*arguments(**keys), "--json", *flags])
        *text, last = capsys.readouterr().out.splitlines()
        return json.loads(last), "\n".join(text)

    return run


def fake_steps(monkeypatch, limit=10**9, speed=float):
    """A step takes no time, and more rows than `limit` do not fit. Returns what is measured."""
    measured = []

    def measure_step(config, label, cuda_graph=True):
        measured.append((config, cuda_graph))
        if config.batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"label": label, "ms": 1.0, "tokens_per_s": speed(config.batch_size)}

    monkeypatch.setattr("bench.measure_step", measure_step)
    return measured


def check_step(row: dict, tokens: int) -> None:
    """The times, speed and tokens of a measured step belong together."""
    assert row["tokens"] == tokens
    assert abs(row["tokens_per_s"] * row["ms"] / 1e3 - tokens) < 1e-6 * tokens
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert row["warmup_s"] > 0


# --------------------------------------------------------------------------------------------------
# What was asked for


@pytest.mark.parametrize(
    ("flags", "shapes"),
    [
        ("", [(4, 4, 128, 64)]),  # on a CPU the model is small unless a shape is given
        ("--n_layer=1 --n_head=4 --n_embd=128", [(1, 4, 128, 1024)]),
        ("--n_layer=3", [(3, 12, 768, 1024)]),
        ("--init_from=gpt2-medium", [(24, 16, 1024, 1024)]),
        # The command line's own shape does not stay for the others.
        ("--n_layer=3 --sweep=init_from:gpt2-medium", [(24, 16, 1024, 1024)]),
        # A sweep over the small model's shape keeps the rest of it.
        ("--sweep=n-layer:1,2", [(1, 4, 128, 64), (2, 4, 128, 64)]),
        ("--sweep=init-from:gpt2", [(12, 12, 768, 1024)]),
    ],
)
def test_models_have_the_shapes_that_were_asked_for(monkeypatch, capsys, run, flags, shapes):
    measured = fake_steps(monkeypatch)
    bench.main(["--device=cpu", "--json", *flags.split()])
    asked = flags.startswith(("--n_", "--init_from"))
    assert ("give a shape or --init_from=gpt2" in capsys.readouterr().out) == (not asked)
    assert [(c.n_layer, c.n_head, c.n_embd, c.block_size) for c, _ in measured] == shapes
    config, _ = measured[0]
    assert config.vocab_size == (65 if config.block_size == 64 else 50257)
    assert config.bias == (config.init_from != "scratch")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init_from=resume", "one of scratch, gpt2, gpt2-medium"),
        ("--sample --max_new_tokens=1", "should be greater than or equal to 2"),
        ("--sweep=batch_sise:1,2", "batch_size"),
        ("--sweep=batch_size:1,none", "batch_size=none"),
        ("--sweep=batch_size", "KEY:VALUE"),
        ("--sweep=init_from:gpt2,gpt3", "init_from=gpt3"),
        ("--find_batch --vram_gb=12", "vram_gb=12 limits a GPU's memory"),
        ("--plan '--card=RTX 4070 Laptop'", "NVIDIA GeForce RTX 4070 Ti"),
        ("--plan --card=Ti", "card=Ti names no single card"),
        ("--plan --init_from=gpt2 --vram_gb=1.5", "nothing fits"),
        ("--plan --vram_gb=1", "vram_gb=1: Input should be greater than 1"),
        ("--card=A100", "card=A100: counts only with --plan"),
        ("--plan --ladder", "--ladder=True: does not count with --plan"),
        ("--plan --find_batch", "--find_batch=True: does not count with --plan"),
        ("--plan --sample", "--sample=True: does not count with --plan"),
        ("--plan --profile", "--profile=True: does not count with --plan"),
        ("--plan --attention=math", "--attention=math: does not count with --plan"),
        ("--sweep=plan:True", "sweep=plan:True: does not count with --plan"),
        ("--device=cpu --n_embd=32 --sweep=n_head:3", "must be a multiple of n_head"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(monkeypatch, flags, message):
    monkeypatch.setattr("bench.measure_step", lambda *_, **__: pytest.fail("measured"))
    refused(message, bench.main, [*arguments(), *shlex.split(flags)])


def test_several_processes_share_the_micro_batches_and_measure_only_the_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert bench.read([])[0].gradient_accumulation_steps == 4
    refused(
        "gradient_accumulation_steps=6 .* pass .*=8",
        bench.read,
        ["--gradient_accumulation_steps=6"],
    )
    refused("only the step can be measured", bench.main, ["--ladder"])


# --------------------------------------------------------------------------------------------------
# The step


def test_the_measured_step_is_train_pys_own_on_ever_new_windows():
    runner = StepRunner(make(gradient_accumulation_steps=2))
    assert type(runner.step) is TrainStep
    assert runner.model.training
    weights = [p.clone() for p in runner.model.parameters()]
    first = runner.step.x.clone()
    runner()
    assert runner.position == 2 * 3
    assert not torch.equal(first, runner.step.x)
    assert not same_weights(runner.model, weights)


def test_the_data_set_is_used_if_it_is_prepared(tmp_path):
    folder = make_dataset(tmp_path / "letters")
    runner = StepRunner(make(dataset=folder, real_data="auto"))
    assert (runner.data, runner.shape.vocab_size) == (str(folder), 13)
    for keys in ({"dataset": folder, "real_data": False}, {"dataset": "nowhere"}):
        assert StepRunner(make(**{"real_data": "auto"} | keys)).data == "random tokens"
    refused("nowhere", StepRunner, make(dataset="nowhere", real_data=True))


def test_a_step_reports_its_tokens_its_time_and_its_operations(run, tmp_path):
    result, text = run(gradient_accumulation_steps=2)
    check_step(result, 2 * 3 * 16)
    weights = 64 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32  # without positions; bias=False
    expected = {
        "parameters": weights + 16 * 32,
        "flops_per_token": 6 * weights + 12 * 2 * 32 * 16,
        "micro_steps": 2,
        "steps": 2,
        "data": "random tokens",
        "dtype": "float32",
        "compile": False,
        "cuda_graph": False,
    }
    assert result | expected == result
    assert "mfu" not in result and "peak_gib" not in result  # nobody knows them on a CPU
    assert 3 < result["loss"] < 6
    assert result["config"]["n_embd"] == 32
    assert result["device"].endswith("CPU cores")
    assert "measuring 3 x 16 tokens, recompute=none ..." in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_mfu_and_prediction_follow_from_the_datasheet(monkeypatch, lora_rank):
    card = Card(tflops=0.5, bandwidth_gbs=20, vram_gb=10, fp32_tflops=0.25)
    runner = StepRunner(make(dtype="bfloat16", lora_rank=lora_rank))
    monkeypatch.setitem(CARDS, runner.machine.name, card)
    row = {"flops_per_token": 7, "tokens_per_s": 100.0, "micro_steps": 1}
    bench.compare_with_datasheet(row, runner)
    # 6N + 12LCT counts a gradient for every weight, so LoRA has none.
    assert row.get("mfu") == (None if lora_rank else pytest.approx(7 * 100.0 / 0.5e12))
    prediction = predict(runner.shape, runner.config, card)
    assert row["predicted_ms"] == prediction["ms"]
    assert row["predicted_gib"] == prediction["peak_gib"]


def test_a_card_is_imitated_by_a_limit_on_torchs_allocator(monkeypatch):
    shares = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", shares.append)
    card = SimpleNamespace(total_memory=11.7 * GIB)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    bench.imitate_card(8, GPU)
    assert shares == [pytest.approx(7 / 11.7)]
    refused("none of that size", bench.imitate_card, 24, GPU)


def test_all_ranks_are_one_figure():
    (status, printed), others = [
        rank.end() for rank in start_ranks(bench.main, *arguments(json=True))
    ]
    assert status == 0, printed
    assert others == (0, "")
    check_step(json.loads(printed.splitlines()[-1]), 2 * 48)


# --------------------------------------------------------------------------------------------------
# Several steps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_rung_of_the_ladder_does_the_same_work(run, device):
    keys = {"device": device, "dtype": "bfloat16", "compile": "auto", "vocab_size": 50}
    result, _ = run("--ladder", **keys, n_embd=64, block_size=32)
    first, *others = result["ladder"]
    assert [row["dtype"] for row in others] == ["bfloat16"] * (5 if device == "cuda" else 3)
    assert others[-1]["cuda_graph"] == (device == "cuda")
    # Before the clock starts, a recorded step makes three steps more: its last loss is a later one.
    for row in others:
        check_step(row, 3 * 32)
        assert row["cuda_graph"] or row["loss"] == pytest.approx(first["loss"], abs=0.02)


def test_on_a_gpu_every_rung_of_the_ladder_switches_one_thing_on(monkeypatch):
    config = make(dtype="bfloat16", compile=True)
    measured = fake_steps(monkeypatch)
    bench.climb_ladder(config, GPU)
    rungs = [(c.dtype, c.compile, c.attention, c.recompute, graph) for c, graph in measured]
    assert [" ".join(map(str, rung)) for rung in rungs] == [
        "float32 False math none False",
        "bfloat16 False math none False",
        "bfloat16 True math none False",
        "bfloat16 True auto none False",
        "bfloat16 True auto pointwise False",
        "bfloat16 True auto pointwise True",
    ]


def test_rungs_that_do_not_fit_are_rows_and_speeds_are_multiples_of_the_first(capsys):
    rows = [
        {"label": "a", "error": "out of memory"},
        {"label": "b", "tokens_per_s": 4.0, "peak_gib": 2.0},
        {"label": "c", "tokens_per_s": 10.0, "mfu": 0.5, "peak_gib": 0.00391},
    ]
    show_rows(rows)
    show_step(rows[2] | {"reserved_gib": 0.00195, "predicted_ms": 60.0})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [
        "tokens/s times first MFU peak GiB",
        "a out of memory",
        "b 4 2",
        "c 10 2.50 50.0% 0.00391",  # 4 MB are not 0.00 GiB
    ]
    assert lines[6:] == ["label c", "reserved_gib 0.00195", "predicted_ms 60.00"]


def test_a_sweep_changes_only_its_key_and_is_a_table(run, monkeypatch):
    measured = fake_steps(monkeypatch, limit=2)
    result, text = run("--sweep=batch-size:1,4,2")
    assert [row.get("error") for row in result["sweep"]] == [None, "out of memory", None]
    assert [config for config, _ in measured] == [
        make(batch_size=n, json=True, sweep="batch-size:1,4,2") for n in (1, 4, 2)
    ]
    assert "batch-size=2" in text


def test_a_key_that_the_shape_of_gpt2_overrules_is_told(monkeypatch, capsys):
    fake_steps(monkeypatch)
    keys = ["--n_layer=4", "--n_embd=768", "--device=cpu", "--json"]
    for flags in (["--init_from=gpt2"], ["--init_from=gpt2", "--plan"], ["--sweep=init_from:gpt2"]):
        bench.main([*keys, *flags])
        told = [line for line in capsys.readouterr().out.splitlines() if "not count" in line]
        assert told == ["n_layer=4 does not count: the model in gpt2 has 12"]


def test_find_batch_doubles_the_rows_until_it_gets_slower_or_does_not_fit(run, monkeypatch):
    speed = {1: 1.0, 2: 2.0, 4: 9.0, 8: 8.7, 16: 3.0}
    fake_steps(monkeypatch, limit=4, speed=speed.get)
    result, text = run("--find_batch")
    assert len(result["find_batch"]) == 4  # 1, 2, 4, 8 rows
    last = {"label": "--batch_size=8 --recompute=none", "error": "out of memory"}
    assert result["find_batch"][-1] == last
    assert "fastest: --batch_size=4 --recompute=none, 9 tokens/s" in text
    fake_steps(monkeypatch, limit=100, speed=speed.get)
    result, _ = run("--find_batch", "--recompute=block")
    assert len(result["find_batch"]) == 5
    assert len(bench.find_batch(make(), RECOMPUTE, GPU)) == 15  # on a GPU every kind
    fake_steps(monkeypatch, limit=0)
    refused("nothing fits", run, "--find_batch")


def test_a_step_that_a_cpu_has_no_memory_for_is_not_begun(run, monkeypatch):
    """The system would kill the program."""
    monkeypatch.setattr("bench.available_memory", lambda machine: 0.5 * GIB)
    result, text = run("--sweep=batch_size:1,100000")
    assert text.count("measuring batch_size=100000 ...") == 1
    assert [row.get("error") for row in result["sweep"]] == [None, "out of memory"]
    with pytest.raises(torch.OutOfMemoryError):
        run(batch_size=100000)


def test_another_error_is_not_taken_for_too_little_memory(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug about memory")

    monkeypatch.setattr("bench.measure_step", fail)
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
        assert row["first_ms"] > 0
    assert "prompts of 4 tokens, 12 new tokens" in text  # the context ends there
    assert "texts at once: 1 " in text
    assert "first token ms" in text


def test_profile_and_nanogpts_other_options_of_bench_are_taken(run, tmp_path, capsys):
    bench.main([*arguments(), "--profile", "--bias=True", "--real_data=False", "--seed=1"])
    assert "aten::mm" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # the figures of the last measurement stay


def test_the_plan_for_the_4070_ti(run, monkeypatch):
    """Without asking for a GPU. Its name need not be whole."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("asked for a GPU"))
    bench.main(["--plan", "--card=rtx 4070 ti"])
    found = json.loads(Path("plan.json").read_text())["plan"]
    assert not Path("bench.json").exists()  # a prediction does not replace what was measured
    assert found["card"] == "NVIDIA GeForce RTX 4070 Ti"
    assert {row["recompute"] for row in found["rows"]} == set(RECOMPUTE)
    for row in found["rows"]:
        assert row["peak_gib"] <= 11
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(row["batch_size"] * 1024)
        # 798 MFLOP a token with causal attention: the datasheet allows no more than this.
        assert row["tokens_per_s"] < 80.2e12 / 798e6
    # The README's prediction.
    assert (found["best"]["batch_size"], found["best"]["recompute"]) == (30, "none")
    assert found["best"]["tokens_per_s"] == pytest.approx(65_000, rel=0.01)


def test_a_card_is_named_by_its_end_or_those_that_are_near_are_shown():
    assert find_card("rtx 4070") == "NVIDIA GeForce RTX 4070"
    for name, near in (
        ("A100", "A100-SXM4-40GB\n  NVIDIA A100-SXM4-80GB\n  NVIDIA A100 80GB PCIe"),
        ("RTX 4070Ti", "GeForce RTX 4070 Ti\n  NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("L40", "L40S"),
    ):
        refused(rf"\A.*\n  NVIDIA {near}\Z", find_card, name)


def test_a_plan_of_a_long_context_asks_the_twin_for_a_shorter_one(monkeypatch):
    """A twin's time and memory grow with the square of its context."""
    examined = []
    monkeypatch.setattr("bench.is_gpt2", lambda shape: examined.append(shape) or True)
    bench.main(["--plan", "--json", "--block_size=100000", "--recompute=block"])
    assert examined[0].block_size <= 2048
    assert examined[0].n_layer == 12


@pytest.mark.parametrize(
    "words",
    [
        "config/train_gpt2.py",
        "config/train_gpt2_12gb.py",
        "config/train_gpt2_fast.py",
        "--block_size=512 --batch_size=4",
    ],
)
def test_presets_and_results_name_the_predicted_figures(monkeypatch, words):
    monkeypatch.chdir(ROOT)
    config, *_ = bench.read([*words.split(), "--dtype=bfloat16"])
    prediction = predict(shape_of(config), config, RTX_4070_TI)
    figures = f"{round(prediction['tokens_per_s'] / 1000)},000 tokens/s"
    if words.startswith("config/"):
        days = f"{config.max_iters * prediction['ms'] / 1e3 / 86400:.2g} days"
        assert f"{days} on" in Path(words).read_text()
        figures += f", {days}, {prediction['peak_gib']:.1f} GiB"
    assert (
        f"| {figures} | `python bench.py --plan {words}` |" in Path("docs/results.md").read_text()
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_writes_the_figures_and_draws_the_ladder(run, tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    rows = [{"label": "a", "error": "full"}, {"label": "b", "tokens_per_s": 4.0, "peak_gib": 2.0}]
    bench.finish(make(ladder=True), "a card", {"ladder": rows})
    written = {file.name for file in tmp_path.iterdir()}
    assert written == ({"bench.json", "bench.png"} if rank == 0 else set())


# --------------------------------------------------------------------------------------------------
# Predicting


@pytest.mark.parametrize(("recompute", "plain", "causal"), [("none", 12, 7), ("block", 16, 9)])
def test_the_work_is_counted_as_torch_counts_it(recompute, plain, causal):
    """FlopCounterMode sees every product of a step with the plain head and loss.

    It runs plain attention, which takes 12 T C L a token, 16 if computed again. A causal kernel
    takes 7 and 9.
    """
    options = make(recompute=recompute)
    model = GPT(shape_of(options))
    model.set_recompute(recompute)
    x = torch.zeros(3, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = model(x)
        F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    attention = (3 * 16) * 16 * 32 * 2  # tokens T C L
    products = counter.get_total_flops() - plain * attention
    counted = product_flops(shape_of(options), options, 3 * 16) - causal * attention
    # LayerNorm's weights are counted like those of matrices.
    assert counted == pytest.approx(products, rel=0.01)


def test_muons_products_are_counted_as_torch_counts_them():
    C = SHAPE["n_embd"]
    muon, adamw = (
        product_flops(shape_of(make()), make(optimizer=name), 48) for name in ("muon", "adamw")
    )
    with FlopCounterMode(display=False) as counter:
        for count, rows, columns in ((4, C, C), (1, 4 * C, C), (1, C, 4 * C)):
            orthogonalize(torch.ones(count, rows, columns))
    assert muon - adamw == SHAPE["n_layer"] * counter.get_total_flops()


@pytest.mark.parametrize(
    ("line", "ms"),
    [
        ("--batch_size=64 --recompute=none", 112.7),
        ("--batch_size=32 --recompute=none", 58.5),
        ("--batch_size=12 --recompute=pointwise", 24.75),
        ("--batch_size=32 --recompute=pointwise", 60.7),
        ("--batch_size=32 --recompute=block", 67.4),
    ],
)
def test_predicted_time_is_what_was_measured(line, ms):
    """Measured on an H200: 124M, T=1024, bias=False, torch 2.11 (docs/results.md)."""
    found = predicted(line, CARDS["NVIDIA H200"])
    assert found["ms"] == pytest.approx(ms, rel=0.025)


def predicted(line="", card=RTX_4070_TI):
    options = make_124m(line)
    return predict(shape_of(options), options, card)


def test_methods_that_save_memory_do_and_those_that_cost_time_do():
    plain = predicted()
    lora = predicted("--lora_rank=16")
    assert lora["peak_gib"] < predicted("--optimizer=adamw8bit")["peak_gib"] < plain["peak_gib"]
    slower = [
        "--lora_rank=16",
        "",
        "--bias=True",
        "--recompute=pointwise",
        "--optimizer=muon",
        "--recompute=block",
        "--dtype=float32",
    ]
    times = [predicted(line)["ms"] for line in slower]
    assert times == sorted(times)
    many = predicted("--gradient_accumulation_steps=8")
    assert many["tokens_per_s"] > plain["tokens_per_s"]


def test_the_sizes_of_a_plan_end_with_the_largest_that_fits():
    for recompute in RECOMPUTE:
        options = make_124m(f"--recompute={recompute} --batch_size=5")
        rows = predict_sizes(shape_of(options), options, 11.0, RTX_4070_TI)
        largest = rows[-1]["batch_size"]
        assert [row["batch_size"] for row in rows[:-1]] == [
            n for n in (1, 4, 5, 16, 64) if n < largest
        ]
        assert rows[-1]["peak_gib"] <= 11.0
        assert step_memory(shape_of(options), replace(options, batch_size=largest + 1)) > 11.0 * GIB
        (row,) = predict_sizes(shape_of(options), options, 1.0, RTX_4070_TI)
        needed = step_memory(shape_of(options), options) / GIB
        assert row["error"] == f"does not fit: {needed:.3g} GiB"
