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

Exit codes, on every host: 0 complete; 75 stopped and saved, start the same command again; 76 a
process was lost or hung, start it again on every host; 2 user error, mend it first. Of several
hosts, one with a bug exits with 1.
"""

import argparse
import os
import time
from typing import TYPE_CHECKING

from tttjax.cli.config_argument import add_code_argument, add_config_argument
from tttjax.cli.error_sentences import error_sentence
from tttjax.cli.flag_types import int32
from tttjax.config import load_config
from tttjax.config.files import use_code
from tttjax.errors import UserError
from tttjax.exit_codes import DONE, SAVED
from tttjax.io.paths import storage_text

if TYPE_CHECKING:  # slow to import
    from tttjax.parallel.pod import Pod

_LIMITS = {  # by name: the help text
    "init": "to wait for all processes at the start (default 300)",
    "heartbeat": "without a sign of life until a process counts as lost (default 100)",
    "shutdown": "to wait for the other processes at the end (default 300)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax train`."""
    add_config_argument(parser)
    add_code_argument(parser)  # of the run that the recipe chat tunes
    parser.set_defaults(runs_code=True)
    parser.add_argument(
        "--workdir",
        required=True,
        type=storage_text,
        metavar="DIR",
        help="output of the run, here or in a bucket (gs://, s3://); if it exists, the run resumes",
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
    for name, text in _LIMITS.items():
        several.add_argument(
            f"--{name}-timeout", type=int32, metavar="SECONDS", help=f"seconds {text}"
        )


def run(args: argparse.Namespace) -> int:
    """`tttjax train` from parsed arguments; returns DONE, or SAVED if interrupted."""
    began = time.time()
    addresses = (args.coordinator, args.process_id, args.process_count)
    given = {name: getattr(args, f"{name}_timeout") for name in _LIMITS}
    given = {name: seconds for name, seconds in given.items() if seconds is not None}
    if not args.distributed and all(value is None for value in addresses):
        if given:
            raise UserError(
                f"--{next(iter(given))}-timeout needs several processes: --distributed, or "
                "--coordinator, --process-id and --process-count"
            )
        return _train(args, began)

    # JAX's runtime logs the loss of a process in many lines; `parallel.pod` reports it in one.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from tttjax.parallel.distributed import start_distributed
    from tttjax.parallel.pod import TimeLimits

    with start_distributed(*addresses, TimeLimits(**given), error_sentence) as pod:
        return _train(args, began, pod)


def _train(args: argparse.Namespace, began: float, pod: "Pod | None" = None) -> int:
    for path in args.code:
        use_code(path)
    config = load_config(args.config, args.overrides)

    from absl import logging

    from tttjax.training.loop import train
    from tttjax.training.start_facts import agree_on_start

    # Orbax logs the traceback of a failed save from its own thread; the loop raises the error.
    logging.set_verbosity(logging.FATAL)
    if pod is not None:
        agree_on_start(pod, config, args.workdir, args.stop_after, args.from_step)
    result = train(
        config, args.workdir, stop_after=args.stop_after, from_step=args.from_step, began=began
    )
    return SAVED if result.interrupted else DONE
