"""Imports point downward, flax.nnx stays in models, and only the command line parses flags."""

import ast
import functools
from collections import Counter

from helpers.paths import ROOT

# From the ground up. A module imports from its own rank and those below; the longest prefix counts.
RANKS = (
    ("types", "errors", "exit_codes", "io", "runtime"),
    ("config",),
    ("parallel.kernel_mesh", "parallel.fsdp", "parallel.batching"),
    ("ops",),
    ("models",),
    ("ttt",),
    ("data", "parallel", "planning.flops", "planning.accelerators"),
    ("training", "inference"),
    ("runs",),
    ("evaluation", "interop", "planning", "verification", "benchmarks", "recipes", "sweeps"),
    ("cli", "api"),
    ("lm_eval", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name below tttjax; what exports carry is never imported here."""
    package = ROOT / "tttjax"
    paths = [path for path in package.rglob("*.py") if path.parent.name != "exported_code"]
    names = {".".join(path.relative_to(package).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): ast.parse(p.read_text()) for name, p in names.items()}


@functools.cache
def imports(name: str) -> set[str]:
    """What a module imports, wherever in it: `tttjax.config.Config`, `argparse`."""
    result = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            result |= {f"{node.module}.{alias.name}" for alias in node.names}
    return result


def importers(target: str) -> set[str]:
    """The folders of the modules that import `target`."""
    return {name.split(".")[0] for name in modules() if target in imports(name)}


def rank_of(name: str) -> int:
    parts = name.split(".")
    if parts[0] == "models" and parts[2:3] == ["config"]:  # the fields of a mixer
        return RANK["config"]
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(RANK[prefix] for prefix in prefixes if prefix in RANK)


def test_imports_point_downward():
    upward = [
        f"{name} imports {target}"
        for name in modules()
        if name != "__init__"
        for target in imports(name)
        if target.startswith("tttjax.") and not target.endswith("__version__")
        if rank_of(target.removeprefix("tttjax.")) > rank_of(name)
    ]
    assert not upward


def test_some_imports_stay_in_their_folders():
    assert importers("flax.nnx") == {"models"}
    assert importers("flax.linen") == set()
    assert importers("argparse") == {"cli"}
    assert importers("absl.flags") == set()


def test_ops_do_not_import_the_configuration():
    users = {
        name for name in modules() if any(t.startswith("tttjax.config") for t in imports(name))
    }
    assert "ops" not in {name.split(".")[0] for name in users}


def test_only_some_folders_print():
    printers = {
        name.split(".")[0]
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert printers <= {"cli", "io", "parallel", "recipes", "training"}  # notes on stderr


def test_class_names_are_unique():
    nodes = [node for tree in modules().values() for node in tree.body]
    count = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert not [name for name, n in count.items() if n > 1]
