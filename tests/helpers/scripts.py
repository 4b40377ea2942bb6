"""Running the scripts of launch/ with fake cluster programs."""

import os
import subprocess

import pytest

from helpers.paths import ROOT

LAUNCH = ROOT / "launch"
SHOW = "printf '[%s]' \"$@\"; echo"  # a program that prints its arguments


def write_program(path, body):
    """A bash program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def shell(tmp_path):
    """Runs a script; `programs` are bash bodies of fake programs on PATH."""

    def run(script: str, *arguments: str, programs=(), **variables: str):
        for name, body in dict(programs).items():
            write_program(tmp_path / name, body)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        command = ["bash", *script.split(" ", 1)] if script.startswith("-c") else ["bash", script]
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
        )

    return run
