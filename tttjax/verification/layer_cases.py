"""Verification of a reference case of the `layers` family: outputs, states and gradients.

Every form of the layer is compared. Intermediate arrays (`mid.`, `aux.`) are listed, not compared.

Measure: the largest difference of an array. In float32 it is divided by the array's largest entry
and compared with the tolerances of the reference's README; in float64 the tolerance of the absolute
difference is twice that of the case's own float64 restatement.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.errors import UserError
from tttjax.verification import layers
from tttjax.verification.golden import load_arrays
from tttjax.verification.layer_format import DESCRIPTIVE, CaseArrays, is_number
from tttjax.verification.layers import LayerForms
from tttjax.verification.rows import VerifyRow, max_abs_diff

OUTPUT_TOLERANCE = 1e-5  # float32: outputs and states
GRADIENT_TOLERANCE = 5e-5
INIT_GRADIENT_TOLERANCE = 1e-4  # the inner layer norm divides by a tiny standard deviation
# An epsilon of 1e-5 instead of 1e-6 in a TTT layer's last norm changes its output by about 1e-5;
# the noise is 1.5e-6. Absolute for outputs up to 4, proportional above that.
TTT_OUTPUT_TOLERANCE = 5e-6
TTT_OUTPUT_SCALE = 4.0

POSITIONS = "in.position_ids"
INPUTS = ("in.", "param.", "cot.")
OUTPUTS = ("out.", "state.", "mid.", "aux.")
INTERMEDIATE = ("mid.", "aux.")
GRADIENTS = {"grad_in.": "in.", "grad.": "param."}  # of which arrays


def check_layer_case(
    path: Path, case: Mapping[str, Any], name: str, x64: bool, cache: "LayerCache"
) -> Iterator[VerifyRow]:
    """Rows of the case described by `case`, the JSON at `path`."""
    dtype = "float64" if x64 else "float32"
    try:
        layer = layers.build_layer(case, dtype)
        arrays = load_arrays(path.with_suffix(".npz"))
        _check_listing(case, arrays)
        _check_positions(arrays)
        results = _compute(case, layer, arrays, dtype, cache)
        yield from _rows(layer, results, _LayerTolerances(case, x64), arrays, name)
    except UserError as error:
        yield VerifyRow(name, "settings", None, None, False, str(error))


def _check_listing(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError unless the arrays have the names and shapes that the JSON lists."""
    for name, shape in _object(case, "arrays").items():
        if name not in arrays:
            raise UserError(f"the case has no array {name}, which its JSON lists")
        if list(arrays[name].shape) != shape:
            raise UserError(f"{name} has shape {list(arrays[name].shape)}; its JSON says {shape}")


