"""The completion scripts, in the shells that they are for."""

import os
import shutil
import subprocess

import pytest

from tttjax.cli.completion import SHELLS, completion_script
from tttjax.cli.main import full_parser, main

# What bash does at TAB: the line, split also at `=` and `:`, and the index of the last word.
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_tttjax
printf '%s\\n' "${COMPREPLY[@]}"
"""


def needs(shell):
    return pytest.mark.skipif(not shutil.which(shell), reason=f"{shell} is not installed")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(completion_script(full_parser(), shell))
    return folder


@pytest.fixture
def complete(scripts, tmp_path):
    """Completes the last of the words that bash makes of a line, in a folder of three paths."""
    (tmp_path / "books").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "mine.py").touch()

    def in_bash(*words):
        command = ["bash", "--norc", "-c", COMPLETE, "bash", scripts / "bash", "tttjax", *words]
        result = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
        )
        return result.stdout.split()

    return in_bash


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["bench", "pre"], ["prefill"]),
        (["prepare", "--tok"], ["--tokenizer"]),
        (["prepare", "no"], ["notes.txt"]),
        (["prepare", "notes.txt", "--out", "=", "b"], ["books"]),
        (["train", "--workdir", "n"], []),
        (["generate", "--mode", "=", "d"], ["dynamic"]),
        (["train", "--config", "=", "quick"], ["quickstart:"]),
        (["train", "--config", "=", "mi"], ["mid_size:", "mine.py"]),
        (["train", "--config", "=", "quickstart", ":"], ["ttt_e2e", "window"]),
        (["train", "--config", "quickstart", ":", "w"], ["window"]),
        (["recipes", "quickstart", ":", "w"], ["window"]),
        (["train", "--conf"], ["--config"]),
        (["train", "--config.train.step"], ["--config.train.steps"]),
        (["train", "--config.model.fast_mlp", "="], ["true", "false"]),
        (["evaluate", "--config.train.step"], []),
    ],
)
def test_bash_completes_the_last_word(words, expected, complete):
    assert complete(*words) == expected


def test_bash_completes_all_commands(complete):
    assert {"prepare", "train", "generate", "completion"} <= set(complete(""))


@needs("fish")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tttjax tr", "train"),
        ("tttjax train --config=quickstart:w", "--config=quickstart:window"),
        ("tttjax train --config.train.step", "--config.train.steps"),
    ],
)
def test_fish_completes_the_last_word(line, expected, scripts, tmp_path):
    command = f"source {scripts / 'fish'}; complete -C '{line}'"
    env = os.environ | {"HOME": str(tmp_path)}
    result = subprocess.run(
        ["fish", "--no-config", "-c", command], capture_output=True, text=True, env=env
    )
    assert [row.partition("\t")[0] for row in result.stdout.splitlines()] == [expected]


@needs("zsh")
def test_zsh_script_is_valid(scripts):
    result = subprocess.run(["zsh", "-f", "-n", scripts / "zsh"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_command_prints_the_script(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("-F _tttjax tttjax")
    assert main(["completion", "tcsh"]) == 2
