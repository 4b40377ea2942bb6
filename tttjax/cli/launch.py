"""Submit a training run to a cluster, after `tttjax plan` has said that it fits.

examples:
  tttjax launch slurm --config=paper:125m,ttt_e2e,pretrain --workdir=/shared/runs/125m \\
      --config.data.sources=/shared/data --topology=gpu:h100:8x4 --config.mesh.fsdp=8 --dry-run
  tttjax launch jobset ... --topology=v5e:4x4 --set=NAME=run125m --set=IMAGE=... --set=CLAIM=shared

Runs in the checkout of tttjax, whose scripts it calls:

  slurm    launch/slurm.sh by sbatch                              gpu:h100:8x4
  jobset   launch/jobset.sh | kubectl apply -f -                  gpu:h100:8x4, v5p:4x4x4
  xpk      launch/gke_xpk.sh, which calls xpk                     v5p:4x4x4
  tpu-vm   launch/tpu_vm.sh run, which calls gcloud and waits     v5p:4x4x4

The topology (as in `tttjax plan --help`) sets how many hosts and chips there are; --set sets the
scripts' other variables, which the first lines of each describe. sbatch has variables too, such as
SBATCH_PARTITION. A run that does not fit is not submitted: exit code 2, with the nearest change
that fits. Otherwise the exit code is that of the command.
"""

import argparse
import os

from tttjax.cli.config_argument import add_config_argument
from tttjax.config import load_config
from tttjax.errors import UserError
from tttjax.io.paths import is_bucket, storage_text

LAUNCHERS = ("slurm", "jobset", "xpk", "tpu-vm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax launch`."""
    add = parser.add_argument
    add("launcher", choices=LAUNCHERS, help="where to submit, see above")
    add_config_argument(parser)
    add(
        "--workdir",
        required=True,
        type=storage_text,
        metavar="DIR",
        help="output of the run, on a disk that all hosts share or in a bucket (gs://, s3://)",
    )
    add("--topology", required=True, metavar="NAME", help="the pod, see above")
    add(
        "--set",
        action="append",
        default=[],
        metavar="VARIABLE=VALUE",
        help="variable of the launch script, such as IMAGE or MAX_RESTARTS; several --set are fine",
    )
    add("--no-plan", action="store_true", help="submit without the check that the run fits")
    add(
        "--dry-run",
        action="store_true",
        help="print the plan, the command, and the manifest or script; submit nothing",
    )


def run(args: argparse.Namespace) -> int:
    """`tttjax launch` from parsed arguments; returns the exit code."""
    config = load_config(args.config, args.overrides)
    if not (is_bucket(args.workdir) or os.path.isabs(args.workdir)):
        raise UserError(f"--workdir={args.workdir} must be an absolute path, the same on all hosts")

    from tttjax.planning.launch import make_launch
    from tttjax.planning.topologies import parse_topology, use_cpu_backend

    topology = parse_topology(args.topology)
    launch = make_launch(
        args.launcher,
        topology,
        config,
        recipe=args.config,
        workdir=args.workdir,
        variables=dict(_variable(text) for text in args.set),
        overrides=args.overrides,
    )
    if args.no_plan:
        print("not checked: memory, because of --no-plan", flush=True)
    else:
        from tttjax.planning.make import make_plan
        from tttjax.planning.show import show, verdict

        if launch.environment().get("NUM_SLICES", "1") not in ("", "1"):
            raise UserError(
                "a plan is of one slice, and NUM_SLICES is another number; add --no-plan, or "
                "remove it"
            )
        use_cpu_backend(1)
        try:
            plan = make_plan(config, topology, name=" ".join([args.config, *args.overrides]))
        except UserError as error:  # such as libtpu missing
            sentence = str(error).rstrip(".")
            raise UserError(f"{sentence}; or submit it unchecked with --no-plan") from error
        if plan.fits is False:
            raise UserError(f"{verdict(plan)}; nothing was submitted")
        print(show(plan), flush=True)
    print(f"\n$ {launch}", flush=True)
    if args.dry_run:
        print(f"\n{launch.submitted()}")
        return 0
    return launch.submit()


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise UserError(f"--set={text}: write --set=VARIABLE=VALUE")
    if option := {"CONFIG": "--config", "WORKDIR": "--workdir"}.get(name):
        raise UserError(f"--set={text}: give it as {option}, which the plan goes by")
    return name, value
