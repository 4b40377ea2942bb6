"""Models in the form of Hugging Face transformers: names, configurations, files; both ways.

config_from_huggingface   config.json -> fields of our `ModelConfig`
inner_from_huggingface    the same of our `InnerConfig`, for models that learn
tensor_places             which tensor is which weight, and how to convert it either way
pieces                    our weights, row by row, out of tensors that are read one at a time
"""

from tttjax.interop.huggingface.configs import (
    config_from_huggingface,
    inner_from_huggingface,
    supported,
)
from tttjax.interop.huggingface.names import (
    EMBEDDING,
    HEAD,
    TensorSlot,
    check_names,
    families,
    pieces,
    tensor_places,
    unplaced,
)

__all__ = [
    "EMBEDDING",
    "HEAD",
    "TensorSlot",
    "check_names",
    "config_from_huggingface",
    "families",
    "inner_from_huggingface",
    "pieces",
    "supported",
    "tensor_places",
    "unplaced",
]
