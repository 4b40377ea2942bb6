"""Turns prepared data into training batches, with Grain.

    records -> shuffle -> (mixture) -> batches of this process -> prefetch in threads

Every stage is a Grain `MapDataset`, a function of an index, so a batch depends only on (seed,
step). The step is the only state: resuming needs no replay, and the number of processes may change.
The order of operations is that of the official TTT-E2E loader: shuffle the records of an epoch with
Grain's index_shuffle, seed (seed + epoch) mod 2^32, group them into global batches, drop the
epoch's remainder, repeat. Process p of S takes the p-th of S equal parts of each global batch,
which is the official "batches p, p+S, ... of size global_batch / S".
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np

from tttjax.config.schema import LAYOUTS
from tttjax.data.manifest import is_masked
from tttjax.data.records import PADDING, Record, RecordSource, document_records, stream_records
from tttjax.data.shards import PreparedData, open_prepared
from tttjax.errors import UserError
from tttjax.types import Batch


@dataclass(frozen=True)
class MixtureSource:
    """Records of one prepared data set, and its weight in the mixture."""

    records: RecordSource
    weight: float
    bos_id: int | None
    pad_id: int


def epoch_order(records: Any, *, shuffle: bool, seed: int) -> grain.MapDataset:
    """Records ordered by epoch; index epoch * len + i is the i-th record of that epoch."""
    dataset = grain.MapDataset.source(records)
    return dataset.shuffle(seed=seed % 2**32) if shuffle else dataset


def local_batches(
    dataset: grain.MapDataset,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    batch_fn: Any = None,
) -> grain.MapDataset:
    """This process's part of each global batch; every epoch drops its remainder.

    Raises UserError if the batch size is not divisible or an epoch has fewer records than a batch.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"The batch of {batch_size} sequences cannot be divided among {process_count} "
            "processes; make train.batch_size a multiple of them."
        )
    usable = len(dataset) // batch_size * batch_size
    if not usable:
        raise UserError(
            f"The data have {len(dataset)} sequences, fewer than one batch of {batch_size}; lower "
            "train.batch_size or train.seq_len, or prepare more text."
        )
    # There is no remainder, but the length of an infinite mixture needs integer arithmetic.
    local = dataset[:usable].batch(
        batch_size // process_count, drop_remainder=True, batch_fn=batch_fn
    )
    return local[process_index::process_count]


def make_batch(
    tokens_BS: np.ndarray,
    exclude_BS: np.ndarray | None = None,
    pad_id: int = 0,
    chosen_BS: np.ndarray | None = None,
) -> Batch:
    """Records int32 [B, T+1] to a Batch of inputs, next-token targets and the loss mask.

    exclude_BS: bool [B, T+1], tokens that are masked as targets, as padding always is. chosen_BS:
    bool [B, T+1], the tokens to learn, which become the batch's weights.
    """
    inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    mask_BT = targets_BT != PADDING
    if exclude_BS is not None:
        mask_BT &= ~exclude_BS[:, 1:]
    if tokens_BS.min() == PADDING:
        inputs_BT = np.where(inputs_BT == PADDING, np.int32(pad_id), inputs_BT)
        targets_BT = np.where(targets_BT == PADDING, np.int32(pad_id), targets_BT)
    contiguous: Any = np.ascontiguousarray  # numpy arrays: the train step puts them on the devices
    weight: Any = None if chosen_BS is None else chosen_BS[:, 1:] & mask_BT
    return Batch(contiguous(inputs_BT), contiguous(targets_BT), mask_BT, weight)


@dataclass(frozen=True)
class _BatchFn:
    bos_id: int | None
    pad_id: int
    is_masked: bool  # whether any source is; all tokens of the others are targets

    def __call__(self, records: Sequence[Record]) -> Batch:
        """Masks a BOS that starts a document: the next document is unpredictable.

        Goes by position, since the EOS that ends a document may have the same id.
        """
        tokens_BS = np.stack([record.tokens_S for record in records])
        starts_BS = np.stack([record.starts_S for record in records])
        exclude_BS = None if self.bos_id is None else starts_BS & (tokens_BS == self.bos_id)
        chosen_BS = np.stack([r.targets_S for r in records]) if self.is_masked else None
        return make_batch(tokens_BS, exclude_BS, self.pad_id, chosen_BS)


class TrainStream:
    """An infinite iterator over batches with random access by step.

    `batch_at(step)` returns any batch and does not advance. `get_state` and `set_state` use a
    small JSON value; `set_state` refuses a state of other data or another batch size.
    """

    def __init__(self, dataset: grain.MapDataset, identity: dict[str, Any], prefetch: int):
        self._dataset, self._identity = dataset, identity
        self._options = grain.ReadOptions(
            num_threads=min(2, prefetch), prefetch_buffer_size=prefetch
        )
        self._iterator: Any = None
        self._step = 0

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._dataset.to_iter_dataset(self._options))
            self._iterator.set_state({"next_index": self._step})
        batch = next(self._iterator)
        self._step += 1
        return batch

    @property
    def step(self) -> int:
        """Index of the batch that `next` returns."""
        return self._step

    def batch_at(self, step: int) -> Batch:
        """The batch of `step`."""
        return self._dataset[step]

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at the step of `state`. Raises UserError if it belongs to other batches."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                if name == "data":
                    raise UserError(
                        "The data differ from those of the checkpoint, so the batches would not "
                        "continue; name the original data in data.sources, or use a new work "
                        "directory."
                    )
                raise UserError(
                    f"The checkpoint has {name}={state.get(name)!r}, this run has {value!r}, so "
                    "the batches would not continue; use the same data settings or a new work "
                    "directory."
                )
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops the prefetch threads; iterating starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


