"""Meta-train a model, or extend the context of one from another run's weights. Resumable.

examples:
  tttjax train --config=quickstart --workdir=runs/first --config.data.sources=DATA
  tttjax train --config=... --workdir=runs/first          again: resumes from the last checkpoint
  tttjax train --config=... --workdir=runs/first --from-step=400
                                                          goes back to the checkpoint of step 400
  tttjax train --config=... --workdir=runs/long --config.train.init_from=runs/first
                                                          extension: weights only, new schedule

The work directory gets checkpoints/, metrics.jsonl (one record per step), tensorboard/, the data's
tokenizer/, config.json, environment.json and, at the end, summary.json and loss.png. SIGTERM or
Ctrl-C saves a checkpoint and exits with code 75; the same command resumes. A start that is refused
or crashes before its first step leaves no files but failed_starts.json, which counts crashes in a
row. Only one process at a time can write a work directory.
"""

import argparse

from tttjax.cli.config_argument import add_code_argument, add_config_argument
from tttjax.cli.flag_types import int32
from tttjax.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax train`."""
    add_config_argument(parser)
    add_code_argument(parser)  # of the run that the recipe chat tunes
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="output of the run; if it exists, the run resumes",
    )
    parser.add_argument(
        "--stop-after", type=int32, metavar="STEP", help="save and exit (code 75) after this step"
    )
    parser.add_argument(
        "--from-step",
        type=int32,
        metavar="STEP",
        help="go back to the checkpoint of this step: later ones are renamed to abandoned-STEP. "
        "Repeated, the command does not go back again but resumes from the newest checkpoint",
    )
    several = parser.add_argument_group("multi-host training (start the command on each host)")
    several.add_argument(
        "--distributed",
        action="store_true",
        help="detect the coordinator from the cluster environment",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument(
        "--process-id", type=int32, metavar="N", help="index of this process: 0, 1, ..."
    )
    several.add_argument("--process-count", type=int32, metavar="N", help="number of processes")


def run(args: argparse.Namespace) -> int:
    """`tttjax train` from parsed arguments; returns 0 if complete, 75 if interrupted and saved."""
    config = load_config(args.config, args.overrides)

    from absl import logging

    from tttjax.parallel.distributed import start_distributed
    from tttjax.training.loop import train
    from tttjax.training.stopping import EXIT_INTERRUPTED

    # Orbax logs the traceback of a failed save from its own thread; the loop raises the error.
    logging.set_verbosity(logging.FATAL)
    addresses = (args.coordinator, args.process_id, args.process_count)
    if args.distributed or any(value is not None for value in addresses):
        start_distributed(*addresses)
    result = train(config, args.workdir, stop_after=args.stop_after, from_step=args.from_step)
    return EXIT_INTERRUPTED if result.interrupted else 0
