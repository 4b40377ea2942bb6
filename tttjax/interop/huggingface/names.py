"""Every tensor of a Hugging Face model and the weight of ours that it is, both ways.

A family's table says what a tensor is called; a `Conversion` how the two arrays differ. There,
matrices are [out, in] and heads are merged; here they are [in, out] with an axis of heads. Rotary
positions turn pairs of entries of a head: there (i, i + K/2), here (2i, 2i + 1), so the rows of
queries and keys, and the weights of their norms, change places. Attention does not notice, since
queries and keys change alike.

Everything goes a tensor at a time, so that a model need not be in memory twice.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tttjax.errors import UserError
from tttjax.interop.streaming import WeightPiece
from tttjax.models import Transformer, combine


@dataclass(frozen=True)
class Conversion:
    """theirs = merged(ours) * scale + offset.

    layout: "same"; "matrix", [in, out]; "into_heads", [D, H, K]; "out_of_heads", [H, K, D]; the
    last three are [out, in] there. turned: the entries of a head are paired by halves there.
    """

    layout: str
    turned: bool = False
    scale: float = 1.0
    offset: float = 0.0

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of an array that has `shape` here."""
        return shape if self.layout == "same" else self._matrix(shape)[::-1]

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        if self.turned:
            ours = _to_halves(ours)
        if self.layout != "same":
            ours = ours.reshape(self._matrix(ours.shape)).T
        return self._affine(ours, self.scale, self.offset)

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """shape: of the array here, which theirs does not tell."""
        ours = self._affine(theirs, 1 / self.scale, -self.offset / self.scale)
        if self.layout != "same":
            ours = ours.T.reshape(shape)
        return _to_pairs(ours) if self.turned else ours

    def _matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        inputs = len(shape) - 1 if self.layout == "out_of_heads" else 1
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])

    @staticmethod
    def _affine(x: np.ndarray, scale: float, offset: float) -> np.ndarray:
        """In float32 at least, so that nothing is lost before the last rounding."""
        if (scale, offset) == (1, 0):
            return x
        return x.astype(np.promote_types(x.dtype, np.float32)) * scale + offset


def _to_halves(x_K: np.ndarray) -> np.ndarray:
    """Entries (0, 1, 2, 3, ...) as (0, 2, ..., 1, 3, ...), along the last axis."""
    return np.concatenate((x_K[..., 0::2], x_K[..., 1::2]), axis=-1)


def _to_pairs(x_K: np.ndarray) -> np.ndarray:
    """The inverse of `_to_halves`."""
    first, second = np.split(x_K, 2, axis=-1)
    return np.stack((first, second), axis=-1).reshape(x_K.shape)


@dataclass(frozen=True)
class TensorSlot:
    """A tensor there and the weight here that it is: `path`, and the row in a stack of blocks.

    shape: there. our_shape: of the row here.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    row: int | None
    our_shape: tuple[int, ...]
    conversion: Conversion

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """ours: the row alone. The result may be a view, and is float32 where it was computed."""
        return self.conversion.to_theirs(ours)

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """Raises UserError for another shape than the model's."""
        if tuple(theirs.shape) != self.shape:
            raise UserError(
                f"the tensor {self.name} has shape {tuple(theirs.shape)}, and this model needs "
                f"{self.shape}"
            )
        return self.conversion.to_ours(theirs, self.our_shape)


# --- the tables: our name inside a block (or at an end) -> theirs, and how it differs -------------

SAME, MATRIX = Conversion("same"), Conversion("matrix")
Table = Mapping[str, tuple[str, Conversion]]


def _swiglu(ours: str) -> Table:
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return {f"{ours}/{w}": (f"{ours}.{name}.weight", MATRIX) for w, name in names.items()}


def _norms(names: Mapping[str, str], conversion: Conversion = SAME) -> Table:
    return {f"{ours}/weight": (f"{name}.weight", conversion) for ours, name in names.items()}


PROJECTIONS: Table = {
    "mixer/wq": ("self_attn.q_proj.weight", Conversion("into_heads", turned=True)),
    "mixer/wk": ("self_attn.k_proj.weight", Conversion("into_heads", turned=True)),
    "mixer/wv": ("self_attn.v_proj.weight", Conversion("into_heads")),
    "mixer/wo": ("self_attn.o_proj.weight", Conversion("out_of_heads")),
}
HEAD_NORMS = {f"mixer/{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")}
TURNED = Conversion("same", turned=True)
ABOUT_ZERO = Conversion("same", offset=-1)  # Gemma's norms multiply by 1 + weight

