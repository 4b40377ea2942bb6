"""Weights under the names of the official TTT-E2E code, both ways.

The official code stacks all blocks on one axis, keeps matrices as [in, out] and the fast MLPs in a
store of their own (`prime_storage`, row j for suffix block j). Here prefix and suffix are stacked
apart and attention weights carry the head axis.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tttjax.errors import UserError
from tttjax.interop.streaming import WeightPiece
from tttjax.models import Transformer, combine, partition
from tttjax.types import Params

BLOCKS = "language_model.model.h.blocks."
PRIME = "language_model.model.h.prime_storage."
SUFFIX = "language_model.model.h.suffix_blocks."

ENDS = {
    "embedding": "language_model.model.wte.weight",
    "final_norm/weight": "language_model.model.ln_f.weight",
    "head": "language_model.lm_head.weight",
}
OF_BLOCK = {
    **{f"mixer/{w}": f"seq_modeling_block.{w}.weight" for w in ("wq", "wk", "wv", "wo")},
    **{f"mixer/{n}/weight": f"seq_modeling_block.{n}.weight" for n in ("q_norm", "k_norm")},
    **{f"mlp/{w}": f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")},
    "mixer_norm/weight": "seq_norm.weight",
    "mixer_post_norm/weight": "seq_post_norm.weight",
    "mlp_norm/weight": "ffn_norm.weight",
    "mlp_post_norm/weight": "ffn_post_norm.weight",
}
OF_FAST_MLP = {
    **{f"fast_mlp/{w}": f"feed_forward_prime.{w}.weight" for w in ("w1", "w2", "w3")},
    "fast_mlp_norm/weight": "ffn_prime_norm.weight",
    "fast_mlp_post_norm/weight": "ffn_prime_post_norm.weight",
}


class TensorName(NamedTuple):
    """Where one array of one block (or an end) lies here and there."""

    path: str
    row: int | None
    official: str
    official_row: int | None


def places(model: Transformer) -> list[TensorName]:
    """Every weight of the model, block by block, with its official name and row."""
    paths = flatten_dict(combine(*_slow_fast(model)), sep="/")
    found = [TensorName(path, None, name, None) for path, name in ENDS.items() if path in paths]
    first_of_suffix = model.num_layers - model.suffix_layers
    for layer, (stack, row) in enumerate(model.block_paths()):
        for of, prefix, official_row in (
            (OF_BLOCK, BLOCKS, layer),
            (OF_FAST_MLP, PRIME, layer - first_of_suffix),
        ):
            found += [
                TensorName(f"{stack}/{name}", row, prefix + official, official_row)
                for name, official in of.items()
                if f"{stack}/{name}" in paths
            ]
    return found


def _slow_fast(model: Transformer):
    abstract = model.abstract_params()
    return abstract.slow, abstract.fast


def suffix_names(model: Transformer) -> dict[str, str]:
    """Path of every weight that may be fast -> its official name during the forward pass."""
    names = {path: name for path, name in ENDS.items() if path != "embedding"}
    for place in places(model):
        if place.path.startswith("suffix/"):
            names[place.path] = place.official.replace(BLOCKS, SUFFIX).replace(PRIME, SUFFIX)
    return names


def official_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every weight that the model has."""
    abstract = flatten_dict(combine(*_slow_fast(model)), sep="/")
    shapes, rows = {}, Counter(place.official for place in places(model))
    for place in places(model):
        shape = abstract[place.path].shape
        if place.row is not None:
            shape = (rows[place.official], *_matrix_shape(place.path, shape[1:]))
        shapes[place.official] = shape
    return shapes


