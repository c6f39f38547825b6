"""Sentences and tables that several commands print."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.work.tally import Tally


def counted(count: int, thing: str) -> str:
    """Such as `1 image` or `2,000 images`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def rejections(rejected: Iterable[tuple[str, int]], fate: str = "quarantined") -> str:
    """Such as `3 quarantined (truncated 2, empty 1)`."""
    pairs = list(rejected)
    if not pairs:
        return f"none {fate}"
    listed = ", ".join(f"{reason} {count}" for reason, count in pairs)
    return f"{sum(count for _, count in pairs)} {fate} ({listed})"


def print_outcome(done: str, output: str, tally: Tally) -> None:
    """Prints what a bulk job did, in one line."""
    print(f"{done}; {rejections(tally.rejected.most_common())}. Output: {output}")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table, numbers to the right. Piped output is so wide that nothing is cut off."""
    rows = list(rows)
    table = Table(title=escape(title) or None, title_justify="left", title_style="bold", show_header=any(columns))
    for position, column in enumerate(columns):
        numeric = all(isinstance(row[position], int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
    return escape(str(value))
