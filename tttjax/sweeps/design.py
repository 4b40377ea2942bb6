"""The design of a sweep: the settings of its trials, their seeds, and how all are scored.

A setting is a recipe with values of some fields; a trial is a setting with a seed. Trials with one
seed share the order of the data, and initial weights of one shape, so that settings are compared
in pairs. `sweep.json` in the sweep's folder holds every trial's whole configuration: recipe files
are not needed again, not on another machine either.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tttjax.config import Config, EvalConfig, from_config_dict
from tttjax.config.build import to_dict
from tttjax.config.custom_code import custom_code
from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write, write_text

DESIGN = "sweep.json"
FORMAT = 1
RECIPE = "recipe"  # the axis of several recipes


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    setting: name of the setting, made of the values that distinguish it. values: all values of the
    grid or table by field, and "recipe". seed: 0, 1, ...
    """

    setting: str
    values: Mapping[str, Any]
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Name of the trial's folder."""
        return f"{self.setting},seed={self.seed}"


@dataclass(frozen=True)
class Scoring:
    """How every trial is evaluated, so that all score the same tokens.

    window: tokens after which "beyond the window" begins. settings: with context lengths.
    """

    split: str
    window: int
    settings: EvalConfig

    @property
    def lengths(self) -> tuple[int, ...]:
        """Context lengths in tokens."""
        return self.settings.context_lengths


@dataclass(frozen=True)
class Design:
    """All trials, seed by seed, and how they are scored."""

    trials: tuple[Trial, ...]
    scoring: Scoring

    @functools.cached_property
    def settings(self) -> dict[str, tuple[Trial, ...]]:
        """The trials of every setting, by its name."""
        result: dict[str, tuple[Trial, ...]] = {}
        for trial in self.trials:
            result[trial.setting] = (*result.get(trial.setting, ()), trial)
        return result

    @functools.cached_property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Field in which settings differ -> its values, in the order of the trials."""
        result: dict[str, tuple[Any, ...]] = {}
        for trial in self.trials:
            for name, value in trial.values.items():
                seen = result.setdefault(name, ())
                result[name] = seen if value in seen else (*seen, value)
        return {name: values for name, values in result.items() if len(values) > 1}


# On disk -----------------------------------------------------------------------------------------


def write_design(design: Design, out: Path) -> None:
    """Writes `sweep.json`, in place of an earlier one: trials of both keep their results.

    Raises UserError for a custom rule or loss of a file that this process has not run.
    """
    values = {
        "format": FORMAT,
        "scoring": dataclasses.asdict(design.scoring),
        "trials": [
            {**vars(trial), "values": dict(trial.values), "config": to_dict(trial.config)}
            for trial in design.trials
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    for sha256, path in _code_files(design, out).items():
        with atomic_write(path) as temporary:
            temporary.write_bytes(custom_code(sha256).source)
    with atomic_write(out / DESIGN) as temporary:
        write_text(temporary, json.dumps(values, indent=1, allow_nan=False) + "\n")


def code_flags(design: Design, out: Path) -> list[str]:
    """The flags `--code` of a process that runs a trial: files with its custom rule or loss."""
    return [f"--code={path.absolute()}" for path in _code_files(design, out).values()]


def _code_files(design: Design, out: Path) -> dict[str, Path]:
    """Where the sweep's folder keeps each recipe file with a custom rule or loss, by sha256."""
    hashes = sorted({trial.config.inner.code for trial in design.trials} - {""})
    return {sha256: out / f"recipe-{sha256[:12]}.py" for sha256 in hashes}


def read_design(out: Path) -> Design | None:
    """The design in a sweep's folder, None if there is none. UserError for a damaged file."""
    path = out / DESIGN
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has the format {values['format']}, and this version reads {FORMAT}; use "
                "the version that wrote it"
            )
        scoring = values["scoring"]
        lengths = tuple(scoring["settings"]["context_lengths"])
        settings = EvalConfig(**{**scoring["settings"], "context_lengths": lengths})
        scored = Scoring(scoring["split"], scoring["window"], settings)
        return Design(tuple(map(_read_trial, values["trials"])), scored)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it, and give the sweep again"
        ) from error


def _read_trial(values: Mapping[str, Any]) -> Trial:
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values["values"].items()
    }
    config = from_config_dict(values["config"])
    return Trial(values["setting"], fields, values["seed"], config)
