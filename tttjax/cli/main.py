"""The program `tttjax`: parses the command line, runs one command, reports errors in one line.

Each command is a module with `add_arguments(parser)` and `run(args) -> int`. It is imported only
when it is used, and imports the library only in `run`, so that help and errors of the command line
are fast. Exit codes: `exit_codes.py`; 143 if terminated by SIGTERM.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import tttjax
from tttjax.cli.error_sentences import error_sentence
from tttjax.config.files import OVERRIDE_PREFIX, use_code
from tttjax.config.values import nearest
from tttjax.errors import AbsentProcessError, UnreachableError, UserError
from tttjax.exit_codes import BROKEN_PIPE, INTERRUPTED, LOST, USER_ERROR
from tttjax.io.paths import path_text
from tttjax.runtime import progress
from tttjax.runtime.compilation_cache import enable_compilation_cache
from tttjax.runtime.libtpu import quieten_libtpu


@dataclass(frozen=True)
class Command:
    """A command's module and its summary in `tttjax --help`."""

    module: str
    summary: str


COMMANDS = {
    "prepare": Command("tttjax.cli.prepare", "tokenize text into a data set"),
    "train": Command("tttjax.cli.train", "meta-train a model, or extend its context; resumable"),
    "evaluate": Command(
        "tttjax.cli.evaluate", "measure loss by position and context, TTT on and off; needle tests"
    ),
    "recipes": Command("tttjax.cli.recipes", "list recipes, their cost and expected loss"),
    "paths": Command("tttjax.cli.paths", "list a model's weights, the fast ones marked"),
    "import": Command(
        "tttjax.cli.import_", "convert Hugging Face or official TTT-E2E weights into a run"
    ),
    "export": Command("tttjax.cli.export", "write a model for Hugging Face transformers"),
    "generate": Command(
        "tttjax.cli.generate", "generate text, with test-time training on the prompt"
    ),
    "read": Command("tttjax.cli.read", "prefill a session file with a text of any length"),
    "sessions": Command("tttjax.cli.sessions", "describe and rewind session files"),
    "plan": Command("tttjax.cli.plan", "predict memory, FLOPs and time of a run on any pod"),
    "launch": Command("tttjax.cli.launch", "submit a run to a cluster once its plan fits"),
    "report": Command("tttjax.cli.report", "compare finished runs on one page"),
    "sweep": Command("tttjax.cli.sweep", "train and compare a grid of settings, with seeds"),
    "runs": Command("tttjax.cli.runs", "list the runs of a folder and how they differ"),
    "status": Command(
        "tttjax.cli.status", "show the state of a run: progress, hosts, starts, time spent"
    ),
    "verify": Command("tttjax.cli.verify", "check this build against reference values"),
    "bench": Command("tttjax.cli.bench", "measure speed and memory"),
    "completion": Command("tttjax.cli.completion", "print a shell's completion script"),
}

DESCRIPTION = """\
Language models trained end to end for test-time training (TTT-E2E), in JAX.
"""

