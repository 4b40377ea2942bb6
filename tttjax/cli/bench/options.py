"""Flags shared by the benchmarks."""

import argparse
from collections.abc import Sequence

from tttjax.cli.flag_types import int32
from tttjax.config import Config, load_config
from tttjax.config.files import matching_specs


def add_measuring(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --rounds and --json."""
    parser.add_argument("--rounds", type=int32, default=5, help=f"{what} (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def add_configs(parser: argparse.ArgumentParser) -> None:
    """Adds --config, which may be repeated."""
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE.py[:ARG]",
        help="recipe (mid_size:full) or experiment file, several with * in ARG; may be repeated. "
        "--config.FIELD=VALUE changes all of them",
    )


def load_configs(specs: Sequence[str], overrides: Sequence[str]) -> list[tuple[str, Config]]:
    """(name, configuration) of each spec; * in ARG matches several.

    Raises UserError for an invalid file, argument or override.
    """
    expanded = [match for spec in specs for match in matching_specs(spec)]
    return [(spec, load_config(spec, overrides)) for spec in expanded]
