"""Bytes by kind: exact from shardings, and residuals of loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tttjax.parallel.mesh import make_mesh
from tttjax.planning.memory import bytes_per_device, saved_bytes


def test_bytes_of_one_device():
    mesh = make_mesh(2, 4, 1)
    sharded = NamedSharding(mesh, PartitionSpec("fsdp"))
    replicated = NamedSharding(mesh, PartitionSpec())
    tree = [
        jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=sharded),
        jax.ShapeDtypeStruct((8,), jnp.float32, sharding=replicated),
    ]
    assert bytes_per_device(tree) == 2 * 3 * 2 + 8 * 4


def test_trajectory_is_identified_by_shape():
    fast = {"w": jnp.ones((4, 4))}
    steps = 5

    def loss(w, x):
        def step(w, _):
            return w - jnp.outer(jnp.sin(w @ x), x), None

        return jnp.sum(jax.lax.scan(step, w, None, length=steps)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(fast["w"], jnp.ones(4)).jaxpr
    saved = saved_bytes(jaxpr, fast)
    assert saved.trajectory == 0  # w enters linearly: the residual is the cosine
    assert saved.activations == pytest.approx(steps * 4 * 4, rel=1.01)

    def saves_weights(w, x):
        def step(w, _):
            return w - (w @ w), None

        return jnp.sum(jax.lax.scan(step, w, None, length=steps)[0])

    jaxpr = jax.make_jaxpr(jax.grad(saves_weights))(fast["w"], jnp.ones(4)).jaxpr
    assert saved_bytes(jaxpr, fast).trajectory >= steps * 64


def test_weights_of_single_blocks_are_trajectory_too():
    """The loop may carry the blocks of a stack separately, with a batch dimension."""
    stack = {"w": jax.ShapeDtypeStruct((3, 4, 6), jnp.float32)}

    def loss(w):
        def step(w, _):
            return jnp.sin(w), None

        return jnp.sum(jax.lax.scan(step, w, None, length=5)[0])

    def saved(*shape):
        return saved_bytes(jax.make_jaxpr(jax.grad(loss))(jnp.ones(shape)).jaxpr, stack)

    assert saved(2, 1, 4, 6).trajectory == 5 * 2 * 4 * 6 * 4
    assert saved(2, 1, 6, 4).trajectory == 0


def test_unread_stacked_outputs_are_not_residuals():
    def collect(x):
        return jax.lax.scan(lambda x, _: (x @ x, x), x, None, length=3)[1]

    assert saved_bytes(jax.make_jaxpr(collect)(jnp.ones((16, 16))).jaxpr, {}).activations == 0
