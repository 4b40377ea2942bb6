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


def on_two(function, weight, x, dtype):
    """function(full weight, local rows of x) on two devices, each with half of the weight."""

    @partial(
        jax.shard_map,
        mesh=make_mesh(1, 2, 1, devices=jax.devices()[:2]),
        in_specs=(P(None, "fsdp"), P("fsdp")),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    def run(shard, x):
        return function(all_gather_params({"w": ShardedParam(shard, "fsdp", -1, dtype)})["w"], x)

    return run(weight, x)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_value_and_gradient_equal_the_unsharded(dtype):
    weight = jax.random.normal(jax.random.key(0), (4, 6))
    x = jax.random.normal(jax.random.key(1), (2, 4))

    def product(w, x):
        assert w.dtype == (dtype or jnp.float32)
        return x @ w.astype(jnp.float32)

    low_precision = weight.astype(dtype or weight.dtype)
    np.testing.assert_allclose(
        on_two(product, weight, x, dtype), product(low_precision, x), rtol=1e-5, atol=1e-6
    )

    def loss(weight, run):
        return jnp.sum(jnp.sin(run(weight)))

    result = jax.grad(loss)(weight, lambda w: on_two(product, w, x, dtype))
    expected = jax.grad(loss)(low_precision.astype(jnp.float32), lambda w: x @ w)
    assert result.dtype == jnp.float32
    tolerance = 1e-6 if dtype is None else 2**-8  # each device's gradient is in low precision
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_summed_in_dtype_of_shard():
    """257 is not a bfloat16: a sum in bfloat16 would be 256."""
    weight = jnp.ones((1, 2))
    x = jnp.array([[256.0], [1.0]])
    bar = jax.grad(lambda w: jnp.sum(on_two(lambda w, x: x.astype(w.dtype) @ w, w, x, "bfloat16")))
    np.testing.assert_array_equal(bar(weight), jnp.full((1, 2), 257.0))


def test_other_leaves_are_unchanged():
    assert all_gather_params({"a": 1, "b": [2.0]}) == {"a": 1, "b": [2.0]}
