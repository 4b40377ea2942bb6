"""One case of the `layers` family: outputs and states of every form of the layer, its gradients.

What lies between (`mid.`, `aux.`) is named and not compared.

Measure: the largest difference of an array. In float32 it is divided by the array's largest entry
and held to the limits that the reference's README gives; in float64 it is compared as it is with
twice the difference that the case's own float64 restatement found.
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
from tttjax.verification.layer_format import DESCRIPTIVE, Stored, is_number
from tttjax.verification.layers import Layer
from tttjax.verification.rows import VerifyRow, absolute

OUTPUT_LIMIT = 1e-5  # float32: outputs and states
GRADIENT_LIMIT = 5e-5
INIT_GRADIENT_LIMIT = 1e-4  # the inner layer norm divides by a tiny standard deviation
# An epsilon of 1e-5 instead of 1e-6 in a TTT layer's last norm moves its output by about 1e-5, the
# noise is 1.5e-6: absolute for outputs up to 4, in proportion above that.
TTT_OUTPUT_LIMIT = 5e-6
TTT_OUTPUT_SIZE = 4.0

POSITIONS = "in.position_ids"
INPUTS = ("in.", "param.", "cot.")
OUTPUTS = ("out.", "state.", "mid.", "aux.")
BETWEEN = ("mid.", "aux.")
GRADIENTS = {"grad_in.": "in.", "grad.": "param."}  # of which arrays


def check_layer_case(
    path: Path, case: Mapping[str, Any], name: str, x64: bool, cache: "LayerCache"
) -> Iterator[VerifyRow]:
    """Rows of the case described by `case`, the JSON at `path`."""
    dtype = "float64" if x64 else "float32"
    try:
        layer = layers.read_layer(case, dtype)
        arrays = load_arrays(path.with_suffix(".npz"))
        _check_listing(case, arrays)
        _check_positions(arrays)
        found = _compute(case, layer, arrays, dtype, cache)
        yield from _rows(layer, found, _Limits(case, x64), arrays, name)
    except UserError as error:
        yield VerifyRow(name, "settings", None, None, False, str(error))


def _check_listing(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """The arrays that the JSON lists are there, and as large as it says."""
    for name, shape in _object(case, "arrays").items():
        if name not in arrays:
            raise UserError(f"the case has no array {name}, which its JSON lists")
        if list(arrays[name].shape) != shape:
            raise UserError(f"{name} has shape {list(arrays[name].shape)}; its JSON says {shape}")


def _object(case: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field of the JSON that may be missing; UserError if it is something else than an object."""
    value = case.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"the JSON's field {name!r} is {value!r}, not an object by array")
    return value


def _rows(
    layer: Layer,
    found: "Computed",
    limits: "_Limits",
    arrays: Mapping[str, np.ndarray],
    name: str,
) -> Iterator[VerifyRow]:
    for setting in layer.unknown:
        yield VerifyRow(name, "settings", None, None, True, f"not known, ignored: {setting}")
    unused = [n for n in arrays if n.startswith("param.") and n not in found.asked]
    if unused:
        raise UserError(f"the layer has no parameter {', '.join(unused)}")

    compared: set[str] = set()
    rows = []
    for form in layer.forms:
        computed = found.outputs[form]
        for array in sorted(set(computed) & set(arrays), key=_order):
            rows.append(limits.row(f"{name}/{form}", {array: computed[array]}, arrays))
            compared.add(array)
    for prefix in GRADIENTS:
        group = {n: g for n, g in found.gradients.items() if n.startswith(prefix)}
        if group:
            rows.append(limits.row(name, group, arrays, f"{prefix}*, worst array"))
            compared |= set(group)
    if not rows:
        raise UserError("the case stores nothing to compare")
    yield from rows
    left = [n for n in arrays if n not in compared and not n.startswith(INPUTS)]
    inputs = [n for n in arrays if n.startswith("in.") and n not in found.asked | {POSITIONS}]
    if left or inputs:
        between = all(array.startswith(BETWEEN) for array in left)
        yield VerifyRow(
            name, "arrays", None, None, between, f"not compared: {', '.join(left + inputs)}"
        )


def _order(name: str) -> tuple[int, str]:
    return next(i for i, prefix in enumerate(OUTPUTS) if name.startswith(prefix)), name


def _check_positions(arrays: Mapping[str, np.ndarray]) -> None:
    position_BT = arrays.get(POSITIONS)
    if position_BT is not None and np.any(position_BT != np.arange(position_BT.shape[-1])):
        raise UserError(f"unsupported setting: {POSITIONS} are not 0, 1, 2, ... in every sequence")


# --- computation ----------------------------------------------------------------------------------


class Computed(NamedTuple):
    """outputs: of every form, by name. gradients: by name, as far as the case stores them.

    asked: names of the arrays that the layer took.
    """

    outputs: dict[str, dict[str, np.ndarray]]
    gradients: dict[str, np.ndarray]
    asked: set[str]


