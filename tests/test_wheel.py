"""From the wheel alone, in an empty folder, the steps of the quickstart run."""

import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from helpers.paths import ROOT

SMALL = (
    *("model.num_layers=2", "model.suffix_layers=1", "model.embed_dim=16", "train.steps=4"),
    *("train.seq_len=64", "optim.warmup_steps=1", "inner.lr_warmup_steps=1"),
    *("eval.context_lengths=64", "eval.num_sequences=8", "eval.batch_size=8"),
)
SCRIPT = """
import sys
import tttjax
from tttjax.cli.main import main

print(tttjax.__file__)
for line in sys.stdin:
    assert main(line.split()) == 0, line
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's contents alone."""
    if not any(d.name == "setuptools" for d in metadata.distributions()):
        pytest.skip("setuptools, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(
        ROOT / "tttjax", source / "tttjax", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
        capture_output=True,
    )
    return target


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_quickstarts_steps_run_from_the_wheel(installed, tmp_path):
    (tmp_path / "books").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "books" / f"{name}.txt").write_text(f"The book called {name}. " * 200)
    shutil.copy(installed / "tttjax" / "recipes" / "quickstart.py", tmp_path / "my.py")
    changes = " ".join(f"--config.{change}" for change in SMALL)
    lines = [
        "recipes quickstart:ttt_e2e",
        "prepare books --out=data --val-fraction=0.5",
        f"train --config=quickstart:ttt_e2e --workdir=run --config.data.sources=data {changes}",
        "evaluate run --out=evaluation",
        "report run --out=report",
        "generate run --prompt=The --max-tokens=4",
        "paths --config=my.py:ttt_e2e",
    ]
    environment = {**os.environ, "PYTHONPATH": str(installed), "XLA_FLAGS": ""}
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        input="\n".join(lines),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith(str(installed))
    assert (tmp_path / "run" / "summary.json").exists()
    assert any((tmp_path / "evaluation").iterdir())
    assert (tmp_path / "report" / "report.html").exists()
