"""The numbers that computations hold, and how they are read from text.

Counts, positions and token ids are int32 on the device, seeds uint32, everything else float32 or
narrower in range: what does not fit would wrap around, become infinite, or become 0.
"""

import math
import re

INT_MAX = 2**31 - 1
INT_MIN = -(2**31)
SEED_MAX = 2**32 - 1
FLOAT_MAX = (2 - 2**-23) * 2.0**127
FLOAT_TINY = 2.0**-126  # devices flush what is smaller to 0

INT_WORDS = "an integer"
FLOAT_WORDS = "a number, 0 or from 1.2e-38 to 3.4e38 in size"

_DECIMAL = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def read_number(text: str) -> int | float | None:
    """The number that `text` writes in decimal notation (`100`, `1_000`, `1e-3`); None if none.

    Whole numbers are integers however they are written (`1e5`). What is too large for a float is
    infinite, and what is too small for one is None, not 0.
    """
    text = text.strip(" ")
    if not _DECIMAL.fullmatch(text):
        return None
    if re.fullmatch("[+-]?[0-9_]{1,100}", text):
        return int(text)
    number = float(text)
    if number == 0 and re.search("[1-9]", text.lower().partition("e")[0]):
        return None
    return int(number) if math.isfinite(number) and number == int(number) else number


def fits_float(value: float) -> bool:
    """Whether float32 holds `value` as a finite number, and holds it as 0 only if it is."""
    return value == 0 or FLOAT_TINY <= abs(value) <= FLOAT_MAX
