"""The program `tttjax`: reads the command line, calls one command, turns errors into sentences.

Each command is a module with `add_arguments(parser)` and `run(args) -> int`, imported only when
it is asked for, so that `tttjax --help` answers at once. Exit codes: 0 done; 1 a check failed or
a bug (with its traceback); 2 something the user can mend, said in one sentence; 130 interrupted;
141 nobody reads what is printed; 143 ended by SIGTERM; others are a command's own.
"""

import argparse
import atexit
import contextlib
import errno
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import tttjax
from tttjax.config.files import OVERRIDE_PREFIX
from tttjax.config.values import nearest
from tttjax.errors import UserError, is_out_of_memory
from tttjax.io.paths import path_text
from tttjax.runtime import progress
from tttjax.runtime.compilation_cache import enable_compilation_cache
from tttjax.runtime.libtpu import quieten_libtpu

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


@dataclass(frozen=True)
class Command:
    """A command's module, and its line in `tttjax --help`."""

    module: str
    summary: str


COMMANDS = {
    "prepare": Command("tttjax.cli.prepare", "turn text into a tokenizer and token shards"),
    "train": Command("tttjax.cli.train", "meta-train a model, or extend one; resumes by itself"),
    "evaluate": Command(
        "tttjax.cli.evaluate", "loss by position and context, TTT on and off; needles"
    ),
    "import": Command("tttjax.cli.import_", "make a run of weights from elsewhere"),
    "export": Command("tttjax.cli.export", "write a model for Hugging Face transformers"),
    "generate": Command("tttjax.cli.generate", "read, learn from it, write on; keep sessions"),
    "read": Command("tttjax.cli.read", "read a text of any length into a session file"),
    "sessions": Command("tttjax.cli.sessions", "what session files hold"),
    "plan": Command("tttjax.cli.plan", "memory, FLOPs, time of a run on any pod, without the pod"),
    "report": Command("tttjax.cli.report", "one comparison of several finished runs, as a page"),
    "verify": Command("tttjax.cli.verify", "check this build against reference numbers"),
    "bench": Command("tttjax.cli.bench", "measure speed and memory"),
}

DESCRIPTION = """\
Language models that keep learning while they read: end-to-end test-time training in JAX.
"""

