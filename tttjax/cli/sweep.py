"""Train and evaluate a grid or a list of settings, each with several seeds, and compare them.

examples:
  tttjax sweep --config=quickstart:ttt_e2e --config.data.sources=data/books --out=sweeps/chunk \\
      --set inner.chunk_size=16,32,64 --set inner.lr=0.3,1 --seeds=2
  tttjax sweep --config='quickstart:*' --set optim.peak_lr=5e-3,1e-2,2e-2 ... --out=sweeps/rates
      every recipe that matches, each at every rate
  tttjax sweep --trials=sweeps/rates/report/best.csv --seeds=3 ... --out=sweeps/final
      the settings of a table; this one has the best rate of every recipe
  tttjax sweep --out=sweeps/chunk
      goes on with an interrupted sweep, or writes the report again

Trials with the same seed see the same data in the same order, so settings are compared in pairs.
Every trial is a process; kill it or the sweep, and the same command goes on. The folder gets
sweep.json, trials/ (work directories and logs) and report/ (report.html, tables as CSV, plots).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttjax.cli.config_argument import add_code_argument
from tttjax.cli.flag_types import int32, list_of
from tttjax.config.files import OVERRIDE_PREFIX
from tttjax.config.values import parse_value
from tttjax.errors import UserError
from tttjax.exit_codes import DONE, FAILED, SAVED
from tttjax.io.locks import LockHeldError, hold

if TYPE_CHECKING:
    from tttjax.sweeps.design import Design

PLACES = ("here", "slurm", "kubernetes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax sweep`."""
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder of the sweep; if it exists, it goes on")
    add(
        "--config",
        action="append",
        default=None,
        metavar="FILE.py[:ARG]",
        help="recipe or experiment file; * in ARG: all that match; may be given several times; "
        "--config.SECTION.FIELD=VALUE changes a field of all trials",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=V,V",
        help="values of a configuration field (of a list: separated by ;); several --set: a grid",
    )
    add(
        "--trials",
        metavar="TABLE",
        help="CSV table of settings in place of a grid: a column for each field, perhaps `recipe`",
    )
    add("--seeds", type=int32, metavar="N", help="trials of each setting (default: 1)")
    add("--data", metavar="DIR", help="prepared data set (default: data.sources of the recipes)")
    add_code_argument(parser)
    scoring = parser.add_argument_group("evaluation (default: `eval.*` of the recipes)")
    add = scoring.add_argument
    add("--split", help="split of the data set (default: data.val_split)")
    add(
        "--context-lengths",
        type=list_of(int32),
        metavar="T,T",
        help="context lengths in tokens (default: eval.context_lengths, else train.seq_len)",
    )
    add("--window", type=int32, metavar="N", help="tokens of the first window")
    add("--num-sequences", type=int32, metavar="N", help="sequences of the longest context")
    add = parser.add_argument_group("running").add_argument
    add("--on", choices=PLACES, default="here", help="where trials run (default: here)")
    add("--jobs", type=int32, default=0, metavar="N", help="at once (default: one per core or GPU)")
    add("--plan", action="store_true", help="print the trials and their cost, and exit")
    add("--report", action="store_true", help="only write the report, of the trials that are done")
    add("--baseline", default="", metavar="SETTING", help="compare with it (default: the first)")
    add(
        "--trial",
        metavar="NAME",
        help="only this trial of DIR, by name or number in --plan, for other schedulers",
    )
    add("--follow-stdin", action="store_true", help=argparse.SUPPRESS)
    add(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of submitit: timeout_min=600, gpus_per_node=1, slurm_partition=...",
    )
    add("--image", default="", help="container image of the Kubernetes Job")
    add("--gpus", type=int32, default=0, metavar="N", help="NVIDIA GPUs of a pod (default: none)")
    add("--volume-claim", default="", help="PersistentVolumeClaim that is mounted at DIR")
    parser.set_defaults(has_own_config=True)


