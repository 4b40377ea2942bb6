"""Lazy reading of Orbax checkpoints of the official TTT-E2E code.

A checkpoint is a local folder or a path in Google Cloud Storage (`gs://bucket/path`). Opening it
reads names, shapes and dtypes; values are read array by array, or row by row of stacked arrays.

All access is through tensorstore, which supports both: a damaged file raises an exception and
leaves no pending reads behind.
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
METADATA = "_METADATA"  # names and types of all arrays of an item
COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # record that a step is complete
TMP_MARK = ".orbax-checkpoint-tmp"
TIMEOUT_S = 60  # of a request for a file, in seconds


class StoredArray:
    """An opened array. Reading it raises UserError if it is damaged."""

    def __init__(self, name: str, spec: dict[str, Any], store: tensorstore.TensorStore):
        self._name, self._spec, self._store = name, spec, store
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype: np.dtype = store.dtype.numpy_dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        with _user_errors(self._name):
            return np.asarray(self._store.read().result())

    def rows(self) -> Callable[[int], np.ndarray]:
        """Returns a function that reads one row (along the first axis).

        If stored chunks span several rows, the function caches decoded chunks, so that each is
        decoded once.
        """
        store = self._store
        read_chunk = store.chunk_layout.read_chunk.shape or (1,)
        if (read_chunk[0] or 1) > 1:
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 2 * self.nbytes}})
            with _user_errors(self._name):
                store = tensorstore.open(self._spec, context=context, open=True).result()

        def read(row: int) -> np.ndarray:
            with _user_errors(self._name):
                return np.asarray(store[row].read().result())

        return read


class StoredCheckpoint(NamedTuple):
    """Step and weights (by dotted name) of an opened checkpoint. source: folder of the step."""

    source: str
    step: int
    arrays: dict[str, StoredArray]


class OfficialCheckpoint(NamedTuple):
    """The contents of an official checkpoint, by dotted names; None for an absent item."""

    step: int
    model_weights: dict[str, np.ndarray]
    opt_state: dict[str, np.ndarray] | None
    data_iterator: dict[str, int] | None


def open_official_checkpoint(source: str | Path, project: str = "") -> StoredCheckpoint:
    """Opens the weights of a checkpoint without reading their values.

    source: the folder of a step (`.../4`), its parent (the newest step is used), or the item
    `model_weights` itself, local or as `gs://bucket/path`. project: Google Cloud project to bill
    for requester-pays buckets.
    Raises UserError if the checkpoint does not exist, is incomplete, or cannot be read.
    """
    store_path = StorePath.of(source, project)
    with _user_errors(store_path):
        store_path, item, step = _locate(store_path)
        return StoredCheckpoint(str(store_path), step, _open_item(item))


def load_official_checkpoint(source: str | Path) -> OfficialCheckpoint:
    """Reads all items of an official checkpoint.

    source: as for `open_official_checkpoint`. Raises UserError as it does.
    """
    checkpoint = open_official_checkpoint(source)
    store_path = StorePath.of(checkpoint.source)

    def read(arrays: dict[str, StoredArray]) -> dict[str, np.ndarray]:
        return {name: array.read() for name, array in arrays.items()}

    with _user_errors(store_path):
        optimizer, iterator = store_path / OPTIMIZER, store_path / ITERATOR
        has_optimizer = optimizer.read(METADATA) is not None
        progress = sorted(name for name in iterator.children() if name.endswith(".json"))
        return OfficialCheckpoint(
            step=checkpoint.step,
            model_weights=read(checkpoint.arrays),
            opt_state=read(_open_item(optimizer)) if has_optimizer else None,
            data_iterator=json.loads(iterator.read(progress[0]) or b"") if progress else None,
        )


# Paths -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StorePath:
    """A local folder (bucket empty), or a folder in a Google Cloud Storage bucket."""

    path: str
    bucket: str = ""
    project: str = ""

    @classmethod
    def of(cls, source: str | Path, project: str = "") -> "StorePath":
        """Raises UserError for any other URL."""
        text = str(source)
        if "://" not in text:
            return cls(str(Path(text).expanduser().resolve()))
        match = re.fullmatch(r"gs://([^/]+)/*(.*?)/*", text)
        if not match:
            raise UserError(f"{text} is neither a folder nor a path like gs://BUCKET/FOLDER.")
        return cls(match[2], match[1], project)

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(
            f"{self.path}/{name}".lstrip("/" if self.bucket else ""), *self._bucket_and_project()
        )

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.path}" if self.bucket else self.path

    def _bucket_and_project(self) -> tuple[str, str]:
        return self.bucket, self.project

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def kvstore(self) -> dict[str, Any]:
        """The folder as a tensorstore kvstore spec."""
        path = f"{self.path}/" if self.path else ""
        if not self.bucket:
            return {"driver": "file", "path": path}
        spec: dict[str, Any] = {"driver": "gcs", "bucket": self.bucket, "path": path}
        if self.project:
            spec["gcs_user_project"] = {"project_id": self.project}
        # By default tensorstore retries an unreachable bucket for many minutes.
        return {**spec, "gcs_request_retries": {"max_retries": 5, "max_delay": "8s"}}

    def read(self, name: str) -> bytes | None:
        """The content of a file in the folder; None if it is absent."""
        if not self.bucket:
            file = Path(self.path) / name
            return file.read_bytes() if file.is_file() else None
        store = tensorstore.KvStore.open(self.kvstore).result(timeout=TIMEOUT_S)
        result = store.read(name).result(timeout=TIMEOUT_S)
        return result.value if result.state == "value" else None

    def children(self) -> list[str]:
        """Names in the folder; empty if it is absent."""
        if not self.bucket:
            folder = Path(self.path)
            return [child.name for child in folder.iterdir()] if folder.is_dir() else []
        store = tensorstore.KvStore.open(self.kvstore).result(timeout=TIMEOUT_S)
        keys = store.list().result(timeout=TIMEOUT_S)
        return sorted({key.decode().split("/")[0] for key in keys})


@contextlib.contextmanager
def _user_errors(store_path: StorePath | str) -> Iterator[None]:
    """Turns errors while reading a folder or an array into UserError."""
    try:
        yield
    except TimeoutError as error:
        raise UserError(
            f"{store_path} does not respond; check the path and the connection."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint {store_path} cannot be read: {reason}") from error


# Locating and opening ---------------------------------------------------------------------------


def is_official_checkpoint(source: str | Path) -> bool:
    """Whether a folder is an official checkpoint or contains some, complete or not."""
    store_path = StorePath.of(source)
    names = store_path.children()
    inside = [name for step in names if step.isdigit() for name in (store_path / step).children()]
    return (
        METADATA in names
        or any(TMP_MARK in name for name in (store_path.path, *names))
        or any(name.startswith(WEIGHTS) for name in (*names, *inside))
    )


def _locate(store_path: StorePath) -> tuple[StorePath, StorePath, int]:
    """(folder of the step, folder of its weights, step)."""
    if store_path.name == WEIGHTS and store_path.read(METADATA) is not None:
        parent = StorePath(
            store_path.path.rpartition("/")[0], store_path.bucket, store_path.project
        )
        return parent, store_path, _number(parent)
    step = _newest_step(store_path)
    names = step.children()
    if TMP_MARK in step.path or any(name.startswith(WEIGHTS + TMP_MARK) for name in names):
        raise _unfinished_error(step)
    if WEIGHTS not in names:
        raise UserError(f"{step} is no official checkpoint: it has no {WEIGHTS}.")
    commit_metadata, success = (step.read(name) for name in COMMIT_FILES)
    if (
        commit_metadata
        and not success
        and not json.loads(commit_metadata).get("commit_timestamp_nsecs", True)
    ):
        raise _unfinished_error(step)
    return step, step / WEIGHTS, _number(step)


def _newest_step(store_path: StorePath) -> StorePath:
    """The newest step in a folder; the folder itself if it contains no step."""
    names = store_path.children()
    if any(name.startswith(WEIGHTS) for name in names):
        return store_path
    steps = sorted((name for name in names if name.isdigit()), key=int)
    unfinished = [name for name in names if TMP_MARK in name]
    return store_path / (steps or unfinished)[-1] if steps or unfinished else store_path


def _number(store_path: StorePath) -> int:
    return int(store_path.name) if store_path.name.isdigit() else 0


def _unfinished_error(store_path: StorePath) -> UserError:
    return UserError(
        f"the checkpoint {store_path} is still being written or was interrupted; wait until it is "
        "complete, or use another one."
    )


def _open_item(item: StorePath) -> dict[str, StoredArray]:
    """The arrays of an item by dotted name, without nodes that are stored as None."""
    metadata, names = item.read(METADATA), item.children()
    in_one_store = "manifest.ocdbt" in names  # else every array has its own folder
    is_unmerged = any(name.startswith("ocdbt.process_") for name in names)
    if metadata is None or (is_unmerged and not in_one_store):
        lacks = METADATA if metadata is None else "manifest.ocdbt"
        raise UserError(
            f"{item} is incomplete, it has no {lacks}: it is still being written, or was not fully "
            "copied."
        )
    content = json.loads(metadata)
    stores = {}
    for entry in content["tree_metadata"].values():
        if entry["value_metadata"]["value_type"] == "None":
            continue
        name = ".".join(str(key["key"]) for key in entry["key_metadata"])
        kvstore = (item / name).kvstore
        if in_one_store:
            kvstore = {"driver": "ocdbt", "base": item.kvstore, "path": f"{name}/"}
        spec = {"driver": "zarr3" if content.get("use_zarr3") else "zarr", "kvstore": kvstore}
        stores[name] = spec, tensorstore.open(spec, open=True)  # concurrent requests
    return {
        name: StoredArray(f"{item}, array {name},", spec, store.result())
        for name, (spec, store) in stores.items()
    }


def open_item(folder: str | Path) -> dict[str, StoredArray]:
    """Opens the arrays of an item of any Orbax checkpoint, by dotted name.

    Raises UserError if they cannot be opened.
    """
    store_path = StorePath.of(folder)
    with _user_errors(store_path):
        return _open_item(store_path)
