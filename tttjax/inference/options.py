"""Options of inference: sampling parameters, and the precision of session files. Imports no JAX."""

from dataclasses import dataclass, fields

from tttjax.config.limits import FLOAT_MAX, FLOAT_WORDS, INT_MAX, fits_float
from tttjax.errors import UserError

PRECISIONS = ("float32", "bfloat16")  # of the fast weights in a session file

LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, FLOAT_MAX),
    "top_k": (0, INT_MAX),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, FLOAT_MAX),
}


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request.

    temperature: 0 is greedy decoding. top_k: sample from the k most likely tokens (0: all). top_p:
    from the smallest set of most likely tokens with this total probability (1: all). min_p: from
    tokens with at least this fraction of the highest probability (0: all). repetition_penalty:
    positive logits of tokens that occurred before are divided by it, negative ones multiplied (1:
    off).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), LIMITS[field.name]
            if not low <= value <= high:
                limits = f"at least {low:g}" if high == FLOAT_MAX else f"from {low:g} to {high}"
                raise UserError(f"{field.name}={value} must be {limits}.")
            if not fits_float(value):
                raise UserError(f"{field.name}={value} must be {FLOAT_WORDS}.")
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise UserError(
                f"top_p={self.top_p} and repetition_penalty={self.repetition_penalty} must be "
                "above 0."
            )
