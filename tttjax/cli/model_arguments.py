"""Flags shared by all commands that open a run's model: generate, read, sessions."""

import argparse

from tttjax.cli.flag_types import int32
from tttjax.errors import UserError
from tttjax.runs.load import LEARN, LoadedModel, load_model
from tttjax.runs.run import MODES


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of how a run's model reads, for every command that opens one."""
    group = parser.add_argument_group("reading")
    add = group.add_argument
    add(
        "--learn",
        choices=LEARN,
        default="all",
        help="from everything, from what is read and not what is written, or from nothing "
        "(default %(default)s)",
    )
    add("--mode", choices=MODES, default="", help="dynamic: let weights learn that never did")
    add("--tokenizer", metavar="DIR", help="its folder, or data prepared with it")
    add(
        "--max-length",
        type=int32,
        default=0,
        metavar="N",
        help="tokens that full attention has room for (default: eight training sequences)",
    )


def load_from_args(args: argparse.Namespace, *, trace_updates: bool = False) -> LoadedModel:
    """The model that the options of `add_model_arguments` describe; observe: as of `load_model`."""
    if args.learn == "none" and args.mode not in ("", "off"):
        raise UserError(f"--learn=none and --mode={args.mode} contradict each other.")
    return load_model(
        args.workdir,
        tokenizer=args.tokenizer,
        mode="off" if args.learn == "none" else args.mode,
        max_length=args.max_length,
        trace_updates=trace_updates,
    )
