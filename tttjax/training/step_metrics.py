"""What a step records of its forward pass, its gradient and the learned inner rates."""

import jax
import jax.numpy as jnp
import optax

from tttjax.models.inner_rates import PART
from tttjax.models.transformer import Transformer
from tttjax.ttt.layer_norms import by_layer, fast_layers, row_sums
from tttjax.ttt.outer_loss import ForwardOutput, InnerLoop
from tttjax.types import Array, Params

Metrics = dict[str, Array]  # scalars
_PARTS = ("embedding", "prefix", "suffix", "head", "final_norm", PART)


def forward_metrics(
    model: Transformer, inner: InnerLoop, output: ForwardOutput, learn: bool
) -> Metrics:
    """Metrics of a forward pass, as means over its sequences."""
    metrics = {
        "loss": jnp.mean(output.loss),
        "inner_grad_norm": jnp.mean(output.grad_norm_N),
        "fast_drift": jnp.mean(output.drift),
        "inner_clip_rate": jnp.mean(output.grad_norm_N >= (inner.clip or jnp.inf)),
        "first_chunk_loss": jnp.mean(output.chunk_loss_N[:, 0]),
        "last_chunk_loss": jnp.mean(output.chunk_loss_N[:, -1]),
    }
    if learn:
        drift_L = jnp.mean(output.layer_drift_L, axis=0)
        names = fast_layers(model)
        metrics |= {f"fast_drift_{name}": drift_L[i] for i, name in enumerate(names)}
    return metrics


def norms_by_part(grads: Params) -> Metrics:
    """Gradient norms: of everything, of slow and fast weights, and by part of the model."""
    norms = {"": grads, "_slow": grads.slow, "_fast": grads.fast}
    norms |= {f"_{part}": grads.slow[part] for part in _PARTS if part in grads.slow}
    return {f"grad_norm{name}": optax.tree.norm(tree) for name, tree in norms.items()}


def learned_rates(model: Transformer, params: Params, lr: Array) -> Metrics:
    """The learned inner learning rates, as means over the weights of each layer."""
    if model.learn_lr == "none":
        return {}
    ones = jax.tree.map(lambda w: jnp.ones(w.shape), params.fast)
    rates = jax.tree.broadcast(model.inner_rates(params.slow, lr), ones)
    rates = jax.tree.map(jnp.multiply, rates, ones)
    mean_L = by_layer(model, row_sums(rates)) / by_layer(model, row_sums(ones))
    return {f"inner_lr_{name}": mean_L[i] for i, name in enumerate(fast_layers(model))}
