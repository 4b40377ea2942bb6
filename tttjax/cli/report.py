"""One comparison of several finished runs: loss by context, position and FLOPs; state.

examples:
  tttjax report full=runs/full ttt=runs/ttt_e2e window=runs/window --out=report
      three systems on the same held-out tokens, as differences from full attention
  tttjax report full=runs/full_s0 full=runs/full_s1 ttt=runs/ttt_s0 ttt=runs/ttt_s1 --out=report
      several runs under one label are its seeds, or its extensions to longer contexts, or both
  tttjax report on=runs/ttt_e2e:on off=runs/ttt_e2e:off --out=report --lengths=512,1024
      the same weights, read in two ways

Writes report.md, report.html (one page that needs nothing else), report.csv, report.json and the
plots into --out. What was read is kept in cache/ there: the same command goes on where
an interrupted one stopped, or writes the report again at once. docs/report.md says what is in it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from tttjax.cli.flag_types import float32, int32, list_of
from tttjax.errors import UserError
from tttjax.evaluation.report.entries import DYNAMIC, ReportEntry, parse_entry
from tttjax.evaluation.report.make import make_report
from tttjax.evaluation.report.results import Report, SystemResult
from tttjax.runs.run import LearningOptions
from tttjax.ttt.update_rules import RULES

__all__ = ["Report", "ReportEntry", "SystemResult", "add_arguments", "make_report", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax report`."""
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="LABEL=DIR, LABEL=DIR:MODE or DIR; modes: auto (learning if there are fast weights), "
        "on, off, dynamic (dynamic evaluation)",
    )
    add("--out", metavar="DIR", required=True, help="where the report goes")
    add("--data", metavar="DIR", help="prepared data set (default: the baseline's own)")
    add("--split", default="", help="split of the data (default: the baseline's data.val_split)")
    add(
        "--baseline",
        default="",
        metavar="LABEL",
        help="system that differences are taken from (default: full attention, else the first)",
    )
    add(
        "--lengths",
        type=list_of(int32),
        default=(),
        metavar="T,T",
        help="context lengths in tokens (default: those that the runs were extended to, else the "
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
    add("--inner-rule", choices=RULES, help="update rule of the mode dynamic (default: the run's)")
    add(
        "--dynamic-layers",
        type=int32,
        default=0,
        metavar="N",
        help="last blocks whose MLPs learn in the mode dynamic (default: a quarter)",
    )
    add("--title", default="", help="the report's title")


def _with_learning(entries: Sequence[ReportEntry], args: argparse.Namespace) -> list[ReportEntry]:
    """Those in the mode dynamic learn as the options say. UserError if there is none."""
    learning = LearningOptions(
        inner={"rule": args.inner_rule} if args.inner_rule else {},
        dynamic_lrs=() if args.dynamic_lr is None else (args.dynamic_lr,),
        dynamic_layers=args.dynamic_layers,
    )
    if learning == LearningOptions():
        return list(entries)
    if not any(entry.mode == DYNAMIC for entry in entries):
        raise UserError(
            "--dynamic-lr, --dynamic-layers and --inner-rule are for runs in the mode "
            f"{DYNAMIC}, and there is none; write LABEL=DIR:{DYNAMIC}"
        )
    return [replace(e, learning=learning) if e.mode == DYNAMIC else e for e in entries]


def run(args: argparse.Namespace) -> int:
    """`tttjax report` from parsed arguments; the exit code."""
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
