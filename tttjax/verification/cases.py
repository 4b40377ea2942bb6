"""Verification of a reference case of the `e2e` family: recomputes every stored quantity.

Measures: the largest absolute difference of losses, weights and rates; the same relative to the
largest entry (if above 1) of hidden states and norms; the relative L2 norm of gradients.
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
from tttjax.verification.golden import CaseSetup, select_prefix
from tttjax.verification.rows import (
    VerifyRow,
    change_error,
    max_abs_diff,
    max_abs_diff_of_all,
    max_rel_diff,
    relative_l2,
    tolerance_of,
)

OFFICIAL_METRIC_EPS = 1e-5  # the official trainer logs sqrt(sum of squares + eps)


class _Comparison:
    """The stored arrays of one case setup; compares computed quantities with them."""

    def __init__(self, case: str, prefix: str, arrays: Mapping[str, np.ndarray], setup: CaseSetup):
        self.prefix, self.arrays, self.setup = prefix, arrays, setup
        self.case = f"{case}/{prefix}".rstrip("/")
        self.used: set[str] = set()

    def stored(self, name: str) -> tuple[np.ndarray, bool] | None:
        """(reference array, whether it is the float64 one); None if there is none."""
        key = self.prefix + name
        self.used.add(key)
        if self.setup.dtype == "float64" and f"f64/{key}" in self.arrays:
            return self.arrays[f"f64/{key}"], True
        return (self.arrays[key], False) if key in self.arrays else None

    def arrays_under(self, name: str) -> dict[str, np.ndarray]:
        """All arrays under `name/`."""
        selected = select_prefix(self.arrays, f"{self.prefix}{name}/")
        self.used |= {f"{self.prefix}{name}/{key}" for key in selected}
        return selected

    def has(self, *names: str) -> bool:
        keys = [self.prefix + name for name in names]
        return any(k == key or k.startswith(key + "/") for k in self.arrays for key in keys)

    def row(
        self, quantity: str, deviation: float, is_f64: bool = False, note: str = ""
    ) -> VerifyRow:
        tolerance = tolerance_of(quantity, self.setup.dtype, is_f64)
        return VerifyRow(self.case, quantity, deviation, tolerance, deviation <= tolerance, note)

    def compare(
        self,
        quantity: str,
        actual: Any,
        measure: Callable[[np.ndarray, np.ndarray], float] = max_abs_diff,
    ) -> Iterator[VerifyRow]:
        """Yields a row if the case stores the quantity."""
        reference = self.stored(quantity)
        if reference is not None:
            actual = np.asarray(actual)
            note = (
                "" if actual.shape == reference[0].shape else f"shape {actual.shape} was computed"
            )
            yield self.row(quantity, measure(actual, reference[0]), reference[1], note)


class CompiledCase:
    """The compiled function of one case setup.

    one_batch(params, batch, step) -> (ForwardOutput, gradient or None, prefix output or None)
    """

    def __init__(self, setup: CaseSetup, with_gradient: bool = False, with_prefix: bool = False):
        def one_batch(params: Params, batch: Batch, step: Array):
            loss = partial(setup.outer_loss, batch=batch, step=step)
            prefix = setup.prefix_output(params, batch) if with_prefix else None
            if with_gradient:
                (_, output), grads = jax.value_and_grad(loss, has_aux=True)(params)
                return output, grads, prefix
            return loss(params)[1], None, prefix

        self.setup = setup
        self.one_batch = jax.jit(one_batch)


# Compiled functions by `cache_key`; verification of checkpoints uses them again.
Cache = dict[str, CompiledCase]


def cache_key(case: Mapping[str, Any], prefix: str) -> str:
    return prefix + json.dumps(case, sort_keys=True)


def check_e2e_case(
    path: Path, case: Mapping[str, Any], name: str, x64: bool, cache: Cache
) -> Iterator[VerifyRow]:
    """Rows of every setup of `case`, the JSON at `path`."""
    for field in golden.unknown_fields(case):
        yield VerifyRow(name, "settings", None, None, True, f"not known, ignored: {field}")
    try:
        arrays = golden.load_arrays(path.with_suffix(".npz"))
        setups = golden.case_setups(case, x64)
    except UserError as error:
        yield VerifyRow(name, "settings", None, None, False, str(error))
        return
    except KeyError as error:
        yield VerifyRow(name, "settings", None, None, False, f"the JSON has no field {error}")
        return
    used: set[str] = set()
    for prefix, setup in setups.items():
        comparison = _Comparison(name, prefix, arrays, setup)
        try:
            yield from _check_setup(case, comparison, cache)
        except UserError as error:
            yield VerifyRow(comparison.case, "settings", None, None, False, str(error))
        except KeyError as error:
            note = f"the JSON has no field {error}"
            yield VerifyRow(comparison.case, "settings", None, None, False, note)
        used |= comparison.used
    inputs = ("f64/", "params/", "batch/", "traj/input_ids", "traj/target_", "traj/loss_masks")
    uncompared = [key for key in arrays if key not in used and not key.startswith(inputs)]
    if uncompared:
        yield VerifyRow(name, "arrays", None, None, True, f"not compared: {', '.join(uncompared)}")


def first_step(case: Mapping[str, Any]) -> int:
    """Index of the outer step of the case's batch."""
    return int(case.get("step_index", case["training"].get("step_index", 0)))


