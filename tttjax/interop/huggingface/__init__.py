"""Conversion from and to Hugging Face transformers: tensor names, configurations, files.

config_from_huggingface   config.json -> fields of `ModelConfig`
inner_from_huggingface    config.json -> fields of `InnerConfig`, for models with fast weights
tensor_slots              tensor name <-> weight path, and the conversion between the two
iter_weights              weights, row by row, from tensors that are read one at a time
"""

from tttjax.interop.huggingface.configs import (
    config_from_huggingface,
    inner_from_huggingface,
    supported,
)
from tttjax.interop.huggingface.names import (
    EMBEDDING,
    HEAD,
    check_names,
    iter_weights,
    tensor_slots,
    unmatched_weights,
)

__all__ = [
    "EMBEDDING",
    "HEAD",
    "check_names",
    "config_from_huggingface",
    "inner_from_huggingface",
    "iter_weights",
    "supported",
    "tensor_slots",
    "unmatched_weights",
]
