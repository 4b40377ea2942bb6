"""Measure what this machine does: `tttjax bench NAME`, and `tttjax bench NAME --help`."""

import argparse
import importlib
from types import ModuleType

# Each is a module of this package with a docstring, `add_arguments(parser)`, `run(args) -> int`;
# where the name has a hyphen, the module's has an underscore.
BENCHMARKS = (
    *("attention", "commands", "cross-entropy", "data", "decode", "meta-gradient", "prefill"),
    *("train", "ttt-dual"),
)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tttjax.cli.bench.{name.replace('-', '_')}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark."""
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name in BENCHMARKS:
        module = _module(name)
        text = (module.__doc__ or "").partition("\n\n")[0]
        module.add_arguments(commands.add_parser(name, help=text, description=module.__doc__))


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark that the arguments name; the exit code."""
    return _module(args.benchmark).run(args)
