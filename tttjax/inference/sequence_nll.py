"""The loss of every target token of held-out sequences, on a mesh."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tttjax.data.held_out import HeldOut
from tttjax.inference.prefill import InferenceModel, read_sequences
from tttjax.parallel.fsdp import all_gather_params
from tttjax.parallel.mesh import (
    BATCH_AXES,
    as_sharded_param,
    batch_sharding,
    manual,
    manual_axes,
    param_specs,
    spec,
)
from tttjax.types import Array, Batch, Params

Scorer = Callable[[Params, Batch, float | Array], Array]


@lru_cache(maxsize=4)
def make_scorer(inference_model: InferenceModel, mesh: Mesh) -> Scorer:
    """scorer(params, batch, lr) -> NLL of every target in float32 or wider, [B, T], not masked.

    lr: the inner learning rate, in place of the model's. Compiled once per batch shape; the last
    four are kept. Every device scores its own sequences; the only communication is one all-gather
    of the weights before the forward pass.
    """
    specs = param_specs(mesh, inference_model.chunk_model.split.model.axes())

    def batch_nll(params: Params, batch: Batch, lr: Array) -> Array:
        return read_sequences(inference_model._replace(lr=lr), params, batch)[0]

    def shard_nll(params_shard: Params, batch: Batch, lr: Array) -> Array:
        params = jax.tree.map(as_sharded_param, params_shard, specs)
        return batch_nll(all_gather_params(params), batch, lr)

    score: Callable[[Params, Batch, Array], Array] = batch_nll
    if mesh.size > 1:
        batch_spec = spec(mesh, ["batch"])
        score = jax.shard_map(
            shard_nll,
            mesh=mesh,
            in_specs=(jax.tree.map(manual, specs), batch_spec, PartitionSpec()),
            out_specs=batch_spec,
            axis_names=manual_axes(mesh),
            check_vma=False,
        )
    # Replicated, so that every process can read the full result.
    return jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))


def split_sequences(held_out: HeldOut, length: int) -> HeldOut:
    """Splits the sequences into sequences of `length` targets; the remainder is dropped."""
    count = (held_out.tokens.shape[1] - 1) // length
    chosen = held_out.chosen
    starts = np.arange(count) * length
    index_PT = starts[:, None] + np.arange(length + 1)
    return replace(
        held_out,
        tokens=held_out.tokens[:, index_PT].reshape(-1, length + 1),
        document=np.repeat(held_out.document, count),
        offset=(held_out.offset[:, None] + starts).reshape(-1),
        chosen=None if chosen is None else chosen[:, index_PT].reshape(-1, length + 1),
    )


def padded_batches(sequences: HeldOut, size: int) -> Iterator[tuple[Batch, int]]:
    """(batch of exactly `size`, number of valid sequences); padding sequences are masked."""
    for batch in sequences.batches(size):
        valid = len(batch.inputs)
        fill = ((0, size - valid), (0, 0))
        yield jax.tree.map(partial(np.pad, pad_width=fill), batch), valid


def token_losses(
    scorer: Scorer,
    mesh: Mesh,
    params: Params,
    lr: float | Array,
    held_out: HeldOut,
    length: int,
    batch_size: int,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """NLL [N, T] of all targets, with contexts of `length` tokens.

    T: the sequence length, rounded down to a multiple of `length`. batch_size: sequences per batch
    (at most all), rounded up to a multiple of the batch shards. on_tokens: called with the number
    of tokens of each finished batch.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    sequences = split_sequences(held_out, length)
    size = -(-min(batch_size, len(sequences)) // shards) * shards
    to_device = partial(_to_device, target=batch_sharding(mesh))
    losses: list[np.ndarray] = []
    in_flight: tuple[Array, int] | None = None

    def collect() -> None:
        if in_flight is not None:
            nll_BT, valid = in_flight
            losses.append(np.asarray(nll_BT)[:valid])
            on_tokens(valid * length)

    # Losses of a batch are fetched while the next batch runs.
    for batch, valid in padded_batches(sequences, size):
        nll_BT = scorer(params, jax.tree.map(to_device, batch), lr)
        collect()
        in_flight = (nll_BT, valid)
    collect()
    return np.concatenate(losses).reshape(len(held_out), -1)


def _to_device(x: np.ndarray, target: NamedSharding) -> Array:
    return jax.make_array_from_callback(x.shape, target, lambda index: x[index])
