"""FSDP-sharded weights are all-gathered for use; their gradients are reduce-scattered."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tttjax.parallel.fsdp import ShardedParam, all_gather_params
from tttjax.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow


def on_two(function, dtype):
    """(weight, x) -> function(full weight, local rows of x) on two devices.

    Each has half of the weight.
    """

    @partial(
        jax.shard_map,
        mesh=make_mesh(1, 2, 1, devices=jax.devices()[:2]),
        in_specs=(P(None, "fsdp"), P("fsdp")),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    def run(shard, x):
        return function(all_gather_params({"w": ShardedParam(shard, "fsdp", -1, dtype)})["w"], x)

    return run


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_value_and_gradient_equal_the_unsharded(dtype):
    rng = np.random.default_rng(0)
    weight, x = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 6), (2, 4)))

    def product(w, x):
        assert w.dtype == (dtype or jnp.float32)
        return x @ w.astype(jnp.float32)

    def loss(weight):
        y = on_two(product, dtype)(weight, x)
        return jnp.sum(jnp.sin(y)), y

    result, y = jax.jit(jax.grad(loss, has_aux=True))(weight)
    low_precision = weight.astype(dtype or weight.dtype).astype(np.float32)
    np.testing.assert_allclose(y, x @ low_precision, rtol=1e-5, atol=1e-6)
    assert result.dtype == jnp.float32
    tolerance = 1e-6 if dtype is None else 2**-8  # each device's gradient is in low precision
    expected = x.T @ np.cos(x @ low_precision)
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_summed_in_dtype_of_shard():
    """257 is not a bfloat16: a sum in bfloat16 would be 256."""
    run = on_two(lambda w, x: x.astype(w.dtype) @ w, "bfloat16")
    bar = jax.jit(jax.grad(lambda w, x: jnp.sum(run(w, x))))
    x = np.array([[256.0], [1.0]], np.float32)
    np.testing.assert_array_equal(bar(np.ones((1, 2), np.float32), x), np.full((1, 2), 257.0))


def test_other_leaves_are_unchanged():
    assert all_gather_params({"a": 1, "b": [2.0]}) == {"a": 1, "b": [2.0]}