def run(args: argparse.Namespace) -> int:
    """`tttjax sweep` from parsed arguments; returns the exit code."""
    out = Path(args.out)
    if args.trial is not None:
        return _run_one(out, args.trial, args.follow_stdin)
    if args.jobs < 0:
        raise UserError(f"--jobs={args.jobs} must be at least 1")
    if args.slurm and args.on != "slurm":
        raise UserError("--slurm needs --on=slurm")
    if (args.image or args.volume_claim or args.gpus) and args.on != "kubernetes":
        raise UserError("--image, --volume-claim and --gpus need --on=kubernetes")
    if args.gpus < 0:
        raise UserError(f"--gpus={args.gpus} must be at least 0")
    design = _design(args, out)
    if args.baseline and args.baseline not in design.settings:
        raise UserError(
            f"--baseline={args.baseline} is no setting; choose from {', '.join(design.settings)}"
        )
    if args.plan:
        _print_plan(design)
        return 0
    if args.report:
        return _report(design, out, args.baseline)
    if args.on != "here":
        return _submit(args, design, out)
    return _run_here(args, design, out)


def _design(args: argparse.Namespace, out: Path) -> "Design":
    from tttjax.sweeps.design import read_design
    from tttjax.sweeps.make_design import grid, make_design, read_table

    existing = read_design(out)
    if args.config is None and args.trials is None:
        if existing is None:
            raise UserError(f"{out} has no sweep yet; give --config and --set, or --trials")
        if given := _given(args):
            raise UserError(f"{given} needs --config or --trials beside it")
        return existing
    if args.set and args.trials:
        raise UserError("--set and --trials exclude each other; put all values into the table")
    changes: dict[str, Any] = {}
    for override in args.overrides:
        name, _, text = override.removeprefix(OVERRIDE_PREFIX).partition("=")
        changes[name] = parse_value(name, text)
    if args.data is not None:
        changes["data.sources"] = (str(Path(args.data).absolute()),)
    return make_design(
        args.config or [],
        read_table(args.trials) if args.trials else grid(args.set),
        1 if args.seeds is None else args.seeds,
        changes=changes,
        scoring={
            "split": args.split,
            "lengths": args.context_lengths,
            "window": args.window,
            "num_sequences": args.num_sequences,
        },
    )


def _given(args: argparse.Namespace) -> str:
    """The first option of the command line that describes trials; "" if there is none."""
    options = {
        "--set": args.set,
        "--config.FIELD": args.overrides,
        "--seeds": args.seeds is not None,
        "--data": args.data,
        "--split": args.split,
        "--context-lengths": args.context_lengths,
        "--window": args.window is not None,
        "--num-sequences": args.num_sequences is not None,
    }
    return next((option for option, value in options.items() if value), "")


def _run_one(out: Path, word: str, follow: bool) -> int:
    """One trial in this process; 75 if it was interrupted, or is another process's."""
    from tttjax.sweeps.design import read_design
    from tttjax.sweeps.local import follow_stdin
    from tttjax.sweeps.trial import run_trial

    if follow:
        follow_stdin()
    design = read_design(out)
    if design is None:
        raise UserError(
            f"{out} has no sweep; start one with `tttjax sweep --config=... --out={out}`"
        )
    trials = {trial.name: trial for trial in design.trials}
    trials |= {str(number): trial for number, trial in enumerate(design.trials)}
    if word not in trials:
        raise UserError(
            f"{out} has no trial {word!r}: give a name, or a number from 0 to "
            f"{len(design.trials) - 1}"
        )
    try:
        return DONE if run_trial(out, trials[word], design.scoring) else SAVED
    except LockHeldError as error:
        print(f"note: {error}", file=sys.stderr)
        return SAVED


