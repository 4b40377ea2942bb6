"""Makes the design of a sweep: settings from a grid or a table, their names, configurations."""

import csv
import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tttjax.config import Config, from_config_dict
from tttjax.config.build import replace_values
from tttjax.config.checks import check_config, has_fast_weights
from tttjax.config.files import load_config_dict, matching_specs, set_values
from tttjax.config.values import check_value, find_field, parse_value
from tttjax.errors import UserError
from tttjax.io.paths import local_path
from tttjax.sweeps.design import RECIPE, Design, Scoring, Trial

SEEDS = ("train.seed", "data.seed")  # what a trial's seed is added to
_LONGEST_NAME = 180  # of a setting; file systems take names of 255 bytes


def make_design(
    specs: Sequence[str],
    values: Sequence[Mapping[str, Any]],
    seeds: int,
    *,
    changes: Mapping[str, Any] | None = None,
    scoring: Mapping[str, Any] | None = None,
) -> Design:
    """All recipes x settings x seeds.

    Arguments:
      specs: recipes, as `--config` takes them; `*` in an argument stands for all that match.
      values: the fields of each setting by dotted name, from `grid` or `read_table`; a setting
        with "recipe" is of that recipe alone.
      changes: fields of all trials by dotted name.
      scoring: split, lengths, window and num_sequences other than the recipes'.

    Raises UserError for recipes, fields or values that do not fit, and for settings given twice.
    """
    if seeds < 1:
        raise UserError(f"--seeds={seeds} must be at least 1")
    given = list(itertools.chain.from_iterable(map(matching_specs, specs)))
    rows = list(_settings(given, values))
    _check_even(rows)
    names = _setting_names(rows)
    trials = tuple(
        Trial(name, row, seed, _config(row, seed, changes or {}))
        for seed, (name, row) in itertools.product(range(seeds), zip(names, rows, strict=True))
    )
    scored = _scoring([trial.config for trial in trials], scoring or {})
    for trial in trials:
        _check_scoring(trial, scored)
    return Design(trials, scored)


def grid(axes: Sequence[str]) -> list[dict[str, Any]]:
    """The settings of `field=value,value` for each axis, every combination of them.

    Values of a field that is itself a list are separated by `;`: `model.mixers=window;full`.
    """
    values: dict[str, list[Any]] = {}
    for axis in axes:
        name, equals, text = axis.partition("=")
        if not equals or not text:
            raise UserError(f"--set {axis} has no values; write --set {name}=VALUE,VALUE")
        if name in values:
            raise UserError(f"--set {name} is given twice; give all its values at once")
        words = text.split(";" if _is_list(name) else ",")
        values[name] = [parse_value(name, word) for word in words]
        _refuse_seed(name)
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The settings of a CSV table: a column for each field, and perhaps `recipe`; a row for each.

    Raises UserError for a missing or uneven table, and for values that do not fit.
    """
    path = local_path(path, "--trials")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]  # without blank lines
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--trials={path} cannot be read as a CSV table: {error}") from error
    if len(rows) < 2:
        raise UserError(f"--trials={path} needs a line of field names and a line for each setting")
    head, body = [name.strip() for name in rows[0]], rows[1:]
    for name in head:
        _refuse_seed(name)
        if head.count(name) > 1:
            raise UserError(f"{path} has several columns {name}; keep one")
    return [_read_row(path, head, row) for row in body]


def _read_row(path: Path, head: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    if len(row) != len(head):
        raise UserError(f"the row {','.join(row)} of {path} has {len(row)} cells, not {len(head)}")
    try:
        return {
            name: text if name == RECIPE else parse_value(name, text)
            for name, text in zip(head, row, strict=True)
        }
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _is_list(name: str) -> bool:
    return str(find_field(name).type).startswith("tuple")


def _refuse_seed(name: str) -> None:
    if name in SEEDS:
        raise UserError(f"{name} is set by the sweep; give --seeds=N for N seeds of each setting")


def _settings(
    specs: Sequence[str], values: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The values of every setting, "recipe" among them."""
    for row in values:
        if RECIPE in row:
            if specs:
                raise UserError("--config and a column `recipe` exclude each other; remove one")
            yield from ({**row, RECIPE: spec} for spec in matching_specs(str(row[RECIPE])))
            continue
        if not specs:
            raise UserError("a sweep needs a recipe: give --config, or a column `recipe`")
        yield from ({RECIPE: spec, **row} for spec in specs)


