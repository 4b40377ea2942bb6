"""Inner update rules: optax transformations with finite second derivatives.

The outer gradient goes through every update, so a rule's derivative must be finite wherever its
value is. Norms and square roots need care: sqrt has an infinite derivative at 0, which turns the
meta-gradient of a zero gradient (a chunk without targets, a weight multiplied by zero) into NaN.

A rule gives the update for a learning rate of 1; `inner_loop.adapt` multiplies it by the current
rate, which may ramp up over training.
"""

import jax
import jax.numpy as jnp
import optax

from tttjax.types import Array, PyTree

RULES = ("sgd", "momentum", "normalized_sgd", "adam", "muon")


def global_norm(tree: PyTree) -> Array:
    """sqrt of the sum of squares of all entries, with derivative 0 (not NaN) at 0."""
    square = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))
    is_zero = square == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """g if ||g|| < max_norm, else g / ||g|| * max_norm, over all fast weights together.

    optax has the same value, but its derivative is NaN at g = 0.
    """

    def update(
        g: PyTree, state: optax.OptState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.OptState]:
        del params
        norm = global_norm(g)
        is_small = norm < max_norm
        scale = jnp.where(is_small, 1.0, max_norm / jnp.where(is_small, 1.0, norm))
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), g), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def normalize_by_global_norm(norm: float) -> optax.GradientTransformation:
    """g / ||g|| * norm over all fast weights together; 0 stays 0."""

    def update(
        g: PyTree, state: optax.OptState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.OptState]:
        del params
        length = global_norm(g)
        is_zero = length == 0
        scale = jnp.where(is_zero, 0.0, norm / jnp.where(is_zero, 1.0, length))
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), g), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _spare_zeros(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Passes zeros through, for a rule that divides arrays by their norm."""

    def update(
        g: PyTree, state: optax.OptState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.OptState]:
        is_zero = jax.tree.map(lambda leaf: jnp.all(leaf == 0), g)
        safe = jax.tree.map(
            lambda zero, leaf: jnp.where(zero, jnp.ones_like(leaf), leaf), is_zero, g
        )
        u, state = rule.update(safe, state, params)
        return jax.tree.map(
            lambda zero, x: jnp.where(zero, jnp.zeros_like(x), x), is_zero, u
        ), state

    return optax.GradientTransformation(rule.init, update)


def _muon_dimensions(params: PyTree) -> PyTree:
    """Arrays of two or more axes are stacks of matrices [..., in, out]; vectors are not."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda leaf: matrix if leaf.ndim >= 2 else None, params)


def make_rule(
    name: str,
    *,
    clip: float = 1.0,
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """The inner rule called `name`, for a learning rate of 1.

    - sgd: -g, g clipped to global norm `clip` (0: not clipped). The rule of the papers.
    - momentum: heavy ball, m = momentum m + g, update -m; g clipped first.
    - normalized_sgd: -g / ||g|| (times `clip` where that is set): every step has the same length.
    - adam: Adam with `b1`, `b2`, `eps`; eps^2 is also added under the root, whose derivative is
      infinite at 0. g clipped first.
    - muon: momentum, then every matrix is replaced by the nearest orthogonal one (five
      Newton-Schulz steps, optax.contrib); other arrays use Adam with Nesterov momentum.
    """
    clipping = [clip_by_global_norm(clip)] if clip else []
    descend = optax.scale(-1.0)
    if name == "sgd":
        return optax.chain(*clipping, descend)
    if name == "momentum":
        return optax.chain(*clipping, optax.trace(decay=momentum), descend)
    if name == "normalized_sgd":
        return optax.chain(normalize_by_global_norm(clip or 1.0), descend)
    if name == "adam":
        scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps**2)
        return optax.chain(*clipping, scale, descend)
    if name == "muon":
        muon = optax.contrib.muon(
            learning_rate=1.0,
            beta=momentum,
            eps=eps,
            adam_b1=b1,
            adam_b2=b2,
            adam_eps_root=eps**2,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
        return optax.chain(*clipping, _spare_zeros(muon))
    raise ValueError(f"unknown inner rule {name!r}; one of {', '.join(RULES)}")
