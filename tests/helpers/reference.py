"""A second, readable implementation of TTT-E2E: one token, one head, one chunk at a time.

Shares no code with the package: no scan, no vmap, no mask matrices, no modules. Keys and values
are Python lists, positions are absolute, RoPE multiplies complex numbers. It takes weights as the
flat dict `path -> array` of one sequence's model, computes in whatever precision they have, and is
far too slow for anything but a dozen tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
    """Settings that the weights do not imply."""

    prefix_layers: int
    layers: int
    window: int
    theta: float
    eps: float
    chunk: int
    clip: float
    tied: bool = True


def norm(x, weight, eps):
    return x / jnp.sqrt(jnp.sum(x * x) / x.shape[0] + eps) * weight


def turn(x, position, theta):
    """RoPE of one head of one token."""
    pairs = x.reshape(-1, 2)
    z = jax.lax.complex(pairs[:, 0], pairs[:, 1])
    angle = jnp.array([position * theta ** (-2 * i / x.shape[0]) for i in range(len(pairs))])
    z = z * jnp.exp(1j * angle)
    return jnp.stack([z.real, z.imag], axis=1).reshape(-1)


def swiglu(x, w, name):
    a = x @ w[f"{name}/w1"]
    return (a / (1 + jnp.exp(-a)) * (x @ w[f"{name}/w3"])) @ w[f"{name}/w2"]


def attention(x, w, cache, position, shape):
    """One token; `cache` is a list of (position, keys, values), and grows by this token."""
    heads = []
    entry = ([], [])
    for h in range(w["mixer/wq"].shape[1]):
        q, k, v = (x @ w[f"mixer/{name}"][:, h] for name in ("wq", "wk", "wv"))
        q = turn(norm(q, w["mixer/q_norm/weight"], shape.eps), position, shape.theta)
        k = turn(norm(k, w["mixer/k_norm/weight"], shape.eps), position, shape.theta)
        entry[0].append(k)
        entry[1].append(v)
        near = [p for p in cache if p[0] > position - shape.window]
        keys = jnp.stack([p[1][h] for p in near] + [k])
        values = jnp.stack([p[2][h] for p in near] + [v])
        e = jnp.exp(keys @ q / math.sqrt(len(q)))
        heads.append((e / e.sum()) @ values @ w["mixer/wo"][h])
    cache.append((position, *entry))
    return sum(heads)


def block(x, w, cache, position, shape):
    """One token through one block, `w` the block's weights."""

    def branch(x, name, f):
        y = f(norm(x, w[f"{name}_norm/weight"], shape.eps))
        return x + norm(y, w[f"{name}_post_norm/weight"], shape.eps)

    x = branch(x, "mixer", lambda y: attention(y, w, cache, position, shape))
    if "fast_mlp/w1" in w:
        x = branch(x, "fast_mlp", lambda y: swiglu(y, w, "fast_mlp"))
    return branch(x, "mlp", lambda y: swiglu(y, w, "mlp"))


def block_weights(weights, part, row):
    start = f"{part}/stage0/block0/"
    return {k[len(start) :]: a[row] for k, a in weights.items() if k.startswith(start)}


def sequence(slow, fast, tokens, targets, mask, shape, lr, frozen=()):
    """Reads one sequence. Returns a dict of lists per chunk: loss, nll, grad_norm, update.

    frozen: updates (dicts like `fast`) that the first chunks make whatever their gradients are.
    """
    hidden = [slow["embedding"][t] for t in tokens]
    for row in range(shape.prefix_layers):
        w, cache = block_weights(slow, "prefix", row), []
        hidden = [block(x, w, cache, t, shape) for t, x in enumerate(hidden)]

    caches = [[] for _ in range(shape.layers - shape.prefix_layers)]
    shown = {"loss": [], "nll": [], "grad_norm": [], "update": []}
    for number, first in enumerate(range(0, len(tokens), shape.chunk)):
        positions = range(first, first + shape.chunk)

        def chunk_loss(fast, caches=caches, positions=positions):
            caches = [list(cache) for cache in caches]
            nll = []
            for t in positions:
                x = hidden[t]
                for row, cache in enumerate(caches):
                    x = block(x, block_weights({**slow, **fast}, "suffix", row), cache, t, shape)
                x = norm(x, slow["final_norm/weight"], shape.eps)
                logits = slow["embedding"] @ x if shape.tied else x @ slow["head"]
                nll.append(jnp.log(jnp.exp(logits).sum()) - logits[targets[t]])
            counted = [n for n, t in zip(nll, positions, strict=True) if mask[t]]
            return sum(counted) / max(len(counted), 1), (nll, caches)

        (loss, (nll, caches)), g = jax.value_and_grad(chunk_loss, has_aux=True)(fast)
        length = jnp.sqrt(sum((a**2).sum() for a in g.values()))
        scale = shape.clip / length if shape.clip and length >= shape.clip else 1.0
        update = {k: -lr * scale * a for k, a in g.items()}
        if number < len(frozen):
            update = frozen[number]
        fast = {k: fast[k] + update[k] for k in fast}
        for key, value in (("loss", loss), ("nll", nll), ("grad_norm", length), ("update", update)):
            shown[key].append(value)
    return shown
