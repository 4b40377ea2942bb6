"""Tensor names and layouts of Hugging Face models, and the conversion to and from our weights.

A family's table maps our names to tensor names; a `Conversion` describes how the arrays differ.
Hugging Face stores matrices as [out, in] with merged heads, tttjax as [in, out] with a head axis.
Hugging Face's RoPE rotates the pairs (i, i + K/2) of a head ("half split"), ours (2i, 2i + 1)
("interleaved"), so the rows of queries and keys, and the weights of their norms, are permuted.
Attention is invariant to this, because queries and keys are permuted alike.

Tensors are converted one at a time, so that a model need not be in memory twice.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tttjax.errors import UserError
from tttjax.interop.streaming import WeightSlice, abstract_weights
from tttjax.models.transformer import Transformer


@dataclass(frozen=True)
class Conversion:
    """tensor = merge_heads(weight) * scale + offset.

    layout: of our weight: "same"; "matrix", [in, out]; "into_heads", [D, H, K]; "out_of_heads",
    [H, K, D]; for the last three, the tensor is [out, in]. half_split: the tensor has RoPE's
    half-split order.
    """

    layout: str
    half_split: bool = False
    scale: float = 1.0
    offset: float = 0.0

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape for a weight of `shape`."""
        return shape if self.layout == "same" else self._matrix(shape)[::-1]

    def to_hf(self, weight: np.ndarray) -> np.ndarray:
        if self.half_split:
            weight = _to_half_split(weight)
        if self.layout != "same":
            weight = weight.reshape(self._matrix(weight.shape)).T
        return self._affine(weight, self.scale, self.offset)

    def from_hf(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """shape: of our weight, which the tensor does not determine."""
        weight = self._affine(tensor, 1 / self.scale, -self.offset / self.scale)
        if self.layout != "same":
            weight = weight.T.reshape(shape)
        return _to_interleaved(weight) if self.half_split else weight

    def _matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        inputs = len(shape) - 1 if self.layout == "out_of_heads" else 1
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])

    @staticmethod
    def _affine(x: np.ndarray, scale: float, offset: float) -> np.ndarray:
        """x * scale + offset, in float32 at least, so that the result is rounded once."""
        if (scale, offset) == (1, 0):
            return x
        return x.astype(np.promote_types(x.dtype, np.float32)) * scale + offset


def _to_half_split(x_K: np.ndarray) -> np.ndarray:
    """Permutes the last axis from (0, 1, 2, 3, ...) to (0, 2, ..., 1, 3, ...)."""
    return np.concatenate((x_K[..., 0::2], x_K[..., 1::2]), axis=-1)


def _to_interleaved(x_K: np.ndarray) -> np.ndarray:
    """The inverse of `_to_half_split`."""
    first, second = np.split(x_K, 2, axis=-1)
    return np.stack((first, second), axis=-1).reshape(x_K.shape)


@dataclass(frozen=True)
class TensorSlot:
    """A Hugging Face tensor and our weight that it stores: its path, and the row in a stack.

    shape: of the tensor. row_shape: of our weight, or of one row of a stack.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    row: int | None
    row_shape: tuple[int, ...]
    conversion: Conversion

    def to_hf(self, weight: np.ndarray) -> np.ndarray:
        """weight: one row of a stack. The result may be a view; scaled weights become float32."""
        return self.conversion.to_hf(weight)

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Raises UserError if the tensor's shape is not the model's."""
        if tuple(tensor.shape) != self.shape:
            raise UserError(
                f"the tensor {self.name} has shape {tuple(tensor.shape)}, and this model needs "
                f"{self.shape}"
            )
        return self.conversion.from_hf(tensor, self.row_shape)


# --- tables: our name -> (tensor name, conversion) ------------------------------------------------

SAME, MATRIX = Conversion("same"), Conversion("matrix")
Table = Mapping[str, tuple[str, Conversion]]


def _swiglu(weight: str) -> Table:
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return {f"{weight}/{w}": (f"{weight}.{name}.weight", MATRIX) for w, name in names.items()}


def _norms(names: Mapping[str, str], conversion: Conversion = SAME) -> Table:
    return {f"{weight}/weight": (f"{name}.weight", conversion) for weight, name in names.items()}


PROJECTIONS: Table = {
    "mixer/wq": ("self_attn.q_proj.weight", Conversion("into_heads", half_split=True)),
    "mixer/wk": ("self_attn.k_proj.weight", Conversion("into_heads", half_split=True)),
    "mixer/wv": ("self_attn.v_proj.weight", Conversion("into_heads")),
    "mixer/wo": ("self_attn.o_proj.weight", Conversion("out_of_heads")),
}
HEAD_NORMS = {f"mixer/{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")}
HALF_SPLIT = Conversion("same", half_split=True)
ZERO_CENTRED = Conversion("same", offset=-1)  # Gemma's norms multiply by 1 + weight

