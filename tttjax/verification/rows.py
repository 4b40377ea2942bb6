"""Result rows of the verification, tolerances, and measures of deviations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class VerifyRow:
    """One row of the result table. deviation, tolerance: None if the row only has a note."""

    case: str
    quantity: str
    deviation: float | None
    tolerance: float | None
    ok: bool
    note: str = ""


class Tolerances(NamedTuple):
    """Tolerances of a quantity by the precision of the computation and of the reference.

    float32: the reference README's "reasonable pass limits", about ten times the measured noise.
    float64: against `f64/` arrays; None if there are none.
    float64_to_32: computed in float64 against float32 numbers, a few times their stated noise.
    bfloat16: computed in bfloat16, whose steps are 2^-8 of a value.
    """

    float32: float
    float64: float | None
    float64_to_32: float
    bfloat16: float


# In the units of each quantity's measure (see `cases`).
TOLERANCES = {
    "inner_lr": Tolerances(1e-6, None, 1e-12, 1e-6),
    "loss": Tolerances(1e-5, 1e-10, 2e-6, 2e-2),
    "seq_loss": Tolerances(1e-5, 1e-10, 2e-6, 2e-2),
    "chunk_loss": Tolerances(2e-5, 1e-10, 5e-6, 5e-2),
    "token_nll": Tolerances(5e-5, 1e-10, 2e-5, 0.25),
    "batch_mean_token_nll": Tolerances(5e-5, 1e-10, 2e-5, 0.25),
    "batch_mean_chunk_loss": Tolerances(2e-5, 1e-10, 5e-6, 5e-2),
    "prefix_output": Tolerances(1e-5, 1e-10, 5e-6, 5e-2),
    "inner_grad_norm": Tolerances(4e-5, 1e-10, 1e-5, 5e-2),
    "inner_final": Tolerances(5e-6, 1e-10, 2e-6, 2e-2),
    "grads, worst array": Tolerances(1e-4, 1e-9, 1e-5, 0.2),
    "grads, tree": Tolerances(5e-5, 1e-9, 6e-6, 0.1),
    "grad_norm": Tolerances(1e-5, 1e-10, 2e-6, 5e-2),
    "grad_norm_official_metric": Tolerances(1e-5, 1e-10, 2e-6, 5e-2),
    "traj/loss": Tolerances(2e-5, 1e-8, 5e-6, 2e-2),
    "traj/grad_norm_official_metric": Tolerances(2e-5, 1e-8, 5e-6, 5e-2),
    "traj/lr": Tolerances(1e-6, 1e-12, 1e-6, 1e-6),
    "final_params, 99.9 %": Tolerances(2e-6, 1e-8, 1e-6, 5e-3),
    "final_params, change": Tolerances(1e-3, 1e-5, 2e-4, 0.3),
}


def tolerance_of(quantity: str, dtype: str, reference_is_f64: bool) -> float:
    """The tolerance of a quantity computed in `dtype`."""
    tolerances = TOLERANCES[quantity]
    if dtype == "bfloat16":
        return tolerances.bfloat16
    if dtype == "float32":
        return tolerances.float32
    return (
        tolerances.float64 if reference_is_f64 and tolerances.float64 else tolerances.float64_to_32
    )


Arrays = Mapping[str, np.ndarray]


def max_abs_diff(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of two arrays; infinity if their shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.max(np.abs(actual.astype(np.float64) - expected), initial=0.0))


def max_rel_diff(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, divided by the reference's largest entry where that is above 1."""
    return max_abs_diff(actual, expected) / float(np.max(np.abs(expected), initial=1.0))


def max_abs_diff_of_all(actual: Arrays, expected: Arrays) -> float:
    """`max_abs_diff` over arrays of the same names; infinity if the names differ."""
    if set(actual) != set(expected):
        return float("inf")
    return float(np.max([max_abs_diff(actual[name], expected[name]) for name in expected]))


def _differences(actual: Arrays, expected: Arrays) -> dict[str, np.ndarray] | None:
    same = set(actual) == set(expected) and all(
        actual[n].shape == expected[n].shape for n in expected
    )
    return {n: actual[n].astype(np.float64) - expected[n] for n in expected} if same else None


def _norm(arrays: Arrays) -> float:
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays.values())))


def relative_l2(actual: Arrays, expected: Arrays) -> tuple[float, float, str]:
    """(||actual - expected|| / ||expected|| of the worst array, of the tree, the worst's name)."""
    difference = _differences(actual, expected)
    if difference is None:
        return float("inf"), float("inf"), _mismatch(actual, expected)
    floor = 1e-6 * _norm(expected) or 1.0  # for arrays whose gradient is 0
    errors = {
        n: float(np.linalg.norm(difference[n]) / max(float(np.linalg.norm(expected[n])), floor))
        for n in expected
    }
    worst = max(errors, key=lambda n: np.nan_to_num(errors[n], nan=np.inf))
    return errors[worst], _norm(difference) / (_norm(expected) or 1.0), worst


def change_error(actual: Arrays, expected: Arrays, start: Arrays) -> tuple[float, float, str]:
    """(99.9 % quantile of |difference|, ||difference|| / ||expected - start||, note)."""
    difference = _differences(actual, expected)
    if difference is None:
        return float("inf"), float("inf"), _mismatch(actual, expected)
    entries = np.concatenate([np.abs(d).ravel() for d in difference.values()])
    expected_change = _norm({n: expected[n].astype(np.float64) - start[n] for n in expected})
    return float(np.quantile(entries, 0.999)), _norm(difference) / (expected_change or 1.0), ""


def _mismatch(actual: Arrays, expected: Arrays) -> str:
    if set(actual) == set(expected):
        return "shapes differ: " + ", ".join(
            n for n in expected if actual[n].shape != expected[n].shape
        )
    return "names differ: " + ", ".join(sorted(set(actual) ^ set(expected)))
