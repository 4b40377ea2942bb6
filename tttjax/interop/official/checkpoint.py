"""Orbax checkpoints of the official TTT-E2E code, opened without being read.

A checkpoint lies in a folder of this machine or in Google Cloud Storage (`gs://bucket/path`). Its
names, shapes and types are known at once; the values are read array by array, or row by row of the
arrays in which all blocks are stacked.

All goes through tensorstore, which reaches both places: a damaged file is an exception here, and
leaves no half-done reads behind.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from tttjax.errors import UserError

WEIGHTS, OPTIMIZER, ITERATOR = "model_weights", "opt_state", "train_ds_iter"
METADATA = "_METADATA"  # names and kinds of all arrays of an item
COMMITTED = ("_CHECKPOINT_METADATA", "commit_success.txt")  # say when a step was complete
TMP_MARK = ".orbax-checkpoint-tmp"
SECONDS = 60  # to wait for an answer about a file


class StoredArray:
    """An array that has been opened, and not read. Reading raises UserError if it is damaged."""

    def __init__(self, name: str, spec: dict[str, Any], store: tensorstore.TensorStore):
        self._name, self._spec, self._store = name, spec, store
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype: np.dtype = store.dtype.numpy_dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        with _blamed_on(self._name):
            return np.asarray(self._store.read().result())

    def rows(self) -> Callable[[int], np.ndarray]:
        """A function that reads one row (along the first axis).

        Where a stored piece spans several rows, the decoded pieces are kept for as long as the
        function is, so that each is decoded once.
        """
        store = self._store
        piece = store.chunk_layout.read_chunk.shape or (1,)
        if (piece[0] or 1) > 1:
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 2 * self.nbytes}})
            with _blamed_on(self._name):
                store = tensorstore.open(self._spec, context=context, open=True).result()

        def read(row: int) -> np.ndarray:
            with _blamed_on(self._name):
                return np.asarray(store[row].read().result())

        return read


class OpenedCheckpoint(NamedTuple):
    """A checkpoint's step and weights, by dotted names. source: the folder of the step."""

    source: str
    step: int
    arrays: dict[str, StoredArray]


class OfficialCheckpoint(NamedTuple):
    """What a checkpoint of the official code holds, by dotted names; None for an absent item."""

    step: int
    model_weights: dict[str, np.ndarray]
    opt_state: dict[str, np.ndarray] | None
    data_iterator: dict[str, int] | None


def open_official_checkpoint(source: str | Path, project: str = "") -> OpenedCheckpoint:
    """Opens the weights of a checkpoint, and reads none.

    source: the folder of a step (`.../4`), the one above it (its newest step is taken), or the
    item `model_weights` itself, on this machine or as `gs://bucket/path`. project: of Google
    Cloud, that pays for requests to buckets whose owner does not.
    Raises UserError if there is no such checkpoint, it is not complete, or cannot be read.
    """
    place = StorePath.of(source, project)
    with _blamed_on(place):
        place, item, step = _find(place)
        return OpenedCheckpoint(str(place), step, _open_item(item))


def load_official_checkpoint(source: str | Path) -> OfficialCheckpoint:
    """Reads everything that a checkpoint of the official code holds.

    source: as for `open_official_checkpoint`. Raises UserError as it does.
    """
    found = open_official_checkpoint(source)
    place = StorePath.of(found.source)

    def read(arrays: dict[str, StoredArray]) -> dict[str, np.ndarray]:
        return {name: array.read() for name, array in arrays.items()}

    with _blamed_on(place):
        optimizer, iterator = place / OPTIMIZER, place / ITERATOR
        has_optimizer = optimizer.read(METADATA) is not None
        progress = sorted(name for name in iterator.children() if name.endswith(".json"))
        return OfficialCheckpoint(
            step=found.step,
            model_weights=read(found.arrays),
            opt_state=read(_open_item(optimizer)) if has_optimizer else None,
            data_iterator=json.loads(iterator.read(progress[0]) or b"") if progress else None,
        )


