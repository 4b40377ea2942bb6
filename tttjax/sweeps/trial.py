"""One trial: trained, then evaluated, in one process; and its state, told from its files."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tttjax.config.run_info import check_same_run, read_config
from tttjax.data.shards import open_prepared
from tttjax.errors import UserError
from tttjax.evaluation.compare import compare
from tttjax.evaluation.outputs import write_comparison
from tttjax.io.atomic import atomic_write, write_text
from tttjax.runs.run import RunSpec
from tttjax.sweeps.design import Design, Scoring, Trial
from tttjax.training.loop import train
from tttjax.training.metrics_file import last_record

TRIALS = "trials"
EVALUATION = "evaluation"
SCORING = "scoring.json"
SUMMARY, NONFINITE = "summary.json", "nonfinite.json"

Status = Literal["waiting", "training", "evaluating", "done", "diverged"]


@dataclass(frozen=True)
class TrialState:
    """How far a trial is. loss: of its last step, in nats per token. rate: tokens per second."""

    status: Status
    step: int = 0
    loss: float | None = None
    rate: float | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ("done", "diverged")


def workdir(out: Path, trial: Trial) -> Path:
    """The work directory of a trial."""
    return out / TRIALS / trial.name


def run_trial(out: Path, trial: Trial, scoring: Scoring) -> bool:
    """Trains and evaluates a trial as far as it is not done; False if interrupted and saved.

    A trial whose loss is not finite ends as diverged. Raises UserError for anything else.
    """
    folder = workdir(out, trial)
    if not (folder / SUMMARY).exists() and not (folder / NONFINITE).exists():
        try:
            if train(trial.config, folder).interrupted:
                return False
        except UserError:
            if not (folder / NONFINITE).exists():
                raise
    state = trial_state(out, trial, scoring)
    if state.has_ended:
        return True
    comparison = compare(
        [RunSpec(folder, trial.setting)],
        split=scoring.split,
        settings=scoring.settings,
        window=scoring.window,
        progress=sys.stderr,
    )
    write_comparison(comparison, folder / EVALUATION)
    with atomic_write(folder / EVALUATION / SCORING) as temporary:  # last: it marks the end
        write_text(temporary, json.dumps(dataclasses.asdict(scoring), indent=1) + "\n")
    return True


def trial_state(out: Path, trial: Trial, scoring: Scoring) -> TrialState:
    """The state that a trial's files show, whoever writes them."""
    folder = workdir(out, trial)
    last = last_record(folder)
    step, loss = last.get("step", 0), last.get("loss")
    rate = last.get("time", {}).get("tokens_per_second")
    if (folder / NONFINITE).exists() and not (folder / SUMMARY).exists():
        return TrialState("diverged", step)
    if (folder / SUMMARY).exists():
        path = folder / EVALUATION / SCORING
        is_scored = path.exists() and _same_scoring(path, scoring)
        return TrialState("done" if is_scored else "evaluating", step, loss, rate)
    return TrialState("training" if step else "waiting", step, loss, rate)


def check_trials(design: Design, out: Path) -> None:
    """Raises UserError if a trial's folder holds a run of another configuration.

    The results of that run would be taken for the trial's.
    """
    for trial in design.trials:
        folder = workdir(out, trial)
        check_same_run(folder, trial.config)
        previous = read_config(folder)
        has_ended = (folder / SUMMARY).exists()
        if has_ended and previous and previous.train.steps != trial.config.train.steps:
            raise UserError(
                f"{folder} was trained for {previous.train.steps} steps, not "
                f"{trial.config.train.steps}; give another --out, or remove it"
            )


def check_data(design: Design, out: Path) -> None:
    """Raises UserError if trials that have not ended lack their data, or the evaluation's split."""
    names = set(open_trials(design, out))
    for sources in {trial.config.data.sources for trial in design.trials if trial.name in names}:
        if len(sources) != 1:
            raise UserError(
                f"a sweep trains and evaluates on one data set, not {len(sources)}; give --data=DIR"
            )
        open_prepared(sources[0], verify=False).split(design.scoring.split)


def open_trials(design: Design, out: Path) -> list[str]:
    """The names of the trials that have not ended."""
    return [
        trial.name
        for trial in design.trials
        if not trial_state(out, trial, design.scoring).has_ended
    ]


def _same_scoring(path: Path, scoring: Scoring) -> bool:
    """Whether an evaluation was made as `scoring` says; a damaged record counts as none."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return recorded == json.loads(json.dumps(dataclasses.asdict(scoring)))
