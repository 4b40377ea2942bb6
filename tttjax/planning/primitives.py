"""FLOPs, bytes and collectives of single operations of a jaxpr.

Only matrix products and convolutions are counted (2 FLOPs per multiply-add). A flash attention
kernel counts the pairs of query and key that its mask lets through: two products forward, and five
backward, where it computes the scores again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import JaxprEqn

from tttjax.planning.constant_folding import aval_of
from tttjax.planning.flops import mean_keys

Axes = Mapping[str, int]  # sizes of the manual mesh axes


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind and size. bytes: the larger of operands and results on one device.

    group_size: devices in a replica group. times: per step.
    """

    kind: str
    bytes: float
    group_size: int
    times: float = 1.0


@dataclass(frozen=True)
class Count:
    """Counts of a program over all devices; transfers are those of one device.

    flops: of matrix products and convolutions. product_bytes: of their operands and results.
    unknown_loops: loops of unknown trip count, counted once.
    """

    flops: float = 0.0
    product_bytes: float = 0.0
    unknown_loops: int = 0
    transfers: tuple[Transfer, ...] = ()

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.flops + other.flops,
            self.product_bytes + other.product_bytes,
            self.unknown_loops + other.unknown_loops,
            self.transfers + other.transfers,
        )

    def times(self, trip_count: float) -> "Count":
        """The count of a loop with this body."""
        return Count(
            self.flops * trip_count,
            self.product_bytes * trip_count,
            self.unknown_loops,
            tuple(replace(t, times=t.times * trip_count) for t in self.transfers),
        )

    def on_devices(self, devices: int) -> "Count":
        """The count of this program run by each of `devices` devices."""
        return replace(self, flops=self.flops * devices, product_bytes=self.product_bytes * devices)


def size_in_bytes(var: Any) -> int:
    """Of a variable or literal of a jaxpr; 0 if it is not an array (tokens, keys)."""
    shape, dtype = getattr(var.aval, "shape", None), getattr(var.aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def product(eqn: JaxprEqn, flops: float) -> Count:
    return Count(flops, sum(size_in_bytes(var) for var in (*eqn.invars, *eqn.outvars)))


def _dot_general(eqn: JaxprEqn, axes: Axes) -> Count:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = aval_of(eqn.invars[0]).shape
    depth = math.prod(left[i] for i in contracted)
    return product(eqn, 2.0 * depth * math.prod(aval_of(eqn.outvars[0]).shape))


def _convolution(eqn: JaxprEqn, axes: Axes) -> Count:
    """Each output sums over the kernel's taps and the input features of its feature group."""
    kernel = aval_of(eqn.invars[1]).shape
    out_dimension = eqn.params["dimension_numbers"].rhs_spec[0]
    depth = math.prod(kernel) // kernel[out_dimension]
    return product(eqn, 2.0 * depth * math.prod(aval_of(eqn.outvars[0]).shape))


def _triangular_solve(eqn: JaxprEqn, axes: Axes) -> Count:
    matrix, right = (aval_of(var).shape for var in eqn.invars)
    return product(eqn, float(matrix[-1] * math.prod(right)))


def _flash_attention(products: int) -> Callable[[JaxprEqn, Axes], Count]:
    """cuDNN's attention. products: matrix products over the visible pairs."""

    def rule(eqn: JaxprEqn, axes: Axes) -> Count:
        batch, length, heads, head_dim = aval_of(eqn.invars[0]).shape
        window = eqn.params["sliding_window_length"] or length
        pairs = batch * heads * length * mean_keys(length, window)
        return product(eqn, products * 2 * pairs * head_dim)

    return rule


def _collective(kind: str) -> Callable[[JaxprEqn, Axes], Count]:
    def rule(eqn: JaxprEqn, axes: Axes) -> Count:
        names = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
        names = names if isinstance(names, tuple | list) else (names,)
        group_size = math.prod(axes.get(name, 1) for name in names)
        if group_size == 1:
            return Count()
        size = max(sum(map(size_in_bytes, atoms)) for atoms in (eqn.invars, eqn.outvars))
        return Count(transfers=(Transfer(kind, size, group_size),))

    return rule


# Names in JAX; products of each.
FLASH_ATTENTION = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}
RULES: dict[str, Callable[[JaxprEqn, Axes], Count]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "triangular_solve": _triangular_solve,
    **{name: _flash_attention(products) for name, products in FLASH_ATTENTION.items()},
    **dict.fromkeys(("psum", "psum_invariant"), _collective("all-reduce")),
    "all_gather": _collective("all-gather"),
    "reduce_scatter": _collective("reduce-scatter"),
    "all_to_all": _collective("all-to-all"),
    "ppermute": _collective("collective-permute"),
}
