"""Trials run as processes and in this one; kills change nothing; the report's numbers."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.paths import ROOT

from tttjax.cli.main import main
from tttjax.config import write_run_info
from tttjax.errors import UserError
from tttjax.io.locks import hold
from tttjax.sweeps.design import read_design, write_design
from tttjax.sweeps.local import Machine, SweepState, check_fits
from tttjax.sweeps.make_design import grid, make_design, read_table
from tttjax.sweeps.report import make_report
from tttjax.sweeps.results import load_results
from tttjax.sweeps.trial import check_data, open_trials, run_trial, trial_state, workdir

pytestmark = pytest.mark.slow

TINY = str(ROOT / "tests" / "helpers" / "tiny_run.py")
CHANGES = {
    "train.steps": 4,
    "train.checkpoint_every": 1,
    "optim.warmup_steps": 1,
    "eval.context_lengths": (16, 32),
    "eval.num_sequences": 8,
    "eval.batch_size": 8,
    "eval.bins": 4,
    "model.vocab_size": 264,
}


def make(data, axes, seeds=2, recipes=(f"{TINY}:static",), **changes):
    changes = {**CHANGES, "data.sources": (str(data),), **changes}
    return make_design(recipes, grid(axes), seeds, changes=changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a finished sweep of two rates and two windows, two seeds, with random losses."""
    out = tmp_path_factory.mktemp("sweep")
    design = make("unused", ["optim.peak_lr=1e-2,1e-1", "model.window_size=8,16"])
    write_design(design, out)
    rng = np.random.default_rng(0)
    edges = {16: [0, 4, 8, 12, 16], 32: [0, 4, 8, 16, 24, 32]}
    for trial in design.trials:
        folder = workdir(out, trial)
        rows = [
            {"mode": mode, "context": context, "document": document, "first_token": first + 1}
            | {"last_token": last, "targets": (last - first) * (document + 1), "bytes": np.nan}
            | {"nats": (last - first) * (document + 1) * rng.uniform(2, 4)}
            for mode in ("on", "off")
            for context, bins in edges.items()
            for document in range(3)
            for first, last in itertools.pairwise(bins)
        ]
        write_run_info(folder, trial.config)
        (folder / "summary.json").write_text("{}")
        (folder / "metrics.jsonl").write_text('{"step": 4, "loss": 3.5, "time": {}}\n')
        (folder / "evaluation").mkdir()
        pd.DataFrame(rows).to_csv(folder / "evaluation" / "by_document.csv", index=False)
        scoring = json.dumps(dataclasses.asdict(design.scoring))
        (folder / "evaluation" / "scoring.json").write_text(scoring)
    return design, out


def test_the_state_is_told_from_the_files(finished, tmp_path):
    design, out = finished
    assert open_trials(design, out) == []
    other = make("unused", ["optim.peak_lr=1e-2,1e-1", "model.window_size=8,16"], 3)
    assert [name[-1] for name in open_trials(other, out)] == ["2"] * 4
    assert len(open_trials(design, tmp_path)) == 8
    state = trial_state(out, design.trials[0], design.scoring)
    assert (state.status, state.step, state.loss) == ("done", 4, 3.5)


def test_another_scoring_evaluates_again(finished):
    design, out = finished
    other = make_design([TINY], [{}], 1, changes=CHANGES, scoring={"lengths": (32,)}).scoring
    assert trial_state(out, design.trials[0], other).status == "evaluating"


def by_hand(design, out, setting, first, last):
    """Loss of a setting over tokens first to last, seed by seed, from its files."""
    losses = []
    for trial in design.settings[setting]:
        frame = pd.read_csv(workdir(out, trial) / "evaluation" / "by_document.csv")
        frame = frame[frame["mode"] == "on"]
        part = frame.query("context == 32 and first_token >= @first and last_token <= @last")
        losses.append(part["nats"].sum() / part["targets"].sum())
    return np.array(losses)