def _object(case: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An optional object in the JSON. Raises UserError if it is not an object."""
    value = case.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"the JSON's field {name!r} is {value!r}, not an object by array")
    return value


def _rows(
    layer: LayerForms,
    results: "LayerResults",
    tolerances: "_LayerTolerances",
    arrays: Mapping[str, np.ndarray],
    name: str,
) -> Iterator[VerifyRow]:
    for setting in layer.unknown:
        yield VerifyRow(name, "settings", None, None, True, f"not known, ignored: {setting}")
    unused = [n for n in arrays if n.startswith("param.") and n not in results.requested]
    if unused:
        raise UserError(f"the layer has no parameter {', '.join(unused)}")

    compared: set[str] = set()
    rows = []
    for form in layer.forms:
        computed = results.outputs[form]
        for array in sorted(set(computed) & set(arrays), key=_order):
            rows.append(tolerances.row(f"{name}/{form}", {array: computed[array]}, arrays))
            compared.add(array)
    for prefix in GRADIENTS:
        gradients = {n: g for n, g in results.gradients.items() if n.startswith(prefix)}
        if gradients:
            rows.append(tolerances.row(name, gradients, arrays, f"{prefix}*, worst array"))
            compared |= set(gradients)
    if not rows:
        raise UserError("the case stores nothing to compare")
    yield from rows
    uncompared = [n for n in arrays if n not in compared and not n.startswith(INPUTS)]
    inputs = [n for n in arrays if n.startswith("in.") and n not in results.requested | {POSITIONS}]
    if uncompared or inputs:
        only_intermediate = all(array.startswith(INTERMEDIATE) for array in uncompared)
        yield VerifyRow(
            name,
            "arrays",
            None,
            None,
            only_intermediate,
            f"not compared: {', '.join(uncompared + inputs)}",
        )


def _order(name: str) -> tuple[int, str]:
    return next(i for i, prefix in enumerate(OUTPUTS) if name.startswith(prefix)), name


def _check_positions(arrays: Mapping[str, np.ndarray]) -> None:
    position_BT = arrays.get(POSITIONS)
    if position_BT is not None and np.any(position_BT != np.arange(position_BT.shape[-1])):
        raise UserError(f"unsupported setting: {POSITIONS} are not 0, 1, 2, ... in every sequence")


# --- computation ----------------------------------------------------------------------------------


class LayerResults(NamedTuple):
    """outputs: of every form, by name. gradients: by name, those that the case stores.

    requested: names of the arrays that the layer uses.
    """

    outputs: dict[str, dict[str, np.ndarray]]
    gradients: dict[str, np.ndarray]
    requested: set[str]


class _CompiledLayer:
    """All forms of a layer in one compiled function: (differentiated, inputs) -> results.

    Both arguments are arrays of a case by name; gradients are those of the first form with respect
    to `differentiated`, none if that is empty.
    """

    def __init__(self, layer: LayerForms):
        self.layer = layer
        self.requested: set[str] = set()
        self.training, *self.other_forms = layer.forms
        # Halves the time on a CPU: the code runs once, so compile time dominates.
        on_cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        self.run = jax.jit(self._all_forms, compiler_options=options)

    def _all_forms(self, differentiated, inputs):
        if differentiated:
            gradients, outputs = jax.grad(self._objective, has_aux=True)(differentiated, inputs)
        else:
            gradients, outputs = {}, self._form(self.training, inputs)
        inputs = {**inputs, **differentiated}
        other_forms = {name: self._form(name, inputs) for name in self.other_forms}
        return {self.training: outputs, **other_forms}, gradients

    def _objective(self, differentiated, inputs):
        """(sum of outputs times their cotangents, outputs)."""
        outputs = self._form(self.training, {**inputs, **differentiated})
        total = jnp.zeros(())
        for cotangent, name in self.layer.cotangents.items():
            if cotangent in inputs:
                weights = CaseArrays(inputs)(cotangent, *outputs[name].shape)
                total += jnp.sum(outputs[name] * weights)
        return total, outputs

    def _form(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self.layer.forms[name](CaseArrays(inputs, requested=self.requested))


# Compiled functions by the settings of the layer, which cases can share.
LayerCache = dict[str, _CompiledLayer]


def _compute(
    case: Mapping[str, Any],
    layer: LayerForms,
    arrays: Mapping[str, np.ndarray],
    dtype: str,
    cache: LayerCache,
) -> LayerResults:
    inputs = {n: _cast(a, dtype) for n, a in arrays.items() if n.startswith(INPUTS)}
    sources = {
        name: of + name[len(prefix) :]
        for prefix, of in GRADIENTS.items()
        for name in arrays
        if name.startswith(prefix)
    }
    sources = {name: source for name, source in sources.items() if source in inputs}
    if sources and not set(layer.cotangents) & set(inputs):
        raise UserError(f"the case has gradients, but no {' or '.join(layer.cotangents)}")
    settings = {k: v for k, v in case["config"].items() if k not in DESCRIPTIVE}
    key = json.dumps([case["layer"], settings, dtype], sort_keys=True)
    function = cache.setdefault(key, _CompiledLayer(layer))
    differentiated = {source: inputs.pop(source) for source in sources.values()}
    outputs, gradients = jax.device_get(function.run(differentiated, inputs))
    results = {name: gradients[source] for name, source in sources.items()}
    return LayerResults(outputs, results, function.requested)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(dtype if np.issubdtype(array.dtype, np.floating) else np.int32)


# --- tolerances -----------------------------------------------------------------------------------


class _LayerTolerances:
    """The tolerances of a case's arrays; compares arrays with them."""

    def __init__(self, case: Mapping[str, Any], x64: bool):
        self.x64 = x64
        self.noise: dict[str, float] = {}
        for name, entry in _object(case, "float64_restatement").items():
            noise: Any = entry.get("max_abs_diff") if isinstance(entry, Mapping) else None
            if not is_number(noise):
                raise UserError(f"float64_restatement.{name} is {entry!r}, without max_abs_diff")
            self.noise[name] = noise
        self.is_ttt_layer = str(case["layer"]).startswith("ttt_")
        is_init = case["config"].get("params") == "reference_init"
        self.gradient = INIT_GRADIENT_TOLERANCE if is_init else GRADIENT_TOLERANCE

    def row(
        self,
        case: str,
        computed: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        quantity: str = "",
    ) -> VerifyRow:
        """A row for the array with the largest deviation relative to its tolerance."""
        measured = {n: self._measure(n, actual, arrays[n]) for n, actual in computed.items()}
        worst = max(measured, key=lambda n: _ratio(*measured[n]))
        deviation, tolerance = measured[worst]
        note = "" if worst == (quantity or worst) else worst
        if computed[worst].shape != arrays[worst].shape:
            note = f"{worst}: shape {computed[worst].shape} was computed"
        ok = all(deviation <= tolerance for deviation, tolerance in measured.values())
        return VerifyRow(case, quantity or worst, deviation, tolerance, ok, note)

    def _measure(self, name: str, actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
        """(deviation, tolerance)"""
        size = float(np.max(np.abs(expected), initial=0.0)) or 1.0
        deviation = max_abs_diff(actual, expected)
        if not self.x64:
            return deviation / size, self._relative(name, size)
        noise = self.noise.get(name)
        if noise is None:
            return deviation, self._relative(name, size) * size
        rounding = float(np.finfo(np.float32).eps) / 2 * size  # of an array stored in float32
        return deviation, max(2 * noise, rounding)

    def _relative(self, name: str, size: float) -> float:
        if name.startswith(tuple(GRADIENTS)):
            return self.gradient
        if self.is_ttt_layer and name == "out.y":
            return min(OUTPUT_TOLERANCE, TTT_OUTPUT_TOLERANCE / min(size, TTT_OUTPUT_SCALE))
        return OUTPUT_TOLERANCE


def _ratio(deviation: float, tolerance: float) -> float:
    return float(np.nan_to_num(deviation / tolerance, nan=np.inf))
