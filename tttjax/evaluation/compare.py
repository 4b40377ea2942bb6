"""Evaluates runs on the same held-out tokens: opens data and weights, reads, compares."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from jax.sharding import Mesh

from tttjax.config import Config, EvalConfig
from tttjax.data.held_out import HeldOut
from tttjax.data.shards import PreparedData
from tttjax.errors import UserError
from tttjax.evaluation import tables
from tttjax.evaluation.progress import Progress
from tttjax.evaluation.results import Comparison, Series
from tttjax.evaluation.scoring import make_scorer, token_losses
from tttjax.evaluation.text import Text, open_text
from tttjax.parallel import precision
from tttjax.runs.run import (
    EvalSetup,
    LearningOptions,
    Run,
    RunSpec,
    choose_modes,
    inner_config,
    inner_learning_rates,
    iter_eval_setups,
    make_run_mesh,
    open_run,
    run_of_params,
)
from tttjax.types import Params

LEARNING_COST = 3  # one token read with learning, in tokens read without: forward and backward


def compare(
    runs: Sequence[RunSpec | Run],
    *,
    data: PreparedData | Path | str | None = None,
    split: str = "",
    settings: EvalConfig | None = None,
    modes: Sequence[str] = (),
    window: int = 0,
    longest: int = 0,
    learning: LearningOptions | None = None,
    mesh: Mesh | None = None,
    progress: TextIO | None = None,
) -> Comparison:
    """Loss by position and context length of several runs, on the same held-out tokens.

    The text is cut into sequences of the longest context, each within one document. A shorter
    context cuts these further, so at every length it is the same tokens that are scored.

    Arguments:
      data, split: a prepared data set (default: the first run's) and its split (data.val_split).
      settings: context lengths, numbers and sizes; default those of the first run's configuration.
      modes: of "on", "off", "dynamic"; default on and off, or off for runs without fast weights.
      window: where "beyond the window" begins; default the largest window of the runs.
      longest: tokens of the sequences that the text is cut into; default the longest context.
      learning: changes to the inner loop.
      mesh: default all devices, arranged like each run's own.
      progress: where the progress line goes; None: nowhere.

    Raises:
      UserError: runs, data, tokenizers, lengths or modes that do not fit together.
    """
    learning = learning or LearningOptions()
    opened = [open_run(run) if isinstance(run, RunSpec) else run for run in runs]
    check_names(opened)
    settings = settings or opened[0].config.eval
    chosen = choose_modes(opened, modes)
    window = window or largest_window(opened, settings)
    lengths = context_lengths(opened, chosen, settings, window, learning)
    held_out, text = open_text(opened, data, split, settings, max(longest, *lengths))
    bar = Progress(_total_work(opened, chosen, learning, lengths, held_out), progress)
    series: list[Series] = []
    for run, its_modes in zip(opened, chosen, strict=True):
        with precision.as_configured(run.config):
            for ways in iter_eval_setups(
                run, its_modes, learning, mesh or make_run_mesh(run.config)
            ):
                series += _read(run, ways, text, held_out, lengths, settings.batch_size, bar)
    bar.close()
    comparison = Comparison(
        series=tuple(series),
        lengths=lengths,
        window=window,
        bins=settings.bins,
        runs=tuple(
            {"name": run.name, "step": run.step, "source": run.source, "window": run.window}
            for run in opened
        ),
        text=text.describe(held_out),
    )
    return dataclasses.replace(
        comparison, table=tables.table(comparison), sentence=tables.sentence(comparison)
    )


def evaluate(
    config: Config,
    params: Params,
    data: PreparedData | Path | str | None = None,
    *,
    name: str = "model",
    **options,
) -> Comparison:
    """`compare` for one model whose weights are in memory; the same options."""
    return compare([run_of_params(config, params, name)], data=data, **options)


def check_names(runs: Sequence[Run]) -> None:
    """UserError if there are no runs, or two of the same name."""
    if not runs:
        raise UserError("there is nothing to evaluate; give the work directory of a run")
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two runs are called {twice!r}; give them different names with --names")


def largest_window(runs: Sequence[Run], settings: EvalConfig) -> int:
    """The largest window; where no run has one, the shortest context or the runs' own size."""
    largest = max(run.window for run in runs)
    shortest = min(settings.context_lengths, default=runs[0].config.model.window_size)
    return largest or shortest


def context_lengths(
    runs: Sequence[Run],
    modes: Sequence[tuple[str, ...]],
    settings: EvalConfig,
    window: int,
    learning: LearningOptions,
) -> tuple[int, ...]:
    """Those of the settings, else 1, 2, 4 and 8 windows. UserError if one does not fit a run."""
    lengths = settings.context_lengths or tuple(window * n for n in (1, 2, 4, 8))
    lengths = tuple(sorted(set(lengths)))
    if lengths[0] < 1:
        raise UserError(f"a context length of {lengths[0]} tokens must be at least 1")
    for run, its_modes in zip(runs, modes, strict=True):
        if its_modes == ("off",):
            continue
        chunk = inner_config(run, learning).chunk_size
        for length in lengths:
            if length % chunk:
                below = length - length % chunk
                near = f"{below} or {below + chunk}" if below else str(chunk)
                raise UserError(
                    f"the context length {length} is not a multiple of the chunk size {chunk} of "
                    f"the run {run.name}; the nearest is {near}"
                )
    return lengths


def _read(
    run: Run,
    ways: Sequence[EvalSetup],
    text: Text,
    held_out: HeldOut,
    lengths: Sequence[int],
    batch_size: int,
    bar: Progress,
) -> list[Series]:
    """One mode of a run at all context lengths, once per learning rate, compiled once."""
    scorer = make_scorer(ways[0])
    series = []
    for way in ways:
        started = time.perf_counter()
        contexts = {}
        for length in lengths:
            bar.doing(f"{way.label} at {length} tokens", LEARNING_COST if way.learn else 1)
            nll_NT = token_losses(way, scorer, held_out, length, batch_size, on_tokens=bar.add)
            contexts[length] = text.sums(nll_NT, length)
        inner = {
            "rule": way.rule,
            "lr": way.lr,
            "clip": way.inner.clip,
            "chunk_size": way.inner.chunk_size,
        }
        series.append(
            Series(
                run=run.name,
                mode=way.mode,
                label=way.label,
                inner=inner if way.learn else None,
                contexts=contexts,
                seconds=time.perf_counter() - started,
            )
        )
    return series


def _total_work(
    runs: Sequence[Run],
    modes: Sequence[tuple[str, ...]],
    learning: LearningOptions,
    lengths: Sequence[int],
    held_out: HeldOut,
) -> int:
    """Tokens that will be read, those with learning counted for what they cost."""
    longest = held_out.tokens.shape[1] - 1
    tokens = sum(longest // length * length for length in lengths) * len(held_out)
    costs = sum(
        (LEARNING_COST if mode != "off" else 1) * len(inner_learning_rates(run, mode, learning))
        for run, its_modes in zip(runs, modes, strict=True)
        for mode in its_modes
    )
    return tokens * costs
