"""Result files: tidy CSV, JSON and plots, written atomically."""

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from matplotlib.figure import Figure

from tttjax.errors import UserError
from tttjax.io.atomic import write_files
from tttjax.io.paths import is_bucket, storage_path

Content: TypeAlias = str | bytes | pd.DataFrame | Figure | Mapping[str, Any]


def write_results(out: str | os.PathLike, contents: Mapping[str, Content]) -> dict[str, Path]:
    """Writes the contents by file name under `out`; returns their paths by name.

    A DataFrame becomes CSV, a figure PNG, a mapping JSON.
    """

    def writer(content: Content):
        return lambda path: path.write_bytes(_encode(content))

    return write_files(out, {name: writer(content) for name, content in contents.items()})


def _encode(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, Figure):
        return to_png(content)
    if isinstance(content, pd.DataFrame):
        content = to_csv(content)
    elif not isinstance(content, str):
        content = to_json(content)
    return content.encode()


def check_writable(out: str | os.PathLike) -> None:
    """Raises UserError if `write_results` cannot write under `out`. Creates nothing."""
    folder = storage_path(out, "--out").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; give a results folder with --out=DIR")
    if not is_bucket(folder) and not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write results to {folder}: no write permission for {existing}; give another "
            "folder with --out=DIR"
        )


def to_csv(frame: pd.DataFrame) -> str:
    """Rows with a head, as `pandas.read_csv` reads them; unknown values are empty."""
    return round_values(frame).to_csv(index=False, lineterminator="\n")


def to_json(values: Mapping[str, Any], rows: pd.DataFrame | None = None) -> str:
    """JSON; unknown values are null.

    rows: added under `columns` and `rows`, one per line, for `pandas.DataFrame(rows, columns=...)`.
    """
    if rows is None:
        return json.dumps(values, indent=1, allow_nan=False) + "\n"
    head = json.dumps({**values, "columns": list(rows.columns)}, indent=1, allow_nan=False)
    # Indented numbers would make most of the file white space.
    lines = (json.dumps(list(row.values()), allow_nan=False) for row in records(rows))
    body = ",\n  ".join(lines)
    return f'{head[:-2]},\n "rows": [\n  {body}\n ]\n}}\n'


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain rounded values for JSON, None where unknown."""
    rounded = round_values(frame).astype(object)
    return rounded.where(rounded.notna(), None).to_dict("records")


def lists(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """The columns as lists of plain rounded values, None where unknown."""
    rows = records(frame)
    return {name: [row[name] for row in rows] for name in frame.columns}


def round_values(frame: pd.DataFrame) -> pd.DataFrame:
    """Floats with seven significant digits, which keeps the files of long contexts small."""
    numbers = frame.select_dtypes("float")
    return frame.assign(**{name: numbers[name].map(_round) for name in numbers})


def _round(value: float) -> float:
    if not math.isfinite(value):
        return math.nan
    return value if value.is_integer() else float(f"{value:.7g}")


def estimate_values(mean: Any, stderr: Any) -> dict[str, float | None]:
    """Mean and standard error for JSON; None where there is none."""
    return {"mean": number(mean), "stderr": number(stderr)}


def number(value: Any) -> float | None:
    """A rounded number for JSON; None if it is not known or not finite."""
    known = value is not None and math.isfinite(value)
    return _round(float(value)) if known else None


def to_png(figure: Figure) -> bytes:
    """The figure as an image."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