def test_losses_are_those_of_the_trials(finished):
    design, out = finished
    results = load_results(design, out)
    for region, (first, last) in {
        "all": (1, 32),
        "beyond_window": (17, 32),
        "last_quarter": (25, 32),
    }.items():
        for setting in design.settings:
            expected = by_hand(design, out, setting, first, last)
            loss = results.loss(setting, region)
            assert float(loss.mean) == pytest.approx(expected.mean(), rel=1e-6)
            seeds = abs(expected[0] - expected[1]) / 2  # of the mean of two
            assert float(loss.seeds) == pytest.approx(seeds, rel=1e-5)


def test_differences_are_paired_by_seed(finished):
    design, out = finished
    results = load_results(design, out)
    a, b = list(design.settings)[:2]
    difference = by_hand(design, out, a, 1, 32) - by_hand(design, out, b, 1, 32)
    estimate = results.difference(a, b)
    assert float(estimate.mean) == pytest.approx(difference.mean(), rel=1e-5)
    assert float(estimate.seeds) == pytest.approx(abs(np.diff(difference)[0]) / 2, rel=1e-4)


def test_a_field_is_averaged_over_the_others(finished):
    design, out = finished
    (low, loss, none), (high, _, change) = load_results(design, out).by_value("optim.peak_lr")
    assert (low, high, none) == (0.01, 0.1, None)
    names = list(design.settings)
    means = {name: by_hand(design, out, name, 1, 32).mean() for name in names}
    of = {
        rate: np.mean([means[n] for n in names if f"peak_lr={rate}," in n]) for rate in (low, high)
    }
    assert float(loss.mean) == pytest.approx(of[low], rel=1e-6)
    assert float(change.mean) == pytest.approx(of[high] - of[low], rel=1e-5)


def test_the_report_writes_tables_that_pandas_reads_back(copied):
    design, out = copied
    blocks, paths = make_report(design, out)
    names = {path.name for path in paths}
    assert names >= {"report.html", "report.md", "heat_map.png", "loss_by_position.png", "best.csv"}
    frame = pd.read_csv(out / "report" / "settings.csv")
    rows = frame.query("context == 32 and region == 'all'")
    results = load_results(design, out)
    for row in rows.itertuples():
        loss = results.loss(row.setting, mode=row.mode)
        assert row.loss == pytest.approx(float(loss.mean), rel=1e-6)
    has_difference = rows["difference"].notna()
    assert list(has_difference) == [False, False, *[True, False] * 3]  # not the baseline, not off
    parquet = pd.read_parquet(out / "report" / "settings.parquet")
    assert list(parquet["setting"]) == list(frame["setting"])
    assert len(pd.read_csv(out / "report" / "trials.csv")) == 2 * len(frame)
    best = read_table(out / "report" / "best.csv")
    (setting,) = results.best()
    assert best == [dict(design.settings[setting][0].values)]
    assert any("the best may lie beyond it" in block for block in blocks if isinstance(block, str))
    with pytest.raises(UserError, match="is no setting"):
        make_report(design, out, "window")


@pytest.fixture
def copied(finished, tmp_path):
    """The finished sweep in a folder that may be damaged."""
    design, out = finished
    shutil.copytree(out / "trials", tmp_path / "trials")
    return design, tmp_path


def test_losses_that_are_not_finite_are_never_the_best(copied):
    design, out = copied
    trials = design.settings[load_results(design, out).best()[0]]
    for trial in trials:
        path = workdir(out, trial) / "evaluation" / "by_document.csv"
        frame = pd.read_csv(path)
        frame.loc[0, "nats"] = np.nan
        frame.to_csv(path, index=False)
    results = load_results(design, out)
    assert set(results.diverged) == {trial.name for trial in trials}
    assert trials[0].setting not in results.best()


