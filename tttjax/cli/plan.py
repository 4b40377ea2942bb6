"""Predict memory, FLOPs, time and cost of a run on a pod, without the pod.

examples:
  tttjax plan --config=paper:125m,ttt_e2e,pretrain --topology=v5p:4x4x4
  tttjax plan --config=paper:3b,ttt_e2e,extend,128k --topology=gpu:h100:8x4 --json
  tttjax plan --config=paper:125m,ttt_e2e,pretrain --topology=gpu:h100:4 --kernels
  tttjax plan --table plans/*.json

Compiles the real train step for the pod on this machine, which needs no accelerator. Prints whether
it fits; memory per device by kind; model FLOPs by part and FLOPs of the program, which include
recomputation; collectives and their bytes; what a GPU launches; upper bounds on MFU from compute,
memory and links; and tokens per day, time and chip-hours at an expected MFU. If the recipe does not
fit, the nearest one that does is compiled and printed as well.

topologies:
  v5e:4x8, v5p:4x4x4, v6e:16x16, v7x:2x2x1    TPU slice, by chips along each axis; needs libtpu
                                              (pip install -e '.[plan]') and takes some minutes
  v5litepod-32, v5p-128, v6e-256, tpu7x-8     TPU slice by its cloud console name; v5p and tpu7x
                                              count TensorCores (two per chip), others chips
  gpu:h100:8x4                                GPUs per host x hosts, also of a100, h100-pcie, h200
                                              and b200; needs the CUDA compiler
                                              (pip install -e '.[plan-gpu]', 2.5 GB)
  cpu:4                                       this machine as 4 devices, without bounds

The exit code is 1 if the recipe does not fit, whether or not another one does.
"""

import argparse
import glob
import json
from pathlib import Path

from tttjax.cli.flag_types import float32
from tttjax.config import load_config
from tttjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax plan`."""
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE.py[:ARG]",
        help="recipe (paper:125m,...) or experiment file; --config.SECTION.FIELD=VALUE changes it",
    )
    add("--topology", metavar="NAME", help="the pod, see above")
    add(
        "--mfu",
        type=float32,
        default=0.4,
        help="expected MFU for time and chip-hours, capped at its upper bound (default: "
        "%(default)s)",
    )
    add("--no-proposal", action="store_true", help="do not search for a recipe that fits")
    add(
        "--kernels",
        action="store_true",
        help="of GPUs: a roofline of every kernel, and the operations that take longest",
    )
    add("--json", action="store_true", help="print the plan as JSON")
    add(
        "--table",
        nargs="+",
        metavar="FILE.json",
        help="only print saved plans (of --json) as one Markdown table",
    )


def run(args: argparse.Namespace) -> int:
    """`tttjax plan` from parsed arguments; returns the exit code."""
    if args.table:
        from tttjax.planning.show import markdown

        print(markdown([_read_plan(path) for path in _match_files(args.table)]))
        return 0
    if not args.config or not args.topology:
        raise UserError("tttjax plan needs --config=FILE and --topology=NAME; see --help.")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu={args.mfu} must be above 0 and at most 1.")
    config = load_config(args.config, args.overrides)

    from tttjax.planning.topologies import parse_topology, use_cpu_backend

    topology = parse_topology(args.topology)
    use_cpu_backend(topology.devices if topology.accelerator is None else 1)

    from tttjax.planning.make import make_plan
    from tttjax.planning.show import show

    name = " ".join([args.config.rpartition("/")[2], *args.overrides])
    plan = make_plan(config, topology, name=name, mfu=args.mfu, propose=not args.no_proposal)
    if args.json:
        print(json.dumps(plan.to_dict(args.kernels), indent=1))
    else:
        print(show(plan, args.kernels))
    return int(plan.fits is False)


def _match_files(patterns: list[str]) -> list[Path]:
    """The files that match paths or glob patterns, in order."""
    paths = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern))]
    if not paths:
        raise UserError(f"--table {' '.join(patterns)}: no such file.")
    return paths


def _read_plan(path: Path) -> dict:
    try:
        plan = json.loads(path.read_text())
        plan["memory"]["total"], plan["flops"]["total"], plan["kernel_seconds"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a plan of this version; make one with "
            f"`tttjax plan ... --json > {path}`."
        ) from error
    return plan
