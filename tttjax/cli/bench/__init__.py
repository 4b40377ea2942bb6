"""Measure speed and memory on this machine.

`tttjax bench NAME --help` shows the options of a benchmark, with examples.
"""

import argparse
import importlib
from types import ModuleType

# Each is a module of this package with a docstring, `add_arguments(parser)` and `run(args) -> int`;
# hyphens in the name are underscores in the module's.
BENCHMARKS = ("commands", "data", "decode", "meta-gradient", "prefill", "train")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tttjax.cli.bench.{name.replace('-', '_')}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one subcommand per benchmark."""
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name in BENCHMARKS:
        module = _module(name)
        text = (module.__doc__ or "").partition("\n\n")[0]
        module.add_arguments(commands.add_parser(name, help=text, description=module.__doc__))


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark that the arguments name; returns the exit code."""
    return _module(args.benchmark).run(args)