# Places ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StorePath:
    """A folder of this machine (bucket empty), or of a bucket of Google Cloud Storage."""

    path: str
    bucket: str = ""
    project: str = ""

    @classmethod
    def of(cls, source: str | Path, project: str = "") -> "StorePath":
        """UserError for a URL of another kind."""
        text = str(source)
        if "://" not in text:
            return cls(str(Path(text).expanduser().resolve()))
        match = re.fullmatch(r"gs://([^/]+)/*(.*?)/*", text)
        if not match:
            raise UserError(f"{text} is neither a folder nor a path like gs://BUCKET/FOLDER.")
        return cls(match[2], match[1], project)

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(f"{self.path}/{name}".lstrip("/" if self.bucket else ""), *self._rest())

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.path}" if self.bucket else self.path

    def _rest(self) -> tuple[str, str]:
        return self.bucket, self.project

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def kvstore(self) -> dict[str, Any]:
        """The folder as tensorstore names it."""
        path = f"{self.path}/" if self.path else ""
        if not self.bucket:
            return {"driver": "file", "path": path}
        spec: dict[str, Any] = {"driver": "gcs", "bucket": self.bucket, "path": path}
        if self.project:
            spec["gcs_user_project"] = {"project_id": self.project}
        # By default tensorstore tries for many minutes to reach a place that cannot be reached.
        return {**spec, "gcs_request_retries": {"max_retries": 5, "max_delay": "8s"}}

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it is absent."""
        if not self.bucket:
            file = Path(self.path) / name
            return file.read_bytes() if file.is_file() else None
        store = tensorstore.KvStore.open(self.kvstore).result(timeout=SECONDS)
        found = store.read(name).result(timeout=SECONDS)
        return found.value if found.state == "value" else None

    def children(self) -> list[str]:
        """Names in the folder; none if it is absent."""
        if not self.bucket:
            folder = Path(self.path)
            return [child.name for child in folder.iterdir()] if folder.is_dir() else []
        store = tensorstore.KvStore.open(self.kvstore).result(timeout=SECONDS)
        keys = store.list().result(timeout=SECONDS)
        return sorted({key.decode().split("/")[0] for key in keys})


@contextlib.contextmanager
def _blamed_on(place: StorePath | str) -> Iterator[None]:
    """Turns a failure to read a folder, or an array in it, into one sentence."""
    try:
        yield
    except TimeoutError as error:
        raise UserError(f"{place} gives no answer; check the path and the connection.") from error
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint {place} cannot be read: {reason}") from error


# Finding and opening -----------------------------------------------------------------------------


def looks_official(source: str | Path) -> bool:
    """Whether a folder is a checkpoint, or holds some, complete or not."""
    place = StorePath.of(source)
    names = place.children()
    inside = [name for step in names if step.isdigit() for name in (place / step).children()]
    return (
        METADATA in names
        or any(TMP_MARK in name for name in (place.path, *names))
        or any(name.startswith(WEIGHTS) for name in (*names, *inside))
    )


def _find(place: StorePath) -> tuple[StorePath, StorePath, int]:
    """(folder of the step, folder of its weights, number of the step)."""
    if place.name == WEIGHTS and place.read(METADATA) is not None:
        above = StorePath(place.path.rpartition("/")[0], place.bucket, place.project)
        return above, place, _number(above)
    step = _newest_step(place)
    names = step.children()
    if TMP_MARK in step.path or any(name.startswith(WEIGHTS + TMP_MARK) for name in names):
        raise _unfinished(step)
    if WEIGHTS not in names:
        raise UserError(f"{step} is no official checkpoint: it has no {WEIGHTS}.")
    said, success = (step.read(name) for name in COMMITTED)
    if said and not success and not json.loads(said).get("commit_timestamp_nsecs", True):
        raise _unfinished(step)
    return step, step / WEIGHTS, _number(step)


def _newest_step(place: StorePath) -> StorePath:
    """The newest step in a folder; the folder itself if it has none."""
    names = place.children()
    if any(name.startswith(WEIGHTS) for name in names):
        return place
    steps = sorted((name for name in names if name.isdigit()), key=int)
    unfinished = [name for name in names if TMP_MARK in name]
    return place / (steps or unfinished)[-1] if steps or unfinished else place


def _number(place: StorePath) -> int:
    return int(place.name) if place.name.isdigit() else 0


def _unfinished(place: StorePath) -> UserError:
    return UserError(
        f"the checkpoint {place} is still being written, or its writing was broken off; wait until "
        "it is complete, or take another one."
    )


def _open_item(item: StorePath) -> dict[str, StoredArray]:
    """The arrays of an item by dotted name. Nodes that are stored as None are left out."""
    metadata, names = item.read(METADATA), item.children()
    in_one_store = "manifest.ocdbt" in names  # else every array has a folder of its own
    parted = any(name.startswith("ocdbt.process_") for name in names)  # not yet merged
    if metadata is None or (parted and not in_one_store):
        lacks = METADATA if metadata is None else "manifest.ocdbt"
        raise UserError(
            f"{item} is not complete, it has no {lacks}: it is still being written, or was copied "
            "in part."
        )
    said = json.loads(metadata)
    pending = {}
    for entry in said["tree_metadata"].values():
        if entry["value_metadata"]["value_type"] == "None":
            continue
        name = ".".join(str(key["key"]) for key in entry["key_metadata"])
        kvstore = (item / name).kvstore
        if in_one_store:
            kvstore = {"driver": "ocdbt", "base": item.kvstore, "path": f"{name}/"}
        spec = {"driver": "zarr3" if said.get("use_zarr3") else "zarr", "kvstore": kvstore}
        pending[name] = spec, tensorstore.open(spec, open=True)  # all at once: each is a request
    return {
        name: StoredArray(f"{item}, array {name},", spec, opened.result())
        for name, (spec, opened) in pending.items()
    }


def open_item(folder: str | Path) -> dict[str, StoredArray]:
    """The arrays of one item of any Orbax checkpoint, opened and not read, by dotted name.

    Raises UserError if they cannot be.
    """
    place = StorePath.of(folder)
    with _blamed_on(place):
        return _open_item(place)
