"""tests/manual/interop.py: what becomes of a check that fails, and of one that cannot be made."""

from pathlib import Path

from tests.manual.interop import Check, SkippedError, make_row, print_table
from tests.manual.interop_models import Runs

HERE = Path()
RUNS = Runs(text=HERE, char=HERE, lora=HERE, chat=HERE, tokenizer="bytes", work=HERE)


def check_good(runs: Runs) -> str:
    return "all equal"


def check_bad(runs: Runs) -> str:
    raise KeyError("biases | differ")


def check_impossible(runs: Runs) -> str:
    raise SkippedError("no converter")


def test_a_check_that_fails_becomes_a_row_with_its_reason(capsys):
    rows = [make_row(Check("a", ("torch",), f), RUNS) for f in (check_bad, check_impossible)]
    rows.append(make_row(Check("b", ("torch",), check_good), RUNS))
    assert [row.result for row in rows[1:]] == ["skipped: no converter", "ok"]
    assert rows[0].result.startswith("FAILED: KeyError")
    assert rows[2].what == "all equal"
    print_table(rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {5}  # no text breaks the table


def test_a_tool_that_is_not_installed_is_skipped_and_named():
    row = make_row(Check("c", ("torch", "no-such-package"), check_bad), RUNS)
    assert row.result == "skipped: no-such-package not installed"
