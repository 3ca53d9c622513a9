"""bench.py: every mode on a tiny model, the arithmetic of its JSON, the plan's formulas, and the table of cards.

No test looks at how long anything took: a shared machine would make it fail or pass by chance.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import model as gpt
import train
from bench import GiB, find_card, predict
from config.machine import CARDS, Card, Machine
from data.shards import write_shard
from gpt12 import config_loader
from gpt12.errors import UserError
from gpt12.settings import BenchConfig
from model import GPT, GPTConfig
from tests.helpers import environment

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64, "batch_size": 3}
PLAIN = {"device": "cpu", "dtype": "float32", "compile": False, "real_data": False, "steps": 2}
BENCH = str(Path(bench.__file__))


def arguments(**keys):
    return [f"--{key}={value}" for key, value in (SHAPE | PLAIN | keys).items()]


def make(**keys):
    return config_loader.load(BenchConfig, arguments(**keys))[0]


@pytest.fixture(autouse=True)
def one_thread():
    """For so small a model threads only wait for each other, the more the busier the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run bench.py in an empty folder: its JSON, after checking that it is the last line, and what stood before it."""
    monkeypatch.chdir(tmp_path)
    facts = {"commit": None, "versions": {}, "platform": "here"}  # asking git every time would take seconds
    monkeypatch.setattr(bench.run_folder, "describe", lambda config, **more: {"config": config, **facts, **more})

    def run(*flags, **keys):
        bench.main([*arguments(**keys), *flags])
        *text, last = capsys.readouterr().out.splitlines()
        return json.loads(last), "\n".join(text)

    return run


def check_step(row, tokens):
    assert row["tokens"] == tokens
    assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(tokens)
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert row["warmup_s"] > 0


# --------------------------------------------------------------------------------------------------------------------
# Cards

# SMs, boost clock in MHz, bits of the memory bus, Gbit/s a pin: NVIDIA's product pages
# (nvidia.com/geforce/graphics-cards/{30,40,50}-series, compare). Per SM and clock their tensor cores do 512 operations
# in bf16 with fp32 accumulation, their other units 256 in fp32 (GA102 whitepaper v2.1, table 3; Ada v2.1, appendix A).
GEFORCE = {
    "3060": (28, 1777, 192, 15),
    "3070": (46, 1725, 256, 14),
    "3080": (68, 1710, 320, 19),
    "3090": (82, 1695, 384, 19.5),
    "3090 Ti": (84, 1860, 384, 21),
    "4060": (24, 2460, 128, 17),
    "4060 Ti": (34, 2535, 128, 18),
    "4070": (46, 2475, 192, 21),
    "4070 SUPER": (56, 2475, 192, 21),
    "4070 Ti": (60, 2610, 192, 21),
    "4070 Ti SUPER": (66, 2610, 256, 21),
    "4080": (76, 2505, 256, 22.4),
    "4080 SUPER": (80, 2550, 256, 23),
    "4090": (128, 2520, 384, 21),
    "5070": (48, 2512, 192, 28),
    "5070 Ti": (70, 2452, 256, 28),
    "5080": (84, 2617, 256, 30),
    "5090": (170, 2407, 512, 28),
}
# bf16 with sparsity (twice the dense rate), memory in GB/s and GB, fp32: NVIDIA's datasheets of these names.
DATACENTER = {
    "NVIDIA L4": (242, 300, 24, 30.3),
    "NVIDIA L40S": (724, 864, 48, 91.6),
    "NVIDIA A100-SXM4-40GB": (624, 1555, 40, 19.5),
    "NVIDIA A100-SXM4-80GB": (624, 2039, 80, 19.5),
    "NVIDIA A100 80GB PCIe": (624, 1935, 80, 19.5),
    "NVIDIA H100 PCIe": (1513, 2000, 80, 51),
    "NVIDIA H100 80GB HBM3": (1979, 3350, 80, 67),
    "NVIDIA H200": (1979, 4800, 141, 67),
}


def test_every_card_in_the_table_is_checked_here():
    assert CARDS.keys() == {f"NVIDIA GeForce RTX {name}" for name in GEFORCE} | DATACENTER.keys()


@pytest.mark.parametrize("name", GEFORCE)
def test_geforce_figures_follow_from_units_clock_and_bus(name):
    sms, mhz, bits, gbit = GEFORCE[name]
    card = CARDS[f"NVIDIA GeForce RTX {name}"]
    assert card.tflops == pytest.approx(sms * 512 * mhz / 1e6, rel=0.005)
    assert card.fp32_tflops == pytest.approx(sms * 256 * mhz / 1e6, rel=0.005)
    assert card.bandwidth_gbs == pytest.approx(bits / 8 * gbit, rel=0.002)


@pytest.mark.parametrize("name", DATACENTER)
def test_datacenter_figures_are_the_datasheets(name):
    card, (sparse, bandwidth, memory, fp32) = CARDS[name], DATACENTER[name]
    assert card.tflops == pytest.approx(sparse / 2, rel=0.002)
    assert card.bandwidth_gbs == pytest.approx(bandwidth, rel=0.02)
    assert (card.vram_gb, card.fp32_tflops) == (memory, pytest.approx(fp32, rel=0.005))


def fake_card(name, gib):
    machine = SimpleNamespace(name=name, on_gpu=True, world=1)
    return machine, lambda *_: (int((gib - 1) * GiB), int(gib * GiB))


def test_a_card_is_known_by_name_and_memory(monkeypatch):
    for name, gib, known in (
        ("NVIDIA GeForce RTX 3080", 9.8, True),
        ("NVIDIA GeForce RTX 3080", 11.8, False),  # another card of the same name
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 9.8, False),
        ("NVIDIA H200", 139.8, True),
    ):
        machine, memory = fake_card(name, gib)
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
        assert (find_card(make(), machine) is not None) == known, name
    by_hand = find_card(make(peak_tflops=100, bandwidth_gbs=500, vram_gb=10), machine)
    assert by_hand == Card(100, 500, 10, 50)


def test_what_spoils_a_measurement_is_told(monkeypatch):
    machine, memory = fake_card("NVIDIA GeForce RTX 4070 Ti", 11.7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    for name, gib in (("memory_reserved", 0.5), ("max_memory_reserved", 0.5), ("max_memory_allocated", 0.25)):
        monkeypatch.setattr(torch.cuda, name, lambda gib=gib: int(gib * GiB))
    steady, driver = [10.0] * 20, "575.57, 2610, 3105, 284.9, 0x0000000000000004"
    say = lambda times, text: bench.gpu_state(machine, times, SimpleNamespace(communicate=lambda: (text, "")))  # noqa: E731
    fine = say(steady, driver)
    assert fine["warnings"] == []
    assert (fine["peak_gib"], fine["reserved_gib"], fine["total_gib"]) == (0.25, 0.5, pytest.approx(11.7))
    assert fine["driver"]["driver_version"] == "575.57" and fine["driver"]["clocks.sm"] == "2610"
    assert "30% slower" in say([10.0] * 15 + [13.0] * 5, driver)["warnings"][0]
    assert "1005 MHz" in say(steady, "575.57, 1005, 3105, 90.0, 0x0000000000000020")["warnings"][0]  # too hot
    assert say(steady, "")["warnings"] == [] and say(steady, "N/A, N/A, N/A, N/A, N/A")["warnings"] == []
    assert bench.gpu_state(machine, steady, None)["driver"] == {}
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 12 * GiB)  # more than the card has
    assert "spills" in say(steady, driver)["warnings"][0]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: -3 * GiB)  # that is, 3 GiB more in use
    assert "others'" in say(steady, driver)["warnings"][0]


# --------------------------------------------------------------------------------------------------------------------
# The step


def test_a_measurement_is_its_steps_median_and_outer_deciles(monkeypatch):
    """By a clock that only the steps move: some seconds of warm-up, then steps of unlike length."""
    took, clock = [0.001, 0.009, 0.002, 0.05, 0.004, 0.003, 0.006], [0.0]
    coming = iter([5.0, 2.0, *took])

    def step():
        clock[0] += next(coming)

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    row = bench.time_steps(step, Machine(torch.device("cpu"), torch.float32, compiled=False), 2, 7, tokens=48)
    p10, p50, p90 = (1e3 * np.percentile(took, (10, 50, 90))).tolist()
    assert [row[key] for key in ("ms_p10", "ms", "ms_p90")] == pytest.approx([p10, p50, p90])
    assert (row["tokens_per_s"], row["warmup_s"]) == pytest.approx((48 / np.median(took), 7.0))


def test_a_step_reports_its_tokens_its_time_and_its_operations(run):
    result, text = run(gradient_accumulation_steps=2)
    row = result["step"]
    check_step(row, 2 * 3 * 16)
    C, L, V, T = 32, 2, 64, 16
    weights = V * C + L * (12 * C * C + 2 * C) + C  # without positions; bias=False
    assert row["parameters"] == weights + T * C
    assert row["flops_per_token"] == 6 * weights + 12 * L * C * T
    assert row["mfu"] is None and "MFU" not in text  # nobody knows what a CPU could do
    assert (row["batch_size"], row["micro_steps"], row["steps"], row["data"]) == (3, 2, 2, "random ids")
    assert (row["dtype"], row["compile"], row["cuda_graph"], row["recompute"]) == ("float32", False, False, "none")
    assert 3 < row["loss"] < 6
    assert "96 tokens in micro-batches of 3 x 16" in text and "ms" in text
    assert result["config"]["n_embd"] == 32 and result["device"].endswith("CPU cores")


def test_mfu_and_roofline_on_a_card_given_by_hand(run):
    row = run(dtype="bfloat16", peak_tflops=0.5, bandwidth_gbs=20)[0]["step"]
    assert row["mfu"] == pytest.approx(row["flops_per_token"] * row["tokens_per_s"] / 0.5e12)
    # At this size products are few: 6 a weight and token, 7 T C L for causal attention.
    C, L, V, T, tokens = 32, 2, 64, 16, 48
    products = tokens * (6 * (12 * C * C * L + C * V) + 7 * T * C * L) / 0.5e12
    moved = bench.count_work(make(dtype="bfloat16"), "none")["bytes"] / 20e9
    assert row["roofline"] == pytest.approx((products + moved) * 1e3 / row["ms"])
    assert row["predicted_gib"] == pytest.approx(predict(make(dtype="bfloat16"), "none")["gib"])


def test_lora_has_no_mfu_by_a_formula_that_trains_all_weights(run):
    row = run(dtype="bfloat16", peak_tflops=0.5, bandwidth_gbs=20, lora_rank=2)[0]["step"]
    assert row["mfu"] is None and row["roofline"] > 0


def test_bench_takes_the_options_of_nanogpts_bench(run):
    result, _ = run("--profile", "--bias=True", "--real_data=False", "--seed=1")
    assert result["config"]["bias"] is True and "profile" in result


def prepare(folder, vocab_size):
    for split in ("train", "val"):
        write_shard(folder / f"{split}_000000.bin", np.arange(2000, dtype=np.uint16) % vocab_size)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": None, "vocab_size": vocab_size, "documents": 1}))


def test_real_data_are_used_where_they_are_prepared(run, tmp_path):
    prepare(tmp_path, 50)
    row = run(dataset=tmp_path, real_data="auto")[0]["step"]
    assert row["data"] == str(tmp_path)
    assert row["parameters"] == GPT(GPTConfig(16, 50, 2, 2, 32, bias=False)).num_params()
    assert run(dataset=tmp_path, real_data=False)[0]["step"]["data"] == "random ids"
    assert run(dataset="nowhere", real_data="auto")[0]["step"]["data"] == "random ids"
    with pytest.raises(UserError, match="nowhere"):
        run(dataset="nowhere", real_data=True)


def test_a_cpu_gets_a_small_model_unless_a_shape_is_given(capsys):
    config, given = config_loader.load(BenchConfig, ["--device=cpu"])
    assert bench.settle(config, given) == {"step"}
    assert (config.n_layer, config.n_embd, config.block_size) == (4, 128, 64) and "small" in capsys.readouterr().out
    config, given = config_loader.load(BenchConfig, ["--device=cpu", "--n_layer=3"])
    bench.settle(config, given)
    assert (config.n_layer, config.n_embd, config.block_size) == (3, 768, 1024)
    config, given = config_loader.load(BenchConfig, ["--device=cpu", "--init_from=gpt2-xl"])
    bench.settle(config, given)
    assert (config.n_layer, config.n_head, config.n_embd, config.bias) == (48, 25, 1600, True)


def test_under_torchrun_all_ranks_are_one_table(tmp_path):
    """torchrun finds a port by itself, and puts what each rank prints into a file."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start += ["--redirects=1", f"--log-dir={tmp_path / 'logs'}"]
    bench_command = [BENCH, *arguments(dtype="bfloat16", peak_tflops=0.5, bandwidth_gbs=20)]
    done = subprocess.run([*start, *bench_command], env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (next((tmp_path / "logs").glob(f"*/attempt_0/{rank}/stdout.log")).read_text() for rank in (0, 1))
    assert second == ""
    row = json.loads(first.splitlines()[-1])["step"]
    check_step(row, 2 * 48)
    assert [rank["tokens"] for rank in row["ranks"]] == [48, 48]
    assert row["tokens_per_s"] == pytest.approx(sum(48e3 / rank["ms"] for rank in row["ranks"]))
    assert row["mfu"] == pytest.approx(row["flops_per_token"] * row["tokens_per_s"] / (2 * 0.5e12))  # of two cards


# --------------------------------------------------------------------------------------------------------------------
# Sweep, ladder, batch size


def test_speeds_are_multiples_of_the_first_that_was_measured(capsys):
    bench.show([{"label": "a", "error": "out of memory"}, *({"label": n, "tokens_per_s": n} for n in (4, 10))])
    first, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (first, rows) == (["tokens/s", "x"], [["a"], ["4", "4", "1.00"], ["10", "10", "2.50"]])


def test_a_sweep_measures_every_value_of_the_key(run, tmp_path):
    result, text = run("--sweep=batch_size:1,2")
    for row, size in zip(result["sweep"], (1, 2), strict=True):
        assert (row["label"], row["batch_size"]) == (f"batch_size={size}", size)
        check_step(row, size * 16)
    assert text.count("batch_size=2") == 2 and (tmp_path / "bench.png").exists()
    assert text.splitlines()[-1] == "wrote bench.png"
    rows = run("--sweep=n_layer:1,3")[0]["sweep"]
    assert rows[1]["parameters"] - rows[0]["parameters"] == 2 * (12 * 32 * 32 + 2 * 32)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("batch_sise:1,2", "batch_size"),
        ("batch_size:1,none", "batch_size=none"),
        ("batch_size", "KEY:VALUE"),
        ("recompute:", "KEY:VALUE"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_is_measured(run, monkeypatch, sweep, message):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        run(f"--sweep={sweep}")


def test_every_rung_does_the_same_work(run, tmp_path):
    originals = gpt.compute_dtype, gpt.LinearCrossEntropy, GPTConfig.padded_vocab_size, train.AdamW
    result, _ = run("--ladder", dtype="bfloat16", seed=3, vocab_size=50)
    labels = [row["label"] for row in result["ladder"]]
    techniques = [name for name in bench.WITHOUT if name not in ("TF32", "torch.compile", "CUDA graph")]
    assert labels == ["fp32, eager", *(f"+ {name}" for name in techniques)]
    for row in result["ladder"]:
        check_step(row, 48)
        assert row["loss"] == pytest.approx(result["ladder"][0]["loss"], abs=0.02)
    assert [row["dtype"] for row in result["ladder"]] == ["float32"] + ["bfloat16"] * len(techniques)
    assert [row["recompute"] for row in result["ladder"]][-2:] == ["none", "pointwise"]
    assert originals == (gpt.compute_dtype, gpt.LinearCrossEntropy, GPTConfig.padded_vocab_size, train.AdamW)
    assert (tmp_path / "bench.png").exists()


def test_rungs_that_change_nothing_are_left_out_and_named(run, tmp_path, monkeypatch):
    out_of_memory_above(10, monkeypatch)
    prepare(tmp_path, 64)  # a multiple of 64, whatever vocab_size says
    result, text = run("--ladder", dataset=tmp_path, real_data="auto", vocab_size=50, optimizer="muon")
    rungs = ["flash attention", "loss in chunks", "recomputation"]
    assert [row["label"] for row in result["ladder"]] == ["fp32, eager", *(f"+ {name}" for name in rungs)]
    said = next(line for line in text.splitlines() if line.startswith("rungs left out, for little"))
    assert all((name in said) != (name in rungs) for name in bench.WITHOUT)
    for reason in (
        "16-bit autocast (float32)",
        "padded vocabulary (of 64)",
        "fused AdamW (muon)",
        "CUDA graph (no GPU)",
    ):
        assert reason in said


@pytest.mark.parametrize("name", [name for name, patch in bench.WITHOUT.items() if callable(patch)])
def test_a_rung_of_the_ladder_changes_one_thing_and_restores_it(name):
    shape = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
    x = torch.zeros(1, 16, dtype=torch.int64)

    def state():
        model = GPT(shape)
        adamw = train.build_optimizers(model, make(), Machine(torch.device("cpu"), torch.float32, False))[0]
        with torch.autocast("cpu", torch.bfloat16):
            kind = model.hidden(x).dtype
            loss = type(model(x, x)[1].grad_fn.next_functions[0][0]).__name__
        return model.config.padded_vocab_size, kind, type(adamw).__name__, torch.backends.cuda.matmul.allow_tf32, loss

    torch.backends.cuda.matmul.allow_tf32 = True  # as open_machine sets it
    before = state()
    with bench.WITHOUT[name](make()):
        assert [a != b for a, b in zip(before, state(), strict=True)].count(True) == 1
    assert state() == before
    torch.backends.cuda.matmul.allow_tf32 = False


def out_of_memory_above(limit, monkeypatch):
    def measure(config, without=()):
        if config.batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        row = {"ms": 1.0, "ms_p10": 1.0, "ms_p90": 1.0, "warnings": [], "recompute": config.recompute}
        return row | {"batch_size": config.batch_size, "tokens": 16, "tokens_per_s": 100.0 + config.batch_size}

    monkeypatch.setattr(bench, "measure", measure)


def test_a_sweep_goes_on_after_a_row_that_does_not_fit(run, monkeypatch):
    out_of_memory_above(2, monkeypatch)
    rows = run("--sweep=batch_size:1,2,4")[0]["sweep"]
    assert [row.get("error") for row in rows] == [None, None, "out of memory"]


def test_a_measurement_reports_memory_that_runs_out_while_a_graph_is_recorded():
    def record(config):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("capture was invalidated")

    assert bench.attempt("x", make(), how=record)["error"] == "out of memory"
    with pytest.raises(RuntimeError, match="a bug"):
        bench.attempt("x", make(), how=lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_a_ladder_that_does_not_fit_is_climbed_at_half_the_batch(run, monkeypatch):
    out_of_memory_above(2, monkeypatch)
    rows = run("--ladder", batch_size=8)[0]["ladder"]
    assert {row["batch_size"] for row in rows} == {2}


def test_the_report_is_all_modes_in_one_file(run, tmp_path, monkeypatch):
    out_of_memory_above(10, monkeypatch)
    result, text = run("--report", max_new_tokens=4)
    assert "wrote bench.png\nwrote bench.json" in text
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert {"step", "ladder", "sample", "versions", "commit", "platform", "device"} <= result.keys()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_says_how_many_rows_were_measured(run, monkeypatch):
    titles = []
    monkeypatch.setattr(bench, "draw", lambda result, title: titles.append(title))
    out_of_memory_above(1500, monkeypatch)
    run("--ladder", batch_size=2400, n_embd=1024, block_size=2048)
    run("--sweep=batch_size:1,2")
    assert titles[0].endswith(", 2 layers, 1,024 wide, 1,200 x 2,048 tokens")  # the ladder took half the batch
    assert titles[1].endswith(", 2 layers, 32 wide, 16 tokens a row")


def test_find_batch_measures_what_the_plan_allows(monkeypatch):
    cap = predict(make(batch_size=40), "none")["gib"]
    out_of_memory_above(39, monkeypatch)  # the prediction is a little too high
    machine, memory = fake_card("NVIDIA H200", 139.8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    found = bench.find_batch(make(recompute="none", vram_gb=cap + bench.MARGIN_GIB + 1e-9), machine)
    sizes = {row["batch_size"]: "error" in row for row in found["rows"]}
    assert sizes == {20: False, 30: False, 38: False, 40: True}
    assert found["best"]["batch_size"] == 38 and found["room_gib"] == pytest.approx(cap)


def test_the_fastest_batch_is_found_and_not_the_largest(monkeypatch):
    pace = {1: 1, 2: 2, 4: 9, 8: 8, 16: 7, 32: 8}
    timed = lambda label, c: {"label": label, "tokens_per_s": pace[c.batch_size], **vars(c)}  # noqa: E731
    monkeypatch.setattr(bench, "attempt", timed)
    config = make(recompute="none")
    found = bench.find_batch(config, Machine(torch.device("cpu"), torch.float32, compiled=False))
    assert found["best"]["batch_size"] == config.batch_size == 4


def test_batch_size_auto_is_found_and_then_used(run, monkeypatch):
    out_of_memory_above(10, monkeypatch)
    result, _ = run("--sweep=seed:1,2", batch_size="auto")
    assert [row.get("batch_size") for row in result["find_batch"]["rows"]] == [1, 2, 4, 8, 16, 32]
    assert [row["batch_size"] for row in result["sweep"]] == [8, 8]


def test_find_batch_says_when_nothing_fits(run, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(UserError, match="lora_rank"):
        run("--find_batch")


# --------------------------------------------------------------------------------------------------------------------
# Comparison, profile, decoding


def test_compare_measures_both_sides_in_turns(run):
    result, text = run("--compare=transformers")
    rows = result["compare"]["rows"]
    assert [row["label"] for row in rows] == ["gpt12", "transformers, eager"] * 2
    for row in rows:
        check_step(row, 48)
    rates = [row["tokens_per_s"] for row in rows]
    ratio = (rates[0] + rates[2]) / (rates[1] + rates[3])
    assert result["compare"]["ratios"] == {"transformers, eager": pytest.approx(ratio)}
    assert f"{ratio:.2f} times as fast" in text


def test_both_sides_of_a_comparison_are_the_same_model(run, tmp_path, monkeypatch):
    """A preset without biases, with Muon and its own vocabulary: the first two become transformers', the last stays."""
    prepare(tmp_path, 50)
    (tmp_path / "preset.py").write_text(f"optimizer = 'muon'\ndataset = {str(tmp_path)!r}")
    theirs, build = [], bench.their_model
    monkeypatch.setattr(bench, "their_model", lambda *a, **k: theirs.append(build(*a, **k)) or theirs[-1])
    result, text = run("preset.py", "--compare=transformers", real_data="auto")
    ours = result["compare"]["rows"][0]
    assert ours["parameters"] == sum(p.numel() for p in theirs[0].parameters())
    assert theirs[0].config.vocab_size == 50 and ours["data"] == "random ids"
    assert (result["config"]["bias"], result["config"].get("optimizer")) == (True, None)
    assert "optimizer=adamw in place of muon" in text and "not the same work" not in text


def test_compare_keeps_what_the_user_asked_for_and_says_what_differs(run, tmp_path):
    (tmp_path / "mine.py").write_text("bias = False")
    result, text = run("mine.py", "--compare=transformers", "--optimizer=muon", "--lora_rank=2")
    assert (result["config"].get("bias", False), result["config"]["optimizer"]) == (False, "muon")
    told = [line for line in text.splitlines() if line.startswith("not the same work: ")]
    assert [word in line for line, word in zip(told, ("biases", "muon", "LoRA"), strict=True)] == [True] * 3


def test_compare_says_when_transformers_is_not_installed(run, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="transformers is not installed"):
        run("--compare=transformers")


def test_the_profile_lists_the_ten_longest_kernels(run, tmp_path):
    result, text = run("--profile")
    found = result["profile"]
    assert "wrote trace.json" in text
    assert len(found["kernels"]) == 10
    for row in found["kernels"]:
        assert row["share"] == pytest.approx(row["ms"] / found["total_ms"])
    assert [row["ms"] for row in found["kernels"]] == sorted((row["ms"] for row in found["kernels"]), reverse=True)
    # Every product of a step, seen by the profiler: 6 operations a weight and token.
    flops = 48 * 6 * (12 * 32 * 32 * 2 + 64 * 32)
    assert found["products_tflops"] * found["products_ms"] * 1e9 >= flops * 2 / 3  # addmm_, in place, is not counted
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_sample_measures_decoding_against_the_memorys_bound(run, tmp_path):
    result, text = run("--sample", peak_tflops=1, bandwidth_gbs=10, max_new_tokens=5)
    assert [row["batch"] for row in result["sample"]] == [1, 4, 16, 64]
    read = 4 * (2 * (12 * 32 * 32 + 2 * 32) + 64 * 32)  # bytes of the blocks and the head, each read once a token
    for row in result["sample"]:
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(row["batch"])
        assert row["prefill_tokens_per_s"] * row["prefill_ms"] / 1e3 == pytest.approx(row["batch"] * 4)
        assert row["bound_tokens_per_s"] == pytest.approx(row["batch"] * 10e9 / read)
        assert row["bound_share"] == pytest.approx(row["tokens_per_s"] / row["bound_tokens_per_s"])
    assert "bound" in text and (tmp_path / "bench.png").exists()


def test_sample_measures_decoding_beside_transformers(run):
    rows = run("--sample", "--compare=transformers", "--quantize=int8", max_new_tokens=5)[0]["sample"]
    assert [row["label"] for row in rows[:2]] == ["batch 1", "transformers, dynamic cache"] and len(rows) == 8
    for row in rows:
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(row["batch"]) and "bound_share" not in row


# --------------------------------------------------------------------------------------------------------------------
# The plan


def make_124m(**keys):
    return config_loader.load(BenchConfig, [f"--{key}={value}" for key, value in keys.items()])[0]


@pytest.mark.parametrize(
    ("batch_size", "recompute", "ms"),
    [(64, "none", 112.7), (32, "none", 58.5), (12, "pointwise", 24.75), (32, "pointwise", 60.7), (32, "block", 67.4)],
)
def test_predicted_times_are_those_measured_on_a_h200(batch_size, recompute, ms):
    """Measured with train.Step on a H200, 124M, T=1024, bias=False, torch 2.11 (the README's results)."""
    row = predict(make_124m(batch_size=batch_size, dtype="bfloat16"), recompute, CARDS["NVIDIA H200"])
    assert row["ms"] == pytest.approx(ms, rel=0.025)


@pytest.mark.parametrize(
    ("init_from", "recompute", "keys", "gib"),
    [
        ("gpt2", "none", {"batch_size": 32}, 11.4),
        ("gpt2", "none", {"batch_size": 64}, 20.6),
        ("gpt2", "pointwise", {"batch_size": 12}, 4.26),
        ("gpt2-medium", "pointwise", {"batch_size": 2}, 5.61),
        ("gpt2-medium", "pointwise", {"batch_size": 8}, 8.57),
        ("gpt2-large", "none", {"batch_size": 1}, 11.94),
        ("gpt2-large", "block", {"batch_size": 32, "optimizer": "adamw8bit"}, 7.5),
        ("gpt2-xl", "block", {"batch_size": 4, "optimizer": "adamw8bit"}, 9.4),
        ("gpt2-medium", "none", {"batch_size": 8, "lora_rank": 16}, 7.3),
        ("gpt2-large", "none", {"batch_size": 5, "lora_rank": 16}, 9.2),
        ("gpt2-xl", "block", {"batch_size": 16, "lora_rank": 16}, 7.5),
    ],
)
def test_predicted_memory_is_that_measured_on_a_h200(init_from, recompute, keys, gib):
    """On a H200 at T=1024 (the README's tables)."""
    options = {"init_from": init_from, "dtype": "bfloat16", **keys}
    config, given = config_loader.load(BenchConfig, [f"--{key}={value}" for key, value in options.items()])
    bench.settle(config, given)
    assert predict(config, recompute)["gib"] == pytest.approx(gib, rel=0.03)


def test_accumulation_keeps_a_gradient_of_every_weight():
    one, many = (predict(make_124m(batch_size=32, gradient_accumulation_steps=n), "none")["gib"] for n in (1, 8))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(GPTConfig(bias=False)).parameters())
    assert (many - one) * GiB == pytest.approx(4 * parameters)


def test_the_plan_for_a_4070_ti_is_the_readmes(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    shape = {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
    result, text = run("--plan", **shape, dtype="auto", compile="auto")
    found = result["plan"]
    assert (found["card"], found["tflops"], found["room_gib"]) == ("NVIDIA GeForce RTX 4070 Ti", 80.2, 11)
    # The table has all candidates, the JSON the fastest of each: a terminal's user need not scroll past it.
    assert [row["recompute"] for row in found["rows"]] == ["none", "pointwise", "block"]
    assert len(json.dumps(result)) < 2500 and len(text.splitlines()) < 30
    for row in found["rows"]:
        listed = [line.split() for line in text.splitlines() if line.startswith(f"{row['recompute']} ")]
        assert [int(line[1]) for line in listed[:2]] == [1, 2] and int(listed[-1][1]) == row["batch_size"]
        assert max(float(line[-1].replace(",", "")) for line in listed) == pytest.approx(row["tokens_per_s"], abs=0.5)
    for row in found["rows"]:
        assert sum(row["memory_gib"].values()) == pytest.approx(row["gib"]) and row["gib"] <= 11
        assert row["tokens"] == row["batch_size"] * 1024
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(row["tokens"])
        # Never faster than the datasheet allows: 798 MFLOP a token (FACTS counts attention with five products).
        assert row["tokens_per_s"] < 80.2e12 / 798e6 and row["floor_ms"] < row["ms"]
    assert found["best"] == max(found["rows"], key=lambda row: row["tokens_per_s"])
    # The README's prediction.
    assert (found["best"]["batch_size"], found["best"]["recompute"]) == (30, "none")
    assert found["best"]["tokens_per_s"] == pytest.approx(65_000, rel=0.01)


def test_the_plan_knows_what_an_uncompiled_step_takes(run):
    same = {"dtype": "bfloat16", "recompute": "none"}  # 1,024 rows of this small model, all of which fit either way
    (one, said), (other, warned) = (run("--plan", compile=compiled, **same) for compiled in (True, False))
    assert other["plan"]["best"]["gib"] > one["plan"]["best"]["gib"]
    assert "more than that time" in warned and "more than that time" not in said


def test_the_plan_ends_in_the_command_that_measures_it(run, tmp_path):
    (tmp_path / "mine.py").write_text("lora_rank = 4")
    said = run("mine.py", "--plan", "--card=NVIDIA H200", "--lora-alpha=8", "--batch-size=5")[1].splitlines()[-1]
    command = shlex.split(said.partition("these are predictions for that card; measure it there: ")[2])
    kept = [word for word in arguments() if not word.startswith("--batch_size")]
    best = ["--batch_size=1024", "--recompute=none"]
    assert command == ["python", "bench.py", *kept, "mine.py", "--lora-alpha=8", *best]
    run(*command[2:-2], "--batch_size=2", best[1])  # which bench.py understands


def test_the_largest_batch_is_the_last_that_fits():
    config = make_124m()
    for recompute in bench.RECOMPUTE:
        top = bench.largest(config, recompute, 11.0)
        fits = [predict(bench.replace(config, batch_size=n), recompute)["gib"] <= 11.0 for n in (top, top + 1)]
        assert fits == [True, False]
    assert bench.largest(config, "none", 1.0) == 0


def test_the_work_is_counted_as_torch_counts_it():
    """FlopCounterMode sees every product of a step. It runs plain attention: 12 T C L a token; the kernel does 7."""
    C, L, T = SHAPE["n_embd"], SHAPE["n_layer"], SHAPE["block_size"]
    for recompute, attention in (("none", 12), ("block", 16)):
        config = make(attention="math", recompute=recompute)
        with bench.prepared(config, ["loss in chunks"]) as training, FlopCounterMode(display=False) as counter:
            training.step.run()
        counted = counter.get_total_flops() - 48 * attention * T * C * L
        kernel = 48 * (7 + 2 * (recompute == "block")) * T * C * L
        assert bench.count_work(config, recompute)["flops"] - kernel == pytest.approx(counted, rel=1e-6)


def test_lora_trains_what_the_plan_counts():
    for targets in ("all", "c_attn,c_fc", "c_proj"):
        config = make(lora_rank=3, lora_targets=targets)
        model = GPT(bench.shape_of(config))
        model.add_lora(3, 1.0, 0.0, [] if targets == "all" else targets.split(","))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert predict(config, "none")["memory_gib"]["moments"] * GiB == pytest.approx(8 * trainable)


def test_the_plan_counts_what_each_method_costs():
    """Each method costs what it is for: LoRA less memory, 8-bit moments less, recomputation time, accumulation nothing."""
    card, of = (
        CARDS["NVIDIA GeForce RTX 4070 Ti"],
        lambda recompute="none", **keys: predict(make_124m(**keys), recompute, card),
    )
    assert of(lora_rank=16)["gib"] < of(optimizer="adamw8bit")["gib"] < of()["gib"]
    assert of()["ms"] < of("pointwise")["ms"] < of("block")["ms"]
    assert of(lora_rank=16)["ms"] < of()["ms"] < of(optimizer="muon")["ms"] < of(dtype="float32")["ms"]
    assert of(gradient_accumulation_steps=8)["tokens_per_s"] > of()["tokens_per_s"]
    assert of(bias=True)["ms"] > of()["ms"]


def test_the_plan_says_when_nothing_fits(run):
    result, text = run("--plan", "--init_from=gpt2", dtype="auto", block_size=1024, vram_gb=2)
    assert result["plan"]["rows"] == [] and "nothing fits" in text


def test_the_plan_takes_another_card(run):
    found = run("--plan", peak_tflops=40, bandwidth_gbs=448, vram_gb=8)[0]["plan"]
    assert (found["tflops"], found["bandwidth_gbs"], found["room_gib"]) == (40, 448, 7)
    assert run("--plan", "--card=NVIDIA H200")[0]["plan"]["room_gib"] == 140


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "--card=RTX 4070 Ti"], "NVIDIA GeForce RTX 4070 Ti"),
        (["--plan", "--peak_tflops=40"], "datasheet"),
        (["--plan", "--peak_tflops=40", "--bandwidth_gbs=400"], "vram_gb"),
        (["--init_from=resume"], "gpt2-medium"),
        (["--find_batch", "--vram_gb=12"], "vram_gb=12 needs a GPU"),
        (["--sample", "--max_new_tokens=1"], "it needs at least two"),
        (["--report", "--block_size=2"], "it needs at least two"),
    ],
)
def test_a_users_mistake_is_refused_with_a_message(run, flags, message):
    with pytest.raises(UserError, match=message):
        run(*flags)


# --------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", bench.RECOMPUTE)
def test_predicted_memory_is_what_the_allocator_reports(recompute):
    row = bench.measure(make_124m(batch_size=8, recompute=recompute, real_data=False, steps=3))
    assert row["peak_gib"] == pytest.approx(row["predicted_gib"], rel=0.05)
    assert row["cuda_graph"] and row["compile"] and row["mfu"] > 0


@pytest.mark.gpu
def test_every_rung_on_a_gpu_does_the_same_work(run):
    keys = {"device": "cuda", "dtype": "auto", "compile": "auto", "n_embd": 128, "block_size": 256}
    rows = run("--ladder", "--vocab_size=50", **keys)[0]["ladder"]
    assert [row["label"] for row in rows] == ["fp32, eager", *(f"+ {name}" for name in bench.WITHOUT)]
    for row in rows:
        assert row["loss"] == pytest.approx(rows[0]["loss"], abs=0.02)
