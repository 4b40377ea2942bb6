"""Every numeric flag of every command rejects values that do not fit 32 bits."""

import argparse
import math

import pytest

from tttjax.cli import main

pytestmark = pytest.mark.slow

BAD = ("nan", "inf", "-inf", "1e39", "-1e39", "1e400", "", "x", "1.5.0", "0x10", "\uff11", "1__0")
TOO_LARGE = ("-2147483649", "4294967296", "9223372036854775808", "1.5")
TOO_SMALL = ("1e-46", "1e-400")
GOOD = ("0", "1", "-1", "1e3", "1_000", "2147483647", "4294967295", "0.5", "3.4e38", "1.2e-38")


def number_flags():
    """(command words, flag, type) of every flag that rejects `x`."""
    for name, parser in main._build_parser(main.COMMANDS)[1].items():
        parsers = [((name,), parser)]
        for words, parser in parsers:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += [((*words, name), sub) for name, sub in action.choices.items()]
                elif action.type is not None and action.option_strings:
                    try:
                        action.type("x")
                    except (argparse.ArgumentTypeError, ValueError):
                        yield words, action.option_strings[0], action.type


FLAGS = list(number_flags())
IDS = [" ".join((*words, flag)) for words, flag, _ in FLAGS]


def test_numeric_flags_are_found_in_all_commands():
    commands = {words[0] for words, _, _ in FLAGS}
    without = {"import", "export", "verify", "recipes", "paths", "runs", "launch", "status"}
    without |= {"completion"}
    assert commands == set(main.COMMANDS) - without
    assert len(FLAGS) > 45


def check_rejected(words, flag, text, capsys):
    assert main.main([*words, f"{flag}={text}"]) == 2, text
    err = capsys.readouterr().err
    assert err.startswith(f"error: argument {flag}: {text!r} must be a"), err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("words", "flag", "kind"), FLAGS, ids=IDS)
def test_every_flag_has_a_type_that_rejects(words, flag, kind, capsys):
    for text in ("nan", "1.5" if "int" in kind.__name__ else "1e-400"):
        check_rejected(words, flag, text, capsys)


ONE_FLAG_PER_TYPE = {kind: (words, flag) for words, flag, kind in FLAGS}


@pytest.mark.parametrize("kind", ONE_FLAG_PER_TYPE, ids=lambda kind: kind.__name__)
def test_numbers_outside_32_bits_are_rejected(kind, capsys):
    is_list, is_int = isinstance(kind("1"), tuple), "int" in kind.__name__
    for text in (*BAD, *(TOO_LARGE if is_int else TOO_SMALL)):
        if is_list and not text:
            continue  # an empty list means the default
        check_rejected(*ONE_FLAG_PER_TYPE[kind], text, capsys)


@pytest.mark.parametrize("kind", ONE_FLAG_PER_TYPE, ids=lambda kind: kind.__name__)
def test_numbers_are_parsed_exactly(kind):
    accepted = 0
    for text in GOOD:
        try:
            value = kind(text)
        except argparse.ArgumentTypeError:
            continue
        accepted += 1
        (number,) = value if isinstance(value, tuple) else (value,)
        assert number == float(text)
        assert math.isfinite(number)
        assert isinstance(number, int) == ("int" in kind.__name__)
    assert accepted >= 5
