"""Conversion between our weights and those of the official TTT-E2E code.

The official code stacks all blocks on one axis, stores matrices as [in, out], and has the fast MLPs
in a separate stack (`prime_storage`, row j for suffix block j). Here, prefix and suffix are two
stacks, and attention weights have a head axis.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tttjax.errors import UserError
from tttjax.interop.streaming import WeightSlice, abstract_weights, flat_weights
from tttjax.models.stacking import partition
from tttjax.models.transformer import Transformer
from tttjax.types import Params

BLOCK_PREFIX = "language_model.model.h.blocks."
PRIME_PREFIX = "language_model.model.h.prime_storage."
SUFFIX_PREFIX = "language_model.model.h.suffix_blocks."

TOP_LEVEL_NAMES = {
    "embedding": "language_model.model.wte.weight",
    "final_norm/weight": "language_model.model.ln_f.weight",
    "head": "language_model.lm_head.weight",
}
BLOCK_NAMES = {
    **{f"mixer/{w}": f"seq_modeling_block.{w}.weight" for w in ("wq", "wk", "wv", "wo")},
    **{f"mixer/{n}/weight": f"seq_modeling_block.{n}.weight" for n in ("q_norm", "k_norm")},
    **{f"mlp/{w}": f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")},
    "mixer_norm/weight": "seq_norm.weight",
    "mixer_post_norm/weight": "seq_post_norm.weight",
    "mlp_norm/weight": "ffn_norm.weight",
    "mlp_post_norm/weight": "ffn_post_norm.weight",
}
FAST_MLP_NAMES = {
    **{f"fast_mlp/{w}": f"feed_forward_prime.{w}.weight" for w in ("w1", "w2", "w3")},
    "fast_mlp_norm/weight": "ffn_prime_norm.weight",
    "fast_mlp_post_norm/weight": "ffn_prime_post_norm.weight",
}


class OfficialSlot(NamedTuple):
    """A weight (row None) or one row of a stack: our path and row, official name and row."""

    path: str
    row: int | None
    official: str
    official_row: int | None


def weight_slots(model: Transformer) -> list[OfficialSlot]:
    """Every weight of the model, block by block, with its official name and row."""
    paths = abstract_weights(model)
    slots = [
        OfficialSlot(path, None, name, None)
        for path, name in TOP_LEVEL_NAMES.items()
        if path in paths
    ]
    first_of_suffix = model.config.num_layers - model.config.suffix_layers
    for layer, (stack, row) in enumerate(model.block_paths()):
        for names, prefix, official_row in (
            (BLOCK_NAMES, BLOCK_PREFIX, layer),
            (FAST_MLP_NAMES, PRIME_PREFIX, layer - first_of_suffix),
        ):
            slots += [
                OfficialSlot(f"{stack}/{name}", row, prefix + official, official_row)
                for name, official in names.items()
                if f"{stack}/{name}" in paths
            ]
    return slots


def suffix_names(model: Transformer) -> dict[str, str]:
    """Path of every weight that can be fast -> its official name in the forward pass."""
    names = {path: name for path, name in TOP_LEVEL_NAMES.items() if path != "embedding"}
    for slot in weight_slots(model):
        if slot.path.startswith("suffix/"):
            names[slot.path] = slot.official.replace(BLOCK_PREFIX, SUFFIX_PREFIX).replace(
                PRIME_PREFIX, SUFFIX_PREFIX
            )
    return names


def official_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Official name -> official shape of every weight of the model."""
    abstract = abstract_weights(model)
    shapes, rows = {}, Counter(slot.official for slot in weight_slots(model))
    for slot in weight_slots(model):
        shape = abstract[slot.path].shape
        if slot.row is not None:
            shape = (rows[slot.official], *_matrix_shape(slot.path, shape[1:]))
        shapes[slot.official] = shape
    return shapes


def check_arrays(arrays: Mapping[str, Any], model: Transformer) -> None:
    """Raises UserError that lists missing and unexpected arrays, wrong shapes and dtypes.

    arrays: by official name; only their `shape` and `dtype` are used.
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
    """The model's weights from arrays under official names. Raises as `check_arrays` does."""
    check_arrays(arrays, model)
    abstract = abstract_weights(model)
    flat: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for slot in weight_slots(model):
        array, shape = np.asarray(arrays[slot.official]), abstract[slot.path].shape
        if slot.row is None:
            flat[slot.path] = array
        else:
            stacks.setdefault(slot.path, []).append(array[slot.official_row].reshape(shape[1:]))
    flat |= {path: np.stack(rows) for path, rows in stacks.items()}
    tree = {path: jnp.asarray(array, dtype) for path, array in flat.items()}
    return partition(unflatten_dict(tree, sep="/"), model.fast_paths)


def to_official(params: Params, model: Transformer) -> dict[str, np.ndarray]:
    """Arrays under official names and shapes. params: weights or their gradients."""
    flat = {k: np.asarray(v) for k, v in flat_weights(params).items()}
    stacks: dict[str, list[tuple[int, np.ndarray]]] = {}
    arrays: dict[str, np.ndarray] = {}
    for slot in weight_slots(model):
        array = flat[slot.path]
        if slot.row is None:
            arrays[slot.official] = array
        else:
            assert slot.official_row is not None
            matrix = _as_matrix(slot.path, array[slot.row])
            stacks.setdefault(slot.official, []).append((slot.official_row, matrix))
    for name, rows in stacks.items():
        arrays[name] = np.stack([matrix for _, matrix in sorted(rows, key=lambda row: row[0])])
    return arrays


def _matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[D, H, K] or [H, K, D] as the official [in, out]."""
    if len(shape) < 3:
        return shape
    a, b, c = shape
    return (a * b, c) if path.endswith("/wo") else (a, b * c)


def _as_matrix(path: str, array: np.ndarray) -> np.ndarray:
    return array.reshape(_matrix_shape(path, array.shape))


def fast_to_official(fast, model: Transformer) -> dict[str, np.ndarray]:
    """Fast weights [B, layers, ...] under their official names in the forward pass."""
    names = suffix_names(model)
    flat = flatten_dict(fast, sep="/")
    parts: dict[str, list[np.ndarray]] = {}
    for slot in weight_slots(model):
        if slot.path in flat and slot.row is not None:
            array = np.asarray(flat[slot.path])[:, slot.row]
            matrices = np.stack([_as_matrix(slot.path, matrix) for matrix in array])
            parts.setdefault(names[slot.path], []).append(matrices)
    top_level = {names[path]: np.asarray(flat[path]) for path in flat if path in TOP_LEVEL_NAMES}
    return {**top_level, **{name: np.stack(rows, axis=1) for name, rows in parts.items()}}


def iter_weights(arrays: Mapping[str, Any], model: Transformer) -> Iterator[WeightSlice]:
    """Every weight of the model from opened arrays (`StoredArray`), read one by one.

    Stacked arrays are read one row at a time.
    """
    by_name: dict[str, list[OfficialSlot]] = {}
    for slot in weight_slots(model):
        by_name.setdefault(slot.official, []).append(slot)
    for name, slots in by_name.items():
        if slots[0].row is None:
            yield WeightSlice(slots[0].path, None, arrays[name].read())
            continue
        read = arrays[name].rows()
        for slot in slots:
            assert slot.official_row is not None
            yield WeightSlice(slot.path, slot.row, read(slot.official_row))
