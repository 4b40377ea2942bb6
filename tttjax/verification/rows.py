"""What a check found, how far it may be off, and how deviations are measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class VerifyRow:
    """One line of the table.

    deviation, tolerance: None for a line that only says something (`note`).
    """

    case: str
    quantity: str
    deviation: float | None
    tolerance: float | None
    ok: bool
    note: str = ""


class Limits(NamedTuple):
    """Largest deviation that passes, by the precision of computation and of the reference.

    float32: the reference README's "reasonable pass limits", about ten times the measured noise.
    float64: against `f64/` arrays, None where there are none.
    float64_to_32: computed in float64 against float32 numbers, a few times their stated noise.
    bfloat16: computed in bfloat16, whose steps are 2^-8 of a value.
    """

    float32: float
    float64: float | None
    float64_to_32: float
    bfloat16: float


# In the units of the quantity's measure: see `cases`.
LIMITS = {
    "inner_lr": Limits(1e-6, None, 1e-12, 1e-6),
    "loss": Limits(1e-5, 1e-10, 2e-6, 2e-2),
    "seq_loss": Limits(1e-5, 1e-10, 2e-6, 2e-2),
    "chunk_loss": Limits(2e-5, 1e-10, 5e-6, 5e-2),
    "token_nll": Limits(5e-5, 1e-10, 2e-5, 0.25),
    "batch_mean_token_nll": Limits(5e-5, 1e-10, 2e-5, 0.25),
    "batch_mean_chunk_loss": Limits(2e-5, 1e-10, 5e-6, 5e-2),
    "prefix_output": Limits(1e-5, 1e-10, 5e-6, 5e-2),
    "inner_grad_norm": Limits(4e-5, 1e-10, 1e-5, 5e-2),
    "inner_final": Limits(5e-6, 1e-10, 2e-6, 2e-2),
    "grads, worst array": Limits(1e-4, 1e-9, 1e-5, 0.2),
    "grads, tree": Limits(5e-5, 1e-9, 6e-6, 0.1),
    "grad_norm": Limits(1e-5, 1e-10, 2e-6, 5e-2),
    "grad_norm_official_metric": Limits(1e-5, 1e-10, 2e-6, 5e-2),
    "traj/loss": Limits(2e-5, 1e-8, 5e-6, 2e-2),
    "traj/grad_norm_official_metric": Limits(2e-5, 1e-8, 5e-6, 5e-2),
    "traj/lr": Limits(1e-6, 1e-12, 1e-6, 1e-6),
    "final_params, 99.9 %": Limits(2e-6, 1e-8, 1e-6, 5e-3),
    "final_params, change": Limits(1e-3, 1e-5, 2e-4, 0.3),
}


def limit(quantity: str, dtype: str, reference_is_f64: bool) -> float:
    """The tolerance of a quantity computed in `dtype`."""
    limits = LIMITS[quantity]
    if dtype == "bfloat16":
        return limits.bfloat16
    if dtype == "float32":
        return limits.float32
    return limits.float64 if reference_is_f64 and limits.float64 else limits.float64_to_32


Arrays = Mapping[str, np.ndarray]


def absolute(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference of two arrays; infinity if their shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return float(np.max(np.abs(got.astype(np.float64) - wanted), initial=0.0))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, divided by the reference's largest entry where that is above 1."""
    return absolute(got, wanted) / float(np.max(np.abs(wanted), initial=1.0))


def absolute_of_all(got: Arrays, wanted: Arrays) -> float:
    """`absolute` over arrays of the same names; infinity if the names differ."""
    if set(got) != set(wanted):
        return float("inf")
    return float(np.max([absolute(got[name], wanted[name]) for name in wanted]))


def _differences(got: Arrays, wanted: Arrays) -> dict[str, np.ndarray] | None:
    same = set(got) == set(wanted) and all(got[n].shape == wanted[n].shape for n in wanted)
    return {n: got[n].astype(np.float64) - wanted[n] for n in wanted} if same else None


def _norm(arrays: Arrays) -> float:
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays.values())))


def relative_norm(got: Arrays, wanted: Arrays) -> tuple[float, float, str]:
    """||got - wanted|| / ||wanted|| of the worst array, of all together, and the worst's name."""
    difference = _differences(got, wanted)
    if difference is None:
        return float("inf"), float("inf"), _names_that_differ(got, wanted)
    floor = 1e-6 * _norm(wanted) or 1.0  # an array whose gradient is 0 has no scale of its own
    each = {
        n: float(np.linalg.norm(difference[n]) / max(float(np.linalg.norm(wanted[n])), floor))
        for n in wanted
    }
    worst = max(each, key=lambda n: np.nan_to_num(each[n], nan=np.inf))
    return each[worst], _norm(difference) / (_norm(wanted) or 1.0), worst


def change(got: Arrays, wanted: Arrays, start: Arrays) -> tuple[float, float, str]:
    """99.9 % quantile of |got - wanted|, and ||got - wanted|| / ||wanted - start||."""
    difference = _differences(got, wanted)
    if difference is None:
        return float("inf"), float("inf"), _names_that_differ(got, wanted)
    entries = np.concatenate([np.abs(d).ravel() for d in difference.values()])
    moved = _norm({n: wanted[n].astype(np.float64) - start[n] for n in wanted})
    return float(np.quantile(entries, 0.999)), _norm(difference) / (moved or 1.0), ""


def _names_that_differ(got: Arrays, wanted: Arrays) -> str:
    if set(got) == set(wanted):
        return "shapes differ: " + ", ".join(n for n in wanted if got[n].shape != wanted[n].shape)
    return "names differ: " + ", ".join(sorted(set(got) ^ set(wanted)))