@pytest.mark.parametrize("damage", ["nats", "rows"])
def test_damaged_results_are_named(copied, damage):
    design, out = copied
    path = workdir(out, design.trials[1]) / "evaluation" / "by_document.csv"
    frame = pd.read_csv(path)
    if damage == "rows":
        frame = frame.iloc[:-1]
    else:
        frame["nats"] = "abc"
    frame.to_csv(path, index=False)
    with pytest.raises(UserError, match=re.escape(design.trials[1].name)):
        load_results(design, out)


@pytest.mark.parametrize("name", ["evaluation/scoring.json", "metrics.jsonl"])
def test_a_damaged_record_counts_as_none(copied, name):
    design, out = copied
    (workdir(out, design.trials[0]) / name).write_text("[1]\n" if "jsonl" in name else '{"spl')
    state = trial_state(out, design.trials[0], design.scoring)
    assert state.status == ("done" if "jsonl" in name else "evaluating")


@pytest.mark.exhaustive
def test_a_diverged_trial_is_reported_and_not_repeated(data, tmp_path, capsys):
    axes = ["optim.peak_lr=1e-2,1e30"]
    design = make(data, axes, 1, **{"train.max_skipped_steps": 1, "train.steps": 8})
    write_design(design, tmp_path)
    for trial in design.trials:
        assert run_trial(tmp_path, trial, design.scoring)
    states = [trial_state(tmp_path, trial, design.scoring).status for trial in design.trials]
    assert states == ["done", "diverged"]
    assert main(["sweep", f"--out={tmp_path}", "--report"]) == 0
    assert "Diverged: static,peak_lr=1e+30,seed=0" in capsys.readouterr().out
    assert main(["sweep", f"--out={tmp_path}", "--trial=1"]) == 0
    assert "training for" not in capsys.readouterr().out


def test_a_trial_of_another_process_is_left_alone(data, tmp_path, capsys):
    design = make(data, ["optim.peak_lr=1e-2"], 1)
    write_design(design, tmp_path)
    with hold(workdir(tmp_path, design.trials[0])):
        assert main(["sweep", f"--out={tmp_path}", "--trial=0"]) == 75
    assert "another command" in capsys.readouterr().err


def test_changed_recipes_are_refused(finished, capsys):
    """A trial's folder belongs to its configuration."""
    design, out = finished
    trial = design.trials[0]
    other = make_design([f"{TINY}:static"], [{}], 1, changes={**CHANGES, "train.steps": 5})
    (workdir(out, trial) / "summary.json").rename(out / "kept.json")
    try:
        changed = dataclasses.replace(trial, config=other.trials[0].config)
        with pytest.raises(UserError, match="another configuration"):
            run_trial(out, changed, design.scoring)
    finally:
        (out / "kept.json").rename(workdir(out, trial) / "summary.json")


def test_results_of_another_configuration_are_refused(finished):
    """The names of settings do not tell what all of them share."""
    design, out = finished
    axes = ["optim.peak_lr=1e-2,1e-1", "model.window_size=8,16"]
    changed = make("unused", axes, **{"optim.weight_decay": 0.5})
    with pytest.raises(UserError, match="weight_decay"):
        load_results(changed, out)
    longer = make("unused", axes, **{"train.steps": 5})
    with pytest.raises(UserError, match=r"train\.steps"):
        load_results(longer, out)
    assert load_results(design, out).settings


def test_the_error_of_a_field_is_over_seeds_alone(finished):
    """The settings that it is averaged over are no sample."""
    design, out = finished
    _, (_, _, change) = load_results(design, out).by_value("optim.peak_lr")
    low, high = (
        np.mean([by_hand(design, out, n, 1, 32) for n in design.settings if rate in n], axis=0)
        for rate in ("peak_lr=0.01,", "peak_lr=0.1,")
    )
    seeds = abs(np.diff(high - low)[0]) / 2
    assert float(change.seeds) == pytest.approx(seeds, rel=1e-4)