EPILOG = """\
the usual order:
  tttjax prepare ...    once for each corpus
  tttjax train ...      writes checkpoints and metrics to --workdir; the same command resumes
  tttjax evaluate ...   what the trained model gains from learning while it reads

  `tttjax COMMAND --help` says what each needs, with examples.

configuration:
  A run is described by a Python file, and any field of it can be set on the command line:

    tttjax train --config=quickstart:ttt_e2e --workdir=runs/first \\
        --config.data.sources=data/books --config.train.steps=100

  The fields are listed in docs/configuration.md, the papers' recipes are in experiments/.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: that of the process) and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What is left when the program ends is not searched for garbage, which takes seconds.
    atexit.register(gc.freeze)
    try:
        enable_compilation_cache()
        quieten_libtpu()
        with progress.speaking(sys.stderr), progress.doing(" ".join(["tttjax", *arguments[:1]])):
            return _dispatch(arguments)
    except UserError as error:
        return _report(str(error))
    except BrokenPipeError:  # the reader has ended, as `| head` does
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if _is_out_of_space(error):
            return _report(
                "No space is left on the device (or in the quota) that the results are written "
                "to; free some and run the same command again."
            )
        if cause := next(filter(is_out_of_memory, _causes(error)), None):
            said = str(cause).partition("\n")[0].rstrip(".")
            whose = "This host's" if isinstance(cause, MemoryError) else "The device's"
            return _report(
                f"{whose} memory is too small for this ({said}). Training needs less with "
                "more train.accum_steps, mesh.fsdp or inner.trajectory=recompute, the rest with "
                "fewer tokens or texts at once; `tttjax plan` says what fits."
            )
        if isinstance(error, RecursionError) and "JSON" in str(error):
            return _report("A JSON file is nested too deeply to be read; it is damaged.")
        if sentence := _about_a_path(error):
            return _report(sentence)
        raise


class _Parser(argparse.ArgumentParser):
    """argparse with our errors, and without its guessing at abbreviated flags."""

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
            f"There is no command {name!r}; the commands are {', '.join(COMMANDS)}."
            f"{nearest(name, COMMANDS)}"
        )
    module = importlib.import_module(COMMANDS[name].module) if name in COMMANDS else None
    overrides, arguments = _split_overrides(arguments)
    parser, command_parser = _build_parser(name if module else None)
    if module is None or command_parser is None:
        return _parse_without_command(parser, arguments)
    module.add_arguments(command_parser)
    _expand_path_arguments(command_parser)
    # Set here so that a command with a --config can rely on it. One that finds a configuration by
    # itself, for which --config is a choice, sets has_own_config.
    command_parser.set_defaults(overrides=overrides)
    _refuse_unknown(command_parser, _unknown_flags(command_parser, arguments))
    try:
        args, unknown = parser.parse_known_args(arguments)
    except SystemExit as stop:  # --help has been printed
        return int(stop.code or 0)
    has_config = hasattr(args, "config")
    _refuse_unknown(command_parser, unknown + ([] if has_config else overrides))
    if overrides and args.config is None and not getattr(args, "has_own_config", False):
        raise UserError(f"{overrides[0]} changes a configuration, but no --config=FILE is given.")
    return module.run(args)


# How the metavar of an argument begins whose value is a path, whatever command it belongs to.
# FILE.py[:ARG] and RUN, which hold more than a path, are read by their commands.
_PATH_METAVARS = ("DIR", "FILE", "NEW", "PATH", "TABLE", "WORKDIR")


def _expand_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Has `~` expanded in all path arguments of a command, and URLs refused."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inside in action.choices.values():
                _expand_path_arguments(inside)
        elif str(action.metavar).startswith(_PATH_METAVARS) and "[:ARG]" not in str(action.metavar):
            action.type = _path_argument(action)


def _path_argument(action: argparse.Action) -> Callable[[str], str]:
    name = action.option_strings[0] if action.option_strings else ""
    return lambda text: path_text(text, name) if text else text


def _build_parser(name: str | None) -> tuple[_Parser, argparse.ArgumentParser | None]:
    """The program's parser, and the one inside it of the command `name`."""
    parser = _Parser(prog="tttjax", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"tttjax {tttjax.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True
    )
    added = {}
    for command_name, command in COMMANDS.items():
        description = None
        if command_name == name:
            description = importlib.import_module(command.module).__doc__
        added[command_name] = subparsers.add_parser(
            command_name, help=command.summary, description=description
        )
    return parser, added.get(name) if name else None


def _parse_without_command(parser: _Parser, arguments: list[str]) -> int:
    try:
        parser.parse_args(arguments or ["--help"])
    except SystemExit as stop:
        return int(stop.code or 0)
    raise UserError("No command is given; see `tttjax --help`.")


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--config.x.y=v` words, and the others; `--config.x.y v` is joined to `--config.x.y=v`."""
    overrides, others = [], []
    words = iter(arguments)
    for word in words:
        if not word.startswith(OVERRIDE_PREFIX):
            others.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word} has no value; write {word}=VALUE.")
            overrides.append(f"{word}={value}")
    return overrides, others


def _unknown_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Misspelt flags, found before argparse complains that the right ones are missing."""
    if parser._subparsers is not None:  # their flags are known to parsers inside
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


def _is_out_of_space(error: BaseException) -> bool:
    """Whether the error, or one it came from, says so; storage libraries say it only in text."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(cause)
        for cause in _causes(error)
    )


_PATH_ERRORS = {
    errno.EEXIST: "is there already, as a file where a folder is needed; name another place",
    errno.ENOTDIR: "leads through a file where a folder is needed; name another place",
    errno.EISDIR: "is a folder where a file is needed; name a file",
    errno.ENAMETOOLONG: "is longer than a path may be; name another place",
    errno.ENOENT: "does not exist; check how it is spelt and where the command was started",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "cannot be read or written with your permissions; change them or name another place",
    ),
}


def _about_a_path(error: BaseException) -> str:
    """A sentence, if the error is the system's refusal of a path; else empty."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | os.PathLike):
        return ""
    problem = _PATH_ERRORS.get(error.errno or 0)
    return f"{os.fspath(error.filename)} {problem}." if problem else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _report(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return USER_ERROR
