"""The outer optimizer: AdamW with global-norm clipping and a warm-up/cosine schedule.

An optax chain in the papers' order: clip the gradient by its global norm, Adam with bias
correction, add weight_decay times the parameter, multiply by minus the learning rate. Moments are
float32 or wider for any parameter dtype.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from tttjax.errors import UserError
from tttjax.types import PyTree

if TYPE_CHECKING:
    from tttjax.config import OptimConfig


def make_schedule(cfg: "OptimConfig", total_steps: int) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ...: linear warm-up, then cosine decay.

    It rises linearly from init_lr to peak_lr at n = warmup_steps, falls along a cosine to end_lr at
    n = decay_steps, and stays there. decay_steps = 0 means `total_steps`. With the papers' init_lr
    = 0 the first update has length zero; a negative init_lr (the default) starts at peak_lr /
    (warmup_steps + 1), so that update n uses (n + 1) / (warmup_steps + 1) of the peak.

    Raises:
      UserError: the decay ends before the warm-up does.
    """
    decay_steps = cfg.decay_steps or total_steps
    if decay_steps <= cfg.warmup_steps:
        raise UserError(
            f"optim.warmup_steps={cfg.warmup_steps} leaves no step for the decay, which ends at "
            f"step {decay_steps}: lower optim.warmup_steps, or raise optim.decay_steps or "
            "train.steps"
        )
    init_lr = cfg.init_lr if cfg.init_lr >= 0 else cfg.peak_lr / (cfg.warmup_steps + 1)
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=init_lr,
        peak_value=cfg.peak_lr,
        warmup_steps=cfg.warmup_steps,
        decay_steps=decay_steps,
        end_value=cfg.end_lr,
    )


def decay_mask(params: PyTree) -> PyTree:
    """True for all arrays except embeddings, as a mask for weight decay.

    An array is an embedding if its path contains "embedding"; an untied output head is not one.
    """

    def decays(path: tuple, _: jax.Array) -> bool:
        return "embedding" not in jax.tree_util.keystr(path).lower()

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    cfg: "OptimConfig",
    total_steps: int,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """AdamW of the outer loop, as one optax transformation over `Params`.

    The gradient is clipped to global norm cfg.clip (unchanged if strictly below it; no epsilon;
    cfg.clip = 0 disables clipping). Weight decay applies to all parameters, or those where `mask`
    is True; with cfg.decay_embeddings false and no mask, to all but the embeddings.

    Raises:
      UserError: see `make_schedule`.
    """
    if mask is None and not cfg.decay_embeddings:
        mask = decay_mask
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip > 0 else optax.identity()
    return _in_float32(
        optax.chain(
            clip,
            optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
            optax.add_decayed_weights(cfg.weight_decay, mask=mask),
            optax.scale_by_learning_rate(make_schedule(cfg, total_steps)),
        )
    )


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Casts the inputs of `inner` to float32 or wider, and so its state."""

    def widen(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update(grads: PyTree, state: optax.OptState, params: PyTree | None = None):
        return inner.update(widen(grads), state, None if params is None else widen(params))

    return optax.GradientTransformation(lambda params: inner.init(widen(params)), update)
