"""Reading with a trained model: no outer gradient, memory that does not grow with the context."""

from tttjax.inference.reading import (
    Context,
    Reader,
    Weights,
    divide,
    extend,
    logits,
    make_reader,
    prefill,
    read_chunks,
    start,
)

__all__ = [
    "Context",
    "Reader",
    "Weights",
    "divide",
    "extend",
    "logits",
    "make_reader",
    "prefill",
    "read_chunks",
    "start",
]
