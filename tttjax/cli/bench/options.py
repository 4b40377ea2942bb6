"""Flags that the benchmarks share."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from tttjax.cli.flag_types import int32
from tttjax.config import Config, load_config
from tttjax.config.files import matching_specs


def add_sizes(
    parser: argparse.ArgumentParser,
    defaults: Any,
    texts: Mapping[str, str],
    dtypes: Sequence[str],
) -> None:
    """An option for each integer field of `defaults` by its text, its `dtype`, and the rest."""
    for name, text in texts.items():
        option, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        parser.add_argument(
            option, type=int32, default=default, help=f"{text} (default %(default)s)"
        )
    parser.add_argument(
        "--dtype", choices=dtypes, default=defaults.dtype, help="of arrays (default %(default)s)"
    )
    add_measuring(parser, "measured runs of each")


def add_measuring(parser: argparse.ArgumentParser, what: str) -> None:
    """How often to measure, and how to print."""
    parser.add_argument("--rounds", type=int32, default=5, help=f"{what} (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def add_configs(parser: argparse.ArgumentParser) -> None:
    """The configurations that are measured against each other."""
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE.py[:ARG]",
        help="a configuration, or several by * in ARG; give several to compare them. "
        "--config.FIELD=VALUE changes all",
    )


def load_configs(specs: Sequence[str], overrides: Sequence[str]) -> list[tuple[str, Config]]:
    """(name, configuration) of each, those that fit `FILE.py:125m,*` one after the other.

    Raises UserError for anything wrong with a file, an argument or an override.
    """
    found = [one for spec in specs for one in matching_specs(spec)]
    return [(spec, load_config(spec, overrides)) for spec in found]