LLAMA: Table = {
    **PROJECTIONS,
    **_swiglu("mlp"),
    **_norms({"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}),
}
GEMMA: Table = {
    **PROJECTIONS,
    **_swiglu("mlp"),
    **_norms(HEAD_NORMS, replace(ABOUT_ZERO, turned=True)),
    **_norms(
        {
            "mixer_norm": "input_layernorm",
            "mixer_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
        ABOUT_ZERO,
    ),
}
OWN_NORMS = [
    f"{name}{post}_norm" for name in ("mixer", "fast_mlp", "mlp") for post in ("", "_post")
]
OWN: Table = {
    **PROJECTIONS,
    **_swiglu("fast_mlp"),
    **_swiglu("mlp"),
    **_norms(HEAD_NORMS, TURNED),
    **_norms({name: name for name in OWN_NORMS}),
}
BLOCK_TABLES: dict[str, Table] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen3": {**LLAMA, **_norms(HEAD_NORMS, TURNED)},
    "gemma3_text": GEMMA,
    "tttjax": OWN,
}
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def families() -> tuple[str, ...]:
    """The families of models that there are names for, by Hugging Face's `model_type`."""
    return tuple(BLOCK_TABLES)


def _ends(model: Transformer, family: str) -> list[tuple[str, str, Conversion]]:
    """(path, their name, conversion) of what lies before and after the blocks."""
    if family == "gemma3_text":
        # It multiplies embeddings by sqrt(D), so that they cannot be shared with the head.
        shrunk = Conversion("same", scale=model.shape.embed_dim**-0.5)
        ends = [("embedding", EMBEDDING, shrunk), ("final_norm/weight", FINAL_NORM, ABOUT_ZERO)]
        return [*ends, ("embedding", HEAD, SAME) if model.tied else ("head", HEAD, MATRIX)]
    ends = [("embedding", EMBEDDING, SAME), ("final_norm/weight", FINAL_NORM, SAME)]
    return ends if model.tied else [*ends, ("head", HEAD, MATRIX)]


def abstract_weights(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every weight by its path; blocks are stacked."""
    params = model.abstract_params()
    return flatten_dict(combine(params.slow, params.fast), sep="/")


def tensor_places(model: Transformer, family: str) -> list[TensorSlot]:
    """Every tensor that the family has of this model: the ends, then block by block.

    Raises UserError for an unknown family.
    """
    if family not in BLOCK_TABLES:
        raise UserError(f"the family {family!r} is unknown; there are {', '.join(BLOCK_TABLES)}")
    weights = abstract_weights(model)

    def place(name: str, path: str, row: int | None, conversion: Conversion) -> TensorSlot:
        shape = weights[path].shape if row is None else weights[path].shape[1:]
        return TensorSlot(name, conversion.their_shape(shape), path, row, shape, conversion)

    found = [place(name, path, None, how) for path, name, how in _ends(model, family)]
    for layer, (stack, row) in enumerate(model.block_paths()):
        for ours, (theirs, how) in BLOCK_TABLES[family].items():
            path = f"{stack}/{ours}"
            if path in weights:
                found.append(place(f"model.layers.{layer}.{theirs}", path, row, how))
    return found


def unplaced(model: Transformer, places: Iterable[TensorSlot]) -> list[str]:
    """Paths of our weights that no tensor is: those a family does not know."""
    return sorted(abstract_weights(model).keys() - {place.path for place in places})


def check_names(names: Iterable[str], places: Iterable[TensorSlot], where: str) -> None:
    """UserError, naming them, if tensors are missing or left over.

    Buffers of rotary frequencies, and a head that is tied anyway, are no weights; that such a head
    is the embedding is for the caller to check.
    """
    wanted, there = {place.name for place in places}, set(names)
    extra = {name for name in there - wanted if not name.endswith("rotary_emb.inv_freq")}
    if EMBEDDING in wanted and HEAD not in wanted:
        extra.discard(HEAD)
    problems = [f"missing {name}" for name in sorted(wanted - there)]
    problems += [f"unexpected {name}" for name in sorted(extra)]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{where} does not fit this model: {'; '.join(problems[:8])}{more}")


def pieces(
    places: Iterable[TensorSlot], read: Callable[[str], np.ndarray]
) -> Iterator[WeightPiece]:
    """Our weights, row by row, out of tensors that are read one by one (`read(name)`).

    Raises UserError for a tensor of another shape, and for two that are one weight and differ.
    """
    first: dict[tuple[str, int | None], TensorSlot] = {}
    for place in places:
        ours = place.to_ours(read(place.name))
        before = first.setdefault((place.path, place.row), place)
        if before is place:
            yield WeightPiece(place.path, place.row, ours)
        else:
            _check_same(place, ours, before.to_ours(read(before.name)))


def _check_same(place: TensorSlot, ours: np.ndarray, other: np.ndarray) -> None:
    # Rounded apart, perhaps to bfloat16, or to float16 near 0: nothing else may differ.
    if not np.allclose(ours.astype(np.float32), other.astype(np.float32), rtol=2**-7, atol=1e-5):
        raise UserError(f"{place.name} is not the same weight as the tied {place.path}")
