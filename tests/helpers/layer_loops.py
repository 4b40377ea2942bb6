"""Reference implementations of the recurrent layers in numpy and float64, one token at a time.

Shares no code with the package. Parameters are flat dicts with the names and layouts of the
reference cases; every function takes a batch and returns outputs by the cases' names. Gradients are
central differences.
"""

import json

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def conv(x_BTC, kernel_CJ, bias_C=0.0):
    """Causal convolution; the last tap is for the current token."""
    y = np.zeros_like(x_BTC) + bias_C
    taps = kernel_CJ.shape[1]
    for t in range(x_BTC.shape[1]):
        for j in range(taps):
            if t - (taps - 1) + j >= 0:
                y[:, t] += kernel_CJ[:, j] * x_BTC[:, t - (taps - 1) + j]
    return y


# --- Mamba-2 --------------------------------------------------------------------------------------


def ssd(x, dt, a, b, c, skip, state):
    heads = np.arange(x.shape[2]) // (x.shape[2] // b.shape[2])  # group of each head
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        write = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, heads][:, :, None]
        state = np.exp(dt[:, t] * a)[..., None, None] * state + write
        y[:, t] = np.einsum("bhpn,bhn->bhp", state, c[:, t, heads]) + skip[:, None] * x[:, t]
    return y, state


def ssd_op(config, arrays):
    names = ("x", "dt", "A", "B", "C", "D", "initial_state")
    y, state = ssd(*(arrays[f"in.{n}"] for n in names))
    return {"out.y": y, "out.final_state": state}


def mamba2(config, p, x):
    (B, T, _), H, P = x.shape, config["num_heads"], config["head_dim"]
    G, N = config["n_groups"], config["state_size"]
    inner = H * P
    z, xbc, dt = np.split(x @ p["in_proj.weight"].T, [inner, 2 * inner + 2 * G * N], axis=-1)
    xbc = silu(conv(xbc, p["conv1d.weight"][:, 0], p["conv1d.bias"]))
    xs, b, c = np.split(xbc, [inner, inner + G * N], axis=-1)
    dt = softplus(dt + p["dt_bias"])
    if "time_step_limit" in config:
        dt = np.clip(dt, *config["time_step_limit"])
    b, c = (u.reshape(B, T, G, N) for u in (b, c))
    state = np.zeros((B, H, P, N))
    y, _ = ssd(xs.reshape(B, T, H, P), dt, -np.exp(p["A_log"]), b, c, p["D"], state)
    u = (y.reshape(B, T, inner) * silu(z)).reshape(B, T, G, -1)
    u = rms(u, config["eps"]).reshape(B, T, inner) * p["norm.weight"]
    return {"out.y": u @ p["out_proj.weight"].T}


# --- Gated DeltaNet -------------------------------------------------------------------------------


def delta_rule(q, k, v, g, beta, state):
    shared = v.shape[2] // q.shape[2]
    q, k = (np.repeat(u / np.sqrt((u**2).sum(-1, keepdims=True) + 1e-6), shared, 2) for u in (q, k))
    o = np.zeros_like(v)
    for t in range(q.shape[1]):
        state = np.exp(g[:, t])[..., None, None] * state
        error = v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        o[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t]) / np.sqrt(q.shape[-1])
    return o, state


def delta_op(config, arrays):
    names = ("q", "k", "v", "g", "beta", "initial_state")
    o, state = delta_rule(*(arrays[f"in.{n}"] for n in names))
    return {"out.o": o, "out.final_state": state}


def delta_fused(config, p, x):
    (B, T, _), G, H = x.shape, config["num_k_heads"], config["num_v_heads"]
    K, V, r = config["head_k_dim"], config["head_v_dim"], H // G
    qkvz = (x @ p["in_proj_qkvz.weight"].T).reshape(B, T, G, -1)
    q, k, v, z = np.split(qkvz, [K, 2 * K, 2 * K + r * V], axis=-1)
    b, a = np.split((x @ p["in_proj_ba.weight"].T).reshape(B, T, G, -1), 2, axis=-1)
    inputs = (u.reshape(B, T, -1) for u in (q, k, v, z, b, a))
    return _delta(config, p, *inputs, p["norm.weight"], p["out_proj.weight"])


def delta_separate(config, p, x):
    inputs = (x @ p[f"{name}_proj.weight"].T for name in "qkvgba")
    return _delta(config, p, *inputs, p["o_norm.weight"], p["o_proj.weight"])


