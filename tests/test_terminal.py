"""Lines and tables on the terminal."""

import io

from gpt12.terminal import Table, printable, say


def test_the_first_column_is_on_the_left_and_the_others_on_the_right():
    table = Table("name", "n", "ms")
    table.add("a", "1", "10.0")
    table.add("long", "200", "5.0")
    assert table.lines() == ["name    n    ms", "a       1  10.0", "long  200   5.0"]


def test_a_column_without_cells_is_not_printed():
    table = Table("", "MFU", "ms")
    table.add("a", "", "1")
    table.add("b: out of memory")
    assert table.lines() == [f"{'':18}ms", f"a{'':18}1", "b: out of memory"]


def test_a_table_without_rows_is_nothing():
    assert Table("a", "b").lines() == []


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("not this")
    monkeypatch.setenv("RANK", "0")
    say("this")
    assert capsys.readouterr().out == "this\n"


def test_a_console_in_cp1252_gets_question_marks_for_what_it_cannot_show():
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    console.write(printable("caf\u00e9 \u6f22", console))
    console.flush()
    assert console.buffer.getvalue() == b"caf\xe9 ?"
