"""One jitted, sharded step of the outer loop.

The batch is sharded over the mesh axes `data` and `fsdp` with shard_map: every device runs forward
and backward pass over its own sequences, and gradients are reduced once, not per chunk. (The
partitioner would put that reduction inside the backward scan.) FSDP-sharded parameters are
all-gathered here, or layer by layer in the loop over blocks. The axis `tensor` is left to the
partitioner.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.models.transformer import Transformer, build_model
from tttjax.parallel.fsdp import all_gather_params
from tttjax.parallel.mesh import (
    as_sharded_param,
    batch_axes,
    batch_sharding,
    manual,
    manual_axes,
    param_shardings,
    param_specs,
    reduce_mean,
    shardings_like_params,
    spec,
)
from tttjax.training.optimizer import make_optimizer, make_schedule
from tttjax.training.step_metrics import Metrics, forward_metrics, learned_rates, norms_by_part
from tttjax.ttt.outer_loss import (
    ForwardOutput,
    InnerLoop,
    inner_lr,
    learns,
    make_inner_loop,
    make_outer_loss,
    normalise_weights,
)
from tttjax.types import Array, Batch, Params, PyTree


@flax.struct.dataclass
class TrainState:
    """What a step updates. A checkpoint holds this and the data iterator's state."""

    step: Array  # int32: steps done, skipped ones included
    params: Params
    opt_state: PyTree
    skipped: Array  # int32: steps skipped because loss or gradient was not finite
    skipped_in_row: Array  # int32: consecutive skipped steps up to now


@dataclass(frozen=True)
class Trainer:
    """The jitted functions of training for one configuration and mesh."""

    mesh: Mesh
    model: Transformer
    abstract_state: TrainState  # ShapeDtypeStruct with shardings
    init_state: Callable[[int], TrainState]  # by seed
    start_from: Callable[[Params], TrainState]  # the initial state for given weights
    step: jax.stages.Wrapped  # (TrainState, Batch) -> (TrainState, Metrics); the state is donated
    inner_lr_at: Callable[[TrainState], Array]  # the inner learning rate of the next step

    def put_batch(self, batch: Batch) -> Batch:
        """The global batch on the devices, from this process's sequences.

        Raises UserError if the batch has weights and none is above 0: a step without targets would
        change the weights by their decay alone.
        """
        if batch.weight is not None and not np.any(batch.weight):
            raise UserError("a batch has no target to learn from; leave it out")
        to_device = partial(jax.make_array_from_process_local_data, batch_sharding(self.mesh))
        return jax.tree.map(lambda x: to_device(np.asarray(x)), batch)


def gathered_per_layer(learn: bool) -> tuple[str, ...]:
    """The parts of the slow weights that `mesh.gather` "layer" all-gathers layer by layer.

    These are the parts whose blocks run once per sequence. Weights that the loop over chunks uses
    are gathered before it, or they would be gathered once per chunk.
    """
    return ("prefix",) if learn else ("prefix", "suffix")


def make_gradient(
    model: Transformer,
    inner: InnerLoop,
    mesh: Mesh,
    *,
    learn: bool,
    accum_steps: int = 1,
    gather: str = "layer",
) -> Callable[[Params, Batch, Array], tuple[Params, Metrics]]:
    """gradient(params, batch, inner_lr) -> (outer gradient, metrics), averaged over the batch.

    Weights of the batch are normalised over all of it, whatever its parts.

    accum_steps: micro-batches that the batch is split into, to save memory. gather: when
    FSDP-sharded parameters are all-gathered (`MeshConfig.gather`).
    """
    outer_loss = make_outer_loss(model, inner, learn=learn)
    specs = param_specs(mesh, model.axes())
    axes = batch_axes(mesh)

    def loss(params: Params, batch: Batch, lr: Array) -> tuple[Array, ForwardOutput]:
        per_layer = gathered_per_layer(learn)
        slow = {
            part: w if part in per_layer else all_gather_params(w)
            for part, w in params.slow.items()
        }
        return outer_loss(Params(slow=slow, fast=all_gather_params(params.fast)), batch, lr)

    def micro_batch_gradient(params: Params, batch: Batch, lr: Array) -> tuple[Params, Metrics]:
        (_, output), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, lr)
        return grads, forward_metrics(model, inner, output, learn)

    batch_gradient = _accumulate(micro_batch_gradient, accum_steps)

    def sharded_gradient(shards: Params, batch: Batch, lr: Array) -> tuple[Params, Metrics]:
        def gather_params(shards: Params) -> Params:
            params = jax.tree.map(as_sharded_param, shards, specs)
            return all_gather_params(params) if gather == "step" else params

        params, gather_vjp = jax.vjp(gather_params, shards)
        grads, metrics = batch_gradient(params, batch, lr)
        (grads,) = gather_vjp(grads)  # with gather "step", this reduce-scatters over fsdp
        grads = jax.tree.map(partial(reduce_mean, axes=axes), grads, specs)
        return grads, jax.lax.pmean(metrics, axes)

    def gradient(params: Params, batch: Batch, lr: Array) -> tuple[Params, Metrics]:
        return whole_gradient(params, normalise_weights(batch), lr)

    if mesh.size == 1:
        whole_gradient = batch_gradient
        return gradient
    manual_specs = jax.tree.map(manual, specs)
    whole_gradient = jax.shard_map(
        sharded_gradient,
        mesh=mesh,
        in_specs=(manual_specs, spec(mesh, ["batch"]), PartitionSpec()),
        out_specs=(manual_specs, PartitionSpec()),
        axis_names=manual_axes(mesh),
        check_vma=False,
    )
    return gradient


