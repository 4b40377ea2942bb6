"""Results of needle tests: all answers, and means by length, depth, distance and region."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tttjax.evaluation.needle.model import Answer
from tttjax.evaluation.needle.prompts import Prompt, PromptSpec
from tttjax.evaluation.statistics import Estimate

REGIONS = ("inside", "edge", "outside")


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer. `Prompt.region` defines region."""

    spec: PromptSpec
    distance: int
    region: str
    value: str
    answer: Answer

    @classmethod
    def of(cls, prompt: Prompt, answer: Answer, window: int) -> "Sample":
        region = prompt.region(window)
        return cls(prompt.spec, prompt.distance, region, prompt.value, answer)

    @property
    def is_correct(self) -> bool:
        """Whether the generated text contains the value."""
        return self.value in self.answer.text

    @property
    def gain(self) -> float:
        """Log-probability of the value with minus without the needle, nats per token."""
        return self.answer.value.logprob - self.answer.absent.logprob

    @property
    def recall(self) -> float:
        """Log-probability of the value minus that of the decoy, nats per token."""
        return self.answer.value.logprob - self.answer.decoy.logprob


# Averaged measures, by their names in files.
MEASURES: dict[str, Callable[[Sample], float]] = {
    "correct": lambda sample: sample.is_correct,
    "logprob": lambda sample: sample.answer.value.logprob,
    "gain": lambda sample: sample.gain,
    "recall": lambda sample: sample.recall,
    "top": lambda sample: sample.answer.value.top,
    "top_absent": lambda sample: sample.answer.absent.top,
    "top_decoy": lambda sample: sample.answer.decoy.top,
}


def mean(samples: Sequence[Sample], measure: str) -> Estimate:
    """Mean with standard error over samples; NaN error for fewer than two."""
    return _estimate(_values(samples, measure))


def _values(samples: Sequence[Sample], measure: str) -> np.ndarray:
    return np.array([float(MEASURES[measure](sample)) for sample in samples])


def _estimate(values: np.ndarray) -> Estimate:
    n = len(values)
    error = values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(np.asarray(values.mean() if n else math.nan), np.asarray(error))


def wilson(correct: int, number: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion; wide for few samples, also at 0 and 1."""
    if not number:
        return math.nan, math.nan
    z, p = 1.959964, correct / number
    middle = (p + z * z / (2 * number)) / (1 + z * z / number)
    half_width = (
        z / (1 + z * z / number) * math.sqrt(p * (1 - p) / number + (z / (2 * number)) ** 2)
    )
    return max(0.0, middle - half_width), min(1.0, middle + half_width)


@dataclass(frozen=True)
class NeedleSeries:
    """All samples of one run in one mode. inner: inner-loop settings, None without TTT."""

    run: str
    mode: str
    label: str
    inner: dict[str, Any] | None
    samples: tuple[Sample, ...]
    seconds: float

    def of(self, **criteria: Any) -> list[Sample]:
        """Samples selected by task name, length, depth or region."""
        return [
            sample
            for sample in self.samples
            if all(_matches(sample, *pair) for pair in criteria.items())
        ]


def _matches(sample: Sample, name: str, value: Any) -> bool:
    if name == "task":
        return sample.spec.task.name == value
    return getattr(sample if name == "region" else sample.spec, name) == value


@dataclass(frozen=True)
class SampleGroup:
    """Samples averaged into one row. by: the grouping; where: its values."""

    by: str
    where: dict[str, Any]
    samples: list[Sample]

    @property
    def correct(self) -> int:
        return sum(sample.is_correct for sample in self.samples)


@dataclass(frozen=True)
class NeedleResults:
    """Results of several series on the same prompts.

    window: attention window in tokens for `Prompt.region`. haystacks: origin of the text of each
    task. notes: caveats. runs: name, step, source and window of each run.
    """

    series: tuple[NeedleSeries, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    window: int
    runs: tuple[dict[str, Any], ...]
    haystacks: dict[str, str]
    notes: tuple[str, ...]

    def distances(self) -> list[tuple[int, int]]:
        """Ranges [first, stop) of needle distances: parts of a window, then doubling windows."""
        longest = max(sample.distance for series in self.series for sample in series.samples)
        unit = self.window or longest + 1
        edges = [0, *(edge for part in (4, 2) if (edge := unit // part)), unit]
        while edges[-1] <= longest:
            edges.append(2 * edges[-1])
        return list(pairwise(edges))

    def groups(self, series: NeedleSeries, task: str) -> Iterator[SampleGroup]:
        """The groups of a task: by length, by length and depth, by distance, by region."""
        samples = series.of(task=task)
        for length in self.lengths:
            yield SampleGroup("length", {"length": length}, series.of(task=task, length=length))
        for length in self.lengths:
            for depth in self.depths:
                where = {"length": length, "depth": depth}
                yield SampleGroup("cell", where, series.of(task=task, **where))
        for first, stop in self.distances():
            near = [sample for sample in samples if first <= sample.distance < stop]
            yield SampleGroup("distance", {"distance": first, "distance_stop": stop}, near)
        for region in REGIONS:
            yield SampleGroup("region", {"region": region}, series.of(task=task, region=region))

    def pairs(self) -> list[tuple[NeedleSeries, NeedleSeries]]:
        """Pairs (a, b) of the same run: a with TTT, b without."""
        return [
            (a, b)
            for a in self.series
            for b in self.series
            if a.run == b.run and a.inner is not None and b.inner is None
        ]


def difference(a: Sequence[Sample], b: Sequence[Sample], measure: str) -> Estimate:
    """Mean of a - b, paired by prompt. Raises ValueError for different prompts."""
    if [sample.spec for sample in a] != [sample.spec for sample in b]:
        raise ValueError("a paired difference needs the same prompts in both operands")
    return _estimate(_values(a, measure) - _values(b, measure))
