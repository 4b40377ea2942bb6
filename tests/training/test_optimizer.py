"""The outer optimizer against an independent float64 implementation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tttjax.errors import UserError
from tttjax.training.optimizer import make_optimizer, make_schedule
from tttjax.types import Params


@dataclasses.dataclass(frozen=True)
class Cfg:
    peak_lr: float = 0.1
    init_lr: float = 0.02
    end_lr: float = 0.01
    warmup_steps: int = 4
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_embeddings: bool = True
    clip: float = 0.0


def rates(cfg, total, steps):
    schedule = make_schedule(cfg, total)
    return [float(schedule(n)) for n in steps]


def test_schedule_is_linear_then_cosine():
    actual = rates(Cfg(), 10, [0, 1, 4, 7, 10, 50])
    half = 0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * 3 / 6))
    np.testing.assert_allclose(actual, [0.02, 0.04, 0.1, half, 0.01, 0.01], rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    np.testing.assert_allclose(rates(Cfg(warmup_steps=0), 8, [0, 8]), [0.1, 0.01], rtol=1e-6)


def test_decay_steps_override_the_run_length():
    np.testing.assert_allclose(rates(Cfg(decay_steps=6), 100, [6]), [0.01], rtol=1e-6)


def test_zero_init_lr_and_default_init_lr():
    assert rates(Cfg(init_lr=0.0), 10, [0]) == [0.0]
    actual = rates(Cfg(init_lr=-1.0), 10, range(5))
    np.testing.assert_allclose(actual, [0.02, 0.04, 0.06, 0.08, 0.1], rtol=1e-6)


def test_zero_peak_is_zero_throughout():
    actual = rates(Cfg(peak_lr=0.0, init_lr=0.0, end_lr=1e-5), 10, [0, 3, 4, 9])
    assert actual == [0.0] * 4


def test_warmup_longer_than_decay_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps=10 .* step 10"):
        make_schedule(Cfg(warmup_steps=10), 10)


def adamw_by_hand(params, grads, cfg, lrs, clip):
    """AdamW with clipping, in float64 loops."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for n, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        norm = math.sqrt(sum(float((x**2).sum()) for x in g.values()))
        scale = clip / norm if clip and norm >= clip else 1.0
        for k in params:
            gk = g[k] * scale
            m[k] = cfg.b1 * m[k] + (1 - cfg.b1) * gk
            v[k] = cfg.b2 * v[k] + (1 - cfg.b2) * gk**2
            step = (m[k] / (1 - cfg.b1**n)) / (np.sqrt(v[k] / (1 - cfg.b2**n)) + cfg.eps)
            params = {**params, k: params[k] - lr * (step + cfg.weight_decay * params[k])}
    return params


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_three_steps_match_reference_implementation(clip):
    rng = np.random.default_rng(0)
    cfg = Cfg(weight_decay=0.1, clip=clip)
    shapes = {"embedding": (3, 2), "norm": (2,)}
    start = {k: rng.normal(size=s) for k, s in shapes.items()}
    grads = [{k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(3)]
    lrs = [0.02, 0.04, 0.06]
    expected = adamw_by_hand(start, grads, cfg, lrs, clip)

    tx = make_optimizer(cfg, 10)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = tx.init(params)
    for g in grads:
        g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    for k in params:
        np.testing.assert_allclose(params[k], expected[k], atol=2e-6)


def test_clip_threshold_and_disabled_clip():
    grads = {"a": jnp.array([0.3, -0.4])}  # norm 0.5
    sgd_like = {"eps": 1e30, "b1": 0.0, "b2": 0.0, "weight_decay": 0.0, "init_lr": 0.1}

    def direction(clip):
        tx = make_optimizer(Cfg(clip=clip, warmup_steps=0, **sgd_like), 10)
        updates, _ = tx.update(grads, tx.init(grads), grads)
        return np.asarray(updates["a"])

    unclipped = direction(0.0)
    assert np.all(unclipped != 0)
    np.testing.assert_array_equal(direction(0.6), unclipped)
    np.testing.assert_allclose(direction(0.25), unclipped / 2, rtol=1e-6)


def test_weight_decay_can_exclude_embeddings():
    params = Params(
        slow={"embedding": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}},
        fast={"mlp": jnp.ones(2)},
    )
    zero = jax.tree.map(jnp.zeros_like, params)

    def change(**kw):
        cfg = Cfg(weight_decay=0.5, warmup_steps=0, **kw)
        tx = make_optimizer(cfg, 10)
        updates, _ = tx.update(zero, tx.init(params), params)
        return jax.tree.map(lambda u: round(float(u[0]), 6), updates)

    everything = change(decay_embeddings=True)
    without_embeddings = change(decay_embeddings=False)
    assert everything.slow["embedding"]["kernel"] == pytest.approx(-0.05)
    assert without_embeddings.slow["embedding"]["kernel"] == 0.0
    assert without_embeddings.slow["head"]["kernel"] == pytest.approx(-0.05)
    assert without_embeddings.fast["mlp"] == pytest.approx(-0.05)


def test_moments_are_float32_for_bfloat16_parameters():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = make_optimizer(Cfg(weight_decay=0.1, clip=1.0), 10)
    state = tx.init(params)
    updates, state = tx.update({"w": jnp.full(3, 1e-3, jnp.bfloat16)}, state, params)
    floats = [x.dtype for x in jax.tree.leaves((state, updates)) if x.ndim]
    assert set(floats) == {jnp.dtype("float32")}
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16