EPILOG = """\
typical workflow:
  tttjax prepare ...    tokenize a corpus, once
  tttjax train ...      write checkpoints and metrics to --workdir; the same command resumes
  tttjax evaluate ...   measure the gain from test-time training

  `tttjax COMMAND --help` shows the options of a command, with examples.

configuration:
  A run is configured by a Python file. Any field can be set on the command line:

    tttjax train --config=quickstart:ttt_e2e --workdir=runs/first \\
        --config.data.sources=data/books --config.train.steps=100

  docs/configuration.md lists the fields; tttjax/recipes/ has the papers' recipes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: `sys.argv`) and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Skip the garbage collection at exit, which takes seconds.
    atexit.register(gc.freeze)
    try:
        enable_compilation_cache()
        quieten_libtpu()
        with (
            progress.show_activity(sys.stderr),
            progress.report_activity(" ".join(["tttjax", *arguments[:1]])),
        ):
            return _dispatch(arguments)
    except BrokenPipeError:  # the consumer of the output has ended, as in `| head`
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        sentence = error_sentence(error)
        if not sentence:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        is_resumable = isinstance(error, AbsentProcessError | UnreachableError)
        return LOST if is_resumable else USER_ERROR


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError and does not accept abbreviated flags."""

    def __init__(self, *args, **kwargs):
        kwargs |= {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`.")


def _dispatch(arguments: list[str]) -> int:
    name = next((word for word in arguments if not word.startswith("-")), None)
    if arguments and arguments[0] == name and name not in COMMANDS:
        raise UserError(
            f"There is no command {name!r}; choose from {', '.join(COMMANDS)}."
            f"{nearest(name, COMMANDS)}"
        )
    overrides, arguments = _split_overrides(arguments)
    parser, parsers_by_name = _build_parser((name,) if name else ())
    if name not in parsers_by_name:
        return _parse_without_command(parser, arguments)
    command_parser = parsers_by_name[name]
    _expand_path_arguments(command_parser)
    # Every command gets `overrides`. A command whose --config is optional sets has_own_config.
    command_parser.set_defaults(overrides=overrides)
    _refuse_unknown(command_parser, _unknown_flags(command_parser, arguments))
    try:
        args, unknown = parser.parse_known_args(arguments)
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    has_config = hasattr(args, "config")
    _refuse_unknown(command_parser, unknown + ([] if has_config else overrides))
    if overrides and args.config is None and not getattr(args, "has_own_config", False):
        raise UserError(f"{overrides[0]} needs a configuration to change; give --config=FILE.")
    # A command that has first to join other processes sets runs_code.
    for path in () if getattr(args, "runs_code", False) else getattr(args, "code", ()):
        use_code(path)
    return importlib.import_module(COMMANDS[name].module).run(args)


# Metavars of path arguments begin with these words, in all commands. The commands parse
# FILE.py[:ARG] and RUN, which contain more than a path.
_PATH_METAVARS = ("DIR", "FILE", "NEW", "PATH", "TABLE", "WORKDIR")


def _expand_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Makes all path arguments of a command expand `~` and reject URLs.

    A type `text_path` allows URLs, `storage_text` buckets.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _expand_path_arguments(subparser)
        elif str(action.metavar).startswith(_PATH_METAVARS) and "[:ARG]" not in str(action.metavar):
            action.type = _path_argument(action)


def _path_argument(action: argparse.Action) -> Callable[[str], str]:
    parse: Any = action.type or path_text
    name = action.option_strings[0] if action.option_strings else ""
    return lambda text: parse(text, name) if text else text


def _build_parser(
    names: Collection[str],
) -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    """The program's parser, and the subparsers of the commands `names`, with their arguments."""
    parser = _Parser(prog="tttjax", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"tttjax {tttjax.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True
    )
    parsers_by_name: dict[str, argparse.ArgumentParser] = {}
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module) if name in names else None
        subparser = subparsers.add_parser(
            name, help=command.summary, description=module.__doc__ if module else None
        )
        if module is not None:
            module.add_arguments(subparser)
            parsers_by_name[name] = subparser
    return parser, parsers_by_name


def full_parser() -> argparse.ArgumentParser:
    """The parser of all commands with all their arguments."""
    return _build_parser(COMMANDS)[0]


def _parse_without_command(parser: _Parser, arguments: list[str]) -> int:
    try:
        parser.parse_args(arguments or ["--help"])
    except SystemExit as stop:
        return int(stop.code or 0)
    raise UserError("Give a command; see `tttjax --help`.")


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides, other arguments); `--config.x.y v` becomes `--config.x.y=v`."""
    overrides, remaining = [], []
    words = iter(arguments)
    for word in words:
        if not word.startswith(OVERRIDE_PREFIX):
            remaining.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word} has no value; write {word}=VALUE.")
            overrides.append(f"{word}={value}")
    return overrides, remaining


def _unknown_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Unknown flags; checked before argparse reports the required ones as missing."""
    if parser._subparsers is not None:  # the subparsers know their flags
        return []
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--"]
    return [flag for flag in flags if flag not in parser._option_string_actions]


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    if not unknown:
        return
    flag = unknown[0].partition("=")[0]
    raise UserError(
        f"`{parser.prog}` has no argument {flag!r}.{nearest(flag, parser._option_string_actions)}"
    )
