"""bench.py as a whole: what is asked for is measured in order, shown and written.

No test looks at how long anything took: a shared machine would make it fail or pass by chance.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from gpt12 import bench_report, ladder, sweep
from gpt12.errors import UserError
from tests.bench_helpers import (
    arguments,
    check_step,
    fake_gpu_memory,
    make,
    out_of_memory_above,
    prepare,
)
from tests.helpers import environment

BENCH = str(Path(bench.__file__))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run bench.py in an empty folder. Returns its JSON and the text that stood before it.

    The JSON has to be the last line.
    """
    monkeypatch.chdir(tmp_path)

    def describe_run(config, **facts):  # asking git every time would take seconds
        return {"config": config, "commit": None, "versions": {}, **facts}

    monkeypatch.setattr(bench_report, "describe_run", describe_run)

    def run(*flags, **keys):
        bench.main([*arguments(**keys), "--json", *flags])
        *text, last = capsys.readouterr().out.splitlines()
        return json.loads(last), "\n".join(text)

    return run


def fake_steps(limit, monkeypatch):
    out_of_memory_above(limit, monkeypatch, bench, ladder, sweep)


def test_a_step_is_measured_and_printed_as_json(run, tmp_path):
    result, text = run()
    check_step(result, 48)
    assert result["peak_gib"] is None
    assert result["config"]["n_embd"] == 32
    assert result["device"].endswith("CPU cores")
    assert "48 tokens in micro-batches of 3 sequences x 16 tokens" in text
    assert list(tmp_path.iterdir()) == []


def test_without_json_the_figures_are_written_to_a_file(run, tmp_path, capsys):
    run()
    bench.main(arguments())
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("wrote bench.json") for line in lines)
    assert not any(line.startswith("{") for line in lines)
    check_step(json.loads((tmp_path / "bench.json").read_text()), 48)