def test_a_list_of_settings_has_no_heat_map(copied):
    design, out = copied
    some = dataclasses.replace(
        design,
        trials=tuple(t for t in design.trials if t.setting not in list(design.settings)[1:3]),
    )
    _, paths = make_report(some, out)
    assert len(some.axes) == 2
    assert "heat_map.png" not in {path.name for path in paths}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seeds=3", "--seeds needs"),
        ("--data=x", "--data needs"),
        ("--slurm=a=1", "--on=slurm"),
        ("--baseline=none", "is no setting"),
    ],
)
def test_options_without_effect_are_refused(finished, capsys, option, message):
    _, out = finished
    assert main(["sweep", f"--out={out}", option]) == 2
    assert message in capsys.readouterr().err


def test_missing_data_are_noticed_before_training(data, tmp_path):
    check_data(make(data, [], 1), tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        check_data(make(tmp_path / "none", [], 1), tmp_path)
    with pytest.raises(UserError, match="one data set"):
        check_data(make(data, [], 1, **{"data.sources": (str(data), str(data))}), tmp_path)
    with pytest.raises(UserError, match="split 'exam'"):
        check_data(make(data, [], 1, **{"data.val_split": "exam"}), tmp_path)


def test_what_cannot_fit_is_refused_before_the_start(data):
    design = make(data, ["model.embed_dim=16,1024"], 1)
    check_fits(design.trials, Machine("cpu", 1, 1e9, 1e9), 2)
    with pytest.raises(UserError, match="static,embed_dim=1024,seed=0"):
        check_fits(design.trials, Machine("cpu", 1, 1e6, 1e6), 1)
    with pytest.raises(UserError, match="lower --jobs"):
        check_fits(2 * design.trials, Machine("cpu", 1, 1.2e8, 1.2e8), 4)


def test_failed_trials_are_not_started_again_and_held_ones_wait(data, tmp_path):
    design = make(data, ["optim.peak_lr=1e-2,2e-2,3e-2"], 1)
    sweep = SweepState(design, tmp_path)
    first, second, third = design.trials
    assert sweep.next([]) is first
    sweep.record(first, 2)
    assert sweep.next([]) is second
    sweep.record(second, 75)
    assert sweep.next([]) is third
    assert sweep.next([third]) is None  # the second waits
    sweep.record(third, 0)  # it ended without a result
    assert set(sweep.failed) == {first.name, third.name}


# Processes ---------------------------------------------------------------------------------------


def start(out, data, log):
    command = [sys.executable, "-m", "tttjax", "sweep", f"--config={TINY}:static", f"--out={out}"]
    command += [f"--config.{name}={_text(value)}" for name, value in CHANGES.items()]
    command += ["--set", "optim.peak_lr=1e-2,1e-1", f"--data={data}", "--jobs=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _text(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.exhaustive
def test_killed_at_any_time_it_ends_with_the_same_tables(data, tmp_path):
    """Its trials end with it, and save."""
    tables = {}
    rng = random.Random(0)
    for name in ("undisturbed", "killed"):
        out = tmp_path / name
        with (tmp_path / f"{name}.log").open("wb") as log:
            if name == "killed":
                for number in (signal.SIGKILL, signal.SIGTERM):
                    sweep = start(out, data, log)
                    wait_for_step(out, sweep)
                    time.sleep(rng.random())
                    sweep.send_signal(number)
                    assert sweep.wait(120) in (75, 0, -signal.SIGKILL, -signal.SIGTERM)
            assert start(out, data, log).wait(300) == 0, (tmp_path / f"{name}.log").read_text()
        tables[name] = (out / "report" / "trials.csv").read_text()
        assert read_design(out) is not None
    assert tables["killed"] == tables["undisturbed"]


def wait_for_step(out: Path, sweep, seconds=120):
    """Until a trial has made a step, or everything has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and sweep.poll() is None:
        if any(path.stat().st_size for path in out.glob("trials/*/metrics.jsonl")):
            return
        time.sleep(0.05)
