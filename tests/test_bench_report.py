"""What bench.py prints and writes about its results."""

import json
import shlex
from dataclasses import replace

import pytest

from gpt12 import bench_report
from gpt12.bench_report import describe, save_json, show_plan, show_step, show_steps
from gpt12.errors import UserError
from gpt12.measure import OutOfMemory
from gpt12.plan import make_plan
from tests.bench_helpers import arguments, fake_result, make, make_124m


@pytest.fixture
def no_git(monkeypatch):
    """Asking git for the commit would take a while."""

    def describe_run(config, **facts):
        return {"config": config, **facts}

    monkeypatch.setattr(bench_report, "describe_run", describe_run)


def test_a_step_is_told_in_plain_lines(capsys):
    show_step(replace(fake_result(make(), 1600.0), tokens=96, ms=60.0))
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["step"] == "96 tokens in micro-batches of 3 sequences x 16 tokens, random tokens"
    assert lines["speed"] == "1,600 tokens/s"
    assert lines["time"].startswith("60.0 ms")
    # What is not known here is left out.
    assert not {"MFU", "memory", "predicted", "driver"} & lines.keys()


def test_a_step_on_a_known_card_is_told_with_its_limits(capsys):
    gpu = {
        "mfu": 0.5,
        "roofline": 0.8,
        "predicted_ms": 60.0,
        "peak_gib": 4.25,
        "reserved_gib": 5.0,
        "total_gib": 11.7,
        "predicted_gib": 4.3,
        "driver": {"driver_version": "575.57", "clocks.sm": "2610", "clocks.max.sm": "3105"},
        "ranks": [{"tokens": 48, "ms": 59.0, "peak_gib": 4.25}],
    }
    show_step(replace(fake_result(make(), 1600.0), **gpu))
    text = capsys.readouterr().out
    for part in (
        "50.0% of the datasheet's",
        "80% of what the datasheet's rate and bandwidth allow; prediction: 60.0 ms",
        "4.25 GiB in tensors at the peak, 5.00 GiB taken from the driver, of 11.7",
        "4.30 GiB in tensors",
        "575.57, at 2610 of 3105 MHz",
        "each rank: tokens",
    ):
        assert part in text


def test_speeds_are_multiples_of_the_first_that_was_measured(capsys):
    rows = [
        OutOfMemory("a", batch_size=3),
        replace(fake_result(make(), 4.0), label="b"),
        replace(fake_result(make(), 10.0), label="c"),
    ]
    show_steps(rows)
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a: out of memory"
    assert [line.split()[-2:] for line in lines[1:]] == [["4", "1.00"], ["10", "2.50"]]


def test_the_json_has_the_steps_figures_at_its_top_level(no_git):
    step = replace(fake_result(make(), 1600.0), peak_gib=4.0)
    content = describe(make(), "a card", {"step": step, "ladder": [step, OutOfMemory("x", 8)]})
    assert (content["tokens_per_s"], content["ms"], content["peak_gib"]) == (1600.0, 1.0, 4.0)
    assert content["device"] == "a card"
    assert content["config"]["n_embd"] == 32
    assert "learning_rate" not in content["config"]  # a default
    assert content["ladder"][1] == {"label": "x", "batch_size": 8, "error": "out of memory"}


def test_the_json_file_is_written_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_json({"ms": 1.5})
    assert json.loads((tmp_path / "bench.json").read_text()) == {"ms": 1.5}
    assert "wrote bench.json" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.json.tmp").mkdir()  # root may write everywhere, but not into a folder
    with pytest.raises(UserError, match="--json"):
        save_json({})


def test_the_plan_is_told_with_all_candidates_and_stored_with_the_fastest(no_git, capsys):
    plan = make_plan(make_124m())
    show_plan(plan, make_124m(), ["--plan"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) < 30
    for row in plan.rows:
        listed = [line.split() for line in lines if line.startswith(f"{row.recompute} ")]
        assert int(listed[-1][1]) == row.batch_size
        fastest = max(float(cells[-1].replace(",", "")) for cells in listed)
        assert fastest == pytest.approx(row.tokens_per_s, abs=0.5)
    content = describe(make_124m(), plan.name, {"plan": plan})["plan"]
    assert content["best"] == max(content["rows"], key=lambda row: row["tokens_per_s"])
    assert len(json.dumps(content)) < 2500


def test_the_plan_ends_in_the_command_that_measures_it(tmp_path, capsys):
    words = ["mine.py", "--plan", "--card=NVIDIA H200", "--lora-alpha=8", "--batch-size=5"]
    argv = [*arguments(), *words]
    show_plan(make_plan(make(card="NVIDIA H200")), make(), argv)
    said = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(said.partition("measure on that card with: ")[2])
    kept = [word for word in arguments() if not word.startswith("--batch_size")]
    best = ["--batch_size=1024", "--recompute=none"]
    assert command == ["python", "bench.py", *kept, "mine.py", "--lora-alpha=8", *best]


def test_a_plan_says_when_nothing_fits_and_when_the_step_is_not_compiled(capsys):
    config = make_124m(vram_gb=2, compile=False)
    show_plan(make_plan(config), config, [])
    text = capsys.readouterr().out
    assert "nothing fits" in text
    assert "it takes longer in the same memory" in text
