"""Every flag of every command that takes numbers refuses what 32 bits do not hold."""

import argparse
import importlib
import math

import pytest

from tttjax.cli import main

BAD = ("nan", "inf", "-inf", "1e39", "-1e39", "1e400", "", "x", "1.5.0", "0x10", "\uff11", "1__0")
TOO_LARGE = ("-2147483649", "4294967296", "9223372036854775808", "1.5")
TOO_SMALL = ("1e-46", "1e-400")
GOOD = ("0", "1", "-1", "1e3", "1_000", "2147483647", "4294967295", "0.5", "3.4e38", "1.2e-38")


def number_flags():
    """(words before, flag, its type) of every flag that refuses `x`."""
    for name, command in main.COMMANDS.items():
        _, parser = main._build_parser(name)
        importlib.import_module(command.module).add_arguments(parser)
        parsers = [((name,), parser)]
        for words, parser in parsers:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += [((*words, sub), inner) for sub, inner in action.choices.items()]
                elif action.type is not None and action.option_strings:
                    try:
                        action.type("x")
                    except (argparse.ArgumentTypeError, ValueError):
                        yield words, action.option_strings[0], action.type


FLAGS = list(number_flags())
IDS = [" ".join((*words, flag)) for words, flag, _ in FLAGS]


def test_there_are_flags_of_all_commands_with_numbers():
    commands = {words[0] for words, _, _ in FLAGS}
    assert commands == set(main.COMMANDS) - {"import", "export", "verify"}
    assert len(FLAGS) > 60


@pytest.mark.parametrize(("words", "flag", "kind"), FLAGS, ids=IDS)
def test_numbers_that_32_bits_do_not_hold_are_refused(words, flag, kind, capsys):
    several, whole = isinstance(kind("1"), tuple), "int" in kind.__name__
    for text in (*BAD, *(TOO_LARGE if whole else TOO_SMALL)):
        if several and not text:
            continue  # an empty list, which means the default
        assert main.main([*words, f"{flag}={text}"]) == 2, text
        err = capsys.readouterr().err
        assert err.startswith(f"error: argument {flag}: {text!r} must be a"), err
        assert err.count("\n") == 1


@pytest.mark.parametrize(("words", "flag", "kind"), FLAGS, ids=IDS)
def test_numbers_are_taken_as_they_are_written(words, flag, kind):
    taken = 0
    for text in GOOD:
        try:
            value = kind(text)
        except argparse.ArgumentTypeError:
            continue
        taken += 1
        (number,) = value if isinstance(value, tuple) else (value,)
        assert number == float(text)
        assert math.isfinite(number)
        assert isinstance(number, int) == ("int" in kind.__name__)
    assert taken >= 5
