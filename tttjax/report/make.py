"""Makes a report: opens the runs, reads what was not read before, measures, writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tttjax.data.shards import PreparedData
from tttjax.report.entries import Entry, choose_baseline, open_systems
from tttjax.report.results import Report


def make_report(
    entries: Sequence[Entry],
    out: Path | str,
    *,
    data: PreparedData | Path | str | None = None,
    split: str = "",
    lengths: Sequence[int] = (),
    num_sequences: int = 0,
    baseline: str = "",
    title: str = "",
    latency: bool = True,
    progress: TextIO | None = None,
    notes: str = "",
) -> Report:
    """Compares the systems on the same held-out tokens, and writes the report under `out`.

    Arguments:
      entries: the runs; those with one label are seeds and contexts of one system.
      data, split: a prepared data set (default: the baseline's own) and its split.
      lengths: contexts in tokens (default: those that systems have a run of their own for, else
        the baseline's eval.context_lengths).
      num_sequences: sequences of the longest context (0: the baseline's eval.num_sequences).
      baseline: label of the system that differences are taken from (default: full attention).
      latency: whether to measure prefill. progress: where progress goes.
      notes: Markdown paragraphs that are put below the summary.

    Raises:
      UserError: runs, data, tokenizers or lengths that do not fit together.
    """
    systems = open_systems(entries)
    chosen = choose_baseline(systems, baseline)
    raise NotImplementedError(chosen.label)
