"""One case of the `e2e` family: every stored quantity computed again and compared.

Measures: losses, weights and rates by their largest absolute difference; hidden states and norms
by that difference relative to the largest entry (if above 1); gradients by relative L2 norm.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tttjax.errors import UserError
from tttjax.interop.official.names import fast_to_official, from_official, to_official
from tttjax.types import Array, Batch, Params
from tttjax.verification import golden
from tttjax.verification.golden import Setting, under
from tttjax.verification.rows import (
    VerifyRow,
    absolute,
    absolute_of_all,
    change,
    limit,
    relative,
    relative_norm,
)

OFFICIAL_METRIC_EPS = 1e-5  # the official trainer logs sqrt(sum of squares + this)


class _Comparison:
    """The stored arrays of one setting, and the rows that come of comparing with them."""

    def __init__(self, case: str, prefix: str, arrays: Mapping[str, np.ndarray], setting: Setting):
        self.prefix, self.arrays, self.setting = prefix, arrays, setting
        self.case = f"{case}/{prefix}".rstrip("/")
        self.used: set[str] = set()

    def stored(self, name: str) -> tuple[np.ndarray, bool] | None:
        """The reference called `name`, and whether it is the float64 one."""
        key = self.prefix + name
        self.used.add(key)
        if self.setting.dtype == "float64" and f"f64/{key}" in self.arrays:
            return self.arrays[f"f64/{key}"], True
        return (self.arrays[key], False) if key in self.arrays else None

    def group(self, name: str) -> dict[str, np.ndarray]:
        """All arrays under `name/`."""
        found = under(self.arrays, f"{self.prefix}{name}/")
        self.used |= {f"{self.prefix}{name}/{key}" for key in found}
        return found

    def has(self, *names: str) -> bool:
        keys = [self.prefix + name for name in names]
        return any(k == key or k.startswith(key + "/") for k in self.arrays for key in keys)

    def row(
        self, quantity: str, deviation: float, is_f64: bool = False, note: str = ""
    ) -> VerifyRow:
        tolerance = limit(quantity, self.setting.dtype, is_f64)
        return VerifyRow(self.case, quantity, deviation, tolerance, deviation <= tolerance, note)

    def compare(
        self, quantity: str, got: Any, measure: Callable[[np.ndarray, np.ndarray], float] = absolute
    ) -> Iterator[VerifyRow]:
        """A row if the case has the quantity."""
        reference = self.stored(quantity)
        if reference is not None:
            got = np.asarray(got)
            note = "" if got.shape == reference[0].shape else f"shape {got.shape} was computed"
            yield self.row(quantity, measure(got, reference[0]), reference[1], note)


class CompiledCase:
    """The compiled functions of one setting.

    one_batch(params, batch, step) -> (Reading, gradient or None, prefix output or None)
    """

    def __init__(self, setting: Setting, with_gradient: bool = False, with_prefix: bool = False):
        def one_batch(params: Params, batch: Batch, step: Array):
            loss = partial(setting.outer_loss, batch=batch, step=step)
            prefix = setting.prefix_output(params, batch) if with_prefix else None
            if with_gradient:
                (_, reading), grads = jax.value_and_grad(loss, has_aux=True)(params)
                return reading, grads, prefix
            return loss(params)[1], None, prefix

        self.setting = setting
        self.one_batch = jax.jit(one_batch)


# What was compiled for which setting of which case; checkpoints are read with the same functions.
Cache = dict[str, CompiledCase]


def cache_key(case: Mapping[str, Any], prefix: str) -> str:
    return prefix + json.dumps(case, sort_keys=True)


def check_case(
    path: Path, case: Mapping[str, Any], name: str, x64: bool, cache: Cache
) -> Iterator[VerifyRow]:
    """Rows of every setting of the case described by `case`, the JSON at `path`."""
    for field in golden.unknown_fields(case):
        yield VerifyRow(name, "settings", None, None, True, f"not known, ignored: {field}")
    try:
        arrays = golden.load_arrays(path.with_suffix(".npz"))
        settings = golden.variants(case, x64)
    except UserError as error:
        yield VerifyRow(name, "settings", None, None, False, str(error))
        return
    except KeyError as error:
        yield VerifyRow(name, "settings", None, None, False, f"the JSON has no field {error}")
        return
    used: set[str] = set()
    for prefix, setting in settings.items():
        comparison = _Comparison(name, prefix, arrays, setting)
        try:
            yield from _check_setting(case, comparison, cache)
        except UserError as error:
            yield VerifyRow(comparison.case, "settings", None, None, False, str(error))
        except KeyError as error:
            note = f"the JSON has no field {error}"
            yield VerifyRow(comparison.case, "settings", None, None, False, note)
        used |= comparison.used
    inputs = ("f64/", "params/", "batch/", "traj/input_ids", "traj/target_", "traj/loss_masks")
    left = [key for key in arrays if key not in used and not key.startswith(inputs)]
    if left:
        yield VerifyRow(name, "arrays", None, None, True, f"not compared: {', '.join(left)}")


def first_step(case: Mapping[str, Any]) -> int:
    """Index of the outer step that the case's batch belongs to."""
    return int(case.get("step_index", case["training"].get("step_index", 0)))