def _run_here(args: argparse.Namespace, design: "Design", out: Path) -> int:
    from tttjax.runtime.progress import report_activity
    from tttjax.sweeps.design import write_design
    from tttjax.sweeps.local import check_fits, find_machine, log_path, run_trials
    from tttjax.sweeps.progress import show_sweep, summary
    from tttjax.sweeps.trial import check_data, check_trials, open_trials

    check_trials(design, out)
    check_data(design, out)
    with report_activity("looking for devices"):
        machine = find_machine()
    jobs = min(args.jobs or machine.slots, max(1, len(open_trials(design, out))))
    check_fits(design.trials, machine, jobs)
    with hold(out, exit_on_sigterm=False):
        write_design(design, out)
        with report_activity(""), show_sweep() as show:
            sweep = run_trials(design, out, machine, jobs, show)
        print(f"sweep: {summary(sweep)}")
        if sweep.was_stopped:
            print("sweep: stopped and saved; the same command goes on")
            return SAVED
        for trial in design.trials:
            if trial.name in sweep.failed:
                print(f"sweep: {trial.name} failed; {log_path(out, trial)} says why")
        if sweep.failed and not any(state.status == "done" for state in sweep.states.values()):
            return FAILED  # there is nothing to report
        code = _report(design, out, args.baseline)
    return FAILED if sweep.failed else code


def _report(design: "Design", out: Path, baseline: str) -> int:
    from tttjax.evaluation.tables import show
    from tttjax.runtime.progress import report_activity
    from tttjax.sweeps.report import make_report

    with report_activity("writing the report"):
        blocks, paths = make_report(design, out, baseline)
    show(blocks, sys.stdout)
    print("\n".join(str(path) for path in paths))
    return 0


def _submit(args: argparse.Namespace, design: "Design", out: Path) -> int:
    from tttjax.sweeps.cluster import kubernetes_manifest, submit_to_slurm
    from tttjax.sweeps.design import code_flags, write_design
    from tttjax.sweeps.trial import check_data, check_trials, open_trials

    check_trials(design, out)
    names = open_trials(design, out)
    if not names:
        return _report(design, out, args.baseline)
    then = f"tttjax sweep --out={out} --report"
    if args.on == "kubernetes":
        if not args.image or not args.volume_claim:
            raise UserError("--on=kubernetes needs --image and --volume-claim")
        write_design(design, out)
        jobs = args.jobs or len(names)
        manifest = kubernetes_manifest(
            out,
            names,
            args.image,
            args.volume_claim,
            jobs,
            gpus=args.gpus,
            flags=code_flags(design, out),
        )
        print(json.dumps(manifest, indent=1))
        print(
            f"{len(names)} trials; pipe this into kubectl apply -f -; then {then}", file=sys.stderr
        )
        return 0
    check_data(design, out)
    write_design(design, out)
    options = _slurm_options(args.slurm)
    if args.jobs:
        options.setdefault("slurm_array_parallelism", args.jobs)
    jobs = submit_to_slurm(out, names, options, flags=code_flags(design, out))
    print(f"submitted {len(jobs)} trials: {jobs[0].job_id} to {jobs[-1].job_id}; then {then}")
    return 0


def _slurm_options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--slurm={word} has no value; write --slurm={key}=VALUE")
        options[key] = int(text) if text.isdigit() else text
    return options


def _print_plan(design: "Design") -> None:
    from tttjax.config import parameter_count
    from tttjax.sweeps.local import training_flops

    tokens = flops = 0.0
    for number, trial in enumerate(design.trials):
        train = trial.config.train
        of_trial = train.steps * train.batch_size * train.seq_len
        tokens, flops = tokens + of_trial, flops + training_flops(trial)
        count = parameter_count(trial.config.model)["total"]
        print(
            f"{number:>4} {trial.name}: {count:,} parameters, {of_trial:,} tokens, "
            f"{training_flops(trial):.3g} FLOPs"
        )
    print(f"{len(design.trials)} trials, {tokens:,.0f} tokens, {flops:.3g} FLOPs")
