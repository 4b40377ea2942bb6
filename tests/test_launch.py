"""The scripts of launch/ for one machine, and what all scripts have in common."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.scripts import LAUNCH, SHOW

SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    command = [shellcheck, "--external-sources", *SCRIPTS]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_gpu_benchmarks_end_with_the_ratios(shell, tmp_path):
    body = """
echo "$*" >>"$LOG"
[[ $2 == "$BROKEN" ]] && exit 3
if [[ $2 == meta-gradient ]]; then
    echo '[{"name": "fast", "step_seconds": 3}, {"name": "full", "step_seconds": 2}]'
else
    echo '[{"name": "paper:3b,a", "seconds": 4}, {"name": "b", "seconds": null}]'
fi"""
    python = {"python": f'exec {sys.executable} "$@"'}
    run = partial(shell, str(LAUNCH / "gpu_benchmarks.sh"), programs={"tttjax": body, **python})
    out, log = tmp_path / "out", tmp_path / "log"
    result = run(str(out), "--config.model.remat=none", LOG=str(log), BROKEN="", BATCH="2")
    assert result.returncode == 0, result.stderr
    assert "TTT-E2E / full attention: 1.50; inverse 0.67" in result.stdout
    assert re.search(r"(?m)^  3b,a +4.000 s", result.stdout)
    assert re.search(r"b +does not fit", result.stdout)
    assert result.stdout.count("TTT-E2E / full") == 1
    assert {path.name for path in out.iterdir()} == {"train_step.json", "prefill.json"}
    step, prefill = log.read_text().splitlines()
    assert "125m,ttt_e2e,pretrain --config.train.batch_size=2" in step
    assert "--lengths=131072" in prefill
    assert "3b,full,pretrain --config.model.remat=none" in prefill
    result = run(str(tmp_path / "new"), LOG=str(log), BROKEN="prefill")
    assert result.returncode == 1
    assert "1.50" in result.stdout
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train_step.json"]


def test_gpu_systems_are_a_sweep_that_stops_in_time(shell, tmp_path):
    out = str(tmp_path / "out")
    script = partial(shell, str(LAUNCH / "gpu_systems.sh"), "my data", out)
    result = script("ttt_e2e", "full", programs={"tttjax": SHOW}, FLAGS="--seeds=2 --plan")
    assert (
        "[sweep][--config=small:6m,ttt_e2e][--config=small:6m,full][--data=my data]"
        in result.stdout
    )
    assert f"[--out={out}][--seeds=2][--plan]" in result.stdout
    body = "trap 'exit 75' TERM; sleep 60 & wait"
    assert script("full", programs={"tttjax": body}, LIMIT="0.2").returncode == 75
    assert script().returncode == 2
    assert shell(str(LAUNCH / "gpu_systems.sh"), "data", "", "full").returncode == 2
    result = script("full", programs={"tttjax": SHOW}, LIMIT="soon")
    assert (result.returncode, "LIMIT=soon must be" in result.stderr) == (2, True)
    assert not os.path.exists(out)


OLD = 'if [[ "$1" == --version ]]; then echo "Python 3.9.1"; else exit 1; fi'
NO_VENV = f'case "$2" in *ensurepip*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac'


@pytest.mark.parametrize(
    ("programs", "python", "sentence"),
    [
        ({}, "no-such-python", "PYTHON=no-such-python is not an executable program"),
        ({"oldpython": OLD}, "oldpython", "is Python 3.9.1, but tttjax needs Python 3.11 or newer"),
        ({"barepython": NO_VENV}, "barepython", "cannot make virtual environments"),
    ],
)
def test_an_unsuitable_python_is_an_error(shell, tmp_path, programs, python, sentence):
    source = f"source {LAUNCH}/_venv.sh && ensure_venv test"
    venv = tmp_path / "new"
    result = shell(f"-c {source}", programs=programs, PYTHON=python, VENV=str(venv))
    assert result.returncode == 2
    assert sentence in result.stderr
    assert not venv.exists()


def test_a_folder_with_other_files_is_not_changed(shell, tmp_path):
    (tmp_path / "precious").write_text("keep")
    source = f"source {LAUNCH}/_venv.sh && ensure_venv test"
    result = shell(f"-c {source}", PYTHON=sys.executable, VENV=str(tmp_path))
    assert result.returncode == 2
    assert "holds other files" in result.stderr
    assert (tmp_path / "precious").read_text() == "keep"


@pytest.fixture
def quickstart(shell, tmp_path):
    """Runs quickstart.sh in a complete environment, with a `tttjax` that prints its arguments."""
    (tmp_path / "v env" / "bin").mkdir(parents=True)
    program = tmp_path / "v env" / "bin" / "tttjax"
    program.write_text(f"#!/usr/bin/env bash\n{SHOW}\n[[ $1 != $FAILING ]]\n")
    # Reports that everything is installed.
    python = tmp_path / "v env" / "bin" / "python"
    python.write_text("#!/usr/bin/env bash\nexit 0\n")
    for path in (program, python):
        path.chmod(0o755)

    def run(*arguments: str, failing: str = "nothing"):
        venv = str(tmp_path / "v env")
        return shell(str(LAUNCH / "quickstart.sh"), *arguments, VENV=venv, FAILING=failing)

    return run


def called(result):
    """The arguments of each call of tttjax."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    return [line[1:-1].split("][") for line in lines]


SENTENCEPIECE = ["--tokenizer=sentencepiece", "--vocab-size=1024"]
BYTES = ["--tokenizer=bytes"]
LONG = ["--min-document-tokens=513", "--val-fraction=0.1"]


def test_quickstart_prepares_trains_both_and_compares(quickstart):
    result = quickstart()
    assert result.returncode == 0, result.stderr
    experiment = "--config=quickstart"
    data = "--config.data.sources=quickstart/data"
    assert called(result) == [
        ["prepare", "stdlib", "--out=quickstart/data", *SENTENCEPIECE, *LONG],
        ["train", f"{experiment}:ttt_e2e", "--workdir=quickstart/ttt_e2e", data],
        ["train", f"{experiment}:window", "--workdir=quickstart/window", data],
        ["evaluate", "quickstart/ttt_e2e", "quickstart/window", "--out=quickstart/results"],
    ]
    assert "The plot: quickstart/results/loss_by_position.png" in result.stdout


def test_quickstart_passes_options_on(quickstart, tmp_path):
    (tmp_path / "my text").mkdir()
    (tmp_path / "my text" / "a.txt").write_text("x" * 120_000)
    (tmp_path / "my text" / "b.txt").write_text("x" * 120_000)
    words = ["--text", f"{tmp_path}/my text", f"--out={tmp_path}/o p", "--steps", "3"]
    result = quickstart(*words)
    prepare, *trains, evaluate = called(result)
    assert prepare == ["prepare", words[1], f"--out={tmp_path}/o p/data", *SENTENCEPIECE, *LONG]
    assert [words[-1] for words in trains] == ["--config.train.steps=3"] * 2
    assert evaluate[-1] == f"--out={tmp_path}/o p/results"


@pytest.mark.parametrize(
    ("out", "words"), [("quickstart", []), ("it's o p", ["--text", "a text.txt"])]
)
def test_quickstart_ends_with_a_command_to_paste(quickstart, tmp_path, out, words):
    (tmp_path / "a text.txt").write_text("some words")
    words = [word.replace("a text", f"{tmp_path}/a text") for word in words]
    result = quickstart("--out", out, *words)
    assert result.returncode == 0, result.stderr
    command = result.stdout.splitlines()[-1]
    pasted = subprocess.run(
        ["bash", "-euc", command], env={"FAILING": ""}, capture_output=True, text=True, cwd=ROOT
    )
    assert pasted.returncode == 0, pasted.stderr
    prompt = "--prompt=The" if words else "--prompt=def __init__(self"
    assert called(pasted) == [["generate", f"{out}/ttt_e2e", prompt]]


@pytest.mark.parametrize("arguments", [[], ["--tokenizer=bytes"], ["--tokenizer", "sentencepiece"]])
def test_quickstart_uses_bytes_for_a_small_text(quickstart, tmp_path, arguments):
    (tmp_path / "small.txt").write_text("x" * 199_999)
    prepare = called(quickstart("--text", str(tmp_path / "small.txt"), *arguments))[0]
    assert prepare[3:] == [*(SENTENCEPIECE if "sentencepiece" in arguments else BYTES), *LONG]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "/nowhere"], "--text /nowhere: no such file or folder"),
        (["--text"], "--text needs a value; see bash .*quickstart.sh --help"),
        (["--steps="], "--steps needs a value"),
        (["--txet=a"], "unknown option --txet=a; see bash .*quickstart.sh --help"),
    ],
)
def test_quickstart_rejects_invalid_options(quickstart, arguments, sentence):
    result = quickstart(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(f"error: .*{sentence}.*\n", result.stderr)


@pytest.mark.parametrize(("failing", "calls"), [("prepare", 1), ("train", 2), ("evaluate", 4)])
def test_quickstart_stops_at_the_first_failure(quickstart, failing, calls):
    result = quickstart(failing=failing)
    assert result.returncode == 1
    assert len(called(result)) == calls
    assert "Done in" not in result.stdout
    assert "Next" not in result.stdout


def test_quickstart_has_help(quickstart):
    result = quickstart("--help")
    assert result.returncode == 0
    for option in ("--text PATH", "--out DIR", "--steps N", "--tokenizer KIND"):
        assert f" {option} " in result.stdout
    assert "#" not in result.stdout
    assert "set -euo" not in result.stdout


def test_quickstart_has_no_unguarded_list():
    """Under `set -u`, bash 3.2 of macOS takes "${LIST[@]}" of an empty list for unset."""
    script = (LAUNCH / "quickstart.sh").read_text()
    assert "[@]+" in script
    assert not re.search(r'(?<!\+)"\$\{\w+\[@\]\}"', script)
