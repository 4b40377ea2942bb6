"""launch/Dockerfile: what the scripts expect of it, and its commands in a clean environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from helpers.paths import ROOT
from helpers.scripts import LAUNCH

DOCKERFILE = (LAUNCH / "Dockerfile").read_text()
SCRIPTS = ("gke_xpk.sh", "jobset.sh", "slurm.sh")


def instructions():
    """(instruction, its text) of every line; a line that ends with a backslash goes on."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def values(name):
    return [text for instruction, text in instructions() if instruction == name]


def test_the_image_is_what_the_scripts_start():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entrypoint,) = map(json.loads, values("ENTRYPOINT"))
    assert entrypoint == ["tttjax"]
    assert set(entrypoint) <= set(project["scripts"])
    (base,) = values("FROM")
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+", base)
    version = re.fullmatch(r"PYTHON=(3)\.(\d+)\.\d+", values("ARG")[0])
    assert version
    assert tuple(map(int, version.groups())) >= (3, 11)
    assert values("COPY") == [". ."], "the checkout is the working folder"
    named = set(re.findall(r"EXTRA=(\w+)", DOCKERFILE))
    for script in SCRIPTS:
        text = (LAUNCH / script).read_text()
        assert "as launch/Dockerfile builds it" in text
        named |= set(re.findall(r"EXTRA=(\w+)", text))
    assert named == {"cuda", "tpu"} <= set(project["optional-dependencies"])


def test_the_context_has_the_sources_and_no_results():
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert not any((ROOT / name / "__init__.py").exists() for name in ignored)
    of_git = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert {"runs", "data", "results", "build", "site", "quickstart"} <= of_git & set(ignored)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("extra", ["", "cuda", "tpu"])
def test_its_commands_work_in_a_clean_environment(extra, tmp_path):
    """Of the extras, pip only resolves the packages, which are gigabytes. Needs the registry."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    checkout = tmp_path / "tttjax"
    for folder in ("tttjax", "launch"):
        shutil.copytree(ROOT / folder, checkout / folder)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, checkout)
    environment = {
        "PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "EXTRA": extra,
        **{name: text for name, text in os.environ.items() if name.startswith("PIP_")},
    }
    commands = [*values("RUN"), "tttjax train --help"]
    if extra:
        commands = [f"{commands[0]} --dry-run"]
    for command in commands:
        result = subprocess.run(
            ["sh", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    shutil.rmtree(tmp_path / "venv")  # gigabytes that pytest would keep
    if extra:
        package = {"cuda": "jax-cuda13-plugin", "tpu": "libtpu"}[extra]
        assert re.search(f"Would install .*{package}-[0-9]", result.stdout)
