"""Measure loss by token position and context length on held-out documents, or run needle tests.

examples:
  tttjax evaluate runs/first
      the gain from test-time training, on held-out documents of the run's own data
  tttjax evaluate runs/ttt_e2e runs/window --out=results
      two runs on the same tokens, with differences and their standard errors
  tttjax evaluate runs/window --modes=off,dynamic --dynamic-lr=0.01,0.1,1
      dynamic evaluation: inner updates for a model that was not meta-trained
  tttjax evaluate runs/ttt_e2e runs/window --needle --context-lengths=4096,16384
      RULER's single-needle tasks

Prints tables and writes results.json, by_position.csv, by_context.csv, loss_by_position.png and
loss_by_context.png to --out (with --needle: needle.json, needle.csv, needle_samples.csv and
needle_TASK.png). docs/evaluation.md explains the metrics.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tttjax.cli.config_argument import add_code_argument
from tttjax.cli.flag_types import float32, int32, list_of, uint32
from tttjax.cli.needle import add_needle_arguments, check_needle_arguments, run_needle
from tttjax.config import EvalConfig
from tttjax.config.schema import RULES
from tttjax.config.values import check_value
from tttjax.errors import UserError
from tttjax.io.paths import storage_path, storage_text
from tttjax.runs.modes import DYNAMIC_PATHS, MODES

if TYPE_CHECKING:
    from tttjax.runs.eval_setup import LearningOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax evaluate`."""
    add = parser.add_argument
    add(
        "workdirs",
        nargs="+",
        type=storage_text,
        metavar="WORKDIR",
        help="work directory or checkpoint of a run",
    )
    add(
        "--names",
        type=list_of(str),
        metavar="a,b",
        help="labels of the runs (default: folder names)",
    )
    add(
        "--out",
        type=storage_text,
        metavar="DIR",
        help="output folder (default: eval/ in the first WORKDIR)",
    )
    add(
        "--data",
        type=storage_text,
        metavar="DIR",
        help="prepared data set (default: the first run's own)",
    )
    add("--split", default="", help="split of the data set (default: the run's data.val_split)")
    add(
        "--modes",
        type=list_of(str),
        default=(),
        metavar="a,b",
        help=f"any of {', '.join(MODES)}: test-time training on, off, or dynamic evaluation; each "
        "run uses the modes it supports (default: on,off; off for runs without fast weights)",
    )
    defaults = parser.add_argument_group("defaults from the first run's configuration, eval.*")
    add = defaults.add_argument
    add(
        "--context-lengths",
        type=list_of(int32),
        metavar="T,T",
        help="context lengths in tokens (if not configured: 1, 2, 4 and 8 windows)",
    )
    add("--num-sequences", type=int32, metavar="N", help="sequences of the longest context")
    add("--batch-size", type=int32, metavar="N", help="sequences per batch")
    add("--bins", type=int32, metavar="N", help="bins of the loss by position")
    add("--seed", type=uint32, metavar="N", help="seed of the sampling of documents")
    inner = parser.add_argument_group("inner loop (default: the run's configuration)")
    add = inner.add_argument
    add("--inner-lr", type=float32, metavar="LR", help="inner learning rate")
    add("--inner-rule", choices=RULES, help="update rule of the fast weights")
    add("--inner-clip", type=float32, metavar="NORM", help="gradient clipping norm; 0: off")
    add("--chunk-size", type=int32, metavar="N", help="tokens of an inner mini-batch")
    add(
        "--dynamic-paths",
        type=list_of(str),
        default=DYNAMIC_PATHS,
        metavar="GLOB,GLOB",
        help="fast weights in dynamic evaluation (default: all MLPs of the suffix, "
        "suffix/**/mlp/**)",
    )
    add(
        "--dynamic-layers",
        type=int32,
        default=0,
        metavar="N",
        help="last blocks that form its suffix (default: a quarter of all)",
    )
    add(
        "--dynamic-lr",
        type=list_of(float32),
        default=(),
        metavar="LR,LR",
        help="inner learning rates of dynamic evaluation, one curve each",
    )
    add_needle_arguments(parser)
    add_code_argument(parser)
    add = parser.add_argument_group("presentation").add_argument
    add(
        "--window",
        type=int32,
        default=0,
        metavar="TOKENS",
        help='start of "beyond the window" (default: the largest window of the runs)',
    )
    add("--log-x", action="store_true", help="logarithmic position axis")


def run(args: argparse.Namespace) -> int:
    """`tttjax evaluate` from parsed arguments; returns the exit code."""
    check_needle_arguments(args)
    names = _names(args)

    import jax

    from tttjax.evaluation.compare import compare
    from tttjax.evaluation.files import check_writable
    from tttjax.evaluation.outputs import write_comparison
    from tttjax.evaluation.summary import blocks
    from tttjax.evaluation.tables import show
    from tttjax.runs.run import RunSpec, open_run

    specs = [RunSpec(folder, name) for folder, name in zip(args.workdirs, names, strict=True)]
    runs = [open_run(spec) for spec in specs]
    out = storage_path(args.out or f"{args.workdirs[0]}/eval")
    if args.needle:
        return run_needle(args, runs, _learning(args), out)
    if jax.process_index() == 0:
        check_writable(out)  # before the evaluation, which may take hours
    comparison = compare(
        runs,
        data=args.data,
        split=args.split,
        settings=_settings(args, runs[0].config.eval),
        modes=args.modes,
        window=args.window,
        learning=_learning(args),
        progress=sys.stderr,
    )
    if jax.process_index() == 0:
        paths = write_comparison(comparison, out, log_x=args.log_x)
        show([*blocks(comparison), comparison.sentence], sys.stdout)
        print("\n".join(str(path) for path in paths.values()))
    return 0


def _names(args: argparse.Namespace) -> Sequence[str]:
    names = args.names or ("",) * len(args.workdirs)
    if len(names) != len(args.workdirs):
        raise UserError(f"--names has {len(names)} names for {len(args.workdirs)} work directories")
    return names


def _settings(args: argparse.Namespace, defaults: EvalConfig) -> EvalConfig:
    names = [field.name for field in dataclasses.fields(EvalConfig)]
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    values = {name: check_value(f"eval.{name}", value) for name, value in flags.items()}
    return dataclasses.replace(defaults, **values)


def _learning(args: argparse.Namespace) -> "LearningOptions":
    from tttjax.runs.eval_setup import LearningOptions

    inner = {
        "lr": args.inner_lr,
        "rule": args.inner_rule,
        "clip": args.inner_clip,
        "chunk_size": args.chunk_size,
    }
    return LearningOptions(
        inner={key: value for key, value in inner.items() if value is not None},
        dynamic_paths=args.dynamic_paths,
        dynamic_layers=args.dynamic_layers,
        dynamic_lrs=args.dynamic_lr,
    )
