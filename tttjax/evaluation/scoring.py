"""The loss of every target token of the held-out sequences, for one way of reading them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tttjax.data.held_out import HeldOut
from tttjax.models import Transformer
from tttjax.parallel.fsdp import all_gather_params
from tttjax.parallel.mesh import (
    BATCH_AXES,
    as_divided,
    batch_sharding,
    manual,
    manual_axes,
    param_specs,
    spec,
)
from tttjax.runs.run import EvalSetup
from tttjax.ttt.outer_loss import InnerLoop, make_forward
from tttjax.types import Array, Batch, Params


def make_scorer(way: EvalSetup) -> Callable[[Params, Batch, float], Array]:
    """scorer(params, batch, lr) -> NLL of every target in float32 or wider, [B, T], not masked.

    Compiled once per shape of the batch, also for several ways that differ in their weights alone
    (runs of several seeds). Every device reads its own sequences; the weights are gathered once,
    before reading begins, and nothing else is communicated.
    """
    # There is no outer gradient here to cut short or to save memory for.
    inner = way.inner._replace(exact_chunks=None, remat=False)
    if not way.learn:
        inner = inner._replace(chunk_size=1)  # any length can be read without learning
    return _scorer(way.model, inner, way.learn, way.mesh)


@lru_cache(maxsize=4)
def _scorer(
    model: Transformer, inner: InnerLoop, learn: bool, mesh: Mesh
) -> Callable[[Params, Batch, float], Array]:
    read = make_forward(model, inner, learn=learn)
    specs = param_specs(mesh, model.axes())

    def of_batch(params: Params, batch: Batch, lr: Array) -> Array:
        return read(params, batch, lr).token_nll_T

    def of_shard(params_shard: Params, batch: Batch, lr: Array) -> Array:
        params = jax.tree.map(as_divided, params_shard, specs)
        return of_batch(all_gather_params(params), batch, lr)

    score: Callable[[Params, Batch, Array], Array] = of_batch
    if mesh.size > 1:
        batch_spec = spec(mesh, ["batch"])
        score = jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(jax.tree.map(manual, specs), batch_spec, PartitionSpec()),
            out_specs=batch_spec,
            axis_names=manual_axes(mesh),
            check_vma=False,
        )
    # Replicated, so that every process of several can read all of it.
    return jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))


def cut(held_out: HeldOut, length: int) -> HeldOut:
    """The same tokens as sequences of `length` targets: what is read with so much context."""
    pieces = (held_out.tokens.shape[1] - 1) // length
    starts = np.arange(pieces) * length
    index_PT = starts[:, None] + np.arange(length + 1)
    return replace(
        held_out,
        tokens=held_out.tokens[:, index_PT].reshape(-1, length + 1),
        document=np.repeat(held_out.document, pieces),
        offset=(held_out.offset[:, None] + starts).reshape(-1),
    )


def padded_batches(sequences: HeldOut, size: int) -> Iterator[tuple[Batch, int]]:
    """(batch of exactly `size`, how many of them are real); the rest is masked throughout."""
    for batch in sequences.batches(size):
        real = len(batch.inputs)
        fill = ((0, size - real), (0, 0))
        yield jax.tree.map(partial(np.pad, pad_width=fill), batch), real


def token_losses(
    way: EvalSetup,
    scorer: Callable[[Params, Batch, float], Array],
    held_out: HeldOut,
    length: int,
    batch_size: int,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """NLL [N, T] of all targets, read with `length` tokens of context at a time.

    T: the length of the sequences, or the multiple of `length` below it. batch_size: sequences
    read at once (all, if there are fewer), rounded up to a multiple of the devices that divide
    them. on_tokens is told how many tokens each batch had, once it is done.
    """
    shards = int(np.prod([way.mesh.shape[axis] for axis in BATCH_AXES]))
    sequences = cut(held_out, length)
    size = -(-min(batch_size, len(sequences)) // shards) * shards
    place = partial(_place, target=batch_sharding(way.mesh))
    losses: list[np.ndarray] = []
    running: tuple[Array, int] | None = None

    def collect() -> None:
        if running is not None:
            nll_BT, real = running
            losses.append(np.asarray(nll_BT)[:real])
            on_tokens(real * length)

    # A batch's losses are fetched while the next one is computed.
    for batch, real in padded_batches(sequences, size):
        nll_BT = scorer(way.params, jax.tree.map(place, batch), way.lr)
        collect()
        running = (nll_BT, real)
    collect()
    return np.concatenate(losses).reshape(len(held_out), -1)


def _place(x: np.ndarray, target: NamedSharding) -> Array:
    return jax.make_array_from_callback(x.shape, target, lambda index: x[index])
