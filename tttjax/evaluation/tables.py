"""Text tables that fit a terminal or a page, and the formats of their cells.

A table is a pandas DataFrame of text, whose first column names the rows. A document is a sequence
of blocks: paragraphs and captioned tables. `show` prints it, `render` gives it as Markdown.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TextIO

import numpy as np
import pandas as pd

from tttjax.evaluation.statistics import Estimate

WIDTH = 100  # columns of a page, where there is no terminal
MISSING = "-"


class CaptionedTable(NamedTuple):
    """A table of text and the sentence above it ("" for none)."""

    caption: str
    table: pd.DataFrame


Block = str | CaptionedTable


def pivot(
    frame: pd.DataFrame,
    rows: str,
    columns: str,
    cells: Iterable[str],
    corner: str = "",
    order: tuple[Sequence[str], Sequence[str]] | None = None,
) -> pd.DataFrame:
    """A table of text from tidy rows; `-` where a cell is missing.

    rows, columns: the columns of `frame` that name the rows and columns of the table. cells: the
    text of every row of `frame`. corner: head of the first column. order: names of rows and of
    columns (default: in order of first appearance).
    """
    text = frame[[rows, columns]].astype(str).assign(cell=list(cells))
    table = text.pivot(index=rows, columns=columns, values="cell")
    index, names = order or (text[rows].unique(), text[columns].unique())
    table = table.reindex(index=index, columns=names).astype(object).fillna(MISSING)
    return table.rename_axis(columns=None).rename_axis(corner).reset_index()


def make_table(
    cells: Mapping[str, Sequence[str]], corner: str, columns: Sequence[str]
) -> pd.DataFrame:
    """A table of text from its rows by name. corner: head of the first column."""
    rows = [[name, *row] for name, row in cells.items()]
    return pd.DataFrame(rows, columns=[corner, *columns])


def split_to_width(table: pd.DataFrame, width: int) -> Iterator[pd.DataFrame]:
    """Parts of at most `width` characters; each has the first column.

    A part has at least one more column, however wide that is.
    """
    widths = [max(map(len, [name, *table[name]])) + 3 for name in table.columns]
    part, total = [0], widths[0] + 1
    for column in range(1, len(widths)):
        if len(part) > 1 and total + widths[column] > width:
            yield table.iloc[:, part]
            part, total = [0], widths[0] + 1
        part.append(column)
        total += widths[column]
    yield table.iloc[:, part]


def to_markdown(table: pd.DataFrame) -> str:
    """An aligned Markdown table; the first column is left-aligned, the others right-aligned."""
    rows = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *others]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def render(blocks: Sequence[Block], width: int = WIDTH) -> str:
    """The blocks as Markdown; paragraphs and tables are at most `width` characters wide."""

    def lines(block: Block) -> str:
        if isinstance(block, str):
            return _wrap(block, width)
        parts = "\n\n".join(map(to_markdown, split_to_width(block.table, width)))
        return f"{_wrap(block.caption, width)}\n{parts}" if block.caption else parts

    return "\n\n".join(map(lines, blocks))


def show(blocks: Sequence[Block], stream: TextIO) -> None:
    """Prints the blocks: as wide as the terminal, or as Markdown where `stream` is none."""
    if not stream.isatty():
        stream.write(f"{render(blocks)}\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    for block in blocks:
        if isinstance(block, str):
            console.print(f"{block}\n")
            continue
        if block.caption:
            console.print(block.caption, style="bold")
        for part in split_to_width(block.table, console.width):
            table = Table(box=box.SIMPLE_HEAD)
            for i, name in enumerate(part.columns):
                table.add_column(name, justify="right" if i else "left")
            for cells in part.to_numpy().tolist():
                table.add_row(*cells)
            console.print(table)


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


# Cells -------------------------------------------------------------------------------------------


def format_mean(mean: float, stderr: float, signed: bool = False) -> str:
    """`1.2345 ± 0.0067`; signed: with a star if more than two standard errors from 0."""
    if np.isnan(mean):
        return "no targets"
    text = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    if np.isnan(stderr):
        return text
    star = " *" if signed and abs(mean) > 2 * stderr else ""
    return f"{text} ± {stderr:.4f}{star}"


def format_means(
    frame: pd.DataFrame, value: str = "value", stderr: str = "stderr", signed: bool = False
) -> list[str]:
    """`format_mean` of two columns."""
    pairs = zip(frame[value].astype(float), frame[stderr].astype(float), strict=True)
    return [format_mean(mean, error, signed) for mean, error in pairs]


def format_estimate(estimate: Estimate, signed: bool = False) -> str:
    """`format_mean` of an estimate."""
    return format_mean(float(estimate.mean), float(estimate.stderr), signed)


def format_difference(difference: Estimate, signed: bool = False) -> str:
    """`0.012 ± 0.003`, with or without sign."""
    mean, error = float(difference.mean), float(difference.stderr)
    digits = 3 if abs(mean) >= 0.01 else 4
    text = f"{mean:+.{digits}f}" if signed else f"{abs(mean):.{digits}f}"
    return text if np.isnan(error) else f"{text} ± {error:.{digits}f}"


def describe_difference(difference: Estimate) -> str:
    """`0.012 ± 0.003 lower`, or `not significantly different`."""
    if difference.is_insignificant():
        return f"not significantly different ({format_difference(difference, signed=True)})"
    return f"{format_difference(difference)} {'lower' if difference.mean < 0 else 'higher'}"


def format_count(number: int) -> str:
    """`1,234`, `1.23M` or `1.23B`."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,}"


def format_bytes(value: float) -> str:
    """`512 B`, `1.5 KiB`, ...; `-` if unknown."""
    if np.isnan(value):
        return MISSING
    power = min(3, int(np.log2(value) // 10)) if value else 0
    if power == 0:
        return f"{int(value):,} B"
    return f"{value / 1024**power:.4g} {' KMG'[power]}iB"


def format_seconds(seconds: float) -> str:
    """`12.3 s`, `2:05` or `1:02:05`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, secs = divmod(round(seconds), 60)
    hours = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else f"{minutes}"
    return f"{hours}:{secs:02}"


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
