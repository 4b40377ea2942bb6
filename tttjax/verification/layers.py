"""Reference cases of the `layers` family: mixers, their operators, and small language models.

`read_layer` turns a case's JSON into functions of the case's own arrays, with the same names for
what comes out as the case has: weights and inputs of the reference in, `out.*` and `state.*` out.
So gradients with respect to the reference's own parameters come from `jax.grad`. A layer, or the
value of a setting, that this package does not have raises UserError; a setting that is not known at
all is listed in `Layer.unknown`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.errors import UserError
from tttjax.models.gated_deltanet import GatedDeltaNet
from tttjax.models.mamba2 import Mamba2
from tttjax.models.stacking import Stack
from tttjax.models.ttt_layer import TTTLayer
from tttjax.ops.delta_rule import gated_delta_rule, gated_delta_rule_recurrent, l2_normalise
from tttjax.ops.ssd import ssd, ssd_recurrent
from tttjax.ops.ttt import final_weights, learning_rates
from tttjax.types import Array, PyTree
from tttjax.verification import layer_lm, layer_weights
from tttjax.verification.layer_format import Fields, Stored

Form = Callable[[Stored], dict[str, Array]]

INIT_STD = 0.02  # of weights that are replaced by the case's own
TTT_FORMS = ("dual", "primal")
TTT_STATE = {"w1": "ttt_dense_0", "b1": "ttt_bias_0", "w2": "ttt_dense_1", "b2": "ttt_bias_1"}


@dataclass(frozen=True)
class Layer:
    """A case as functions.

    forms: ways to compute that must agree; each takes the case's arrays and gives its outputs by
        their names there. The first form is that of training.
    cotangents: which output each stored cotangent belongs to.
    unknown: settings of the case that nothing here reads, as `config.field = value`.
    """

    forms: Mapping[str, Form]
    cotangents: Mapping[str, str]
    unknown: list[str] = field(default_factory=list)


def read_layer(case: Mapping[str, Any], dtype: str) -> Layer:
    """The layer that a case's `layer` and `config` describe, computing in `dtype`.

    Raises UserError for a layer or a setting that there is not, and for missing fields.
    """
    for name in ("layer", "config"):
        if name not in case:
            raise UserError(f"the JSON has no field {name!r}")
    kind, fields = case["layer"], Fields(case["config"])
    if not isinstance(kind, str) or kind not in _READERS:
        raise UserError(f"unsupported layer {kind!r}; one of {', '.join(_READERS)}")
    layer = _READERS[kind](fields, dtype)
    layer.unknown.extend(fields.unknown())
    return layer


# --- operators ------------------------------------------------------------------------------------


def _read_ssd(fields: Fields, dtype: str) -> Layer:
    H, P = fields.whole("num_heads"), fields.whole("head_dim")
    G, N = fields.whole("n_groups", 1), fields.whole("state_size")
    if H % G:
        raise UserError(f"config.n_groups = {G} does not divide num_heads {H}")
    chunk = fields.whole("chunk_size", 64)

    def form(run, stored: Stored) -> dict[str, Array]:
        take = stored.below("in.")
        x = take("x", None, None, H, P)
        B, T = x.shape[:2]
        batched = x, take("dt", B, T, H), take("B", B, T, G, N), take("C", B, T, G, N)
        start = _or_zeros(take, "initial_state", B, H, P, N, like=x)
        a_H, skip_H = take("A", H), _or_zeros(take, "D", H, like=x)

        def one(x_THP, dt_TH, b_TGN, c_TGN, state_HPN):
            return run(x_THP, dt_TH, a_H, b_TGN, c_TGN, skip_H, state_HPN)

        y, state = jax.vmap(one)(*batched, start)
        return {"out.y": y, "out.final_state": state}

    forms = {
        "chunked": partial(form, partial(ssd, chunk=chunk)),
        "recurrent": partial(form, ssd_recurrent),
    }
    return Layer(forms, {"cot.R": "out.y", "cot.R_state": "out.final_state"})


def _read_delta_rule(fields: Fields, dtype: str) -> Layer:
    G, H = fields.whole("num_k_heads"), fields.whole("num_v_heads")
    K, V = fields.whole("head_k_dim"), fields.whole("head_v_dim")
    if H % G:
        raise UserError(f"config.num_k_heads = {G} does not divide num_v_heads {H}")
    fields.require("scale", ("head_k_dim**-0.5", K**-0.5), "head_k_dim**-0.5")
    chunk, normalise = fields.whole("chunk_size", 64), fields.flag("l2norm_in_op", False)

    def form(run, stored: Stored) -> dict[str, Array]:
        take = stored.below("in.")
        q = take("q", None, None, G, K)
        B, T = q.shape[:2]
        k = take("k", B, T, G, K)
        if normalise:
            q, k = l2_normalise(q), l2_normalise(k)
        rest = take("v", B, T, H, V), take("g", B, T, H), take("beta", B, T, H)
        start = _or_zeros(take, "initial_state", B, H, K, V, like=q)
        o, state = jax.vmap(run)(q, k, *rest, start)
        return {"out.o": o, "out.final_state": state}

    forms = {
        "chunked": partial(form, partial(gated_delta_rule, chunk=chunk)),
        "recurrent": partial(form, gated_delta_rule_recurrent),
    }
    return Layer(forms, {"cot.R": "out.o", "cot.R_state": "out.final_state"})


def _or_zeros(take: Stored, name: str, *shape: int, like: Array) -> Array:
    return take(name, *shape) if name in take else jnp.zeros(shape, like.dtype)


# --- mixers ---------------------------------------------------------------------------------------


def _whole(stack: Stack, weights: PyTree, x_TD: Array) -> Array:
    """The form of training: the sequence starts and ends here."""
    return stack.apply(weights, x_TD, None, jnp.zeros((), jnp.int32))[0]


def _resumed(stack: Stack, weights: PyTree, x_TD: Array) -> tuple[Array, PyTree]:
    """The form of reading a prompt: all tokens at once, from a state to a state."""
    state = stack.module().init_state(x_TD.shape[0], x_TD.dtype)
    return stack.apply(weights, x_TD, state, jnp.zeros((), jnp.int32))


def _token_by_token(stack: Stack, weights: PyTree, x_TD: Array) -> tuple[Array, PyTree]:
    """The form of decoding."""
    state = stack.module().init_state(x_TD.shape[0], x_TD.dtype)

    def step(state, token):
        position, x_D = token
        y_1D, state = stack.apply(weights, x_D[None], state, position)
        return state, y_1D[0]

    positions = jnp.arange(x_TD.shape[0], dtype=jnp.int32)
    state, y_TD = jax.lax.scan(step, state, (positions, x_TD))
    return y_TD, state


def _mixer_form(stack: Stack, weights: Callable[[Stored], PyTree], width: int, run) -> Form:
    """`run(stack, weights, x_TD)` gives a dict of outputs of one sequence."""

    def form(stored: Stored) -> dict[str, Array]:
        own = weights(stored.below("param."))
        x_BTD = stored.below("in.")("x", None, None, width)
        return jax.vmap(lambda x_TD: run(stack, own, x_TD))(x_BTD)

    return form


def _recurrent_layer(stack: Stack, weights: Callable[[Stored], PyTree], width: int) -> Layer:
    runs = {
        "chunked": lambda *args: {"out.y": _whole(*args)},
        "from a state": lambda *args: {"out.y": _resumed(*args)[0]},
        "recurrent": lambda *args: {"out.y": _token_by_token(*args)[0]},
    }
    forms = {name: _mixer_form(stack, weights, width, run) for name, run in runs.items()}
    return Layer(forms, {"cot.R": "out.y"})


def _read_mamba2(fields: Fields, dtype: str) -> Layer:
    s = layer_weights.Mamba2Sizes.read(fields)
    make = partial(
        Mamba2,
        s.D,
        expand=s.expand,
        head_dim=s.P,
        state_size=s.N,
        groups=s.G,
        conv_size=s.J,
        dt_limits=fields.limits("time_step_limit"),
        norm_eps=fields.number("eps", 1e-5),
        chunk=fields.whole("chunk_size", 64),
        std=INIT_STD,
        dtype=jnp.dtype(dtype),
    )
    stack = Stack(lambda rngs: make(rngs=rngs), 1)
    return _recurrent_layer(stack, partial(layer_weights.mamba2, s), s.D)


def _read_delta(fields: Fields, dtype: str, fused: bool) -> Layer:
    s = layer_weights.DeltaSizes.read(fields)
    make = partial(
        GatedDeltaNet,
        s.D,
        key_heads=s.G,
        value_heads=s.H,
        key_dim=s.K,
        value_dim=s.V,
        conv_size=s.J,
        negative=fields.flag("allow_neg_eigval", False),
        norm_eps=fields.number("eps", 1e-6 if fused else 1e-5),
        chunk=fields.whole("chunk_size", 64),
        std=INIT_STD,
        dtype=jnp.dtype(dtype),
    )
    stack = Stack(lambda rngs: make(rngs=rngs), 1)
    convert = layer_weights.delta_fused if fused else layer_weights.delta_separate
    return _recurrent_layer(stack, partial(convert, s), s.D)


def _read_ttt(fields: Fields, dtype: str, inner: str, plain: bool) -> Layer:
    s = layer_weights.TTTSizes.read(fields, inner, plain)
    base_lr = fields.number("ttt_base_lr")

    def stack(form: str) -> Stack:
        make = partial(
            TTTLayer,
            s.D,
            inner=inner,
            num_heads=s.H,
            chunk_size=s.C,
            base_lr=base_lr,
            rope_theta=rope_theta,
            backbone="plain" if plain else "mamba",
            conv_size=s.J,
            form=form,
            output="query",
            norm_eps=layer_lm.TTT_EPS,
            std=INIT_STD,
            dtype=jnp.dtype(dtype),
        )
        return Stack(lambda rngs: make(rngs=rngs), 1)

    def with_state(run, stack: Stack, weights: PyTree, x_TD: Array) -> dict[str, Array]:
        y_TD, state = run(stack, weights, x_TD)
        learned = {name: weights[name] for name in TTT_STATE if name in weights}
        rate_C = learning_rates(base_lr, s.K, weights["token_idx"])
        last = final_weights(state, learned, rate_C, x_TD.shape[0])
        # The reference keeps a bias as a matrix of one row.
        named = {n: w if n.startswith("w") else w[:, None] for n, w in last.items()}
        return {"out.y": y_TD, **{f"state.{TTT_STATE[n]}": w for n, w in named.items()}}

    rope_theta = fields.number("rope_theta", 10000.0)
    dual, primal = map(stack, TTT_FORMS)
    runs = {
        "dual": (dual, lambda *args: {"out.y": _whole(*args)}),
        "primal": (primal, lambda *args: {"out.y": _whole(*args)}),
        "from a state": (dual, partial(with_state, _resumed)),
        "recurrent": (dual, partial(with_state, _token_by_token)),
    }
    weights = partial(layer_weights.ttt, s)
    forms = {name: _mixer_form(stack, weights, s.D, run) for name, (stack, run) in runs.items()}
    return Layer(forms, {"cot.R": "out.y"})


# --- language models ------------------------------------------------------------------------------


def _read_lm(read: Callable[..., layer_lm.LanguageModel], fields: Fields, dtype: str) -> Layer:
    model = read(fields, dtype)
    transformer = model.transformer

    def form(run, stored: Stored) -> dict[str, Array]:
        params = model.params(stored.below("param."))
        token_BT = stored.below("in.")("input_ids", None, None)
        return {"out.logits": jax.vmap(lambda token_T: run(params, token_T))(token_BT)}

    def whole(params, token_T):
        state = transformer.init_state(token_T.shape[0])
        return transformer.apply(params, state, token_T)[0]

    def token_by_token(params, token_T):
        def step(state, token):
            logit_1V, state = transformer.apply(params, state, token[None])
            return state, logit_1V[0]

        return jax.lax.scan(step, transformer.init_state(token_T.shape[0]), token_T)[1]

    forms = {"whole": partial(form, whole), "recurrent": partial(form, token_by_token)}
    return Layer(forms, {"cot.R": "out.logits"})


_READERS: dict[str, Callable[[Fields, str], Layer]] = {
    "mamba2_ssd_op": _read_ssd,
    "gdn_op": _read_delta_rule,
    "mamba2": _read_mamba2,
    "gdn_separate": partial(_read_delta, fused=False),
    "gdn_qwen3next": partial(_read_delta, fused=True),
    "lm:mamba2": partial(_read_lm, layer_lm.mamba2_model),
    "lm:gdn_separate": partial(_read_lm, partial(layer_lm.delta_model, fused=False)),
    "lm:gdn_qwen3next": partial(_read_lm, partial(layer_lm.delta_model, fused=True)),
}
for _inner in ("linear", "mlp"):
    for _suffix in ("", "_base"):
        _choice: dict[str, Any] = {"inner": _inner, "plain": bool(_suffix)}
        _READERS[f"ttt_{_inner}{_suffix}"] = partial(_read_ttt, **_choice)
        _READERS[f"lm:ttt_{_inner}{_suffix}"] = partial(
            _read_lm, partial(layer_lm.ttt_model, form="dual", **_choice)
        )
