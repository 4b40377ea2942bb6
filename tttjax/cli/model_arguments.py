"""Flags shared by the commands that load a run's model: generate, read, sessions."""

import argparse
from typing import TYPE_CHECKING

from tttjax.cli.config_argument import add_code_argument
from tttjax.cli.flag_types import int32
from tttjax.errors import UserError
from tttjax.inference.options import PRECISIONS
from tttjax.runs.modes import LEARN, MODES

if TYPE_CHECKING:
    from tttjax.runs.load import LoadedModel


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of loading a model for inference."""
    add_code_argument(parser)
    add = parser.add_argument_group("inference").add_argument
    add(
        "--learn",
        choices=LEARN,
        default="all",
        help="tokens to apply inner updates for: prompt and generated text, the prompt only, or "
        "none (default: %(default)s)",
    )
    add(
        "--mode",
        choices=MODES,
        default="",
        help="test-time training on or off, or dynamic evaluation of a static model (default: on, "
        "if the model has fast weights)",
    )
    add(
        "--tokenizer",
        metavar="DIR",
        help="folder of the tokenizer, or of data prepared with it (default: the run's own)",
    )
    add(
        "--max-length",
        type=int32,
        default=0,
        metavar="N",
        help="KV cache capacity of full attention in tokens (default: eight training sequences)",
    )


def add_storage_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds the options of how a session file stores the fast weights."""
    parser.add_argument(
        "--session-precision",
        choices=PRECISIONS,
        default="float32",
        help="precision of stored arrays (default: %(default)s)",
    )


def load_from_args(args: argparse.Namespace, *, trace_updates: bool = False) -> "LoadedModel":
    """Loads the model that the options of `add_model_arguments` describe."""
    if args.learn == "none" and args.mode not in ("", "off"):
        raise UserError(f"--learn=none and --mode={args.mode} contradict each other; remove one.")

    from tttjax.runs.load import load_model

    return load_model(
        args.workdir,
        tokenizer=args.tokenizer,
        mode="off" if args.learn == "none" else args.mode,
        max_length=args.max_length,
        trace_updates=trace_updates,
    )