def _check_even(rows: Sequence[Mapping[str, Any]]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    uneven = next((name for name in names for row in rows if name not in row), None)
    if uneven is not None:
        raise UserError(f"{uneven} is set by some settings only; give it in all")


def _config(row: Mapping[str, Any], seed: int, changes: Mapping[str, Any]) -> Config:
    config = load_config_dict(row[RECIPE])
    twice = next((name for name in row if name in changes), None)
    if twice is not None:
        raise UserError(f"{twice} is set for all trials and by the settings; give it once")
    set_values(config, changes)
    set_values(config, {name: value for name, value in row.items() if name != RECIPE})
    checked = from_config_dict(config)
    first = {"train.seed": checked.train.seed, "data.seed": checked.data.seed}
    seeded = replace_values(
        checked, {name: check_value(name, number + seed) for name, number in first.items()}
    )
    check_config(seeded)
    return seeded


def _setting_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings, each another; UserError for a setting that is given twice.

    A name has all fields of its setting, so settings that are added later do not change it.
    """
    names = [_setting_name(row) for row in rows]
    texts = [repr(sorted(row.items())) for row in rows]
    count, times = Counter(names), Counter(texts)
    for name, text in zip(names, texts, strict=True):
        if times[text] > 1:
            raise UserError(f"the setting {name} is given twice; remove one")
    return [
        name
        if count[name] == 1 and len(name) <= _LONGEST_NAME
        else f"{name[:_LONGEST_NAME]},{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        for name, text in zip(names, texts, strict=True)
    ]


def _setting_name(values: Mapping[str, Any]) -> str:
    """`ttt_e2e,chunk_size=16,inner.lr=0.1`: the last words of field names where they suffice."""
    leaves = [name.rpartition(".")[2] for name in values]
    file, _, argument = str(values[RECIPE]).partition(":")
    words = [argument.replace(",", "-") or Path(file).stem]
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        text = "+".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
        if name != RECIPE:
            words.append(f"{leaf if leaves.count(leaf) == 1 else name}={text}")
    return re.sub(r"[^\w.,=+-]", "_", ",".join(words), flags=re.ASCII)


def _scoring(configs: Sequence[Config], given: Mapping[str, Any]) -> Scoring:
    """The recipes' evaluation settings, which must agree where none is given."""

    def common(field: str, values: Sequence[Any], option: str) -> Any:
        if given.get(field) is not None:
            return given[field]
        if len(set(values)) > 1:
            shown = ", ".join(map(str, list(dict.fromkeys(values))[:4]))
            raise UserError(f"the trials have several {option} ({shown}); give {option}")
        return values[0]

    longest = max(config.train.seq_len for config in configs)
    windows = [c.model.window_size for c in configs if "window" in c.model.mixer_kinds]
    largest_window = max(windows, default=longest)
    lengths = common(
        "lengths",
        [config.eval.context_lengths or (longest,) for config in configs],
        "--context-lengths",
    )
    settings = dataclasses.replace(
        configs[0].eval,
        context_lengths=tuple(sorted(set(lengths))),
        num_sequences=common(
            "num_sequences", [config.eval.num_sequences for config in configs], "--num-sequences"
        ),
        batch_size=min(config.eval.batch_size for config in configs),
        bins=max(config.eval.bins for config in configs),
    )
    return Scoring(
        split=common("split", [config.data.val_split for config in configs], "--split"),
        window=largest_window if given.get("window") is None else given["window"],
        settings=settings,
    )


def _check_scoring(trial: Trial, scoring: Scoring) -> None:
    """Raises UserError if a trial cannot be evaluated so, before it is trained."""
    if scoring.window < 1:
        raise UserError(f"--window={scoring.window} must be at least 1")
    values = {
        "eval.context_lengths": check_value("eval.context_lengths", scoring.lengths),
        "eval.num_sequences": check_value("eval.num_sequences", scoring.settings.num_sequences),
    }
    if not has_fast_weights(trial.config.model, trial.config.inner):
        return  # its chunks are none
    try:
        check_config(replace_values(trial.config, values))
    except UserError as error:
        raise UserError(f"{trial.name}: {error}") from error
