"""Models as pure functions of (parameters, state, tokens). The only package that knows flax.nnx."""

from tttjax.models.build import build_model
from tttjax.models.cut import Cut
from tttjax.models.functional import combine, partition, path_filter
from tttjax.models.relayout import fast_mlps, relayout
from tttjax.models.transformer import Transformer, advance

__all__ = [
    "Cut",
    "Transformer",
    "advance",
    "build_model",
    "combine",
    "fast_mlps",
    "partition",
    "path_filter",
    "relayout",
]