def test_a_prediction_does_not_replace_what_was_measured(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.main(["--plan"])
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert "wrote plan.json" in capsys.readouterr().out


def test_bench_takes_the_options_of_nanogpts_bench(run):
    result, text = run("--profile", "--bias=True", "--real_data=False", "--seed=1")
    assert result["config"]["bias"] is True
    assert len(result["profile"]["kernels"]) == 10
    assert "wrote trace.json" in text


def test_a_sweep_is_shown_as_a_table_and_a_picture(run, tmp_path):
    result, text = run("--sweep=batch_size:1,2")
    assert [row["batch_size"] for row in result["sweep"]] == [1, 2]
    assert text.count("batch_size=2") == 2  # announced, and in the table
    assert "wrote bench.png" in text
    assert (tmp_path / "bench.png").exists()


def test_a_wrong_sweep_is_refused_before_anything_is_measured(run, monkeypatch):
    monkeypatch.setattr(bench, "measure_in_order", lambda *args: pytest.fail("measured"))
    with pytest.raises(UserError, match="batch_size=none"):
        run("--sweep=batch_size:1,none", "--ladder")


def test_a_sweep_on_a_cpu_starts_from_the_small_model_for_cpus(monkeypatch):
    """Its 4 heads divide a width of 64; the 12 heads of GPT-2 do not."""
    widths = []
    monkeypatch.setattr(bench, "measure_in_order", lambda config, *args: (config, {}))
    found = bench.swept_configs

    def noted(*args, **options):
        swept = found(*args, **options)
        widths.extend(config.n_embd for config in swept.values())
        return swept

    monkeypatch.setattr(bench, "swept_configs", noted)
    bench.main(["--device=cpu", "--sweep=n_embd:64,128"])
    assert widths == [64, 128]


def test_a_sweep_over_batch_size_auto_is_refused(run):
    with pytest.raises(UserError, match="batch_size=auto cannot be swept: --find_batch"):
        run("--sweep=batch_size:auto,2")


def test_the_report_is_step_ladder_and_generation_in_one_file(run, tmp_path, monkeypatch):
    fake_steps(10, monkeypatch)
    result, text = run("--report", max_new_tokens=4)
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert {"tokens_per_s", "ladder", "sample", "versions", "commit", "device"} <= result.keys()
    assert [row["batch"] for row in result["sample"]] == [1, 4, 16, 64]
    for word in ("wrote bench.png", "wrote bench.json", "publish"):
        assert word in text
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_batch_size_auto_is_found_and_then_used(run, monkeypatch):
    fake_steps(10, monkeypatch)
    result, text = run("--sweep=seed:1,2", batch_size="auto")
    assert [row["batch_size"] for row in result["find_batch"]["rows"]] == [1, 2, 4, 8, 16, 32]
    assert result["find_batch"]["best"]["batch_size"] == 8
    assert [row["batch_size"] for row in result["sweep"]] == [8, 8]
    assert result["config"]["batch_size"] == 8
    assert "fastest: --batch_size=8 --recompute=none" in text


def test_training_is_compared_with_transformers(run, tmp_path):
    """A preset without biases and with Muon is compared as transformers trains."""
    prepare(tmp_path, 50)
    preset = tmp_path / "preset.py"
    preset.write_text(f"optimizer = 'muon'\ndataset = {str(tmp_path)!r}")
    result, text = run(str(preset), "--compare=transformers", real_data="auto")
    rows = result["compare"]["rows"]
    assert [row["label"] for row in rows] == ["gpt12", "transformers, eager"] * 2
    assert result["config"]["bias"] is True
    assert "optimizer" not in result["config"]
    ratio = result["compare"]["ratios"]["transformers, eager"]
    assert f"gpt12 is {ratio:.2f} times as fast as transformers, eager" in text


def test_generation_is_compared_with_transformers(run):
    result, _ = run("--sample", "--compare=transformers", max_new_tokens=3)
    labels = [row["label"] for row in result["sample"]]
    assert labels[:2] == ["batch 1", "transformers, dynamic cache"]
    assert len(labels) == 8


def test_the_plans_command_is_understood_by_bench(run):
    result, text = run("--plan", "--card=NVIDIA H200")
    assert result["plan"]["best"]["batch_size"] == 1024
    assert result["device"] == "NVIDIA H200"
    command = text.splitlines()[-1].partition("measure on that card with: python bench.py ")[2]
    assert run(*command.split(), "--batch_size=2")[0]["batch_size"] == 2


def test_a_cpu_cannot_imitate_a_card(run):
    with pytest.raises(UserError, match="vram_gb=12 limits a GPU's memory"):
        run("--find_batch", "--vram_gb=12")


def test_running_out_of_memory_ends_with_advice(run, monkeypatch):
    fake_steps(2, monkeypatch)
    fake_gpu_memory(monkeypatch, 12)
    with pytest.raises(UserError, match="(?s)out of GPU memory.*--batch_size=4"):
        run(batch_size=8)


def test_only_rank_0_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    bench.finish(make(), "a card", {})
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_all_ranks_are_one_table(tmp_path):
    """torchrun finds a port by itself, and puts what each rank prints into a file."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start += ["--redirects=1", f"--log-dir={tmp_path / 'logs'}"]
    card = {"dtype": "bfloat16", "peak_tflops": 0.5, "bandwidth_gbs": 20}
    command = [*start, BENCH, *arguments(**card)]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = []
    for rank in (0, 1):
        (log,) = (tmp_path / "logs").glob(f"*/attempt_0/{rank}/stdout.log")
        printed.append(log.read_text())
    assert printed[1] == ""
    assert "wrote bench.json" in printed[0]
    row = json.loads((tmp_path / "bench.json").read_text())
    check_step(row, 2 * 48)
    assert [rank["tokens"] for rank in row["ranks"]] == [48, 48]
    speed = sum(48e3 / rank["ms"] for rank in row["ranks"])
    assert row["tokens_per_s"] == pytest.approx(speed)
    of_two_cards = 2 * 0.5e12
    assert row["mfu"] == pytest.approx(row["flops_per_token"] * speed / of_two_cards)
