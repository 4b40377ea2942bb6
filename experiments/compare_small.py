"""Compares nine architectures for contexts beyond the window, at one size, on one text.

    python experiments/compare_small.py --text PATH --out DIR --scale cpu

PATH is a file or folder of long documents (default: the sources of Python's standard library),
split into training, validation and test. All systems have as many parameters as full attention and
train on the same tokens. Each is pretrained at one window with several learning rates, and with a
second seed at the best; then each model is extended separately to 2, 4 and 8 windows, with a new
schedule. The report on the test documents is DIR/report/report.html.

    full, window, hybrid        full attention; window attention; three window to one full
    mamba2, gated_deltanet      with window attention in every block
    ttt_linear, ttt_mlp         TTT layers in the backbone of their paper, without attention
    dynamic                     dynamic evaluation: `window`, with its MLPs as fast weights
    ttt_e2e                     TTT-E2E, meta-trained

Ctrl-C and SIGTERM save; the same command continues. docs/comparison.md explains the design. As an
experiment file, `compare_small.py:SCALE,SYSTEM,pretrain` and
`compare_small.py:SCALE,SYSTEM,extend,WINDOWS` are the configurations of its runs.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from ml_collections import ConfigDict

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.comparison.plan import Plan
from experiments.comparison.scales import (
    DYNAMIC,
    EXTEND,
    PRETRAIN,
    PRETRAINED_AS,
    SCALES,
    SYSTEMS,
    parameters,
    recipe,
)
from tttjax.cli.flag_types import int32
from tttjax.errors import UserError

EXIT_INTERRUPTED = 75  # saved, as of `tttjax train`
USER_ERROR = 2
ARGUMENT = "SCALE,SYSTEM,pretrain or SCALE,SYSTEM,extend,WINDOWS"


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of one run (default: pretraining of TTT-E2E at the scale cpu)."""
    words = (arg or f"cpu,ttt_e2e,{PRETRAIN}").split(",")
    if len(words) == 3 and words[2] == PRETRAIN:
        return recipe(words[0], words[1], PRETRAIN)
    if len(words) == 4 and words[2] == EXTEND and words[3].isdigit() and int(words[3]) > 1:
        return recipe(words[0], words[1], EXTEND, int(words[3]))
    raise UserError(f"{arg!r} is not a run of the comparison: write {ARGUMENT}.")


def recipes() -> list[str]:
    """Arguments of pretraining and of the longest extension, at the scales cpu and gpu."""
    return [
        f"{name},{system},{stage}"
        for name in ("cpu", "gpu")
        for system in SYSTEMS
        for stage in (PRETRAIN, f"{EXTEND},{max(SCALES[name].windows)}")
    ]


def main() -> int:
    try:
        return _compare(_parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", default="stdlib", help="file or folder of long documents (default: stdlib)")
    add("--out", type=Path, required=True, metavar="DIR", help="output folder")
    add(
        "--scale",
        choices=SCALES,
        default="cpu",
        help="model and budget (default: %(default)s); smoke: a few minutes, to test the setup",
    )
    add(
        "--splits",
        default="",
        metavar="TABLE",
        help="table with document names in its first column and a column `split` (train, val, "
        "test); default: split by a hash of the names",
    )
    add(
        "--jobs",
        type=int32,
        default=0,
        metavar="N",
        help="parallel runs (default: one per core; one at the scale gpu)",
    )
    add("--plan", action="store_true", help="print the plan and exit")
    return parser.parse_args()


def _compare(args: argparse.Namespace) -> int:
    from experiments.comparison.runner import Stop, run_tasks
    from experiments.comparison.text import prepare_text

    plan = Plan(args.scale, args.out)
    jobs = args.jobs or (1 if args.scale == "gpu" else _cores())
    if jobs < 1:
        raise UserError(f"--jobs={jobs} must be at least 1")
    if args.plan:
        _say(describe(plan, jobs))
        return 0
    _check_same(args)
    scale = plan.scale
    prepare_text(
        args.text,
        args.out,
        vocab_size=scale.model["vocab_size"],
        longest=scale.longest,
        splits=args.splits,
        log=_say,
    )
    _say(describe(plan, jobs))
    with Stop().listening() as stop:
        if not run_tasks(plan.tasks, args.out, jobs=jobs, stop=stop, log=_say):
            _say("stopped and saved; run the same command again to continue")
            return EXIT_INTERRUPTED
    return _report(plan)


def _report(plan: Plan) -> int:
    """Writes the report. Starts JAX in this process, so all others must have ended."""
    from experiments.comparison.summary import write_report

    try:
        report = write_report(plan, command=shlex.join(["python", *sys.argv]), progress=sys.stderr)
    except KeyboardInterrupt:
        _say("stopped while writing the report; run the same command again to continue")
        return EXIT_INTERRUPTED
    _say("\n".join([*report.summary, *map(str, report.paths.values())]))
    return 0


def describe(plan: Plan, jobs: int) -> str:
    """The plan as text: sizes, every task with its tokens and expected time, and totals."""
    scale, tasks = plan.scale, plan.tasks()
    lines = [f"scale {plan.scale_name}: window {scale.window}, TTT-E2E's chunk {scale.chunk}"]
    lines += [
        f"  {name:<16} {parameters(plan.scale_name, name):>12,} parameters" for name in SYSTEMS
    ]
    lines.append(f"  {DYNAMIC:<16} dynamic evaluation of the window run")
    shared = " and ".join(f"{a} from {b}" for a, b in PRETRAINED_AS.items())
    lines.append(f"shared pretraining: {shared} (the same computation within one window)")
    for number, task in enumerate(tasks, start=1):
        state = "done" if task.is_done() else f"about {task.seconds:.0f} s"
        tokens = f"{task.tokens:>12,} tokens" if task.tokens else " " * 19
        lines.append(f"{number:>4} {task.name:<34} {tokens}  {state}")
    remaining = sum(task.seconds for task in tasks if not task.is_done()) / jobs
    total = sum(task.tokens for task in tasks)
    lines += [
        f"{len(tasks)} tasks, {total:,} tokens, {jobs} in parallel: {remaining / 60:.0f} minutes "
        "remaining on an idle machine like that of docs/comparison.md, plus the report;",
        "plus one run for each sweep whose best rate is the lowest or highest tried",
    ]
    return "\n".join(lines)


def _check_same(args: argparse.Namespace) -> None:
    """Records the options in `out`. Raises UserError if it was made with others."""
    path = args.out / "comparison.json"
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out={args.out} is a file; name a folder")
    text = args.text if args.text == "stdlib" else os.path.realpath(args.text)
    options = {"scale": args.scale, "text": text, "splits": args.splits}
    if path.exists():
        recorded = json.loads(path.read_text())
        for name, value in options.items():
            if recorded[name] != value:
                raise UserError(
                    f"{args.out} has a comparison with --{name} {recorded[name] or 'not given'}, "
                    f"not {value or 'without it'}; use the same option, or choose another --out"
                )
        return
    args.out.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(options, indent=1) + "\n")
    os.replace(temporary, path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
