"""An index of the runs below a folder: how far they are, and how their configurations differ."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tttjax.config.build import to_flat_dict
from tttjax.config.run_info import CONFIG, read_config
from tttjax.errors import UserError
from tttjax.io.paths import storage_path, walk
from tttjax.training.metrics_file import last_record


@dataclass(frozen=True)
class IndexedRun:
    """name: path below the folder. fields: all values by dotted name. loss: of the last step."""

    name: str
    step: int
    loss: float | str | None
    fields: dict[str, Any]


def index_runs(folder: str | os.PathLike) -> list[IndexedRun]:
    """All runs below `folder`, by name. Raises UserError if there are none."""
    root = storage_path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} is not a folder; give one with work directories")
    runs = [_read(root, workdir) for workdir in sorted(_workdirs(root))]
    if not runs:
        raise UserError(f"there are no runs in {folder}; give a folder with work directories")
    return runs


def differing_fields(runs: list[IndexedRun]) -> list[str]:
    """The configuration fields in which not all runs agree, paths left out."""
    names = (name for name in runs[0].fields if name not in ("data.sources", "train.init_from"))
    return [name for name in names if len({repr(run.fields[name]) for run in runs}) > 1]


def _workdirs(root: Path) -> Iterator[Path]:
    for path, folders, files in walk(root):
        if CONFIG in files and "environment.json" in files:  # an export has no environment
            folders.clear()  # what a run contains is no run
            yield path


def _read(root: Path, workdir: Path) -> IndexedRun:
    config = read_config(workdir)
    assert config is not None  # `_workdirs` saw the file
    record = last_record(workdir)
    name = "." if workdir == root else workdir.relative_to(root).as_posix()
    return IndexedRun(name, record.get("step", 0), record.get("loss"), to_flat_dict(config))
