"""Loss of several runs on the same held-out tokens, by position and context length."""

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
from tttjax.evaluation.progress import Progress
from tttjax.evaluation.results import Comparison, Series
from tttjax.evaluation.summary import blocks, sentence
from tttjax.evaluation.tables import render
from tttjax.evaluation.text import Text, open_text
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.sequence_nll import make_scorer, token_losses
from tttjax.parallel import precision
from tttjax.runs.eval_setup import (
    EvalSetup,
    LearningOptions,
    choose_modes,
    inner_config,
    inner_learning_rates,
    iter_eval_setups,
)
from tttjax.runs.run import Run, RunSpec, make_run_mesh, open_run, run_of_params
from tttjax.types import Params

LEARNING_COST = 3  # forward and backward of a token with TTT, in forward passes


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
    """Evaluates several runs on the same held-out tokens, by position and context length.

    The text is split into sequences of the longest context, each within one document. Shorter
    contexts split these further, so every length scores the same tokens.

    Arguments:
      data, split: a prepared data set (default: the first run's) and its split (data.val_split).
      settings: evaluation settings (default: `eval` of the first run's configuration).
      modes: "on", "off", "dynamic" (default: on and off; off for runs without fast weights).
      window: tokens after which "beyond the window" begins (default: the largest of the runs).
      longest: sequence length in tokens (default: the longest context).
      learning: changes to the inner loop.
      mesh: default: all devices, with the mesh shape of each run.
      progress: stream for the progress line; None for no output.

    Raises:
      UserError: incompatible runs, data, tokenizers, lengths or modes.
    """
    learning = learning or LearningOptions()
    loaded = [open_run(run) if isinstance(run, RunSpec) else run for run in runs]
    check_names(loaded)
    settings = settings or loaded[0].config.eval
    chosen = choose_modes(loaded, modes, learning.dynamic_lrs)
    window = window or largest_window(loaded, settings)
    lengths = context_lengths(loaded, chosen, settings, window, learning)
    held_out, text = open_text(loaded, data, split, settings, max(longest, *lengths))
    bar = Progress(_total_work(loaded, chosen, learning, lengths, held_out), progress)
    series: list[Series] = []
    for run, run_modes in zip(loaded, chosen, strict=True):
        with precision.x64_if_configured(run.config):
            for setups in iter_eval_setups(
                run, run_modes, learning, mesh or make_run_mesh(run.config)
            ):
                series += _score_setups(
                    run, setups, text, held_out, lengths, settings.batch_size, bar
                )
    bar.close()
    comparison = Comparison(
        series=tuple(series),
        lengths=lengths,
        window=window,
        bins=settings.bins,
        runs=tuple(run.describe() for run in loaded),
        text=text.describe(held_out),
    )
    return dataclasses.replace(
        comparison, table=render(blocks(comparison)), sentence=sentence(comparison)
    )


def evaluate(
    config: Config,
    params: Params,
    data: PreparedData | Path | str | None = None,
    *,
    name: str = "model",
    **options,
) -> Comparison:
    """`compare` for one model with weights in memory; takes the same options."""
    return compare([run_of_params(config, params, name)], data=data, **options)


def check_names(runs: Sequence[Run]) -> None:
    """Raises UserError if there are no runs, or two with the same name."""
    if not runs:
        raise UserError("no runs to evaluate; give the work directory of a run")
    names = [run.name for run in runs]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise UserError(
            f"two runs are called {duplicate!r}; give them different names with --names"
        )


def largest_window(runs: Sequence[Run], settings: EvalConfig) -> int:
    """The largest window of the runs; without any, the shortest context or model.window_size."""
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
    """Context lengths of the settings, else 1, 2, 4 and 8 windows.

    Raises UserError for a length that is not a multiple of a learning run's chunk size.
    """
    lengths = settings.context_lengths or tuple(window * n for n in (1, 2, 4, 8))
    lengths = tuple(sorted(set(lengths)))
    if lengths[0] < 1:
        raise UserError(f"a context length of {lengths[0]} tokens must be at least 1")
    for run, run_modes in zip(runs, modes, strict=True):
        if run_modes == ("off",):
            continue
        chunk = inner_config(run, learning).chunk_size
        for length in lengths:
            if length % chunk:
                lower = length - length % chunk
                near = f"{lower} or {lower + chunk}" if lower else str(chunk)
                raise UserError(
                    f"the context length {length} is not a multiple of the chunk size {chunk} of "
                    f"the run {run.name}; the nearest is {near}"
                )
    return lengths


def _score_setups(
    run: Run,
    setups: Sequence[EvalSetup],
    text: Text,
    held_out: HeldOut,
    lengths: Sequence[int],
    batch_size: int,
    bar: Progress,
) -> list[Series]:
    """Scores all context lengths for one mode of a run; one series per inner learning rate."""
    first = setups[0]  # the others differ in the rate alone
    inference_model = make_inference_model(first.model, first.inner, lr=0.0, learn=first.learn)
    scorer = make_scorer(inference_model, first.mesh)
    series = []
    for setup in setups:
        started = time.perf_counter()
        contexts = {}
        for length in lengths:
            bar.doing(f"{setup.label} at {length} tokens", LEARNING_COST if setup.learn else 1)
            nll_NT = token_losses(
                *(scorer, setup.mesh, setup.params, setup.lr, held_out, length, batch_size),
                on_tokens=bar.add,
            )
            contexts[length] = text.sums(nll_NT, length)
        series.append(
            Series(
                run=run.name,
                mode=setup.mode,
                label=setup.label,
                inner=setup.describe_inner(),
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
    """Tokens to score, those with TTT weighted by LEARNING_COST."""
    longest = held_out.tokens.shape[1] - 1
    tokens = sum(longest // length * length for length in lengths) * len(held_out)
    costs = sum(
        (LEARNING_COST if mode != "off" else 1) * len(inner_learning_rates(run, mode, learning))
        for run, run_modes in zip(runs, modes, strict=True)
        for mode in run_modes
    )
    return tokens * costs
