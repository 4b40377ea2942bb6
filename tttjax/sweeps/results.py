"""Losses of all trials of a sweep that are done, read from their files, and comparisons of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tttjax.errors import UserError
from tttjax.evaluation.outputs import BY_DOCUMENT
from tttjax.evaluation.statistics import Estimate, Sums, difference, loss
from tttjax.sweeps.design import RECIPE, Design, Trial
from tttjax.sweeps.trial import EVALUATION, check_trials, trial_state, workdir

REGIONS = {
    "all": "all tokens",
    "within_window": "first window",
    "beyond_window": "beyond it",
    "last_quarter": "last quarter",
}
Losses = Mapping[tuple[str, int], Sums]  # by mode and context length; positions are bins


@dataclass(frozen=True)
class SweepResults:
    """losses: setting -> seed -> losses. edges: context length -> edges of the bins.

    diverged: names of trials whose loss was not finite. missing: of those that are not done.
    """

    design: Design
    losses: Mapping[str, Mapping[int, Losses]]
    edges: Mapping[int, np.ndarray]
    diverged: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def longest(self) -> int:
        return max(self.design.scoring.lengths)

    @property
    def settings(self) -> list[str]:
        """Settings with losses, in the order of the design."""
        return [name for name in self.design.settings if self.losses.get(name)]

    def regions(self, length: int) -> dict[str, tuple[int, int]]:
        """Name -> (first position, stop)."""
        window = self.design.scoring.window
        regions = {"all": (0, length)}
        if length > window:
            regions |= {"within_window": (0, window), "beyond_window": (window, length)}
        if length >= 4:
            regions["last_quarter"] = (length - length // 4, length)
        return regions

    def modes(self, setting: str) -> list[str]:
        """Modes of a setting: the main one (TTT on, where there are fast weights) first."""
        losses = next(iter(self.losses[setting].values()))
        return list(dict.fromkeys(mode for mode, _ in losses))

    def runs(
        self, setting: str, region: str = "all", *, mode: str = "", length: int = 0
    ) -> dict[int, Sums]:
        """Seed -> losses of a setting in a region, summed over it."""
        length, mode = length or self.longest, mode or self.modes(setting)[0]
        edges = self.edges[length]
        first, stop = np.searchsorted(edges, self.regions(length)[region])
        return {
            seed: losses[mode, length].between(first, stop)
            for seed, losses in self.losses[setting].items()
        }

    def loss(self, setting: str, region: str = "all", **options: Any) -> Estimate:
        """Nats per token in a region, over documents and seeds."""
        return loss(list(self.runs(setting, region, **options).values()))

    def difference(self, a: str, b: str, region: str = "all") -> Estimate:
        """a - b in a region, paired by document, and by seed where they have seeds in common."""
        return difference(*paired(self.runs(a, region), self.runs(b, region)))

    def best(self) -> list[str]:
        """The setting with the lowest loss; of every recipe, where there are several.

        Settings of a recipe are ranked by the seeds that all of them have, if there are any.
        """
        recipes: dict[Any, list[str]] = {}
        for name in self.settings:
            recipe = self.design.settings[name][0].values.get(RECIPE)
            recipes.setdefault(recipe, []).append(name)
        return [min(names, key=self._rank(names)) for names in recipes.values()]

    def _rank(self, names: Sequence[str]) -> Callable[[str], float]:
        seeds = set.intersection(*(set(self.losses[name]) for name in names))

        def mean(name: str) -> float:
            runs = self.runs(name)
            return float(loss([runs[seed] for seed in sorted(seeds or runs)]).mean)

        return mean

    def by_value(self, axis: str) -> Iterator[tuple[Any, Estimate, Estimate | None]]:
        """(value, loss, difference from the first value), over the trials that all values have.

        Trials are paired by seed and by the values of the other fields, over which the losses of a
        seed are averaged: the other settings are no sample, so they add nothing to the error.
        """
        groups: dict[Any, dict[tuple[tuple[str, ...], int], Sums]] = {}
        for name in self.settings:
            values = dict(self.design.settings[name][0].values)
            group = groups.setdefault(values.pop(axis), {})
            for seed, sums in self.runs(name).items():
                group[tuple(map(repr, values.values())), seed] = sums
        common = set.intersection(*map(set, groups.values())) if groups else set()
        if not common:
            return
        first = next(iter(groups))
        seeds = sorted({seed for _, seed in common})
        for value, group in groups.items():
            ours, theirs = (
                [_mean([of[key] for key in sorted(common) if key[1] == seed]) for seed in seeds]
                for of in (group, groups[first])
            )
            yield value, loss(ours), None if value == first else difference(ours, theirs)


def _mean(runs: Sequence[Sums]) -> Sums:
    """Mean losses of the same tokens."""
    return Sums(np.mean([sums.loss_DL for sums in runs], axis=0), runs[0].count_DL)


def paired(a: Mapping[int, Sums], b: Mapping[int, Sums]) -> tuple[list[Sums], list[Sums]]:
    """The runs of the seeds in common; all, if there are none."""
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return list(a.values()), list(b.values())
    return [a[seed] for seed in seeds], [b[seed] for seed in seeds]


def load_results(design: Design, out: Path) -> SweepResults:
    """The results of all trials that are done.

    Raises UserError if none is, or if one was trained with another configuration.
    """
    check_trials(design, out)
    losses: dict[str, dict[int, Losses]] = {}
    edges: dict[int, np.ndarray] = {}
    diverged, missing = [], []
    for trial in design.trials:
        state = trial_state(out, trial, design.scoring)
        if state.status == "diverged":
            diverged.append(trial.name)
        elif state.status != "done":
            missing.append(trial.name)
        else:
            of_trial, edges = _load(workdir(out, trial) / EVALUATION / BY_DOCUMENT, trial)
            if all(np.isfinite(sums.loss_DL).all() for sums in of_trial.values()):
                losses.setdefault(trial.setting, {})[trial.seed] = of_trial
            else:  # its updates at test time
                diverged.append(trial.name)
    if not losses:
        if diverged and not missing:
            raise UserError(f"all trials of {out} diverged, so there is nothing to report")
        raise UserError(f"no trial of {out} is done yet, so there is nothing to report")
    _check_same_tokens(losses)
    return SweepResults(design, losses, edges, tuple(diverged), tuple(missing))


def _load(path: Path, trial: Trial) -> tuple[Losses, dict[int, np.ndarray]]:
    try:
        frame = pd.read_csv(path)
        losses, edges = {}, {}
        for (mode, context), part in frame.groupby(["mode", "context"], sort=False):
            tables = {name: _pivot(part, name) for name in ("nats", "targets", "bytes")}
            if np.isnan(tables["targets"]).any():
                raise ValueError("rows are missing")
            has_bytes = not np.isnan(tables["bytes"]).any()
            length = int(context)
            losses[str(mode), length] = Sums(
                tables["nats"], tables["targets"], tables["bytes"] if has_bytes else None
            )
            edges[length] = np.asarray([0, *sorted(part["last_token"].unique())])
        return losses, edges
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the results of {trial.name} are damaged ({error}); remove {path.parent} and run the "
            "sweep again"
        ) from error


def _pivot(part: pd.DataFrame, name: str) -> np.ndarray:
    """[D, bins]. Raises ValueError or TypeError for what is not a number."""
    table = part.pivot(index="document", columns="first_token", values=name)
    return table.to_numpy().astype(np.float64)


def _check_same_tokens(losses: Mapping[str, Mapping[int, Losses]]) -> None:
    counts = [
        (name, seed, key, sums.count_DL)
        for name, seeds in losses.items()
        for seed, of_trial in seeds.items()
        for key, sums in of_trial.items()
    ]
    first = {key[1]: count for _, _, key, count in reversed(counts)}
    for name, seed, key, count in counts:
        if not np.array_equal(count, first[key[1]]):
            raise UserError(
                f"{name}, seed {seed} was evaluated on other tokens than the first trial: were the "
                "data prepared again? Remove the folders `evaluation` of the trials, and run the "
                "sweep again"
            )


def at_an_edge(results: SweepResults, names: Sequence[str]) -> Iterator[tuple[str, str, Any, str]]:
    """(setting, field, value, "lowest" or "highest") where a best value is an end of its range.

    The range is that of the setting's recipe.
    """
    settings = {name: trials[0].values for name, trials in results.design.settings.items()}
    for field in results.design.axes:
        for name in names:
            best = settings[name]
            tried = {of[field] for of in settings.values() if of[RECIPE] == best[RECIPE]}
            if len(tried) < 2 or not all(type(value) in (int, float) for value in tried):
                continue
            value = best[field]
            if value in (min(tried), max(tried)):
                yield name, field, value, "lowest" if value == min(tried) else "highest"
