"""Held-out sequences for evaluation, grouped by document for standard errors."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tttjax.data.pipeline import make_batch
from tttjax.data.records import DocumentRecords
from tttjax.data.shards import PreparedData, TokenSplit
from tttjax.errors import UserError
from tttjax.types import Batch


@dataclass(frozen=True)
class HeldOut:
    """N sequences of T+1 tokens, each within one document.

    tokens: int32 [N, T+1], PADDING (-1) after the end of a document shorter than T+1.
    document: int64 [N], document index in the split; sequences of one document are not independent.
    offset: int64 [N], position in the document of the first token.
    chosen: bool [N, T+1], the targets of masked data; None: all tokens are.
    """

    tokens: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    pad_id: int
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, start: int = 0, stop: int | None = None) -> Batch:
        """Sequences [start, stop) as a Batch; padding is masked.

        No target starts a document, since each sequence lies within one.
        """
        return make_batch(self.tokens[start:stop], pad_id=self.pad_id)

    def scored(self) -> np.ndarray:
        """bool [N, T] the targets that losses are of: no padding and, of masked data, the chosen.

        Batches have no such mask: the inner loop learns from all targets.
        """
        mask_NT = np.asarray(self.batch().mask)
        return mask_NT if self.chosen is None else mask_NT & self.chosen[:, 1:]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All sequences in order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.batch(start, start + batch_size)

    def target_bytes(self, token_bytes_V: np.ndarray) -> np.ndarray:
        """int64 [N, T] UTF-8 bytes of each target token; 0 where it is not scored."""
        return np.where(self.scored(), token_bytes_V[self.batch().targets], 0).astype(np.int64)


def doubling_windows(length: int, window: int) -> list[int]:
    """Edges 0, k, 2k, 4k, ..., length: few columns that resolve what is beyond the window."""
    edges = [0]
    edge = window
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def eval_sequences(
    data: PreparedData,
    *,
    length: int,
    num: int,
    split: str = "val",
    seed: int = 0,
    min_document_tokens: int = 0,
) -> HeldOut:
    """Up to `num` sequences of exactly length+1 tokens.

    First the beginning of every document of at least `min_document_tokens` and length+1 tokens, in
    an order drawn with `seed`; then, up to `num`, their next `length` tokens, and so on; no target
    occurs twice. To compare several lengths on the same text, truncate sequences of the longest.
    Raises UserError if no document of the split is long enough.
    """
    if length < 1 or num < 1:
        raise UserError(f"Held-out sequences need length={length} and num={num} of at least 1.")
    tokens = data.split(split)
    starts, stops = tokens.document_bounds()
    sizes = stops - starts
    needed = max(length + 1, min_document_tokens)
    if not (sizes >= needed).any():
        raise UserError(
            f"No document of the split {split!r} of {data.folder} has {needed} tokens (the longest "
            f"has {sizes.max()}); evaluate at a shorter context, or prepare longer documents."
        )
    document = np.flatnonzero(sizes >= needed)
    document = np.random.default_rng(seed).permutation(document)
    counts = (sizes[document] - 1) // length
    owner = np.repeat(np.arange(len(document)), counts)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.lexsort((owner, index))[:num]  # every document's first, then every second, ...
    return _read(data, tokens, length, document[owner[chosen]], index[chosen] * length)


def eval_documents(
    data: PreparedData, *, max_length: int, split: str = "val", min_length: int = 1
) -> HeldOut:
    """The first `max_length` targets of every document with at least `min_length`, padded."""
    tokens = data.split(split)
    starts, stops = tokens.document_bounds()
    document = np.flatnonzero(stops - starts - 1 >= min_length)
    if not len(document):
        raise UserError(
            f"No document of the split {split!r} of {data.folder} has {min_length} targets."
        )
    return _read(data, tokens, max_length, document, np.zeros(len(document), np.int64))


def _read(
    data: PreparedData, tokens: TokenSplit, length: int, document: np.ndarray, offset: np.ndarray
) -> HeldOut:
    starts, stops = tokens.document_bounds()
    begin = starts[document] + offset
    end = np.minimum(begin + length + 1, stops[document])
    records = DocumentRecords(tokens, length, begin, end)
    stacked = np.stack([records[i].tokens_S for i in range(len(records))])
    chosen = None
    if tokens.is_masked:
        chosen = np.stack([records[i].targets_S for i in range(len(records))])
    eos = data.tokenizer.eos_id
    result = HeldOut(stacked, document, offset, 0 if eos is None else eos, chosen)
    if not result.scored().any():
        raise UserError(
            f"No token of the sequences of {length} tokens in the split {tokens.name!r} of "
            f"{data.folder} is a target; evaluate at a longer context, or more sequences."
        )
    return result
