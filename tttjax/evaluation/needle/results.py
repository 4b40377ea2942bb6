"""Results of needle tests: a row for every answer, and means by length, depth, distance, region."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from tttjax.evaluation.needle.model import Answer
from tttjax.evaluation.needle.prompts import Prompt
from tttjax.evaluation.statistics import average, subtract, wilson

REGIONS = ("inside", "edge", "outside")
MEASURES = ["correct", "logprob", "gain", "recall", "top", "top_absent", "top_decoy"]
PROMPT = ["task", "length", "depth", "number"]  # what identifies a prompt
SERIES = ["run", "mode", "label"]
GROUPS = {
    "length": ["length"],
    "cell": ["length", "depth"],
    "distance": ["distance", "distance_stop"],
    "region": ["region"],
}


def answer_row(prompt: Prompt, answer: Answer, window: int) -> dict[str, Any]:
    """One answer as a row. `Prompt.region` defines region.

    correct: whether the generated text contains the value. The other measures are nats per token,
    or fractions of the value's tokens. gain: log-probability of the value with minus without the
    needle. recall: that of the value minus that of the decoy.
    """
    spec, value = prompt.spec, answer.value
    return {
        "task": spec.task.name,
        "length": spec.length,
        "depth": spec.depth,
        "number": spec.number,
        "distance": prompt.distance,
        "region": prompt.region(window),
        "value": prompt.value,
        "written": answer.text,
        "correct": float(prompt.value in answer.text),
        "logprob": value.logprob,
        "gain": value.logprob - answer.absent.logprob,
        "recall": value.logprob - answer.decoy.logprob,
        "top": value.top,
        "top_absent": answer.absent.top,
        "top_decoy": answer.decoy.top,
    }


@dataclass(frozen=True)
class NeedleSeries:
    """One run in one mode. inner: inner-loop settings, None without TTT."""

    run: str
    mode: str
    label: str
    inner: dict[str, Any] | None
    seconds: float

    def answers(self, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
        """The answers of the series, with its names in the first columns."""
        names = {name: getattr(self, name) for name in SERIES}
        return pd.DataFrame([{**names, **row} for row in rows])


@dataclass(frozen=True)
class NeedleResults:
    """Results of several series on the same prompts.

    answers: the rows of needle_samples.csv. window: attention window in tokens for
    `Prompt.region`. samples: prompts per task, length and depth. haystacks: origin of the text of
    each task. notes: caveats. runs: name, step, source and window of each run.
    """

    series: tuple[NeedleSeries, ...]
    answers: pd.DataFrame
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    window: int
    runs: tuple[dict[str, Any], ...]
    haystacks: dict[str, str]
    notes: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """The answers with run, mode, label, task and region as ordered categories."""
        orders = {name: [getattr(series, name) for series in self.series] for name in SERIES}
        orders |= {"task": list(self.tasks), "region": list(REGIONS)}
        return self.answers.astype(
            {
                name: pd.CategoricalDtype(list(dict.fromkeys(order)), ordered=True)
                for name, order in orders.items()
            }
        )

    def distances(self) -> list[tuple[int, int]]:
        """Ranges [first, stop) of needle distances: parts of a window, then doubling windows."""
        longest = int(self.answers["distance"].max())
        unit = self.window or longest + 1
        edges = [0, *(edge for part in (4, 2) if (edge := unit // part)), unit]
        while edges[-1] <= longest:
            edges.append(2 * edges[-1])
        return list(pairwise(edges))

    def pairs(self) -> list[tuple[NeedleSeries, NeedleSeries]]:
        """Pairs (a, b) of the same run: a with TTT, b without."""
        return [
            (a, b)
            for a in self.series
            for b in self.series
            if a.run == b.run and a.inner is not None and b.inner is None
        ]


def group_means(results: NeedleResults) -> pd.DataFrame:
    """The rows of needle.csv: means of the measures, over the groups of `by`.

    needles: number of samples; found: of these, how many values were generated, with the Wilson
    interval of the fraction.
    """
    frame = results.frame()
    edges = [first for first, _ in results.distances()] + [results.distances()[-1][1]]
    index = np.searchsorted(edges, frame["distance"], side="right") - 1
    frame = frame.assign(
        distance=np.asarray(edges)[index], distance_stop=np.asarray(edges)[index + 1]
    )
    parts = [
        average(frame, [*SERIES, "task", *keys], MEASURES).assign(by=by)
        for by, keys in GROUPS.items()
    ]
    rows = pd.concat(parts, ignore_index=True).sort_values([*SERIES, "task"], kind="stable")
    rows = rows.rename(columns={"number": "needles"})
    rows["found"] = (rows["correct"] * rows["needles"]).round().astype(int)
    rows["found_low"], rows["found_high"] = wilson(rows["found"], rows["needles"])
    where = ["length", "depth", "distance", "distance_stop", "region"]
    whole = dict.fromkeys(("length", "distance", "distance_stop"), "Int64")
    means = [name for measure in MEASURES for name in (measure, f"{measure}_stderr")]
    columns = [*SERIES, "task", "by", *where, "needles", "found", "found_low", "found_high"]
    return rows.astype(whole)[columns + means].reset_index(drop=True)


def differences(results: NeedleResults) -> pd.DataFrame:
    """Means of a - b by task and region, paired by prompt, for every pair of `results`.

    Raises ValueError if the two have different prompts.
    """
    frame = results.frame()
    parts = []
    for a, b in results.pairs():
        ours, theirs = (frame[frame["label"] == series.label] for series in (a, b))
        change = subtract(ours, theirs, PROMPT, MEASURES)
        means = average(change, ["task", "region"], MEASURES)
        parts.append(means.assign(a=a.label, b=b.label))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