def _check_setup(case: Mapping[str, Any], c: _Comparison, cache: Cache) -> Iterator[VerifyRow]:
    setup = c.setup
    param_dtype = jnp.dtype(setup.model.config.param_dtype)
    params = from_official(select_prefix(c.arrays, "params/"), setup.model, param_dtype)
    batch = golden.load_batch(c.arrays)
    step = jnp.asarray(first_step(case))
    has_steps = not c.prefix and c.has("traj", "final_params")
    with_gradient = has_steps or c.has("grads", "grad_norm", "grad_norm_official_metric")
    compiled = CompiledCase(setup, with_gradient, c.has("prefix_output"))
    cache[cache_key(case, c.prefix)] = compiled
    output, grads, prefix = compiled.one_batch(params, batch, step)
    rows = [
        *_inner_rates(case, c, step),
        *_losses(c, output, batch),
        *_inner_loop(c, output, prefix),
        *(_gradient(c, grads) if grads is not None else ()),
    ]
    if not rows:
        rows = [
            VerifyRow(c.case, "arrays", None, None, False, "the case stores nothing to compare")
        ]
    yield from rows
    if has_steps:
        yield from _optimizer_steps(case, c, compiled, params)


def _inner_rates(case: Mapping[str, Any], c: _Comparison, step: Array) -> Iterator[VerifyRow]:
    stored = case.get("effective_inner_lr")
    if c.setup.learn and isinstance(stored, int | float):
        actual = np.asarray(c.setup.inner_lr(step))
        yield c.row("inner_lr", max_abs_diff(actual, np.asarray(stored)))


def _losses(c: _Comparison, output: Any, batch: Batch) -> Iterator[VerifyRow]:
    rows = batch.inputs.shape[0]
    nll_BT = np.asarray(output.token_nll_T).reshape(rows, -1)
    chunk_loss_BN = np.asarray(output.chunk_loss_N).reshape(rows, -1)
    yield from c.compare("loss", np.mean(output.loss))
    yield from c.compare("seq_loss", np.asarray(output.loss).reshape(rows, -1).mean(axis=1))
    yield from c.compare("chunk_loss", chunk_loss_BN)
    yield from c.compare("token_nll", nll_BT)
    yield from c.compare("batch_mean_token_nll", nll_BT.mean(axis=0))
    yield from c.compare("batch_mean_chunk_loss", chunk_loss_BN.mean(axis=0))


def _inner_loop(c: _Comparison, output: Any, prefix_BTD: Any) -> Iterator[VerifyRow]:
    if prefix_BTD is not None:
        yield from c.compare("prefix_output", prefix_BTD, max_rel_diff)
    yield from c.compare("inner_grad_norm", output.grad_norm_N, max_rel_diff)
    expected = c.arrays_under("inner_final")
    if expected:
        actual = fast_to_official(output.fast, c.setup.model)
        yield c.row("inner_final", max_abs_diff_of_all(actual, expected))


def _gradient(c: _Comparison, grads: Params) -> Iterator[VerifyRow]:
    expected = c.arrays_under("grads")
    if expected:
        actual = to_official(grads, c.setup.model)
        worst, tree, name = relative_l2(actual, expected)
        yield c.row("grads, worst array", worst, note=name)
        yield c.row("grads, tree", tree)
    norm = optax.tree.norm(grads)
    yield from c.compare("grad_norm", norm, max_rel_diff)
    yield from c.compare("grad_norm_official_metric", _official_metric(grads), max_rel_diff)


def _official_metric(grads: Params) -> Array:
    return jnp.sqrt(jnp.square(optax.tree.norm(grads)) + OFFICIAL_METRIC_EPS)


def _optimizer_steps(
    case: Mapping[str, Any], c: _Comparison, compiled: CompiledCase, params: Params
) -> Iterator[VerifyRow]:
    """One optimizer step per stored batch, from a new optimizer state."""
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
        output, grads, _ = compiled.one_batch(params, batch, step)
        params, opt_state, metric = update(params, opt_state, grads)
        losses.append(np.mean(output.loss))
        metrics.append(np.asarray(metric))
    rates = np.asarray([schedule(i) for i in range(count)])
    stored_rates = case.get("effective_inner_lr_of_traj_steps")
    if stored_rates:
        actual = np.asarray([c.setup.inner_lr(int(step)) for step in steps])
        deviation = max_abs_diff(actual, np.asarray(stored_rates))
        yield c.row("inner_lr", deviation, note="of the optimizer steps")
    yield from c.compare("traj/loss", np.asarray(losses))
    yield from c.compare("traj/grad_norm_official_metric", np.asarray(metrics), max_rel_diff)
    yield from c.compare("traj/lr", rates)
    expected = c.arrays_under("final_params")
    if expected:
        final = to_official(params, c.setup.model)
        quantile, change, note = change_error(final, expected, select_prefix(c.arrays, "params/"))
        yield c.row("final_params, 99.9 %", quantile, note=note)
        yield c.row("final_params, change", change, note=note)
