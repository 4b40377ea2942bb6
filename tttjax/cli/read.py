"""Prefill a session file with a text of any length, with test-time training.

examples:
  tttjax read runs/first book.txt --save-session=book.session
  tttjax generate runs/first --session=book.session --prompt "In the end,"
  tttjax read runs/first book.txt --save-session=book.session --telescope=book.telescope
      records every inner update: loss before and after, gradient norm, weight drift by layer
  tttjax read runs/first book.txt --save-session=book.session --compare=book.compare
      compares the loss with learning and without: a table, a plot, and one sentence
  tttjax read runs/first book.txt --save-session=book.session --keep-every=100000
      keeps snapshots for `tttjax sessions book.session --rewind=TOKENS`

Memory use and file size do not grow with the text. The session is saved every minute and on Ctrl-C
or SIGTERM; the same command resumes. --log writes the loss of every chunk, before its update, to a
CSV file.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tttjax.cli.flag_types import int32
from tttjax.cli.model_arguments import add_model_arguments, add_storage_arguments, load_from_args
from tttjax.errors import UserError
from tttjax.exit_codes import DONE, SAVED
from tttjax.io.locks import Lock, hold
from tttjax.io.paths import storage_text, text_path

if TYPE_CHECKING:
    from tttjax.data.inputs import InputFile
    from tttjax.evaluation.prefill_text import ChunkOutput
    from tttjax.evaluation.read_comparison import ReadComparison
    from tttjax.runs.load import LoadedModel
    from tttjax.runs.long_text import TextPrefill
    from tttjax.runs.snapshots import Snapshots

MAX_SNAPSHOTS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax read`."""
    add = parser.add_argument
    add(
        "workdir",
        type=storage_text,
        metavar="WORKDIR",
        help="work directory or checkpoint of a run",
    )
    add(
        "text",
        type=text_path,
        metavar="FILE",
        help="text in UTF-8; also .gz, .xz, .bz2, .zst, and a URL",
    )
    add("--save-session", required=True, metavar="FILE", help="session file to write")
    add("--session", metavar="FILE", help="session to continue (default: an empty one)")
    add_storage_arguments(parser)
    add("--log", metavar="FILE.csv", help="log of loss and gradient norm of every chunk")
    add("--telescope", metavar="DIR", help="trace of all inner updates, as JSON and as a plot")
    add("--compare", metavar="DIR", help="losses with learning and without, as a table and a plot")
    add = parser.add_argument_group("snapshots, in FILE.kept/").add_argument
    add(
        "--keep-every",
        type=int32,
        default=0,
        metavar="TOKENS",
        help="interval between snapshots; 0: none",
    )
    add(
        "--keep-most",
        type=int32,
        default=MAX_SNAPSHOTS,
        metavar="N",
        help="largest number of snapshots; beyond it, every other one is removed and the interval "
        "doubles (default: %(default)s)",
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`tttjax read` from parsed arguments; returns the exit code."""
    _check(args)

    from tttjax.inference.session_file import check_writable
    from tttjax.runs.long_text import find_text

    file = find_text(args.text)
    with contextlib.ExitStack() as stack:
        locks = []
        for path, beside in (
            (args.save_session, True),
            (args.log, True),
            (args.telescope, False),
            (args.compare, False),
        ):
            if path:
                locks.append(stack.enter_context(hold(path, beside=beside)))
        check_writable(args.save_session)
        return _run(args, file, locks)


def _run(args: argparse.Namespace, file: "InputFile", locks: Sequence[Lock]) -> int:
    from tttjax.evaluation.prefill_text import prefill_session_file
    from tttjax.parallel.precision import x64_if_configured
    from tttjax.runs.long_text import resume_prefill, start_prefill
    from tttjax.training.stopping import StopRequest

    loaded = load_from_args(args, trace_updates=bool(args.telescope))
    for option in ("telescope", "compare"):
        if getattr(args, option) and not loaded.engine.inference_model.chunk_size:
            raise UserError(
                f"--{option} needs inner updates; remove it, because {args.workdir} has no fast "
                "weights, or --learn=none or --mode=off is set"
            )
    with x64_if_configured(loaded.config):
        path = Path(args.save_session)
        prefill = (
            resume_prefill(loaded, file, path)
            if path.exists()
            else start_prefill(loaded, file, args.session)
        )
        loaded.engine.check((), prefill.session.tokens + prefill.total - prefill.done)
        # After the end of the text, a summary or a plot may still be missing.
        if prefill.done < prefill.total or args.telescope or args.compare:
            with StopRequest() as stop, contextlib.ExitStack() as stack:
                snapshots = _snapshots(args, loaded)
                outputs, comparison = _open_outputs(args, loaded, prefill, stack)
                prefill_session_file(
                    path,
                    loaded,
                    prefill,
                    outputs=outputs,
                    snapshots=snapshots,
                    precision=args.session_precision,
                    locks=locks,
                    stop=stop,
                    stream=sys.stderr,
                )
                if comparison:
                    print(comparison.sentence())
    tokens, size = prefill.session.tokens, path.stat().st_size
    print(f"{path}: {tokens:,} tokens in {size:,} bytes", file=sys.stderr)
    return DONE if prefill.done == prefill.total else SAVED


def _check(args: argparse.Namespace) -> None:
    for name, low in (("keep_every", 0), ("keep_most", 2)):
        value = getattr(args, name)
        if value < low:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least {low}.")


def _open_outputs(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    prefill: "TextPrefill",
    stack: contextlib.ExitStack,
) -> "tuple[list[ChunkOutput], ReadComparison | None]":
    from tttjax.evaluation.read_comparison import ReadComparison
    from tttjax.evaluation.update_trace import UpdateTraceWriter
    from tttjax.runs.chunk_log import CsvLog

    outputs: list[ChunkOutput] = []
    comparison = ReadComparison(args.compare, loaded, prefill) if args.compare else None
    if args.telescope:
        outputs.append(UpdateTraceWriter(args.telescope, loaded, prefill))
        stack.callback(outputs[-1].close)
    if args.log:
        outputs.append(CsvLog(args.log, prefill.learned_tokens))
        stack.callback(outputs[-1].close)
    if comparison:
        comparison.open()
        outputs.append(comparison)
        stack.callback(comparison.close)
    return outputs, comparison


def _snapshots(args: argparse.Namespace, loaded: "LoadedModel") -> "Snapshots | None":
    if not args.keep_every:
        return None

    from tttjax.runs.long_text import tokens_per_call
    from tttjax.runs.snapshots import Snapshots

    size = tokens_per_call(loaded)
    every = -(-args.keep_every // size)
    snapshots = Snapshots(Path(args.save_session), every, args.keep_most, size)
    snapshots.check()
    return snapshots
