"""MinHash signatures of texts, which tell near duplicates (`prepare --drop-duplicates=near`).

The parameters are those of FineWeb (arXiv 2406.17557): shingles of five words and 112 hashes, in 14
bands of 8. Two texts are near duplicates if all hashes of a band are equal; shingles of Jaccard
similarity s make that happen with probability 1 - (1 - s^8)^14: 5% at s = 0.5, 56% at 0.7, 77% at
0.75, 92% at 0.8. Words are separated by white space, and in lower case.

A signature is the minimum over shingles, so that of a document is the minimum over its spans. To
know the shingles across the border of two spans, each span comes with the words before it. (The
sketches of rensa are made faster, but have no such merge.)
"""

import functools
import hashlib
import zlib
from typing import Any

import numpy as np

from tttjax.errors import UserError, install_extra

BANDS, _ROWS = 14, 8
_WORDS = 5  # of a shingle
_LONGEST = 1000  # characters of a word that count
_BATCH = 4096  # shingles hashed at once; larger arrays leave the cache


def check_datasketch() -> None:
    """UserError if datasketch is not installed."""
    try:
        import datasketch  # noqa: F401 (an extra)
    except ImportError as error:
        raise UserError(
            f"drop_duplicates=near needs datasketch: {install_extra('dedup')}"
        ) from error


def carried_words(carried: str, text: str) -> str:
    """What the span after `text` needs: the last five words, and the beginning of one that is cut.

    carried: the same for `text`. A space at the end says that no word is cut.
    """
    words = (carried + text).rsplit(None, _WORDS + 1)[-_WORDS - 1 :]
    last = [] if (carried + text)[-1:].isspace() else words[-1:]
    whole = words[: len(words) - len(last)][-_WORDS:]
    return " ".join([word[:_LONGEST] for word in (*whole, *(last or [""]))])


def signature(carried: str, text: str, is_last: bool) -> bytes:
    """112 uint32: the MinHash of the shingles that end in a span of a document."""
    sketch = _empty_sketch().copy()
    shingles = _shingles(carried, text, is_last)
    for start in range(0, len(shingles), _BATCH):
        sketch.update_batch(shingles[start : start + _BATCH])
    return sketch.hashvalues.astype("<u4").tobytes()


def _shingles(carried: str, text: str, is_last: bool) -> list[bytes]:
    """Five CRC-32 of consecutive words each. A document of fewer is one shingle, with zeros."""
    words = (carried + text).split()
    if words and not is_last and not (carried + text)[-1].isspace():
        words.pop()  # the next span has the whole word
    known = len((carried + "x").split()) - 1
    line = " ".join([word[:_LONGEST] for word in words]).lower().encode()
    sums = np.fromiter(map(zlib.crc32, line.split()), "<u4")
    hashes, size = sums.tobytes(), 4 * _WORDS
    if is_last and len(hashes) < size:
        return [hashes.ljust(size, b"\0")]
    first = max(known + 1 - _WORDS, 0)  # that ends in this span
    return [hashes[i : i + size] for i in range(4 * first, len(hashes) - size + 4, 4)]


@functools.cache
def _empty_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(BANDS * _ROWS, seed=1, hashfunc=zlib.crc32, scheme="affine32")


def merge(first: bytes, second: bytes) -> bytes:
    """The signature of two spans together."""
    return np.minimum(np.frombuffer(first, "<u4"), np.frombuffer(second, "<u4")).tobytes()


def bands(signature: bytes) -> list[bytes]:
    """A digest of 64 bits of each band; texts that share one are near duplicates."""
    size = len(signature) // BANDS
    return [
        hashlib.blake2b(
            signature[i * size : (i + 1) * size], digest_size=8, salt=bytes([i])
        ).digest()
        for i in range(BANDS)
    ]
