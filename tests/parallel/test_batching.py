"""over_sequences equals vmap; a batch of one runs without a batch axis."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.parallel.batching import over_sequences

AXES = ({"weight": None, "rows": 1}, 0)


def read(state, x_TD):
    """Sums over a middle axis, and a state with one unbatched part."""
    y_D = jnp.sum(x_TD * state["weight"] + state["rows"], axis=0)
    return y_D, {"weight": 2 * state["weight"], "rows": state["rows"] - y_D}


def arguments(batch):
    rng = np.random.default_rng(batch)
    state = {"weight": rng.normal(size=3), "rows": rng.normal(size=(5, batch, 3))}
    return jax.tree.map(jnp.asarray, (state, rng.normal(size=(batch, 5, 3))))


@pytest.mark.parametrize("batch", [1, 4])
def test_equals_vmap(batch):
    forms = [f(read, in_axes=AXES, out_axes=(0, AXES[0])) for f in (over_sequences, jax.vmap)]
    result, expected = (f(*arguments(batch)) for f in forms)
    chex.assert_trees_all_equal_shapes(result, expected)
    chex.assert_trees_all_close(result, expected, rtol=1e-6)


def sum_shapes(batch):
    fn = over_sequences(read, in_axes=AXES, out_axes=(0, AXES[0]))
    program = jax.make_jaxpr(fn)(*arguments(batch))
    sums = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "reduce_sum"]
    return [eqn.invars[0].aval.shape for eqn in sums]


def test_one_sequence_has_no_batch_axis():
    assert sum_shapes(4) == [(4, 5, 3)]
    assert sum_shapes(1) == [(5, 3)]


def test_inconsistent_batch_sizes_raise():
    with pytest.raises(ValueError, match="inconsistent sizes"):
        over_sequences(jnp.add)(jnp.ones((1, 2)), jnp.ones((3, 2)))
