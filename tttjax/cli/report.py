"""Compare finished runs in a report: loss by context length, position and FLOPs; state size.

examples:
  tttjax report full=runs/full ttt=runs/ttt_e2e window=runs/window --out=report
      three systems on the same held-out tokens, as differences from full attention
  tttjax report full=runs/full_s0 full=runs/full_s1 ttt=runs/ttt_s0 ttt=runs/ttt_s1 --out=report
      runs with the same label are seeds, or extensions to longer contexts, of one system
  tttjax report on=runs/ttt_e2e:on off=runs/ttt_e2e:off --out=report --lengths=512,1024
      the same weights with test-time training on and off

Writes report.md, report.html (self-contained), report.csv, report.json and plots to --out. Results
are cached in its folder cache/: the same command resumes an interrupted report, or writes it again
at once. See docs/report.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tttjax.cli.config_argument import add_code_argument
from tttjax.cli.flag_types import float32, int32, list_of
from tttjax.config.schema import RULES
from tttjax.errors import UserError

if TYPE_CHECKING:
    from tttjax.evaluation.report.entries import ReportEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax report`."""
    add_code_argument(parser)
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="LABEL=DIR, LABEL=DIR:MODE or DIR; MODE: auto (on, if there are fast weights), on, "
        "off, dynamic (dynamic evaluation)",
    )
    add("--out", metavar="DIR", required=True, help="output folder")
    add("--data", metavar="DIR", help="prepared data set (default: the baseline's own)")
    add(
        "--split", default="", help="split of the data set (default: the baseline's data.val_split)"
    )
    add(
        "--baseline",
        default="",
        metavar="LABEL",
        help="system to compare with (default: full attention, otherwise the first)",
    )
    add(
        "--lengths",
        type=list_of(int32),
        default=(),
        metavar="T,T",
        help="context lengths in tokens (default: those of the runs' extensions, otherwise the "
        "baseline's eval.context_lengths)",
    )
    add(
        "--num-sequences",
        type=int32,
        default=0,
        metavar="N",
        help="sequences of the longest context (default: the baseline's eval.num_sequences)",
    )
    add(
        "--dynamic-lr",
        type=float32,
        metavar="LR",
        help="inner learning rate of the mode dynamic (default: the run's inner.lr)",
    )
    add(
        "--inner-rule",
        choices=[rule for rule in RULES if rule != "custom"],
        help="update rule of the mode dynamic (default: the run's)",
    )
    add(
        "--dynamic-layers",
        type=int32,
        default=0,
        metavar="N",
        help="last blocks whose MLPs are fast weights in the mode dynamic (default: a quarter)",
    )
    add("--title", default="", help="title of the report")


def _with_learning(
    entries: "Sequence[ReportEntry]", args: argparse.Namespace
) -> "list[ReportEntry]":
    """Applies the inner-loop options to the entries in the mode dynamic.

    Raises UserError if there is no such entry.
    """
    from tttjax.evaluation.report.entries import DYNAMIC
    from tttjax.runs.eval_setup import LearningOptions

    learning = LearningOptions(
        inner={"rule": args.inner_rule} if args.inner_rule else {},
        dynamic_lrs=() if args.dynamic_lr is None else (args.dynamic_lr,),
        dynamic_layers=args.dynamic_layers,
    )
    if learning == LearningOptions():
        return list(entries)
    if not any(entry.mode == DYNAMIC for entry in entries):
        raise UserError(
            "--dynamic-lr, --dynamic-layers and --inner-rule need a run in the mode "
            f"{DYNAMIC}; write LABEL=DIR:{DYNAMIC}"
        )
    return [replace(e, learning=learning) if e.mode == DYNAMIC else e for e in entries]


def run(args: argparse.Namespace) -> int:
    """`tttjax report` from parsed arguments; returns the exit code."""
    import jax

    from tttjax.evaluation.report.entries import parse_entry
    from tttjax.evaluation.report.make import make_report

    entries = _with_learning([parse_entry(text) for text in args.runs], args)
    report = make_report(
        entries,
        Path(args.out),
        data=args.data,
        split=args.split,
        lengths=args.lengths,
        num_sequences=args.num_sequences,
        baseline=args.baseline,
        title=args.title,
        progress=sys.stderr,
    )
    if jax.process_index() == 0:
        print("\n".join([*(f"note: {warning}" for warning in report.warnings), *report.summary]))
        print("\n".join(["", *(str(path) for path in report.paths.values())]))
    return 0
