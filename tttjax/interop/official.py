"""Weights under the names of the official TTT-E2E code, both ways.

The official code stacks all blocks on one axis, keeps matrices as [in, out] and the fast MLPs in a
store of their own (`prime_storage`, row j for suffix block j). Here prefix and suffix are stacked
apart and attention weights carry the head axis.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tttjax.errors import UserError
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


class Place(NamedTuple):
    """Where one array of one block (or an end) lies here and there."""

    path: str
    row: int | None
    official: str
    official_row: int | None


def places(model: Transformer) -> list[Place]:
    """Every weight of the model, block by block, with its official name and row."""
    paths = flatten_dict(combine(*_slow_fast(model)), sep="/")
    found = [Place(path, None, name, None) for path, name in ENDS.items() if path in paths]
    first_of_suffix = model.num_layers - model.suffix_layers
    for layer, (stack, row) in enumerate(model.block_paths()):
        for of, prefix, official_row in (
            (OF_BLOCK, BLOCKS, layer),
            (OF_FAST_MLP, PRIME, layer - first_of_suffix),
        ):
            found += [
                Place(f"{stack}/{name}", row, prefix + official, official_row)
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


def from_official(arrays: Mapping[str, np.ndarray], model: Transformer, dtype=None) -> Params:
    """The model's weights out of arrays under official names.

    Raises UserError with the names that are missing, left over, or of another size.
    """
    abstract = flatten_dict(combine(*_slow_fast(model)), sep="/")
    wanted = places(model)
    names = {place.official for place in wanted}
    problems = [f"missing {name}" for name in sorted(names - set(arrays))]
    problems += [f"unexpected {name}" for name in sorted(set(arrays) - names)]
    rows: dict[str, list[np.ndarray]] = {}
    for place in wanted:
        if place.official not in arrays:
            continue
        array = np.asarray(arrays[place.official])
        shape = abstract[place.path].shape
        one_shape = shape if place.row is None else shape[1:]
        if place.official_row is not None:
            array = array[place.official_row]
        if array.size != np.prod(one_shape):
            problems.append(f"{place.official} has {array.shape}, not {one_shape}")
            continue
        rows.setdefault(place.path, []).append(array.reshape(one_shape))
    if problems:
        raise UserError("the weights do not fit this model: " + "; ".join(problems))
    flat = {
        path: jnp.asarray(
            np.stack(parts) if path.split("/")[0] in ("prefix", "suffix") else parts[0], dtype
        )
        for path, parts in rows.items()
    }
    return partition(unflatten_dict(flat, sep="/"), model.fast_paths)


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


def _as_matrix(path: str, array: np.ndarray) -> np.ndarray:
    """[D, H, K] or [H, K, D] as the official [in, out]."""
    if array.ndim < 3:
        return array
    return array.reshape((-1, array.shape[-1]) if path.endswith("/wo") else (array.shape[0], -1))


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
