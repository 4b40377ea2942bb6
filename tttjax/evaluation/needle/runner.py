"""Needle tests of runs: opens weights, tokenizers and haystacks, and asks every prompt."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import jax

from tttjax.data.shards import open_prepared
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.evaluation.compare import LEARNING_COST, check_names
from tttjax.evaluation.needle import haystack as haystacks
from tttjax.evaluation.needle.haystack import Haystack
from tttjax.evaluation.needle.model import EngineModel, NeedleModel
from tttjax.evaluation.needle.prompts import (
    TASKS,
    NeedleTask,
    PromptSpec,
    check_tokenizer,
    make_prompt,
)
from tttjax.evaluation.needle.results import NeedleResults, NeedleSeries, Sample
from tttjax.evaluation.progress import Progress
from tttjax.parallel import precision
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.run import (
    EvalSetup,
    LearningOptions,
    Run,
    RunSpec,
    choose_modes,
    inner_config,
    inner_learning_rates,
    iter_eval_setups,
    open_run,
)
from tttjax.runs.tokenizer import load_run_tokenizer

CONTEXTS_OF_TEXT = 32  # characters of text that are looked at, for each token of context


@dataclass(frozen=True)
class NeedleSettings:
    """Which prompts. lengths: of the prompts, in tokens. depths: parts of the haystack before the
    needle, from 0 to 1. samples: of each task, length and depth. text, data, split, tokenizer:
    where text and tokens are from, if not from the run. batch_size: prompts asked at once.
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

    def places(self) -> list[PromptSpec]:
        """Every prompt; those of one length stand together."""
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
    """Asks every way of reading of every run for the same needles, on one device.

    window: for inside and outside (0: the largest of the runs). The other arguments are those of
    `tttjax.evaluation.compare`. Raises UserError for what does not fit together.
    """
    learning = learning or LearningOptions()
    opened = [open_run(run) if isinstance(run, RunSpec) else run for run in runs]
    check_names(opened)
    chosen = choose_modes(opened, modes)
    window = window or max(run.window for run in opened)
    texts = [load_run_tokenizer(run, settings.tokenizer) for run in opened]
    found = [
        _haystacks(run, tokenizer, settings) for run, tokenizer in zip(opened, texts, strict=True)
    ]
    notes: list[str] = []
    series: list[NeedleSeries] = []
    for haystacks_of_run in found:  # all prompts are possible, or nothing is computed
        for place in {(p.task.name, p.length): p for p in settings.places()}.values():
            make_prompt(place, haystacks_of_run.by_task[place.task.name], settings.seed)
        notes += [note for note in haystacks_of_run.notes if note not in notes]
    if len({_told_apart(its, t) for its, t in zip(found, texts, strict=True)}) > 1:
        notes.append(
            "The runs differ in tokenizer or in the text that needles are hidden in, and so in "
            "their prompts; give --needle-text, and compare runs of one tokenizer."
        )
    bar = Progress(_total_work(opened, chosen, learning, settings), progress, title="needle")
    mesh = make_mesh(devices=jax.local_devices()[:1])
    for run, its_modes, tokenizer, its in zip(opened, chosen, texts, found, strict=True):
        with precision.as_configured(run.config):
            for ways in iter_eval_setups(run, its_modes, learning, mesh):
                for way in ways:
                    bar.doing(way.label, LEARNING_COST if way.learn else 1)
                    series.append(_ask(run, way, tokenizer, its.by_task, settings, window, bar.add))
    bar.close()
    return NeedleResults(
        series=tuple(series),
        tasks=settings.tasks,
        lengths=settings.lengths,
        depths=settings.depths,
        samples=settings.samples,
        seed=settings.seed,
        window=window,
        runs=tuple(
            {"name": run.name, "step": run.step, "source": run.source, "window": run.window}
            for run in opened
        ),
        haystacks={task: its.source for task, its in found[0].by_task.items()},
        notes=tuple(notes),
    )


