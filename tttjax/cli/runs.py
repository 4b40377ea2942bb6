"""List the runs below a folder: their steps, last losses, and the fields in which they differ.

examples:
  tttjax runs runs/
  tttjax runs sweeps/chunk/trials --csv=index.csv     every field, for pandas or a spreadsheet
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tttjax.io.paths import storage_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax runs`."""
    parser.add_argument(
        "folder",
        type=storage_text,
        metavar="DIR",
        help="folder with work directories, at any depth",
    )
    parser.add_argument("--csv", metavar="FILE", help="also write all fields of all runs")


def run(args: argparse.Namespace) -> int:
    """`tttjax runs` from parsed arguments; returns the exit code."""
    import pandas as pd

    from tttjax.evaluation.tables import CaptionedTable, show
    from tttjax.io.atomic import atomic_write
    from tttjax.runs.index import differing_fields, index_runs

    runs = index_runs(args.folder)
    rows = [
        {
            "run": r.name,
            "step": r.step,
            "steps": r.fields["train.steps"],
            "loss": r.loss,
            **r.fields,
        }
        for r in runs
    ]
    frame = pd.DataFrame(rows)
    shown = ["run", "step", "steps", "loss", *differing_fields(runs)]
    table = frame[shown].rename(columns={name: _leaf(name, shown) for name in shown})
    show([CaptionedTable("", table.map(_text))], sys.stdout)
    if args.csv:
        with atomic_write(Path(args.csv)) as temporary:
            frame.to_csv(temporary, index=False)
        print(args.csv)
    return 0


def _leaf(name: str, names: list[str]) -> str:
    """The last word of a field's name where that is enough."""
    leaf = name.rpartition(".")[2]
    return leaf if [n.rpartition(".")[2] for n in names].count(leaf) == 1 else name


def _text(value: Any) -> str:
    if value is None or value != value:  # pandas has NaN for a loss that is not there
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