def check_arrays(arrays: Mapping[str, Any], model: Transformer) -> None:
    """UserError with all names that are missing, left over, of another shape, or no floats.

    arrays: by official name; only their `shape` and `dtype` are looked at.
    """
    shapes = official_shapes(model)
    problems = [f"missing {name}" for name in sorted(set(shapes) - set(arrays))]
    problems += [f"unexpected {name}" for name in sorted(set(arrays) - set(shapes))]
    problems += [
        f"{name} has shape {tuple(arrays[name].shape)}, not {shape}"
        for name, shape in sorted(shapes.items())
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    problems += [
        f"{name} holds {array.dtype}, not floating-point numbers"
        for name, array in sorted(arrays.items())
        if name in shapes and not jnp.issubdtype(array.dtype, jnp.floating)
    ]
    if problems:
        raise UserError("the weights do not fit this model: " + "; ".join(problems))


def from_official(arrays: Mapping[str, np.ndarray], model: Transformer, dtype=None) -> Params:
    """The model's weights out of arrays under official names.

    Raises UserError as `check_arrays` does.
    """
    check_arrays(arrays, model)
    abstract = flatten_dict(combine(*_slow_fast(model)), sep="/")
    flat: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for place in places(model):
        array, shape = np.asarray(arrays[place.official]), abstract[place.path].shape
        if place.row is None:
            flat[place.path] = array
        else:
            stacks.setdefault(place.path, []).append(array[place.official_row].reshape(shape[1:]))
    flat |= {path: np.stack(rows) for path, rows in stacks.items()}
    tree = {path: jnp.asarray(array, dtype) for path, array in flat.items()}
    return partition(unflatten_dict(tree, sep="/"), model.fast_paths)


def to_official(params: Params, model: Transformer) -> dict[str, np.ndarray]:
    """Arrays under official names and shapes; also for trees like params (gradients)."""
    flat = {k: np.asarray(v) for k, v in _flat(params).items()}
    stacks: dict[str, list[tuple[int, np.ndarray]]] = {}
    named: dict[str, np.ndarray] = {}
    for place in places(model):
        array = flat[place.path]
        if place.row is None:
            named[place.official] = array
        else:
            assert place.official_row is not None
            one = _as_matrix(place.path, array[place.row])
            stacks.setdefault(place.official, []).append((place.official_row, one))
    for name, rows in stacks.items():
        named[name] = np.stack([one for _, one in sorted(rows, key=lambda row: row[0])])
    return named


def _flat(params: Params) -> dict[str, np.ndarray]:
    return flatten_dict(combine(params.slow, params.fast), sep="/")


def _matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[D, H, K] or [H, K, D] as the official [in, out]."""
    if len(shape) < 3:
        return shape
    a, b, c = shape
    return (a * b, c) if path.endswith("/wo") else (a, b * c)


def _as_matrix(path: str, array: np.ndarray) -> np.ndarray:
    return array.reshape(_matrix_shape(path, array.shape))


def fast_to_official(fast, model: Transformer) -> dict[str, np.ndarray]:
    """Fast weights [B, layers, ...] under the official names of the forward pass."""
    names = suffix_names(model)
    flat = flatten_dict(fast, sep="/")
    parts: dict[str, list[np.ndarray]] = {}
    for place in places(model):
        if place.path in flat and place.row is not None:
            array = np.asarray(flat[place.path])[:, place.row]
            matrices = np.stack([_as_matrix(place.path, one) for one in array])
            parts.setdefault(names[place.path], []).append(matrices)
    ends = {names[path]: np.asarray(flat[path]) for path in flat if path in ENDS}
    return {**ends, **{name: np.stack(rows, axis=1) for name, rows in parts.items()}}


def pieces(arrays: Mapping[str, Any], model: Transformer) -> Iterator[WeightPiece]:
    """Every weight of the model out of opened arrays (`StoredArray`), read one by one.

    Of an array in which blocks are stacked, one row is read at a time.
    """
    by_name: dict[str, list[TensorName]] = {}
    for place in places(model):
        by_name.setdefault(place.official, []).append(place)
    for name, its in by_name.items():
        if its[0].row is None:
            yield WeightPiece(its[0].path, None, arrays[name].read())
            continue
        read = arrays[name].rows()
        for place in its:
            assert place.official_row is not None
            yield WeightPiece(place.path, place.row, read(place.official_row))
