"""launch/scaling_table.sh with a fake tttjax."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

PLAN = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
[[ "$*" == *--table* ]] && exit 0
[[ "$*" == *v5e* ]] && { echo "error: no v5e today" >&2; exit 2; }
[[ "$*" == *ttt_e2e* ]] && echo '{"program_flops": 3.0, "flops": {"total": 5.0}}'
[[ "$*" == *full* ]] && echo '{"program_flops": 2.0, "flops": {"total": 4.0}}'
[[ "$*" != *v5p* ]]
"""


@pytest.fixture
def table(tmp_path):
    python = f'#!/usr/bin/env bash\n[[ "$1" == - ]] && exec {sys.executable} "$@"\necho 64\n'
    programs = {"tttjax": PLAN, "python": python}
    for name, body in programs.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, recipes: str = "125m,full,pretrain"):
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "RECIPES": recipes,
            "PODS": "v5e:2x2 v5p:2x2x1 gpu:h100:4",
        }
        command = ["bash", str(ROOT / "launch" / "scaling_table.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_each_plan_runs_once_then_the_table(table, tmp_path):
    first = table(str(tmp_path / "out"))
    assert first.returncode == 0
    assert first.stderr == "125m,full,pretrain on v5e:2x2: error: no v5e today\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4
    assert "--config.train.accum_steps=16" in calls[0]
    names = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert names == {f"125m-full-pretrain-{pod}.json" for pod in ("v5p-2x2x1", "gpu-h100-4")}
    assert all(name in calls[-1] for name in names)
    table(str(tmp_path / "out"))  # retries the failed plan
    assert len((tmp_path / "calls").read_text().splitlines()) == 4 + 2


def test_flops_relative_to_full_attention(table, tmp_path):
    both = table(str(tmp_path / "out"), recipes="125m,ttt_e2e,pretrain 125m,full,pretrain")
    rows = both.stdout.splitlines()
    assert rows[1:] == [
        "| FLOPs relative to full attention | program | method |",
        "| --- | --- | --- |",
        "| 125m-ttt_e2e-pretrain-v5p-2x2x1 | 1.50 | 1.25 |",
        "| 125m-ttt_e2e-pretrain-gpu-h100-4 | 1.50 | 1.25 |",
    ]
    assert table(str(tmp_path / "out")).stdout == ""  # nothing to compare with


def test_help(table):
    assert table("--help").returncode == 0
    assert table().returncode == 2
    assert "RECIPES" in table().stdout
