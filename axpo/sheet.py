"""A table of results that is shown in the terminal and written as Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Sheet:
    """columns: their names, the first for what a row is. rows: one cell a column; leading blanks indent."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> "Table":
        from axpo.metrics import table

        return table(self.title, self.columns, self.rows)

    def markdown(self) -> str:
        """As a Markdown table below its title."""
        aligned = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [self.columns, aligned, *self.rows]
        return f"**{self.title}**\n\n" + "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def print_sheets(sheets: Iterable[Sheet]) -> None:
    """Each as wide as its cells, also where the terminal is narrower or there is none: no number is cut."""
    from rich.console import Console

    for table in (sheet.rich() for sheet in sheets):
        console = Console()
        needed = console.measure(table, options=console.options.update(width=10_000)).maximum
        Console(width=max(console.width, needed)).print(table)


def _cell(text: str) -> str:
    inner = text.lstrip(" ")
    return "&nbsp;" * (len(text) - len(inner)) + inner.replace("|", "\\|")
