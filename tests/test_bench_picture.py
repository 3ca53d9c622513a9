"""bench.png."""

from dataclasses import replace

from gpt12.bench_picture import choose_panels, draw, picture_title
from gpt12.measure import OutOfMemory
from gpt12.measure_decoding import DecodingResult
from tests.bench_helpers import fake_result, make

TEXTS = [DecodingResult("batch 1", 1, 1.0, 1.0, 1.0, 1000.0)]


def steps(**keys):
    result = replace(fake_result(make(), 100.0), label="a", **keys)
    return [result, OutOfMemory("b", batch_size=result.batch_size)]


def test_the_picture_is_a_png(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(steps(peak_gib=2.0), TEXTS, make(), "a card")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "wrote bench.png\n"


def test_without_figures_there_is_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw([], [], make(), "a card")
    draw([OutOfMemory("b", batch_size=3)], [], make(), "a card")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_there_is_a_panel_for_each_figure_that_is_known():
    speed, memory, texts = choose_panels(steps(peak_gib=2.0), TEXTS)
    assert (speed.labels, speed.numbers) == (["a", "b: out of memory"], ["100", ""])
    assert (memory.values, memory.numbers) == ([2.0, 0.0], ["2.00", ""])
    assert texts.numbers == ["1,000"]
    assert len(choose_panels(steps(), [])) == 1  # a CPU has no peak memory


def test_the_title_names_the_card_and_the_size_of_the_measured_micro_batch():
    config = make(batch_size=2400, n_embd=1024, block_size=2048)
    halved = steps(batch_size=1200)  # by a ladder that did not fit
    title = picture_title(halved, config, "NVIDIA H200")
    assert title == "NVIDIA H200, 2 layers, 1,024 wide, 1,200 x 2,048 tokens"
    swept = [*steps(batch_size=1), *steps(batch_size=2)]
    assert picture_title(swept, config, "x").endswith(", 2,048 tokens a sequence")
    for key in ("block_size", "n-layer", "init_from"):  # several models
        assert picture_title(swept, make(sweep=f"{key}:1,2"), "A card") == "A card"
