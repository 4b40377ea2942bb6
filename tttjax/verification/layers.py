"""Reference cases of the `layers` family: mixers, their operators, and small language models.

`build_layer` turns a case's JSON into functions from the case's arrays (the reference's parameters
and inputs) to its outputs (`out.*`, `state.*`), so `jax.grad` gives gradients with respect to the
reference's own parameters. An unsupported layer or setting raises UserError; unknown settings are
listed in `LayerForms.unknown`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.config import ModelConfig
from tttjax.errors import UserError
from tttjax.models.mixer import make_mixer
from tttjax.models.stacking import Stack
from tttjax.ops.delta_rule import gated_delta_rule, gated_delta_rule_recurrent, l2_normalise
from tttjax.ops.ssd import ssd, ssd_recurrent
from tttjax.ops.ttt import final_weights, learning_rates
from tttjax.types import Array, PyTree
from tttjax.verification import layer_lm, layer_weights
from tttjax.verification.layer_format import CaseArrays, CaseFields

Form = Callable[[CaseArrays], dict[str, Array]]

TTT_FORMS = ("dual", "primal")
TTT_STATE = {"w1": "ttt_dense_0", "b1": "ttt_bias_0", "w2": "ttt_dense_1", "b2": "ttt_bias_1"}


@dataclass(frozen=True)
class LayerForms:
    """A case's layer as functions.

    forms: implementations that must agree; each maps the case's arrays to its outputs by name. The
        first form is that of training.
    cotangents: stored cotangent -> its output.
    unknown: settings of the case that are not used, as `config.field = value`.
    """

    forms: Mapping[str, Form]
    cotangents: Mapping[str, str]
    unknown: list[str] = field(default_factory=list)


def build_layer(case: Mapping[str, Any], dtype: str) -> LayerForms:
    """The layer that a case's `layer` and `config` describe, computing in `dtype`.

    Raises UserError for unsupported layers and settings, and for missing fields.
    """
    for name in ("layer", "config"):
        if name not in case:
            raise UserError(f"the JSON has no field {name!r}")
    kind, fields = case["layer"], CaseFields(case["config"])
    if not isinstance(kind, str) or kind not in _BUILDERS:
        raise UserError(f"unsupported layer {kind!r}; one of {', '.join(_BUILDERS)}")
    layer = _BUILDERS[kind](fields, dtype)
    layer.unknown.extend(fields.unknown())
    return layer


# --- operators ------------------------------------------------------------------------------------


def _build_ssd(fields: CaseFields, dtype: str) -> LayerForms:
    H, P = fields.positive_int("num_heads"), fields.positive_int("head_dim")
    G, N = fields.positive_int("n_groups", 1), fields.positive_int("state_size")
    if H % G:
        raise UserError(f"config.n_groups = {G} does not divide num_heads {H}")
    chunk = fields.positive_int("chunk_size", 64)

    def form(run, stored: CaseArrays) -> dict[str, Array]:
        take = stored.scoped("in.")
        x = take("x", None, None, H, P)
        B, T = x.shape[:2]
        batched = x, take("dt", B, T, H), take("B", B, T, G, N), take("C", B, T, G, N)
        initial_state = _or_zeros(take, "initial_state", B, H, P, N, like=x)
        a_H, skip_H = take("A", H), _or_zeros(take, "D", H, like=x)

        def one(x_THP, dt_TH, b_TGN, c_TGN, state_HPN):
            return run(x_THP, dt_TH, a_H, b_TGN, c_TGN, skip_H, state_HPN)

        y, state = jax.vmap(one)(*batched, initial_state)
        return {"out.y": y, "out.final_state": state}

    forms = {
        "chunked": partial(form, partial(ssd, chunk=chunk)),
        "recurrent": partial(form, ssd_recurrent),
    }
    return LayerForms(forms, {"cot.R": "out.y", "cot.R_state": "out.final_state"})


def _build_delta_rule(fields: CaseFields, dtype: str) -> LayerForms:
    G, H = fields.positive_int("num_k_heads"), fields.positive_int("num_v_heads")
    K, V = fields.positive_int("head_k_dim"), fields.positive_int("head_v_dim")
    if H % G:
        raise UserError(f"config.num_k_heads = {G} does not divide num_v_heads {H}")
    fields.require("scale", ("head_k_dim**-0.5", K**-0.5), "head_k_dim**-0.5")
    chunk, normalise = fields.positive_int("chunk_size", 64), fields.flag("l2norm_in_op", False)

    def form(run, stored: CaseArrays) -> dict[str, Array]:
        take = stored.scoped("in.")
        q = take("q", None, None, G, K)
        B, T = q.shape[:2]
        k = take("k", B, T, G, K)
        if normalise:
            q, k = l2_normalise(q), l2_normalise(k)
        vgb = take("v", B, T, H, V), take("g", B, T, H), take("beta", B, T, H)
        initial_state = _or_zeros(take, "initial_state", B, H, K, V, like=q)
        o, state = jax.vmap(run)(q, k, *vgb, initial_state)
        return {"out.o": o, "out.final_state": state}

    forms = {
        "chunked": partial(form, partial(gated_delta_rule, chunk=chunk)),
        "recurrent": partial(form, gated_delta_rule_recurrent),
    }
    return LayerForms(forms, {"cot.R": "out.o", "cot.R_state": "out.final_state"})


def _or_zeros(take: CaseArrays, name: str, *shape: int, like: Array) -> Array:
    return take(name, *shape) if name in take else jnp.zeros(shape, like.dtype)


# --- mixers ---------------------------------------------------------------------------------------


def _full_sequence(stack: Stack, weights: PyTree, x_TD: Array) -> Array:
    """Training form: a complete sequence, without a state."""
    return stack.apply(weights, x_TD, None, jnp.zeros((), jnp.int32))[0]


def _prefill(stack: Stack, weights: PyTree, x_TD: Array) -> tuple[Array, PyTree]:
    """Prefill form: all tokens at once, from a state to a state."""
    state = stack.module().init_state(x_TD.shape[0], x_TD.dtype)
    return stack.apply(weights, x_TD, state, jnp.zeros((), jnp.int32))


def _decode(stack: Stack, weights: PyTree, x_TD: Array) -> tuple[Array, PyTree]:
    """Decoding form: one token at a time."""
    state = stack.module().init_state(x_TD.shape[0], x_TD.dtype)

    def step(state, token):
        position, x_D = token
        y_1D, state = stack.apply(weights, x_D[None], state, position)
        return state, y_1D[0]

    positions = jnp.arange(x_TD.shape[0], dtype=jnp.int32)
    state, y_TD = jax.lax.scan(step, state, (positions, x_TD))
    return y_TD, state


def _mixer_form(stack: Stack, weights: Callable[[CaseArrays], PyTree], width: int, run) -> Form:
    """run(stack, weights, x_TD) -> outputs of one sequence by name."""

    def form(stored: CaseArrays) -> dict[str, Array]:
        mixer_weights = weights(stored.scoped("param."))
        x_BTD = stored.scoped("in.")("x", None, None, width)
        return jax.vmap(lambda x_TD: run(stack, mixer_weights, x_TD))(x_BTD)

    return form


def _stack(kind: str, dtype: str, settings: dict[str, Any], **attributes: str) -> Stack:
    """One layer, with attributes changed after it is made."""
    model = ModelConfig(param_dtype=dtype, **settings)

    def make(rngs) -> Any:
        layer = make_mixer(kind, model, rngs)
        for name, value in attributes.items():
            setattr(layer, name, value)
        return layer

    return Stack(make, 1)


def _recurrent_layer(
    stack: Stack, weights: Callable[[CaseArrays], PyTree], width: int
) -> LayerForms:
    runs = {
        "chunked": lambda *args: {"out.y": _full_sequence(*args)},
        "from a state": lambda *args: {"out.y": _prefill(*args)[0]},
        "recurrent": lambda *args: {"out.y": _decode(*args)[0]},
    }
    forms = {name: _mixer_form(stack, weights, width, run) for name, run in runs.items()}
    return LayerForms(forms, {"cot.R": "out.y"})


def _build_mamba2(fields: CaseFields, dtype: str) -> LayerForms:
    s = layer_weights.Mamba2Sizes.from_fields(fields)
    stack = _stack("mamba2", dtype, layer_weights.mamba2_settings(s, fields))
    return _recurrent_layer(stack, partial(layer_weights.mamba2, s), s.D)


def _build_delta(fields: CaseFields, dtype: str, fused: bool) -> LayerForms:
    s = layer_weights.DeltaSizes.from_fields(fields)
    stack = _stack("gated_deltanet", dtype, layer_weights.delta_settings(s, fields, fused))
    convert = layer_weights.delta_fused if fused else layer_weights.delta_separate
    return _recurrent_layer(stack, partial(convert, s), s.D)


def _build_ttt(fields: CaseFields, dtype: str, inner: str, plain: bool) -> LayerForms:
    s = layer_weights.TTTSizes.from_fields(fields, inner, plain)
    settings = layer_weights.ttt_settings(s, fields, plain)
    base_lr = settings["ttt_layer"].lr
    dual, primal = (_stack(f"ttt_{inner}", dtype, settings, minibatch_form=f) for f in TTT_FORMS)

    def output_and_state(run, stack: Stack, weights: PyTree, x_TD: Array) -> dict[str, Array]:
        y_TD, state = run(stack, weights, x_TD)
        initial = {name: weights[name] for name in TTT_STATE if name in weights}
        rate_C = learning_rates(base_lr, s.K, weights["token_idx"])
        final = final_weights(state, initial, rate_C, x_TD.shape[0])
        # The reference stores a bias as a matrix with one row.
        state_arrays = {n: w if n.startswith("w") else w[:, None] for n, w in final.items()}
        return {"out.y": y_TD, **{f"state.{TTT_STATE[n]}": w for n, w in state_arrays.items()}}

    runs = {
        "dual": (dual, lambda *args: {"out.y": _full_sequence(*args)}),
        "primal": (primal, lambda *args: {"out.y": _full_sequence(*args)}),
        "from a state": (dual, partial(output_and_state, _prefill)),
        "recurrent": (dual, partial(output_and_state, _decode)),
    }
    weights = partial(layer_weights.ttt, s)
    forms = {name: _mixer_form(stack, weights, s.D, run) for name, (stack, run) in runs.items()}
    return LayerForms(forms, {"cot.R": "out.y"})


# --- language models ------------------------------------------------------------------------------


def _build_lm(
    make_model: Callable[..., layer_lm.ReferenceLM], fields: CaseFields, dtype: str
) -> LayerForms:
    model = make_model(fields, dtype)
    transformer = model.transformer

    def form(run, stored: CaseArrays) -> dict[str, Array]:
        params = model.params(stored.scoped("param."))
        token_BT = stored.scoped("in.")("input_ids", None, None)
        return {"out.logits": jax.vmap(lambda token_T: run(params, token_T))(token_BT)}

    def prefill(params, token_T):
        state = transformer.init_state(token_T.shape[0])
        return transformer.apply(params, state, token_T)[0]

    def decode(params, token_T):
        def step(state, token):
            logit_1V, state = transformer.apply(params, state, token[None])
            return state, logit_1V[0]

        return jax.lax.scan(step, transformer.init_state(token_T.shape[0]), token_T)[1]

    forms = {"whole": partial(form, prefill), "recurrent": partial(form, decode)}
    return LayerForms(forms, {"cot.R": "out.logits"})


_BUILDERS: dict[str, Callable[[CaseFields, str], LayerForms]] = {
    "mamba2_ssd_op": _build_ssd,
    "gdn_op": _build_delta_rule,
    "mamba2": _build_mamba2,
    "gdn_separate": partial(_build_delta, fused=False),
    "gdn_qwen3next": partial(_build_delta, fused=True),
    "lm:mamba2": partial(_build_lm, layer_lm.mamba2_model),
    "lm:gdn_separate": partial(_build_lm, partial(layer_lm.delta_model, fused=False)),
    "lm:gdn_qwen3next": partial(_build_lm, partial(layer_lm.delta_model, fused=True)),
}
for _inner in ("linear", "mlp"):
    for _suffix in ("", "_base"):
        _choice: dict[str, Any] = {"inner": _inner, "plain": bool(_suffix)}
        _BUILDERS[f"ttt_{_inner}{_suffix}"] = partial(_build_ttt, **_choice)
        _BUILDERS[f"lm:ttt_{_inner}{_suffix}"] = partial(
            _build_lm, partial(layer_lm.ttt_model, **_choice)
        )