def _delta(config, p, q, k, v, z, b, a, norm, out):
    B, T, _ = q.shape
    keys, values = (config["num_k_heads"], -1), (config["num_v_heads"], -1)
    mixed = silu(conv(np.concatenate([q, k, v], -1), p["conv1d.weight"][:, 0]))
    q, k, v = np.split(mixed, [q.shape[-1], 2 * q.shape[-1]], axis=-1)
    q, k, v = (u.reshape(B, T, *h) for u, h in ((q, keys), (k, keys), (v, values)))
    beta = (2 if config.get("allow_neg_eigval") else 1) / (1 + np.exp(-b))
    g = -np.exp(p["A_log"]) * softplus(a + p["dt_bias"])
    state = np.zeros((B, v.shape[2], q.shape[3], v.shape[3]))
    o, _ = delta_rule(q, k, v, g, beta, state)
    y = rms(o, config["eps"]) * norm * silu(z).reshape(o.shape)
    return {"out.y": y.reshape(B, T, -1) @ out.T}


# --- TTT ------------------------------------------------------------------------------------------


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_derivative(x):
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * np.sqrt(2 / np.pi) * (
        1 + 3 * 0.044715 * x**2
    )


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def rotate(x_BTHK, chunk, theta):
    size = x_BTHK.shape[-1]
    angle = np.outer(np.arange(x_BTHK.shape[1]) % chunk, theta ** (-np.arange(0, size, 2) / size))
    z = (x_BTHK[..., ::2] + 1j * x_BTHK[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack([z.real, z.imag], axis=-1).reshape(x_BTHK.shape)


def inner_model(x_BHK, weights):
    """(input of every dense layer, outputs)"""
    inputs, outputs = [x_BHK], []
    for w, b in weights:
        outputs.append(np.einsum("bhi,bhio->bho", inputs[-1], w) + b)
        inputs.append(gelu(outputs[-1]))
    return inputs, outputs


def inner_gradient(k, v, weights, scale, bias):
    """Gradient of 1/2 |LN(f(k)) - (v - k)|^2 with respect to every (w, b)."""
    inputs, outputs = inner_model(k, weights)
    y = outputs[-1]
    std = np.sqrt(((y - y.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-6)
    unit = (y - y.mean(-1, keepdims=True)) / std
    error = (unit * scale + bias - (v - k)) * scale
    error = error - error.mean(-1, keepdims=True) - unit * (error * unit).mean(-1, keepdims=True)
    error = error / std
    result = []
    for n in reversed(range(len(weights))):
        result.insert(0, (inputs[n][..., None] * error[:, :, None], error))
        if n:
            error = np.einsum("bho,bhio->bhi", error, weights[n][0])
            error = error * gelu_derivative(outputs[n - 1])
    return result


def ttt(config, p, x):
    (B, T, D), H, C = x.shape, config["num_heads"], config["mini_batch_size"]
    q = x @ p["wq.kernel"]
    k = x @ p["wk.kernel"] if "wk.kernel" in p else conv(q, *_flax_conv(p, "conv_k"))
    q = q if "wk.kernel" in p else conv(q, *_flax_conv(p, "conv_q"))
    q, k = (rotate(u.reshape(B, T, H, -1), C, config["rope_theta"]) for u in (q, k))
    v = (x @ p["wv.kernel"]).reshape(B, T, H, -1)
    wlr, blr = p["learnable_ttt_lr.kernel"][..., 0], p["learnable_ttt_lr.bias"][:, 0]
    lam = 1 / (1 + np.exp(-(x @ wlr.T + blr)))
    tau = np.maximum(0, 1 / np.arange(1, C + 1) + p["learnable_token_idx"])
    norm = p["ttt_norm.scale"], p["ttt_norm.bias"]
    layers = range(2 if "ttt_dense_1" in p else 1)
    learned = [(p[f"ttt_dense_{n}"], p[f"ttt_bias_{n}"][:, 0]) for n in layers]
    now = [(np.repeat(w[None], B, 0), np.repeat(b[None], B, 0)) for w, b in learned]
    z = np.zeros_like(v)
    for t in range(T):
        i = t % C
        if i == 0:
            start = now
            total = [(0.0, 0.0) for _ in layers]
        step = inner_gradient(k[:, t], v[:, t], start, *norm)
        rate = config["ttt_base_lr"] / q.shape[-1] * lam[:, t]
        total = [
            (a + rate[..., None, None] * dw, b + rate[..., None] * db)
            for (a, b), (dw, db) in zip(total, step, strict=True)
        ]
        now = [
            (w - tau[i] * a, b - tau[i] * c) for (w, b), (a, c) in zip(start, total, strict=True)
        ]
        z[:, t] = q[:, t] + layer_norm(inner_model(q[:, t], now)[1][-1], *norm)
    y = layer_norm(z.reshape(B, T, D), p["post_norm.scale"], p["post_norm.bias"])
    if "wg.kernel" in p:
        y = gelu(x @ p["wg.kernel"]) * y
    result = {"out.y": y @ p["wo.kernel"]}
    for n, (w, b) in enumerate(now):
        result |= {f"state.ttt_dense_{n}": w, f"state.ttt_bias_{n}": b[:, :, None]}
    return result


def _flax_conv(p, name):
    return p[f"{name}.kernel"][:, 0].T, p[f"{name}.bias"]


# --- language models ------------------------------------------------------------------------------


def select_prefix(p, prefix):
    return {name[len(prefix) :]: a for name, a in p.items() if name.startswith(prefix)}


def lm_mamba2(config, p, tokens):
    h = p["backbone.embeddings.weight"][tokens]
    for i in range(config["num_layers"]):
        block = select_prefix(p, f"backbone.layers.{i}.")
        x = rms(h, config["eps"]) * block["norm.weight"]
        h = h + mamba2(config, select_prefix(block, "mixer."), x)["out.y"]
    h = rms(h, config["eps"]) * p["backbone.norm_f.weight"]
    return {"out.logits": h @ p["lm_head.weight"].T}


def lm_delta_fused(config, p, tokens):
    def normed(h, weight):
        return rms(h, config["eps"]) * (1 + weight)

    h = p["model.embed_tokens.weight"][tokens]
    for i in range(config["num_layers"]):
        block = select_prefix(p, f"model.layers.{i}.")
        x = normed(h, block["input_layernorm.weight"])
        h = h + delta_fused(config, select_prefix(block, "linear_attn."), x)["out.y"]
        u = normed(h, block["post_attention_layernorm.weight"])
        gate, up, down = (block[f"mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        h = h + (silu(u @ gate) * (u @ up)) @ down
    return {"out.logits": normed(h, p["model.norm.weight"]) @ p["lm_head.weight"].T}


def lm_ttt(config, p, tokens):
    """With a convolution before every mixer and a tied head."""
    eps = config["rms_norm_eps"]
    h = p["model.wte.embedding"][tokens]
    for i in range(config["num_layers"]):
        block = select_prefix(p, f"model.h.{i}.")
        x = rms(h, eps) * block["conv.conv_norm.kernel"]
        h = h + conv(x, *_flax_conv(block, "conv.conv1"))
        x = rms(h, eps) * block["seq_norm.kernel"]
        h = h + ttt(config, select_prefix(block, "seq_modeling_block."), x)["out.y"]
        u = rms(h, eps) * block["ffn_norm.kernel"]
        w1, w2, w3 = (block[f"feed_forward.w{n}.kernel"] for n in (1, 2, 3))
        h = h + (silu(u @ w1) * (u @ w3)) @ w2
    return {"out.logits": rms(h, eps) * p["model.ln_f.kernel"] @ p["model.wte.embedding"].T}


# --- cases ----------------------------------------------------------------------------------------


def differences(run, arrays, cotangents, names, step=1e-6):
    """d sum(out * cotangent) / d array for every array of `names`, entry by entry."""

    def objective():
        result = run(arrays)
        return sum((result[n] * c).sum() for n, c in cotangents.items())

    gradients = {}
    for name in names:
        gradients[name] = np.zeros_like(arrays[name])
        for i in np.ndindex(arrays[name].shape):
            original = arrays[name][i]
            values = []
            for sign in (1, -1):
                arrays[name][i] = original + sign * step
                values.append(objective())
            arrays[name][i] = original
            gradients[name][i] = (values[0] - values[1]) / (2 * step)
    return gradients


def write_case(folder, name, layer, config, run, arrays, cotangents=None, differentiate=()):
    """Saves a case in the reference's format.

    run(arrays) -> outputs by name. arrays: in.* and param.*. cotangents: stored name -> output.
    differentiate: prefixes of the arrays whose gradients are stored.
    """
    arrays = {  # rounded to float32, so that both precisions have the same inputs
        n: a.astype(np.float32).astype(np.float64) if a.dtype == np.float64 else a
        for n, a in arrays.items()
    }
    exact = run(arrays)
    rng = np.random.default_rng(7)
    stored = dict(arrays)
    weights = {}
    for cotangent, output in (cotangents or {}).items():
        r = rng.normal(size=exact[output].shape).astype(np.float32)
        stored[cotangent], weights[output] = r, r.astype(np.float64)
    names = [n for n in arrays if n.startswith(tuple(differentiate))]
    for of, gradient in differences(run, arrays, weights, names).items():
        exact[of.replace("in.", "grad_in.").replace("param.", "grad.")] = gradient
    rounded = {n: np.asarray(a, np.float32) for n, a in exact.items()}
    figures = {n: {"max_abs_diff": float(np.abs(rounded[n] - a).max())} for n, a in exact.items()}
    stored |= rounded
    content = {
        "case": name,
        "layer": layer,
        "config": config,
        "arrays": {n: list(a.shape) for n, a in stored.items()},
        "float64_restatement": figures,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))
    floats = {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in stored.items()}
    np.savez(folder / f"{name}.npz", **floats)
