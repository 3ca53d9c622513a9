"""Tables on the terminal."""

from gpt12.terminal import Table


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