def ask_all(
    ask: NeedleModel,
    settings: NeedleSettings,
    by_task: Mapping[str, Haystack],
    window: int,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> tuple[Sample, ...]:
    """Every prompt's sample, in the order of `NeedleSettings.places`."""
    samples: list[Sample] = []
    for length in settings.lengths:
        places = [place for place in settings.places() if place.length == length]
        for at in range(0, len(places), settings.batch_size):
            prompts = [
                make_prompt(place, by_task[place.task.name], settings.seed)
                for place in places[at : at + settings.batch_size]
            ]
            answers = ask(prompts)
            samples += [
                Sample.of(prompt, answer, window)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            on_tokens(length * len(prompts))
    return tuple(samples)


def _ask(
    run: Run,
    way: EvalSetup,
    tokenizer: Tokenizer,
    by_task: Mapping[str, Haystack],
    settings: NeedleSettings,
    window: int,
    on_tokens: Callable[[int], None],
) -> NeedleSeries:
    started = time.perf_counter()
    asker = EngineModel(way, tokenizer, max(settings.lengths))
    samples = ask_all(asker, settings, by_task, window, on_tokens)
    inner = {
        "rule": way.rule,
        "lr": way.lr,
        "clip": way.inner.clip,
        "chunk_size": way.inner.chunk_size,
    }
    return NeedleSeries(
        run=run.name,
        mode=way.mode,
        label=way.label,
        inner=inner if way.learn else None,
        samples=samples,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Haystacks:
    by_task: dict[str, Haystack]
    notes: tuple[str, ...]


def _told_apart(its: _Haystacks, tokenizer: Tokenizer) -> int:
    """The same for runs whose prompts are the same."""
    sentences = (tuple(haystack.sentences) for haystack in its.by_task.values())
    return hash((tokenizer.fingerprint(), *sentences))


def _haystacks(run: Run, tokenizer: Tokenizer, settings: NeedleSettings) -> _Haystacks:
    """The haystack of every task for a run, and what must be said of them."""
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
                f"{_listed(tasks)} of {run.name} are in noise instead of natural text, and easier "
                f"or harder for that: {error}. --needle-text=FILE gives them text."
            )
    if not text.is_noise and (tokens := text.tokens()) < max(settings.lengths):
        notes.append(
            f"The text from {text.source} has {tokens:,} tokens and repeats in longer contexts."
        )
    return _Haystacks({t.name: noise if t.in_noise else text for t in tasks}, tuple(notes))


def _listed(tasks: Sequence[NeedleTask]) -> str:
    return " and ".join(task.title for task in tasks if not task.in_noise)


def _text(run: Run, tokenizer: Tokenizer, settings: NeedleSettings) -> Haystack:
    characters = CONTEXTS_OF_TEXT * max(settings.lengths)
    if settings.text:
        return haystacks.from_file(settings.text, tokenizer, characters)
    sources = (settings.data,) if settings.data else run.config.data.sources
    if not sources:
        raise UserError(f"the run {run.name} names no data")
    split = settings.split or run.config.data.val_split
    data = open_prepared(sources[0])
    return haystacks.from_held_out(data, split, tokenizer, characters, settings.seed)


def _total_work(
    runs: Sequence[Run],
    modes: Sequence[tuple[str, ...]],
    learning: LearningOptions,
    settings: NeedleSettings,
) -> int:
    """Tokens of all prompts, those read with learning counted for what they cost."""
    tokens = sum(place.length for place in settings.places())
    costs = 0
    for run, its_modes in zip(runs, modes, strict=True):
        for mode in its_modes:
            if mode != "off":
                inner_config(run, learning)  # refuses what is impossible before anything is read
            rates = len(inner_learning_rates(run, mode, learning))
            costs += (LEARNING_COST if mode != "off" else 1) * rates
    return tokens * costs
