"""A second, readable implementation of TTT layers: one token, one head, one inner weight at a time.

Shares no code with the package. Inner gradients are those that JAX takes of the loss as it is
written; weights are made for every token. Weights of a layer are a flat dict, one sequence only.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def norm(x, scale, bias, eps):
    return (x - x.mean()) / jnp.sqrt(((x - x.mean()) ** 2).mean() + eps) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def inner(x, w):
    """The inner model with its norm; `w` one head's weights."""
    y = x @ w["w1"] + w["b1"]
    if "w2" in w:
        y = gelu(y) @ w["w2"] + w["b2"]
    return norm(y, w["scale"], w["bias"], w["eps"])


@jax.jit
@partial(jax.grad, argnums=0)
def loss_gradient(learned, k, v, fixed):
    return 0.5 * ((inner(k, {**learned, **fixed}) - (v - k)) ** 2).sum()


@jax.jit
def read(x, learned, fixed):
    return x + inner(x, {**learned, **fixed})


def one_head(q, k, v, lam, tau, step, learned, fixed):
    """(outputs, inner weights after the last token). q None: the simplified output rule."""
    out, start, now = [], learned, learned
    for t in range(len(k)):
        i = t % len(tau)
        if i == 0:
            start, total = now, {n: np.zeros_like(a) for n, a in learned.items()}
        g = loss_gradient(start, k[t], v[t], fixed)
        total = {n: total[n] + lam[t] * g[n] for n in g}
        now = {n: start[n] - step * tau[i] * total[n] for n in g}
        out.append(read(k[t], start, fixed) if q is None else read(q[t], now, fixed))
    return np.stack(out), now


def all_heads(q, k, v, lam, tau, step, learned, fixed):
    """The same for [T, H, K]; eps in `fixed` belongs to all heads."""
    outs, finals = [], []
    for h in range(k.shape[1]):
        one = [None if x is None else x[:, h] for x in (q, k, v, lam)]
        of_head = {n: a if n == "eps" else a[h] for n, a in fixed.items()}
        out, final = one_head(*one, tau, step, {n: a[h] for n, a in learned.items()}, of_head)
        outs.append(out)
        finals.append(final)
    return np.stack(outs, 1), {n: np.stack([f[n] for f in finals]) for n in finals[0]}


def apply_rope(x, position, theta):
    """RoPE of one head of one token."""
    z = x[0::2] + 1j * x[1::2]
    z = z * np.exp(1j * position * theta ** (-np.arange(len(z)) * 2 / len(x)))
    return np.stack([z.real, z.imag], axis=1).reshape(-1)


def convolve(x, kernel, bias):
    y = np.zeros_like(x) + bias
    for t in range(len(x)):
        for j in range(len(kernel)):
            if t - j >= 0:
                y[t] += kernel[len(kernel) - 1 - j] * x[t - j]
    return y


def layer(x, w, *, base_lr, theta, eps):
    """(y [T, D], inner weights after the last token) from the layer's weights as numpy arrays.

    Which backbone and which output rule it is shows in the weights that there are.
    """
    tokens, places = len(x), len(w["token_idx"])
    into = {n: np.einsum("td,dhk->thk", x, w[n]) for n in ("wq", "wk", "wv", "wg") if n in w}
    if "wg" in w:
        made = {
            n: convolve(into["wq"], w[f"conv_{n}"], w[f"conv_{n}_bias"])
            for n in "qk"
            if f"conv_{n}" in w
        }
    else:
        made = {n: into[f"w{n}"] for n in "qk" if f"w{n}" in into}
    heads = range(w["wlr"].shape[1])
    for n, a in made.items():
        made[n] = np.array(
            [[apply_rope(a[t, h], t % places, theta) for h in heads] for t in range(tokens)]
        )
    lam = 1 / (1 + np.exp(-(x @ w["wlr"] + w["lr_bias"])))
    tau = np.maximum(0, 1 / np.arange(1, places + 1) + w["token_idx"])
    learned = {n: w[n] for n in ("w1", "b1", "w2", "b2") if n in w}
    fixed = {"scale": w["norm_scale"], "bias": w["norm_bias"], "eps": eps}
    step = base_lr / w["norm_scale"].shape[1]
    z, final = all_heads(made.get("q"), made["k"], into["wv"], lam, tau, step, learned, fixed)
    y = np.stack(
        [norm(z[t], w["post_norm_scale"], w["post_norm_bias"], eps) for t in range(tokens)]
    )
    if "wg" in w:
        y = gelu(into["wg"]) * y
    return np.einsum("thk,hkd->td", y, w["wo"]), final
