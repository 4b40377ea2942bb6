"""Losses of every system at every context length, cached in a folder."""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from tttjax.config import EvalConfig, config_fingerprint
from tttjax.data.held_out import HeldOut
from tttjax.data.shards import PreparedData
from tttjax.evaluation.compare import compare
from tttjax.evaluation.report.entries import Member, System
from tttjax.evaluation.statistics import Sums
from tttjax.evaluation.text import Text, open_text
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import is_bucket, storage_path
from tttjax.training import checkpoint_format
from tttjax.training.checkpoint_integrity import CHECKSUMS

FORMAT = 2
CACHE = "cache"


@dataclass(frozen=True)
class LossEvaluator:
    """Evaluates systems on shared held-out tokens, with cached losses."""

    data: PreparedData | Path | str
    split: str
    settings: EvalConfig
    lengths: tuple[int, ...]
    window: int
    held_out: HeldOut
    text: Text
    cache: Path
    progress: TextIO | None

    def evaluate(self, systems: Sequence[System]) -> dict[str, dict[int, tuple[Sums, ...]]]:
        """Losses by label and context length, one `Sums` per seed."""
        plan = [
            (system, length, member)
            for system in systems
            for length in self.lengths
            for member in system.at(length)
        ]
        losses: dict[str, dict[int, tuple[Sums, ...]]] = {system.label: {} for system in systems}
        for i, (system, length, member) in enumerate(plan):
            path = self._path(member, length)
            sums = load(path) if path.exists() else None
            if sums is None:
                self._report_progress(
                    f"report: {i + 1} of {len(plan)}, {_name(member)} at {length:,} tokens"
                )
                sums = self._evaluate_member(member, length)
                if jax.process_index() == 0:
                    save(path, sums)
            of_system = losses[system.label]
            of_system[length] = (*of_system.get(length, ()), sums)
        return losses

    def _evaluate_member(self, member: Member, length: int) -> Sums:
        comparison = compare(
            [member.run],
            data=self.data,
            split=self.split,
            settings=dataclasses.replace(self.settings, context_lengths=(length,)),
            window=self.window,
            longest=max(self.lengths),
            learning=member.learning,
            progress=self.progress,
        )
        (series,) = comparison.series
        return series.contexts[length]

    def _path(self, member: Member, length: int) -> Path:
        """Cache file; its name hashes all inputs of the numbers but batch size and devices."""
        assert member.run.checkpoint is not None  # runs of a report are on disk
        facts = {
            "format": FORMAT,
            "run": str(storage_path(member.run.source).resolve()),
            "configuration": config_fingerprint(member.config),
            "step": member.run.step,
            "saved": _time_or_sums(member.run.checkpoint),
            "mode": member.mode,
            "learning": {**vars(member.learning), "inner": dict(member.learning.inner)},
            "length": length,
            "tokens": self._tokens(),
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        return self.cache / f"losses-{name}.npz"

    def _tokens(self) -> str:
        hashed = hashlib.sha256(np.ascontiguousarray(self.held_out.tokens).tobytes())
        hashed.update(np.ascontiguousarray(self.held_out.document).tobytes())
        if self.held_out.chosen is not None:
            hashed.update(np.ascontiguousarray(self.held_out.chosen).tobytes())
        return f"{self.text.fingerprint} {hashed.hexdigest()}"

    def _report_progress(self, line: str) -> None:
        if self.progress is not None and jax.process_index() == 0:
            self.progress.write(line + "\n")
            self.progress.flush()


def make_loss_evaluator(
    systems: Sequence[System],
    data: PreparedData | Path | str | None,
    split: str,
    settings: EvalConfig,
    window: int,
    out: Path,
    progress: TextIO | None,
) -> LossEvaluator:
    """Selects the held-out tokens. Raises UserError if a run has another tokenizer.

    Data and split default to those of the first system's first run.
    """
    runs = [member.run for system in systems for member in system.members]
    lengths = settings.context_lengths
    held_out, text = open_text(runs, data, split, settings, max(lengths))
    return LossEvaluator(
        data=data if isinstance(data, PreparedData) else storage_path(text.folder),
        split=text.split,
        settings=settings,
        lengths=lengths,
        window=window,
        held_out=held_out,
        text=text,
        cache=out / CACHE,
        progress=progress,
    )


def _time_or_sums(checkpoint: Path) -> int | str:
    """What changes when a checkpoint is saved again: a folder in a bucket has no time."""
    if is_bucket(checkpoint):
        return (checkpoint / CHECKSUMS).read_text()
    return os.stat(checkpoint / checkpoint_format.META).st_mtime_ns


def save(path: Path, sums: Sums) -> None:
    """Writes sums as .npz, atomically."""
    arrays = {f.name: getattr(sums, f.name) for f in dataclasses.fields(sums)}
    present = {name: value for name, value in arrays.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **present)


def load(path: Path) -> Sums | None:
    """The sums of a cache file; None if it is unreadable."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return Sums(arrays["loss_DL"], arrays["count_DL"], arrays.get("bytes_DL"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _name(member: Member) -> str:
    return f"{member.run.name} (seed {member.seed})"
