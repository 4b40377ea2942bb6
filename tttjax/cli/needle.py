"""Needle tests of `tttjax evaluate --needle`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttjax.cli.flag_types import float32, int32, list_of
from tttjax.config.values import check_value
from tttjax.errors import UserError
from tttjax.evaluation.needle.tasks import TASKS
from tttjax.io.paths import text_path

if TYPE_CHECKING:
    from tttjax.evaluation.needle.runner import NeedleSettings
    from tttjax.runs.eval_setup import LearningOptions
    from tttjax.runs.run import Run

# Options that apply to needle tests only, and to the loss only.
NEEDLE_OPTIONS = ("needle_tasks", "needle_depths", "needle_samples", "needle_text", "tokenizer")
LOSS_OPTIONS = ("num_sequences", "bins", "log_x")


def add_needle_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of needle tests."""
    group = parser.add_argument_group(
        "needle tests",
        "RULER's single-needle tasks, at each of --context-lengths (tokens of the prompt)",
    )
    add = group.add_argument
    add("--needle", action="store_true", help="run needle tests instead of measuring the loss")
    add(
        "--needle-tasks",
        type=list_of(str),
        metavar="a,b",
        help=f"any of {', '.join(TASKS)} (default: all)",
    )
    add(
        "--needle-depths",
        type=list_of(float32),
        metavar="P,P",
        help="positions of needles, in %% of the haystack (default: 0,25,50,75,100)",
    )
    add(
        "--needle-samples",
        type=int32,
        metavar="N",
        help="prompts per task, length and depth (default: 10)",
    )
    add(
        "--needle-text",
        type=text_path,
        metavar="FILE",
        help="haystack text of the tasks number and uuid (default: held-out text)",
    )
    add(
        "--tokenizer",
        metavar="DIR",
        help="folder of the tokenizer, or of data prepared with it (default: the run's own)",
    )


def check_needle_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for options of the other kind of evaluation."""
    for name in LOSS_OPTIONS if args.needle else NEEDLE_OPTIONS:
        if getattr(args, name) not in (None, False):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} does not apply to needle tests: remove it, or --needle"
                if args.needle
                else f"{flag} is an option of needle tests: add --needle"
            )


def run_needle(
    args: argparse.Namespace, runs: "Sequence[Run]", learning: "LearningOptions", out: Path
) -> int:
    """`tttjax evaluate --needle`; returns the exit code."""
    import jax

    from tttjax.evaluation.files import check_writable
    from tttjax.evaluation.needle.outputs import write_needle
    from tttjax.evaluation.needle.runner import needle_tests
    from tttjax.evaluation.needle.summary import blocks, sentence
    from tttjax.evaluation.tables import show

    settings = _settings(args, runs)
    if jax.process_index() == 0:
        check_writable(out)
    results = needle_tests(
        runs,
        settings,
        modes=args.modes,
        window=args.window,
        learning=learning,
        progress=sys.stderr,
    )
    if jax.process_index() == 0:
        paths = write_needle(results, out)
        show([*blocks(results), sentence(results)], sys.stdout)
        print("\n".join(str(path) for path in paths.values()))
    return 0


def _settings(args: argparse.Namespace, runs: "Sequence[Run]") -> "NeedleSettings":
    from tttjax.evaluation.needle.runner import NeedleSettings

    defaults = runs[0].config.eval
    window = max(run.window for run in runs) or runs[0].config.model.window_size
    lengths = args.context_lengths or defaults.context_lengths
    lengths = tuple(sorted(set(lengths or (window * n for n in (1, 2, 4, 8)))))
    values: dict[str, Any] = {"tasks": args.needle_tasks, "samples": args.needle_samples}
    if args.needle_depths is not None:
        values["depths"] = tuple(depth / 100 for depth in args.needle_depths)
    for name in ("batch_size", "seed"):
        value = getattr(args, name)
        values[name] = getattr(defaults, name) if value is None else value
        check_value(f"eval.{name}", values[name])
    return NeedleSettings(
        lengths=lengths,
        text=args.needle_text,
        data=args.data,
        split=args.split,
        tokenizer=args.tokenizer,
        **{name: value for name, value in values.items() if value is not None},
    )
