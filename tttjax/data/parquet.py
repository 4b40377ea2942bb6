"""Reads text columns of Parquet files in small batches, with pyarrow (an extra)."""

from collections.abc import Iterator
from typing import Any

from tttjax.data.streams import open_raw, unreadable
from tttjax.errors import UserError, install_extra

_ROWS = 64  # per batch
_BUFFER = 1 << 20  # bytes per read, instead of a whole column chunk


def check_pyarrow(path: str) -> None:
    """UserError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401 (an extra)
    except ImportError as error:
        raise UserError(
            f"{path} is a Parquet file, and reading it needs pyarrow: {install_extra('parquet')}"
        ) from error


def read_column(path: str, key: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every row, from the column `key`.

    Uses constant memory. Raises UserError if the file is damaged or has no such column of text.
    """
    check_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with (
            open_raw(path) as stream,
            pyarrow.parquet.ParquetFile(stream, buffer_size=_BUFFER) as file,
        ):
            _check_column(file.schema_arrow, path, key)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[key]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is None:
                        raise UserError(f"{path}, row {number}: no text in the column {key!r}.")
                    yield number, text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number}: not UTF-8 text.") from error
    except (OSError, EOFError) as error:
        raise unreadable(path, error) from error
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Cannot read {path} ({reason}); repair it or exclude it.") from error


def _check_column(schema: Any, path: str, key: str) -> None:
    """UserError if the file has no column of text of this name."""
    columns = [
        name for name, kind in zip(schema.names, schema.types, strict=True) if _is_text(kind)
    ]
    if key not in columns:
        available = ", ".join(f'"{name}"' for name in columns) or "none"
        raise UserError(
            f'{path} has no text in a column "{key}" (its columns of text: {available}); name one '
            "with --text-key."
        )


def _is_text(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    is_string = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    return is_string or pyarrow.types.is_string_view(kind)
