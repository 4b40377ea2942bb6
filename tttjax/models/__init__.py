"""Models as pure functions of (parameters, state, tokens). The only package that knows flax.nnx."""

from tttjax.models.functional import combine, partition, path_filter
from tttjax.models.transformer import Transformer, build_model, relayout

__all__ = ["Transformer", "build_model", "combine", "partition", "path_filter", "relayout"]