LLAMA: Table = {
    **PROJECTIONS,
    **_swiglu("mlp"),
    **_norms({"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}),
}
GEMMA: Table = {
    **PROJECTIONS,
    **_swiglu("mlp"),
    **_norms(HEAD_NORMS, replace(ZERO_CENTRED, half_split=True)),
    **_norms(
        {
            "mixer_norm": "input_layernorm",
            "mixer_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
        ZERO_CENTRED,
    ),
}
OWN_NORMS = [
    f"{name}{post}_norm" for name in ("mixer", "fast_mlp", "mlp") for post in ("", "_post")
]
OWN: Table = {
    **PROJECTIONS,
    **_swiglu("fast_mlp"),
    **_swiglu("mlp"),
    **_norms(HEAD_NORMS, HALF_SPLIT),
    **_norms({name: name for name in OWN_NORMS}),
}
BLOCK_TABLES: dict[str, Table] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen3": {**LLAMA, **_norms(HEAD_NORMS, HALF_SPLIT)},
    "gemma3_text": GEMMA,
    "tttjax": OWN,
}
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def families() -> tuple[str, ...]:
    """The supported model families, by Hugging Face's `model_type`."""
    return tuple(BLOCK_TABLES)


def _top_level(model: Transformer, family: str) -> list[tuple[str, str, Conversion]]:
    """(path, tensor name, conversion) of the weights outside the blocks."""
    tied = model.config.tie_embeddings
    if family == "gemma3_text":
        # Gemma multiplies embeddings by sqrt(D), so the head cannot share their tensor.
        scaled = Conversion("same", scale=model.config.embed_dim**-0.5)
        top_level = [
            ("embedding", EMBEDDING, scaled),
            ("final_norm/weight", FINAL_NORM, ZERO_CENTRED),
        ]
        return [*top_level, ("embedding", HEAD, SAME) if tied else ("head", HEAD, MATRIX)]
    top_level = [("embedding", EMBEDDING, SAME), ("final_norm/weight", FINAL_NORM, SAME)]
    return top_level if tied else [*top_level, ("head", HEAD, MATRIX)]


def tensor_slots(model: Transformer, family: str) -> list[TensorSlot]:
    """Every tensor of this model in a family: those outside the blocks, then block by block.

    Raises UserError for an unknown family.
    """
    if family not in BLOCK_TABLES:
        raise UserError(
            f"the family {family!r} is unknown; the families are {', '.join(BLOCK_TABLES)}"
        )
    weights = abstract_weights(model)

    def slot(name: str, path: str, row: int | None, conversion: Conversion) -> TensorSlot:
        shape = weights[path].shape if row is None else weights[path].shape[1:]
        return TensorSlot(name, conversion.hf_shape(shape), path, row, shape, conversion)

    slots = [
        slot(name, path, None, conversion) for path, name, conversion in _top_level(model, family)
    ]
    for layer, (stack, row) in enumerate(model.block_paths()):
        for weight, (tensor, conversion) in BLOCK_TABLES[family].items():
            path = f"{stack}/{weight}"
            if path in weights:
                slots.append(slot(f"model.layers.{layer}.{tensor}", path, row, conversion))
    return slots


def unmatched_weights(model: Transformer, slots: Iterable[TensorSlot]) -> list[str]:
    """Paths of the weights that no slot stores, because the family lacks them."""
    return sorted(abstract_weights(model).keys() - {slot.path for slot in slots})


def check_names(names: Iterable[str], slots: Iterable[TensorSlot], where: str) -> None:
    """Raises UserError that names missing and unexpected tensors.

    Ignores buffers of RoPE frequencies and the head of a tied model; the caller checks that such a
    head equals the embedding.
    """
    expected, actual = {slot.name for slot in slots}, set(names)
    extra = {name for name in actual - expected if not name.endswith("rotary_emb.inv_freq")}
    if EMBEDDING in expected and HEAD not in expected:
        extra.discard(HEAD)
    problems = [f"missing {name}" for name in sorted(expected - actual)]
    problems += [f"unexpected {name}" for name in sorted(extra)]
    raise_mismatch(where, problems)


def raise_mismatch(where: str, problems: Sequence[str]) -> None:
    """Raises UserError that lists the first problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{where} does not fit this model: {'; '.join(problems[:8])}{more}")


def iter_weights(
    slots: Iterable[TensorSlot], read: Callable[[str], np.ndarray]
) -> Iterator[WeightSlice]:
    """The weights, row by row, from tensors that are read one by one (`read(name)`).

    Raises UserError for a tensor of another shape, and for tied tensors that differ.
    """
    seen_slots: dict[tuple[str, int | None], TensorSlot] = {}
    for slot in slots:
        weight = slot.from_hf(read(slot.name))
        first_slot = seen_slots.setdefault((slot.path, slot.row), slot)
        if first_slot is slot:
            yield WeightSlice(slot.path, slot.row, weight)
        else:
            _check_same(slot, weight, first_slot.from_hf(read(first_slot.name)))


def _check_same(slot: TensorSlot, weight: np.ndarray, tied: np.ndarray) -> None:
    # The tolerance covers separate rounding to bfloat16, or to float16 near 0.
    if not np.allclose(weight.astype(np.float32), tied.astype(np.float32), rtol=2**-7, atol=1e-5):
        raise UserError(f"{slot.name} is not the same weight as the tied {slot.path}")
