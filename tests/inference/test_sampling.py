"""Sampled tokens follow the filtered probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttjax.errors import UserError
from tttjax.inference.options import Sampling
from tttjax.inference.sampling import filter_logits, penalise, sample_token, stack

P = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
LOGITS = jnp.log(jnp.asarray(P))[jnp.array([2, 0, 4, 1, 3])]  # 0.15, 0.5, 0.04, 0.25, 0.06


def kept_tokens(**params) -> list[int]:
    (row,) = [jax.tree.map(lambda x: x[0], stack([Sampling(**params)]))]
    return np.flatnonzero(np.isfinite(filter_logits(LOGITS, row))).tolist()


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.74}, [1, 3]),
        ({"top_p": 0.76}, [0, 1, 3]),
        ({"min_p": 0.29}, [0, 1, 3]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 2, "min_p": 0.1}, [1, 3]),
    ],
)
def test_filters_keep_the_expected_tokens(params, tokens):
    assert kept_tokens(**params) == tokens


def draw(number: int, **params) -> np.ndarray:
    row = jax.tree.map(lambda x: x[0], stack([Sampling(**params)]))
    nothing = jnp.zeros(5, bool)
    keys = jax.random.split(jax.random.key(0), number)
    token, logprob = jax.jit(jax.vmap(lambda key: sample_token(key, LOGITS, nothing, row)))(keys)
    np.testing.assert_allclose(logprob, LOGITS[token], atol=1e-6)
    return np.bincount(token, minlength=5) / number


def test_frequencies_are_the_probabilities():
    np.testing.assert_allclose(draw(20000), np.exp(LOGITS), atol=0.015)
    cold = np.exp(2 * np.asarray(LOGITS))
    np.testing.assert_allclose(draw(20000, temperature=0.5), cold / cold.sum(), atol=0.015)
    assert draw(50, temperature=0)[1] == 1
    assert draw(500, top_k=2)[[0, 2, 4]].sum() == 0


def test_repetition_is_penalised_on_both_sides_of_zero():
    logit = jnp.array([2.0, -2.0, 1.0])
    result = penalise(logit, jnp.array([True, True, False]), jnp.asarray(2.0))
    assert result.tolist() == [1.0, -4.0, 1.0]


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-6])
def test_lowest_temperatures_are_greedy(temperature):
    assert draw(50, temperature=temperature)[1] == 1


@pytest.mark.parametrize("penalty", [1.2e-38, 3.4e38])
def test_strongest_penalties_leave_finite_logits(penalty):
    result = penalise(jnp.array([20.0, -20.0]), jnp.array([True, True]), jnp.asarray(penalty))
    assert np.all(np.isfinite(result))
    assert result[0] > result[1] or penalty > 1


@pytest.mark.parametrize(
    "params",
    [
        *({"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}),
        *({"temperature": 1e-46}, {"temperature": float("nan")}, {"top_k": 2**31}),
        *({"top_p": 1e-46}, {"repetition_penalty": 1e39}, {"repetition_penalty": 1e-39}),
    ],
)
def test_invalid_sampling_is_refused(params):
    with pytest.raises(UserError, match=next(iter(params))):
        Sampling(**params)
