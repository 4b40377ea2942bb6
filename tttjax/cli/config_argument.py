"""The flag --config of commands that need a configuration."""

import argparse


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """A required `--config`; the overrides `--config.x.y` are split off in `main.py`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:ARG]",
        help="recipe (quickstart, paper:125m,...) or experiment file; "
        "--config.SECTION.FIELD=VALUE changes any field",
    )
