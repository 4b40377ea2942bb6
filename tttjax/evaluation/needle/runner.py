"""Runs needle tests: loads runs, tokenizers and haystacks, and answers all prompts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import pandas as pd

from tttjax.data.shards import open_prepared
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.evaluation.compare import LEARNING_COST, check_names
from tttjax.evaluation.needle import haystack as haystacks
from tttjax.evaluation.needle.haystack import Haystack
from tttjax.evaluation.needle.model import EngineModel, NeedleModel
from tttjax.evaluation.needle.prompts import PromptSpec, check_tokenizer, make_prompt
from tttjax.evaluation.needle.results import NeedleResults, NeedleSeries, answer_row
from tttjax.evaluation.needle.tasks import TASKS, NeedleTask
from tttjax.evaluation.progress import Progress
from tttjax.parallel import precision
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.eval_setup import (
    LearningOptions,
    choose_modes,
    inner_config,
    inner_learning_rates,
    iter_eval_setups,
)
from tttjax.runs.run import Run, RunSpec, open_run
from tttjax.runs.tokenizer import load_run_tokenizer

CHARACTERS_PER_TOKEN = 32  # characters of haystack text to load, per token of context


@dataclass(frozen=True)
class NeedleSettings:
    """Settings of needle tests.

    lengths: prompt lengths in tokens. depths: fractions of the haystack before the needle, 0 to 1.
    samples: per task, length and depth. text, data, split, tokenizer: sources of the haystack and
    the tokenizer (default: those of the run). batch_size: prompts per batch.
    """

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = tuple(TASKS)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 10
    seed: int = 0
    batch_size: int = 8
    text: Path | str | None = None
    data: Path | str | None = None
    split: str = ""
    tokenizer: Path | str | None = None

    def __post_init__(self):
        if not self.lengths or not self.depths or not self.tasks:
            raise UserError("needle tests need at least one task, one length and one depth")
        for name in self.tasks:
            if name not in TASKS:
                raise UserError(f"the needle task {name!r} is unknown; choose from {_names()}")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise UserError(f"a needle's depth of {100 * depth:g} % must be from 0 to 100 %")
        for name, least in (("samples", 1), ("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")

    def prompt_specs(self) -> list[PromptSpec]:
        """All prompt specs, ordered by length."""
        return [
            PromptSpec(TASKS[task], length, depth, number)
            for length in self.lengths
            for task in self.tasks
            for depth in self.depths
            for number in range(self.samples)
        ]


def _names() -> str:
    return ", ".join(TASKS)


def needle_tests(
    runs: Sequence[RunSpec | Run],
    settings: NeedleSettings,
    *,
    modes: Sequence[str] = (),
    window: int = 0,
    learning: LearningOptions | None = None,
    progress: TextIO | None = None,
) -> NeedleResults:
    """Runs the same needle prompts in every mode of every run, on one device.

    window: attention window that defines the regions (0: the largest of the runs). Other arguments
    are those of `compare`. Raises UserError for incompatible runs or settings.
    """
    learning = learning or LearningOptions()
    loaded = [open_run(run) if isinstance(run, RunSpec) else run for run in runs]
    check_names(loaded)
    chosen = choose_modes(loaded, modes, learning.dynamic_lrs)
    window = window or max(run.window for run in loaded)
    tokenizers = [load_run_tokenizer(run, settings.tokenizer) for run in loaded]
    run_haystacks = [
        _haystacks(run, tokenizer, settings)
        for run, tokenizer in zip(loaded, tokenizers, strict=True)
    ]
    notes: list[str] = []
    series: list[NeedleSeries] = []
    answers: list[pd.DataFrame] = []
    for sources in run_haystacks:  # check all prompts before any computation
        for spec in {(p.task.name, p.length): p for p in settings.prompt_specs()}.values():
            make_prompt(spec, sources.by_task[spec.task.name], settings.seed)
        notes += [note for note in sources.notes if note not in notes]
    if (
        len(
            {
                _prompts_hash(sources, t)
                for sources, t in zip(run_haystacks, tokenizers, strict=True)
            }
        )
        > 1
    ):
        notes.append(
            "The runs differ in tokenizer or haystack text, so their prompts differ; give "
            "--needle-text, and compare runs with the same tokenizer."
        )
    bar = Progress(_total_work(loaded, chosen, learning, settings), progress, title="needle")
    mesh = make_mesh(devices=jax.local_devices()[:1])
    for run, run_modes, tokenizer, sources in zip(
        loaded, chosen, tokenizers, run_haystacks, strict=True
    ):
        with precision.x64_if_configured(run.config):
            for setups in iter_eval_setups(run, run_modes, learning, mesh):
                for setup in setups:
                    bar.doing(setup.label, LEARNING_COST if setup.learn else 1)
                    started = time.perf_counter()
                    model = EngineModel(setup, tokenizer, max(settings.lengths))
                    rows = run_prompts(model, settings, sources.by_task, window, bar.add)
                    of_setup = NeedleSeries(
                        run=run.name,
                        mode=setup.mode,
                        label=setup.label,
                        inner=setup.describe_inner(),
                        seconds=time.perf_counter() - started,
                    )
                    series.append(of_setup)
                    answers.append(of_setup.answers(rows))
    bar.close()
    return NeedleResults(
        series=tuple(series),
        answers=pd.concat(answers, ignore_index=True),
        tasks=settings.tasks,
        lengths=settings.lengths,
        depths=settings.depths,
        samples=settings.samples,
        seed=settings.seed,
        window=window,
        runs=tuple(run.describe() for run in loaded),
        haystacks={task: haystack.source for task, haystack in run_haystacks[0].by_task.items()},
        notes=tuple(notes),
    )


def run_prompts(
    model: NeedleModel,
    settings: NeedleSettings,
    by_task: Mapping[str, Haystack],
    window: int,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[dict[str, Any]]:
    """One row per prompt, by length and then in the order of `NeedleSettings.prompt_specs`."""
    rows: list[dict[str, Any]] = []
    for length in settings.lengths:
        prompt_specs = [spec for spec in settings.prompt_specs() if spec.length == length]
        for start in range(0, len(prompt_specs), settings.batch_size):
            prompts = [
                make_prompt(spec, by_task[spec.task.name], settings.seed)
                for spec in prompt_specs[start : start + settings.batch_size]
            ]
            answers = model(prompts)
            rows += [
                answer_row(prompt, answer, window)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            on_tokens(length * len(prompts))
    return rows


@dataclass(frozen=True)
class _Haystacks:
    by_task: dict[str, Haystack]
    notes: tuple[str, ...]


def _prompts_hash(sources: _Haystacks, tokenizer: Tokenizer) -> int:
    """Equal for runs with equal prompts."""
    sentences = (tuple(haystack.sentences) for haystack in sources.by_task.values())
    return hash((tokenizer.fingerprint(), *sentences))


def _haystacks(run: Run, tokenizer: Tokenizer, settings: NeedleSettings) -> _Haystacks:
    """The haystacks of a run by task, with notes."""
    tasks = [TASKS[name] for name in settings.tasks]
    check_tokenizer(tokenizer, tasks)
    noise = haystacks.noise(tokenizer)
    notes: list[str] = []
    text = noise
    if not all(task.in_noise for task in tasks):
        try:
            text = _text(run, tokenizer, settings)
        except UserError as error:
            if settings.text or settings.data or settings.split:
                raise
            notes.append(
                f"{_listed(tasks)} of {run.name} use noise instead of natural text, which changes "
                f"their difficulty: {error}. --needle-text=FILE gives natural text."
            )
    if not text.is_noise and (tokens := text.tokens()) < max(settings.lengths):
        notes.append(
            f"The text from {text.source} has {tokens:,} tokens and repeats in longer contexts."
        )
    return _Haystacks({t.name: noise if t.in_noise else text for t in tasks}, tuple(notes))


def _listed(tasks: Sequence[NeedleTask]) -> str:
    return " and ".join(task.title for task in tasks if not task.in_noise)


def _text(run: Run, tokenizer: Tokenizer, settings: NeedleSettings) -> Haystack:
    characters = CHARACTERS_PER_TOKEN * max(settings.lengths)
    if settings.text:
        return haystacks.from_file(settings.text, tokenizer, characters)
    sources = (settings.data,) if settings.data else run.config.data.sources
    if not sources:
        raise UserError(f"the configuration of the run {run.name} names no data")
    split = settings.split or run.config.data.val_split
    data = open_prepared(sources[0])
    return haystacks.from_held_out(data, split, tokenizer, characters, settings.seed)


def _total_work(
    runs: Sequence[Run],
    modes: Sequence[tuple[str, ...]],
    learning: LearningOptions,
    settings: NeedleSettings,
) -> int:
    """Tokens of all prompts, those with TTT weighted by LEARNING_COST."""
    tokens = sum(spec.length for spec in settings.prompt_specs())
    costs = 0
    for run, run_modes in zip(runs, modes, strict=True):
        for mode in run_modes:
            if mode != "off":
                inner_config(run, learning)  # raises before any computation
            rates = len(inner_learning_rates(run, mode, learning))
            costs += (LEARNING_COST if mode != "off" else 1) * rates
    return tokens * costs
