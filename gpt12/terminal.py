"""Print tables to the terminal. Under torchrun only rank 0 prints."""

from __future__ import annotations

from gpt12.errors import say


class Table:
    """Cells in columns: the first column is aligned to the left, the others to the right.

    A column whose cells are all empty is not printed.
    """

    def __init__(self, *titles: str):
        self.titles = titles
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """Add a row. Cells that are left out are empty."""
        missing = len(self.titles) - len(cells)
        self.rows.append((*cells, *([""] * missing)))

    def lines(self) -> list[str]:
        """Return the titles and the rows as text, nothing if there is no row."""
        if not self.rows:
            return []
        columns: list[list[str]] = []
        for i, title in enumerate(self.titles):
            cells = [row[i] for row in self.rows]
            if not any(cells):
                continue
            width = max(len(cell) for cell in (title, *cells))
            if columns:
                columns.append([cell.rjust(width) for cell in (title, *cells)])
            else:
                columns.append([cell.ljust(width) for cell in (title, *cells)])
        return ["  ".join(cells).rstrip() for cells in zip(*columns)]

    def print(self) -> None:
        """Print the table, if it has a row."""
        for line in self.lines():
            say(line)
