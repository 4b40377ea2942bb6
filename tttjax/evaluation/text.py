"""The held-out tokens of an evaluation, with their masks, byte counts and documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tttjax.config import EvalConfig
from tttjax.config.run_info import candidate_paths
from tttjax.data.held_out import HeldOut, eval_sequences
from tttjax.data.shards import MANIFEST, PreparedData, open_prepared, read_manifest
from tttjax.errors import UserError
from tttjax.evaluation.statistics import Sums, sum_by_document
from tttjax.io.paths import storage_path
from tttjax.runs.run import Run

MASKED_NOTE = "The data are masked: losses are of the marked tokens alone, and all tokens are read."


@dataclass(frozen=True)
class Text:
    """Metadata of the target tokens [N, T]: masks, UTF-8 bytes, document ids."""

    folder: str
    split: str
    fingerprint: str
    lossless: bool
    mask_NT: np.ndarray
    bytes_NT: np.ndarray | None
    document_N: np.ndarray

    def sums(self, nll_NT: np.ndarray, length: int) -> Sums:
        """Sums losses at one context length by document and position."""
        stop = nll_NT.shape[1]

        def add(x_NT: np.ndarray) -> np.ndarray:
            return sum_by_document(x_NT[:, :stop], self.document_N, length)

        bytes_DL = None if self.bytes_NT is None else add(self.bytes_NT)
        return Sums(add(np.where(self.mask_NT[:, :stop], nll_NT, 0)), add(self.mask_NT), bytes_DL)

    def describe(self, held_out: HeldOut) -> dict:
        return {
            "data": self.folder,
            "split": self.split,
            "tokenizer_fingerprint": self.fingerprint,
            "bytes_are_exact": self.lossless,
            "sequences": len(held_out),
            "documents": len(np.unique(self.document_N)),
            "tokens": int(self.mask_NT.sum()),
            **({} if held_out.chosen is None else {"masked": True}),
        }


def open_text(
    runs: Sequence[Run],
    data: PreparedData | Path | str | None,
    split: str,
    settings: EvalConfig,
    longest: int,
) -> tuple[HeldOut, Text]:
    """The held-out sequences of `longest` tokens, with their metadata.

    Raises UserError for missing data, another tokenizer, or documents that are too short.
    """
    data = _open_data(runs, data)
    for run in runs:
        check_tokenizer(run, data)
    split = split or runs[0].config.data.val_split
    held_out = _sequences(data, split, settings, longest)
    table_V = data.tokenizer.token_bytes()
    text = Text(
        folder=str(data.folder),
        split=split,
        fingerprint=data.fingerprint,
        lossless=data.tokenizer.lossless,
        mask_NT=held_out.scored(),
        bytes_NT=held_out.target_bytes(table_V) if table_V.any() else None,
        document_N=held_out.document,
    )
    return held_out, text


def _open_data(runs: Sequence[Run], data: PreparedData | Path | str | None) -> PreparedData:
    if isinstance(data, PreparedData):
        return data
    if data is not None:
        return open_prepared(data)
    sources = runs[0].config.data.sources
    if len(sources) != 1:
        have = f"was trained on {len(sources)} ({', '.join(sources)})" if sources else "names none"
        raise UserError(f"cannot choose a data set: the run {runs[0].name} {have}; give --data=DIR")
    if not storage_path(sources[0]).exists():
        raise UserError(
            f"the data of the run {runs[0].name} were not found (tried "
            f"{', '.join(map(str, _candidate_paths(runs[0], sources[0])))}); give "
            "--data=DIR"
        )
    return open_prepared(sources[0])


def _candidate_paths(run: Run, source: str) -> list[Path]:
    return candidate_paths(source, run.workdir) if run.workdir else [Path(source)]


def check_tokenizer(run: Run, data: PreparedData) -> None:
    """Raises UserError if the data's tokenizer is known to differ from the run's."""
    for trained in _fingerprints(run):
        if trained != data.fingerprint:
            raise UserError(
                f"the data in {data.folder} use another tokenizer (fingerprint "
                f"{data.fingerprint[:12]}) than those of the run {run.name} ({trained[:12]}); "
                "prepare them with the run's tokenizer, or evaluate the run alone and compare bits "
                "per byte"
            )
    if data.tokenizer.vocab_size > run.config.model.vocab_size:
        raise UserError(
            f"the vocabulary of {data.folder}, {data.tokenizer.vocab_size} tokens, is larger than "
            f"that of the run {run.name}, {run.config.model.vocab_size}; use data prepared with "
            "its tokenizer"
        )


def _fingerprints(run: Run) -> list[str]:
    """Tokenizer fingerprints: from the checkpoint, else from the run's data that exist."""
    if run.tokenizer:
        return [run.tokenizer]
    folders = [storage_path(source) for source in run.config.data.sources]
    manifests = [read_manifest(folder) for folder in folders if (folder / MANIFEST).exists()]
    return [manifest["tokenizer"]["fingerprint"] for manifest in manifests]


def _sequences(data: PreparedData, split: str, settings: EvalConfig, longest: int) -> HeldOut:
    starts, stops = data.split(split).document_bounds()
    available = int((stops - starts).max()) - 1
    if available < longest:
        raise UserError(
            f"no document in the split {split!r} of {data.folder} is long enough for a context of "
            f"{longest} tokens; the longest that fits is {available}: choose shorter "
            "--context-lengths, or prepare longer documents"
        )
    return eval_sequences(
        data, length=longest, num=settings.num_sequences, split=split, seed=settings.seed
    )
