"""What a stranger meets: licence, installation, published numbers, what runs as a program."""

import ast
import hashlib
import re
import tomllib
from pathlib import Path

from helpers.paths import ROOT

FOLDERS = ("tttjax", "docs", "launch", "experiments")
TEXTS = sorted(
    path
    for path in (*ROOT.glob("*.*"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*")))
    if path.suffix in (".py", ".md", ".sh", ".toml", ".cff", ".csv", ".json", ".html")
)
APACHE_2 = (
    "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # of apache.org's text
)


def test_the_licence_is_apache_2_to_the_letter():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    assert "carry no licence that we found" in (ROOT / "NOTICE").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["license"] == "Apache-2.0"
    assert all((ROOT / name).exists() for name in project["project"]["license-files"])
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["tttjax"]
    assert (ROOT / "tttjax" / "py.typed").exists()


def test_nobody_is_told_to_install_a_strangers_package():
    """`tttjax` on the public index is another project."""
    assert len(TEXTS) > 100
    advice = re.compile(r"""pip3? install\s+(-\S+\s+)*['"]?tttjax""")
    assert [path for path in TEXTS if advice.search(path.read_text())] == []


def test_withdrawn_reading_times_are_published_nowhere():
    results = [path for path in TEXTS if ROOT / "docs" / "results" in path.parents]
    assert len(results) >= 5
    for path in results:
        text = path.read_text()
        assert "prefill_seconds" not in text
        assert "long to read as" not in text
        assert "3.8 times as slowly" not in text
    assert not list((ROOT / "docs").rglob("prefill*.png"))


def offences(path: Path) -> set[str]:
    """What could run code from a file, in one module of the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            found |= names & {"pickle", "dill", "cloudpickle", "marshal", "joblib"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg for keyword in node.keywords}
            if called in ("eval", "exec", "torch.load") or called.endswith("exec_module"):
                found.add(called)
            if called in ("np.load", "numpy.load") and "allow_pickle" in keywords:
                found.add("allow_pickle")
    return found


def test_only_recipes_run_as_programs():
    """What SECURITY.md promises: nothing is unpickled, and only a recipe's file is executed."""
    modules = [path for path in TEXTS if path.suffix == ".py" and ROOT / "tttjax" in path.parents]
    found = {str(path.relative_to(ROOT)): names for path in modules if (names := offences(path))}
    assert found == {"tttjax/config/files.py": {"module_spec.loader.exec_module"}}