class _Function:
    """Everything of a layer in one compiled function: (differentiated, given) -> results.

    Both arguments are arrays of a case by name; gradients are those of the first form with respect
    to `differentiated`, none if that is empty.
    """

    def __init__(self, layer: Layer):
        self.layer = layer
        self.asked: set[str] = set()
        self.training, *self.others = layer.forms
        # On a CPU half the time: the code is run once and need not be fast.
        on_cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        self.run = jax.jit(self._everything, compiler_options=options)

    def _everything(self, differentiated, given):
        if differentiated:
            gradients, outputs = jax.grad(self._objective, has_aux=True)(differentiated, given)
        else:
            gradients, outputs = {}, self._form(self.training, given)
        given = {**given, **differentiated}
        others = {name: self._form(name, given) for name in self.others}
        return {self.training: outputs, **others}, gradients

    def _objective(self, differentiated, given):
        """The sum over outputs and their cotangents, and the outputs."""
        outputs = self._form(self.training, {**given, **differentiated})
        total = jnp.zeros(())
        for cotangent, name in self.layer.cotangents.items():
            if cotangent in given:
                weights = Stored(given)(cotangent, *outputs[name].shape)
                total += jnp.sum(outputs[name] * weights)
        return total, outputs

    def _form(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.layer.forms[name](Stored(given, asked=self.asked))


# Compiled functions by the settings of the layer: cases may differ in their numbers alone.
LayerCache = dict[str, _Function]


def _compute(
    case: Mapping[str, Any],
    layer: Layer,
    arrays: Mapping[str, np.ndarray],
    dtype: str,
    cache: LayerCache,
) -> Computed:
    given = {n: _cast(a, dtype) for n, a in arrays.items() if n.startswith(INPUTS)}
    sources = {
        name: of + name[len(prefix) :]
        for prefix, of in GRADIENTS.items()
        for name in arrays
        if name.startswith(prefix)
    }
    sources = {name: source for name, source in sources.items() if source in given}
    if sources and not set(layer.cotangents) & set(given):
        raise UserError(f"the case has gradients, but no {' or '.join(layer.cotangents)}")
    settings = {k: v for k, v in case["config"].items() if k not in DESCRIPTIVE}
    key = json.dumps([case["layer"], settings, dtype], sort_keys=True)
    function = cache.setdefault(key, _Function(layer))
    differentiated = {source: given.pop(source) for source in sources.values()}
    outputs, gradients = jax.device_get(function.run(differentiated, given))
    found = {name: gradients[source] for name, source in sources.items()}
    return Computed(outputs, found, function.asked)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(dtype if np.issubdtype(array.dtype, np.floating) else np.int32)


# --- tolerances -----------------------------------------------------------------------------------


class _Limits:
    """How far the arrays of a case may be off, and the rows that follow."""

    def __init__(self, case: Mapping[str, Any], x64: bool):
        self.x64 = x64
        self.figures: dict[str, float] = {}
        for name, found in _object(case, "float64_restatement").items():
            figure: Any = found.get("max_abs_diff") if isinstance(found, Mapping) else None
            if not is_number(figure):
                raise UserError(f"float64_restatement.{name} is {found!r}, without max_abs_diff")
            self.figures[name] = figure
        self.is_ttt_layer = str(case["layer"]).startswith("ttt_")
        is_init = case["config"].get("params") == "reference_init"
        self.gradient = INIT_GRADIENT_LIMIT if is_init else GRADIENT_LIMIT

    def row(
        self,
        case: str,
        computed: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        quantity: str = "",
    ) -> VerifyRow:
        """The array that is farthest beyond, or nearest to, its limit stands for all of them."""
        each = {n: self._measure(n, got, arrays[n]) for n, got in computed.items()}
        worst = max(each, key=lambda n: _ratio(*each[n]))
        deviation, tolerance = each[worst]
        note = "" if worst == (quantity or worst) else worst
        if computed[worst].shape != arrays[worst].shape:
            note = f"{worst}: shape {computed[worst].shape} was computed"
        ok = all(deviation <= tolerance for deviation, tolerance in each.values())
        return VerifyRow(case, quantity or worst, deviation, tolerance, ok, note)

    def _measure(self, name: str, got: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
        """(deviation, tolerance)"""
        size = float(np.max(np.abs(wanted), initial=0.0)) or 1.0
        deviation = absolute(got, wanted)
        if not self.x64:
            return deviation / size, self._relative(name, size)
        figure = self.figures.get(name)
        if figure is None:
            return deviation, self._relative(name, size) * size
        rounding = float(np.finfo(np.float32).eps) / 2 * size  # of an array stored in float32
        return deviation, max(2 * figure, rounding)

    def _relative(self, name: str, size: float) -> float:
        if name.startswith(tuple(GRADIENTS)):
            return self.gradient
        if self.is_ttt_layer and name == "out.y":
            return min(OUTPUT_LIMIT, TTT_OUTPUT_LIMIT / min(size, TTT_OUTPUT_SIZE))
        return OUTPUT_LIMIT


def _ratio(deviation: float, tolerance: float) -> float:
    return float(np.nan_to_num(deviation / tolerance, nan=np.inf))