def _accumulate(gradient: Callable, accum_steps: int) -> Callable:
    """`gradient`, averaged over `accum_steps` micro-batches that are run one after the other."""
    if accum_steps == 1:
        return gradient

    def accumulated(params: Params, batch: Batch, lr: Array) -> tuple[Params, Metrics]:
        micro_batches = jax.tree.map(lambda x: x.reshape(accum_steps, -1, *x.shape[1:]), batch)

        def add(total, micro_batch):
            return jax.tree.map(jnp.add, total, gradient(params, micro_batch, lr)), None

        first = jax.tree.map(lambda x: x[0], micro_batches)
        shape = jax.eval_shape(gradient, params, first, lr)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        total, _ = jax.lax.scan(add, zero, micro_batches)
        return jax.tree.map(lambda x: x / accum_steps, total)

    return accumulated


def make_trainer(config: Config, mesh: Mesh) -> Trainer:
    """Model, optimizer and outer step for a configuration on a mesh.

    A step with a nonfinite loss or gradient changes neither weights nor optimizer. It is counted in
    `skipped`, and its metrics["nonfinite"] is true.

    Raises UserError if the mesh does not fit the model.
    """
    model = build_model(config.model, config.inner)
    inner = make_inner_loop(config.inner)
    optimizer = make_optimizer(config.optim, config.train.steps)
    schedule = make_schedule(config.optim, config.train.steps)
    gradient = make_gradient(
        model,
        inner,
        mesh,
        learn=learns(model, config.inner.meta_gradient),
        accum_steps=config.train.accum_steps,
        gather=config.mesh.gather,
    )

    def inner_lr_at(state: TrainState) -> Array:
        return jnp.asarray(
            inner_lr(
                state.step - state.skipped,  # the schedules count updates, not steps
                lr=config.inner.lr,
                lr_init=config.inner.lr_init,
                warmup_steps=config.inner.lr_warmup_steps,
            ),
            jnp.float32,
        )

    def start_from(params: Params) -> TrainState:
        def zero():
            return jnp.zeros((), jnp.int32)

        return TrainState(zero(), params, optimizer.init(params), zero(), zero())

    def init_state(seed: Array) -> TrainState:
        return start_from(model.init(jax.random.key(seed)))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        lr_inner = inner_lr_at(state)
        grads, metrics = gradient(state.params, batch, lr_inner)
        metrics |= norms_by_part(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def if_finite(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        new_state = TrainState(
            step=state.step + 1,
            params=if_finite(params, state.params),
            opt_state=if_finite(opt_state, state.opt_state),
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        metrics |= {
            "inner_lr": lr_inner,
            **learned_rates(model, new_state.params, lr_inner),
            "lr": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "param_norm": optax.tree.norm(new_state.params),
            "nonfinite": ~finite,
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
            "tokens": jnp.asarray(batch.inputs.size, jnp.int32),
        }
        return new_state, metrics

    abstract, shardings = _abstract_state(mesh, model, start_from)
    scalar = NamedSharding(mesh, PartitionSpec())
    init = jax.jit(init_state, out_shardings=shardings)
    return Trainer(
        mesh=mesh,
        model=model,
        abstract_state=abstract,
        init_state=lambda seed: init(np.uint32(seed)),  # int32 would limit seeds to 2**31
        start_from=jax.jit(start_from, out_shardings=shardings, donate_argnums=0),
        step=jax.jit(
            step,
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, scalar),
            donate_argnums=0,
        ),
        inner_lr_at=inner_lr_at,
    )


def weights_template(model: Transformer, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of a model's weights."""
    abstract = model.abstract_params()
    return _with_shardings(abstract, param_shardings(mesh, model.axes(), abstract))


def _abstract_state(mesh: Mesh, model: Transformer, start_from) -> tuple[TrainState, TrainState]:
    """(shapes with shardings, shardings) of the training state."""
    params = model.abstract_params()
    abstract = jax.eval_shape(start_from, params)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = shardings_like_params(
        abstract, params, param_shardings(mesh, model.axes(), params), replicated
    )
    return _with_shardings(abstract, shardings), shardings


def _with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
