"""Verification of the data pipeline against batches of the official TTT-E2E loader.

A case is a folder with `batches.json`, `batches.npz` and Zarr token folders `tokens_*`. The name of
an array determines its contents:

    tokens/SPLIT                                                the tokens
    permutation_seedS_epochE                                    the record order of an epoch
    SPLIT_(unshuffled|shuffled)[_seedS][_epochE][_shardPofQ]/ARRAY    the first batches, with ARRAY
        one of input_ids, target_tokens, loss_masks, record_index
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.data.pipeline import StreamOptions, epoch_order, local_batches, make_train_stream
from tttjax.data.preparation import prepare
from tttjax.data.records import stream_records
from tttjax.data.shards import PreparedData
from tttjax.errors import UserError

_FIELDS = {"input_ids": "inputs", "target_tokens": "targets", "loss_masks": "mask"}
_BATCHES = re.compile(
    r"(?P<split>[a-z0-9]+)_(?P<order>unshuffled|shuffled)(?:_seed(?P<seed>\d+))?"
    r"(?:_epoch(?P<epoch>\d+))?(?:_shard(?P<index>\d+)of(?P<count>\d+))?"
    r"/(?P<array>input_ids|target_tokens|loss_masks|record_index)"
)
_PERMUTATION = re.compile(
    r"permutation_seed(?P<seed>\d+)_epoch(?P<epoch>\d+)(?:_(?P<split>[a-z0-9]+))?"
)


def check_zarr_case(case: str | Path) -> list[tuple[str, float]]:
    """(array name, largest deviation) for every array of every token folder of a case.

    case: the folder, or its `batches.json`. A deviation is 0.0 or a difference of integers;
    infinity if shapes differ. Raises UserError if the case cannot be read.
    """
    path = Path(case)
    path = path / "batches.json" if path.is_dir() else path
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz")) as arrays:
            references = dict(arrays)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the golden case {path}: {error}.") from error
    folders = sorted(p for p in path.parent.iterdir() if p.is_dir() and p.name.startswith("tokens"))
    if not folders:
        raise UserError(f"The golden case {path} has no token folder `tokens_*` beside it.")
    results = []
    for folder in folders:
        with tempfile.TemporaryDirectory() as work:
            data = _prepare(folder, work, description)
            for name, expected in references.items():
                actual = recompute(data, description, name, expected.shape)
                results.append((f"{folder.name}/{name}", _deviation(actual, expected)))
    return results


def _prepare(folder: Path, work: str, description: dict[str, Any]) -> PreparedData:
    return prepare(
        [folder],
        Path(work) / "data",
        tokenizer="ids",
        vocab_size=description["vocab_size"],
        bos_id=description["bos_token_id"],
        eos_id=description["eos_token_id"],
    )


def recompute(
    data: PreparedData, description: dict[str, Any], name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """The array called `name`, with `shape[0]` batches."""
    if name.startswith("tokens/"):
        split = data.split(name.removeprefix("tokens/"))
        return split.read(0, split.num_tokens)
    if match := _PERMUTATION.fullmatch(name):
        length = _num_records(data, match["split"] or "train", description)
        order = epoch_order(range(length), shuffle=True, seed=int(match["seed"]))
        first = int(match["epoch"]) * length
        return np.array([order[first + i] for i in range(length)])
    match = _BATCHES.fullmatch(name)
    if not match:
        raise UserError(f"The golden case has an array with the unknown name {name!r}.")
    steps = _Steps(data, description, match)
    return np.stack([value for value, _ in zip(steps.values(), range(shape[0]), strict=False)])


class _Steps:
    """The values of one named array, batch by batch."""

    def __init__(self, data: PreparedData, description: dict[str, Any], match: re.Match):
        self._data, self._description, self._match = data, description, match
        self._shuffle = match["order"] == "shuffled"
        self._seed = int(match["seed"] or description.get("seed", 0))
        self._shard: dict[str, Any] = {
            "process_index": int(match["index"] or 0),
            "process_count": int(match["count"] or 1),
        }

    def values(self) -> Iterator[np.ndarray]:
        split, batch_size = self._match["split"], self._description["global_batch_size"]
        records = _num_records(self._data, split, self._description)
        step = int(self._match["epoch"] or 0) * (records // batch_size)
        if self._match["array"] == "record_index":
            order = epoch_order(range(records), shuffle=self._shuffle, seed=self._seed)
            indices = local_batches(order, batch_size, **self._shard).repeat()
            yield from (indices[i] for i in range(step, len(indices)))
        options = StreamOptions(
            self._description["seq_len"],
            batch_size,
            seed=self._seed,
            shuffle=self._shuffle,
            split=split,
        )
        stream = make_train_stream([self._data], options, **self._shard)
        stream.set_state({**stream.get_state(), "step": step})
        try:
            for batch in stream:
                yield getattr(batch, _FIELDS[self._match["array"]])
        finally:
            stream.close()


def _num_records(data: PreparedData, split: str, description: dict[str, Any]) -> int:
    return len(stream_records(data.split(split), description["seq_len"]))


def _deviation(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual.astype(np.int64) - expected.astype(np.int64)).max(initial=0))