@dataclass(frozen=True)
class StreamOptions:
    """The part of a run's configuration that determines its batches.

    seq_len: T. batch_size: sequences of the global batch. weights: of the sources in the mixture
    (empty: by number of records). min_length: in the layout "documents", records with fewer targets
    are dropped.
    """

    seq_len: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    layout: str = "stream"
    weights: tuple[float, ...] = field(default=())
    split: str = "train"
    min_length: int = 1

    def check(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"data.layout={self.layout!r} is unknown; choose from {LAYOUTS}.")
        if self.seq_len < 1:
            raise UserError(f"train.seq_len={self.seq_len} must be at least 1.")
        if not 1 <= self.min_length <= self.seq_len:
            raise UserError(
                f"min_length={self.min_length} must be between 1 and the sequence's {self.seq_len}."
            )


def make_train_stream(
    sources: Sequence[str | os.PathLike | PreparedData],
    options: StreamOptions,
    *,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
    fingerprint: str | None = None,
) -> TrainStream:
    """Batches of this process from one prepared data set or a mixture of several.

    prefetch: batches prefetched in background threads (0: none). fingerprint: of the model's
    tokenizer. Raises UserError for data that are missing, damaged, too short or of different
    tokenizers.
    """
    options.check()
    if not sources:
        raise UserError("No data: name at least one prepared data set in data.sources.")
    datasets = [
        s if isinstance(s, PreparedData) else open_prepared(s, fingerprint=fingerprint)
        for s in sources
    ]
    _check_tokenizers(datasets, fingerprint)
    mixture = _make_sources(datasets, options)
    dataset = _mix(mixture, options)
    masked = any(is_masked(data.manifest) for data in datasets)
    batch_fn = _BatchFn(mixture[0].bos_id, mixture[0].pad_id, masked)
    batches = local_batches(
        dataset,
        options.batch_size,
        process_index=process_index,
        process_count=process_count,
        batch_fn=batch_fn,
    )
    if len(mixture) == 1:  # a mixture repeats already
        batches = batches.repeat()
    return TrainStream(batches, _identity(datasets, mixture, options), prefetch)


def _check_tokenizers(datasets: Sequence[PreparedData], fingerprint: str | None) -> None:
    expected = fingerprint or datasets[0].fingerprint
    for data in datasets:
        if data.fingerprint != expected:
            raise UserError(
                f"The data in {data.folder} were made by another tokenizer (fingerprint "
                f"{data.fingerprint[:12]}, expected {expected[:12]}); prepare them with "
                f"--tokenizer={datasets[0].folder}."
            )


def _make_sources(datasets: Sequence[PreparedData], options: StreamOptions) -> list[MixtureSource]:
    weights = options.weights
    if weights and len(weights) != len(datasets):
        raise UserError(
            f"data.weights has {len(weights)} entries for {len(datasets)} sources; give one each."
        )
    if any(not weight > 0 for weight in weights):
        raise UserError(f"data.weights={weights} must all be above 0; remove the source instead.")
    mixture = []
    for i, data in enumerate(datasets):
        split = data.split(options.split)
        records: RecordSource
        if options.layout == "stream":
            records = stream_records(split, options.seq_len)
        else:
            records = document_records(split, options.seq_len, options.min_length)
        tokenizer = data.tokenizer
        pad_id = 0 if tokenizer.eos_id is None else tokenizer.eos_id
        weight = weights[i] if weights else float(len(records))
        mixture.append(MixtureSource(records, weight, tokenizer.bos_id, pad_id))
    return mixture


def _mix(sources: Sequence[MixtureSource], options: StreamOptions) -> grain.MapDataset:
    order = {"shuffle": options.shuffle}
    if len(sources) == 1:
        return epoch_order(sources[0].records, seed=options.seed, **order)
    # Each source has its own epochs and its own order.
    repeated = [
        epoch_order(
            source.records, seed=zlib.crc32(f"{options.seed}:{i}".encode()), **order
        ).repeat()
        for i, source in enumerate(sources)
    ]
    return grain.MapDataset.mix(repeated, [source.weight for source in sources])


def _identity(
    datasets: Sequence[PreparedData], sources: Sequence[MixtureSource], options: StreamOptions
) -> dict[str, Any]:
    return {
        "data": [data.content_id(options.split) for data in datasets],
        "layout": options.layout,
        "seq_len": options.seq_len,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "shuffle": options.shuffle,
        "weights": [source.weight for source in sources],
        "min_length": options.min_length,
    }
