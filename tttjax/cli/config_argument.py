"""The flags --config and --code, of commands that need a configuration or open runs."""

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


def add_code_argument(parser: argparse.ArgumentParser) -> None:
    """The flag --code of commands that open runs; `main.py` runs the files that it names."""
    parser.add_argument(
        "--code",
        action="append",
        default=[],
        metavar="FILE",
        help="recipe file with the run's custom inner rule or loss: recipe.py in its work "
        "directory, once you have read it",
    )
