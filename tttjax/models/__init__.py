"""Models as pure functions of (parameters, state, tokens). The only package that knows flax.nnx."""

from tttjax.models.build import build_model
from tttjax.models.relayout import fast_mlps, relayout
from tttjax.models.split_model import SplitModel
from tttjax.models.stacking import combine, partition, path_filter
from tttjax.models.transformer import Transformer, advance

__all__ = [
    "SplitModel",
    "Transformer",
    "advance",
    "build_model",
    "combine",
    "fast_mlps",
    "partition",
    "path_filter",
    "relayout",
]