def _check_setting(case: Mapping[str, Any], c: _Comparison, cache: Cache) -> Iterator[VerifyRow]:
    setting = c.setting
    param_dtype = setting.model.shape.param_dtype
    params = from_official(under(c.arrays, "params/"), setting.model, param_dtype)
    batch = golden.load_batch(c.arrays)
    step = jnp.asarray(first_step(case))
    steps_follow = not c.prefix and c.has("traj", "final_params")
    with_gradient = steps_follow or c.has("grads", "grad_norm", "grad_norm_official_metric")
    computed = CompiledCase(setting, with_gradient, c.has("prefix_output"))
    cache[cache_key(case, c.prefix)] = computed
    reading, grads, prefix = computed.one_batch(params, batch, step)
    rows = [
        *_inner_rates(case, c, step),
        *_losses(c, reading, batch),
        *_inner_loop(c, reading, prefix),
        *(_gradient(c, grads) if grads is not None else ()),
    ]
    if not rows:
        rows = [
            VerifyRow(c.case, "arrays", None, None, False, "the case stores nothing to compare")
        ]
    yield from rows
    if steps_follow:
        yield from _optimizer_steps(case, c, computed, params)


def _inner_rates(case: Mapping[str, Any], c: _Comparison, step: Array) -> Iterator[VerifyRow]:
    stored = case.get("effective_inner_lr")
    if c.setting.learn and isinstance(stored, int | float):
        got = np.asarray(c.setting.inner_lr(step))
        yield c.row("inner_lr", absolute(got, np.asarray(stored)))


def _losses(c: _Comparison, reading: Any, batch: Batch) -> Iterator[VerifyRow]:
    rows = batch.inputs.shape[0]
    nll_BT = np.asarray(reading.token_nll_T).reshape(rows, -1)
    chunk_loss_BN = np.asarray(reading.chunk_loss_N).reshape(rows, -1)
    yield from c.compare("loss", np.mean(reading.loss))
    yield from c.compare("seq_loss", np.asarray(reading.loss).reshape(rows, -1).mean(axis=1))
    yield from c.compare("chunk_loss", chunk_loss_BN)
    yield from c.compare("token_nll", nll_BT)
    yield from c.compare("batch_mean_token_nll", nll_BT.mean(axis=0))
    yield from c.compare("batch_mean_chunk_loss", chunk_loss_BN.mean(axis=0))


def _inner_loop(c: _Comparison, reading: Any, prefix_BTD: Any) -> Iterator[VerifyRow]:
    if prefix_BTD is not None:
        yield from c.compare("prefix_output", prefix_BTD, relative)
    yield from c.compare("inner_grad_norm", reading.grad_norm_N, relative)
    wanted = c.group("inner_final")
    if wanted:
        got = fast_to_official(reading.fast, c.setting.model)
        yield c.row("inner_final", absolute_of_all(got, wanted))


def _gradient(c: _Comparison, grads: Params) -> Iterator[VerifyRow]:
    wanted = c.group("grads")
    if wanted:
        got = to_official(grads, c.setting.model)
        worst, tree, name = relative_norm(got, wanted)
        yield c.row("grads, worst array", worst, note=name)
        yield c.row("grads, tree", tree)
    norm = optax.tree.norm(grads)
    yield from c.compare("grad_norm", norm, relative)
    yield from c.compare("grad_norm_official_metric", _official_metric(grads), relative)


def _official_metric(grads: Params) -> Array:
    return jnp.sqrt(jnp.square(optax.tree.norm(grads)) + OFFICIAL_METRIC_EPS)


def _optimizer_steps(
    case: Mapping[str, Any], c: _Comparison, computed: CompiledCase, params: Params
) -> Iterator[VerifyRow]:
    """As many optimizer steps as the case has batches for, from a fresh optimizer."""
    optimizer, schedule = golden.outer_optimizer(case)
    batches = golden.load_batch(c.arrays, "traj/")
    count = batches.inputs.shape[0]
    stored_steps = c.stored("traj/step_index")
    steps = stored_steps[0] if stored_steps else first_step(case) + np.arange(count)

    @jax.jit
    def update(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, _official_metric(grads)

    opt_state, losses, metrics = optimizer.init(params), [], []
    for i in range(count):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        step = jnp.asarray(int(steps[i]))
        reading, grads, _ = computed.one_batch(params, batch, step)
        params, opt_state, metric = update(params, opt_state, grads)
        losses.append(np.mean(reading.loss))
        metrics.append(np.asarray(metric))
    rates = np.asarray([schedule(i) for i in range(count)])
    stored_rates = case.get("effective_inner_lr_of_traj_steps")
    if stored_rates:
        got = np.asarray([c.setting.inner_lr(int(step)) for step in steps])
        deviation = absolute(got, np.asarray(stored_rates))
        yield c.row("inner_lr", deviation, note="of the optimizer steps")
    yield from c.compare("traj/loss", np.asarray(losses))
    yield from c.compare("traj/grad_norm_official_metric", np.asarray(metrics), relative)
    yield from c.compare("traj/lr", rates)
    wanted = c.group("final_params")
    if wanted:
        final = to_official(params, c.setting.model)
        quantile, moved, note = change(final, wanted, under(c.arrays, "params/"))
        yield c.row("final_params, 99.9 %", quantile, note=note)
        yield c.row("final_params, change", moved, note=note)
