"""What a run needs and costs on a pod, before the pod is rented.

  tttjax plan --config=paper:125m,ttt_e2e,pretrain --topology=v5p:4x4x4
  tttjax plan --config=paper:3b,ttt_e2e,extend,128k --topology=gpu:h100:8x4 --json
  tttjax plan --table plans/*.json

The real train step is compiled for the pod, on this machine, which needs none of its chips. Printed
are: whether it fits, and bytes of a device by kind; FLOPs by part, of the method and of the
program, so that recomputation shows; collectives and their bytes; the bound on MFU and on the time
of a step that arithmetic, memory and links allow; and at an expected MFU tokens per day, time and
chip-hours of the recipe. What does not fit is followed by the nearest recipe that does, compiled as
well.

topologies:
  v5e:4x8, v5p:4x4x4, v6e:16x16, v7x:2x2x1    chips along each axis of a TPU slice; needs libtpu,
                                              pip install -e '.[plan]', and some minutes
  v5litepod-32, v5p-128, v6e-256, tpu7x-8     the same slices as the cloud console names them: v5p
                                              and tpu7x count TensorCores, two a chip, others chips
  gpu:h100:8x4                                GPUs of a host x hosts, here 32 GPUs; by calculation
                                              from the traced program, memory is an estimate
  cpu:4                                       this machine as 4 devices, without bounds

The exit code is 1 if the recipe does not fit, whether or not another one was found.
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
    add("--config", metavar="FILE.py[:ARG]", help="the recipe; --config.FIELD=VALUE changes it")
    add("--topology", metavar="NAME", help="the pod, see above")
    add(
        "--mfu",
        type=float32,
        default=0.4,
        help="what time and chip-hours are worked out at, where the bound allows it (default "
        "%(default)s)",
    )
    add("--no-proposal", action="store_true", help="do not look for a recipe that fits")
    add("--json", action="store_true", help="print the plan as JSON")
    add(
        "--table",
        nargs="+",
        metavar="FILE.json",
        help="print kept plans (of --json) as one Markdown table, and do nothing else",
    )


def run(args: argparse.Namespace) -> int:
    """`tttjax plan` from parsed arguments; the exit code."""
    if args.table:
        from tttjax.planning.show import markdown

        print(markdown([_read(path) for path in _files(args.table)]))
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
    print(json.dumps(plan.to_dict(), indent=1) if args.json else show(plan))
    return int(plan.fits is False)


def _files(patterns: list[str]) -> list[Path]:
    """Paths and glob patterns, in order."""
    found = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern))]
    if not found:
        raise UserError(f"--table {' '.join(patterns)}: there is no such file.")
    return found


def _read(path: Path) -> dict:
    try:
        plan = json.loads(path.read_text())
        plan["memory"]["total"], plan["flops"]["total"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a plan; make one with `tttjax plan ... --json > {path}`."
        ) from error
    return plan
