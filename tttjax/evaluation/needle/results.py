"""What needle tests found: every answer, and means by length, depth, distance and region."""

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
    """One prompt and what was answered. See `Prompt.region` for region."""

    place: PromptSpec
    distance: int
    region: str
    value: str
    answer: Answer

    @classmethod
    def of(cls, prompt: Prompt, answer: Answer, window: int) -> "Sample":
        region = prompt.region(window)
        return cls(prompt.place, prompt.distance, region, prompt.value, answer)

    @property
    def is_correct(self) -> bool:
        """Whether the value stands in what was written."""
        return self.value in self.answer.text

    @property
    def gain(self) -> float:
        """Nats per token by which the needle made its value likelier."""
        return self.answer.value.logprob - self.answer.absent.logprob

    @property
    def recall(self) -> float:
        """Nats per token by which the value is likelier than another that was never read."""
        return self.answer.value.logprob - self.answer.decoy.logprob


# What is averaged, and its name in files.
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
    """With the standard error over samples; NaN for fewer than two."""
    return _estimate(_values(samples, measure))


def _values(samples: Sequence[Sample], measure: str) -> np.ndarray:
    return np.array([float(MEASURES[measure](sample)) for sample in samples])


def _estimate(values: np.ndarray) -> Estimate:
    n = len(values)
    error = values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(np.asarray(values.mean() if n else math.nan), np.asarray(error))


def wilson(correct: int, number: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson): wide for few samples, also at 0 and at 1."""
    if not number:
        return math.nan, math.nan
    z, p = 1.959964, correct / number
    middle = (p + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(p * (1 - p) / number + (z / (2 * number)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class NeedleSeries:
    """One way of reading, asked all prompts. inner: how it learned, None if it did not."""

    run: str
    mode: str
    label: str
    inner: dict[str, Any] | None
    samples: tuple[Sample, ...]
    seconds: float

    def of(self, **wanted: Any) -> list[Sample]:
        """Samples by task (its name), length, depth or region."""
        return [
            sample for sample in self.samples if all(_has(sample, *pair) for pair in wanted.items())
        ]


def _has(sample: Sample, name: str, value: Any) -> bool:
    if name == "task":
        return sample.place.task.name == value
    return getattr(sample if name == "region" else sample.place, name) == value


@dataclass(frozen=True)
class SampleGroup:
    """Samples that are reported together. by: what they share; where: its values."""

    by: str
    where: dict[str, Any]
    samples: list[Sample]

    @property
    def correct(self) -> int:
        return sum(sample.is_correct for sample in self.samples)


@dataclass(frozen=True)
class NeedleResults:
    """Several ways of reading, asked the same prompts.

    window: tokens that attention is taken to see, for `Prompt.region`. haystacks: of each task,
    where its text is from. notes: what a reader must know of them. runs: name, step, source and
    window of each.
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
        """What is reported of a task: by length, by length and depth, by distance, by region."""
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
        """(a, b) of the same run, of which a learns and b does not."""
        return [
            (a, b)
            for a in self.series
            for b in self.series
            if a.run == b.run and a.inner is not None and b.inner is None
        ]


def difference(a: Sequence[Sample], b: Sequence[Sample], measure: str) -> Estimate:
    """Mean of a - b, prompt by prompt; ValueError unless both answered the same prompts."""
    if [sample.place for sample in a] != [sample.place for sample in b]:
        raise ValueError("a paired difference needs the same prompts on both sides")
    return _estimate(_values(a, measure) - _values(b, measure))
