"""Meta-trains a model, or extends one from another run's weights; resumes by itself.

examples:
  tttjax train --config=quickstart --workdir=runs/first --config.data.sources=DATA
  tttjax train --config=... --workdir=runs/first          again: continues where it stopped
  tttjax train --config=... --workdir=runs/long --config.train.init_from=runs/first
                                                          extension: weights only, fresh schedule

The work directory gets checkpoints/, metrics.jsonl (one record per step), tensorboard/, the data's
tokenizer/, config.json, environment.json and, at the end, summary.json and loss.png. SIGTERM or
Ctrl-C saves and exits with code 75; the same command goes on from there. A start that ends before
its first step leaves nothing behind, and one process at a time writes a work directory.
"""

import argparse

from absl import logging

from tttjax.cli.flag_types import int32
from tttjax.config import (
    load_config,
)
from tttjax.parallel.distributed import start_distributed
from tttjax.training.loop import train
from tttjax.training.stopping import EXIT_INTERRUPTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tttjax train`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:ARG]",
        help="experiment file; any field can be changed with --config.SECTION.FIELD=VALUE",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="what the run writes; resumed from here"
    )
    parser.add_argument(
        "--stop-after", type=int32, metavar="STEP", help="save and exit (code 75) after this step"
    )
    several = parser.add_argument_group("several processes (start the command once on each host)")
    several.add_argument(
        "--distributed", action="store_true", help="join the run that the cluster describes"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--process-id", type=int32, metavar="N", help="this process: 0, 1, ...")
    several.add_argument("--process-count", type=int32, metavar="N", help="how many there are")


def run(args: argparse.Namespace) -> int:
    """`tttjax train`: 0 if training is complete, 75 if it was interrupted and saved."""
    # Orbax logs a failed save's traceback from its own thread; the error itself arrives in the
    # loop and is told in one sentence.
    logging.set_verbosity(logging.FATAL)
    config = load_config(args.config, args.overrides)
    by_hand = (args.coordinator, args.process_id, args.process_count)
    if args.distributed or any(value is not None for value in by_hand):
        start_distributed(*by_hand)
    result = train(config, args.workdir, stop_after=args.stop_after)
    return EXIT_INTERRUPTED if result.interrupted else 0
