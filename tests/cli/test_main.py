"""The command line: help, dispatch, overrides, and error messages."""

import errno
import json
import os
import re
import subprocess
import sys
import types

import pytest

from tttjax.cli import main
from tttjax.cli.bench import BENCHMARKS
from tttjax.config import load_config
from tttjax.errors import UserError


@pytest.fixture
def command(monkeypatch):
    """Installs a command `greet` with --config and --name and the given `run`."""

    def install(run):
        module = types.ModuleType("greet_for_test", "Greets somebody.\n")

        def add_arguments(parser):
            parser.add_argument("--config")
            parser.add_argument("--name", required=True)

        module.add_arguments, module.run = add_arguments, run
        monkeypatch.setitem(sys.modules, "greet_for_test", module)
        monkeypatch.setitem(main.COMMANDS, "greet", main.Command("greet_for_test", "greet"))

    return install


def fails_with(error):
    def run(args):
        raise error

    return run


COMMAND_LINES = ["", *main.COMMANDS, *(f"bench {name}" for name in BENCHMARKS)]
SLOW = (
    *("flax", "grain", "jax", "jinja2", "markdown_it", "matplotlib", "ml_collections", "numpy"),
    *("optax", "orbax", "pandas", "rich", "shtab"),
)
PARSE_ALL = f"""
import contextlib, io, json, sys
from tttjax.cli.main import main

results = {{}}
for line in {COMMAND_LINES}:
    before = set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        codes = [main([*line.split(), flag]) for flag in ("--help", "--no-such-flag")]
    slow = {set(SLOW)} & (set(sys.modules) - before)
    results[line] = *codes, sorted(slow)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def parsed():
    """Exit codes of --help and of an unknown flag, and the slow imports, of every command."""
    result = subprocess.run([sys.executable, "-c", PARSE_ALL], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_help_and_errors_of_the_command_line_are_fast(line, parsed):
    assert parsed[line] == [0, 2, []]


def test_help_lists_the_commands(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in main.COMMANDS:
        assert f"\n    {name}" in out


def test_no_argument_prints_help(capsys):
    assert main.main([]) == 0
    assert "typical workflow" in capsys.readouterr().out


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tttjax ")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: tttjax {name}")
    assert len(out.splitlines()) > 5


def test_command_gets_its_arguments_and_returns_its_code(command):
    command(lambda args: 7 if args.name == "Ada" and args.overrides == [] else 0)
    assert main.main(["greet", "--name=Ada"]) == 7


def test_overrides_reach_the_command_in_order(command, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from tttjax.config import default_config as get_config\n")
    configs = []
    command(lambda args: configs.append(load_config(args.config, args.overrides)) or 0)
    words = ["--config.train.steps=5", "--config.optim.peak_lr", "1e-4", "--config.train.steps=6"]
    assert main.main(["greet", f"--config={file}", "--name", "x", *words]) == 0
    assert (configs[0].train.steps, configs[0].optim.peak_lr) == (6, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "There is no command 'trian'.* Did you mean 'train'"),
        (["--nmae=3"], "COMMAND"),
        (["greet"], "--name"),
        (["greet", "--name=x", "--nome=y"], "no argument '--nome'. Did you mean '--name'"),
        (["greet", "--nam=x", "--name=y"], "no argument '--nam'"),
        (["greet", "--nmae=x"], "no argument '--nmae'. Did you mean '--name'"),
        (["greet", "--name=x", "left"], "no argument 'left'"),
        (
            ["greet", "--name=x", "--config.train.steps=1"],
            "needs a configuration to change; give --config=FILE",
        ),
        (["greet", "--name=x", "--config=a.py", "--config.train.steps"], "has no value"),
    ],
)
def test_an_invalid_command_line_is_one_error_line(command, arguments, message, capsys):
    command(lambda args: 0)
    assert main.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


def test_a_user_error_is_printed_without_traceback(command, capsys):
    command(fails_with(UserError("The file x is empty.")))
    assert main.main(["greet", "--name=x"]) == 2
    assert capsys.readouterr().err == "error: The file x is empty.\n"


def test_an_interrupt_has_its_own_exit_code(command, capsys):
    command(fails_with(KeyboardInterrupt()))
    assert main.main(["greet", "--name=x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("kvstore write failed [RESOURCE_EXHAUSTED: No space left on device]"),
    ],
)
def test_a_full_disk_is_one_error_line(command, error, capsys):
    command(fails_with(error))
    assert main.main(["greet", "--name=x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: No space left")
    assert err.count("\n") == 1


def test_out_of_device_memory_is_one_error_line(command, capsys):
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 999 bytes.\nAllocator:\n  much more"
    command(fails_with(RuntimeError(message)))
    assert main.main(["greet", "--name=x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: Out of memory on the device")
    assert "Out of memory allocating 999 bytes)" in err
    assert err.count("\n") == 1
    command(fails_with(RuntimeError("something else, not RESOURCE_EXHAUSTED")))
    with pytest.raises(RuntimeError):
        main.main(["greet", "--name=x"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EEXIST, "/there exists already"),
        (errno.ENOTDIR, "/there passes through a file"),
        (errno.EISDIR, "/there is a folder"),
        (errno.EACCES, "/there cannot be .* your permissions"),
        (errno.EROFS, "/there cannot be .* your permissions"),
        (errno.ENOENT, "/there does not exist"),
        (errno.ENAMETOOLONG, "/there is too long for a path"),
    ],
)
def test_a_path_error_is_one_error_line(command, code, message, capsys):
    command(fails_with(OSError(code, "refused", "/there")))
    assert main.main(["greet", "--name=x"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.match(f"error: {message}.*; .*\\.$", err)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken", "/x"), OSError(errno.ENOENT, "?")])
def test_other_system_errors_keep_their_traceback(command, error):
    command(fails_with(error))
    with pytest.raises(OSError):  # noqa: PT011 (the very error)
        main.main(["greet", "--name=x"])


def test_a_full_disk_is_recognised_as_a_cause(command):
    def run(args):
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise ValueError("saving failed") from error

    command(run)
    assert main.main(["greet", "--name=x"]) == 2


def test_a_bug_keeps_its_traceback(command):
    command(fails_with(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main.main(["greet", "--name=x"])


def test_the_module_is_the_program():
    result = subprocess.run(
        [sys.executable, "-m", "tttjax", "trian"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: There is no command 'trian'")


def test_a_broken_pipe_is_no_error():
    code = (
        "import sys; from tttjax.cli import main as cli;"
        "cli._dispatch = lambda words: print(flush=True);"
        "sys.exit(cli.main(['sessions']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run([sys.executable, "-uc", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, b"")
