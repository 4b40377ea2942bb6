"""Imports point downward, flax.nnx stays in models, and only the command line parses or prints."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "tttjax"

# From the ground up. A module imports from its own rank and those below; the longest prefix counts.
RANKS = (
    ("types", "errors", "io", "runtime"),
    ("config",),
    ("parallel.kernel_mesh", "parallel.fsdp", "parallel.batching"),
    ("ops",),
    ("models",),
    ("ttt",),
    ("data", "parallel", "planning.flops", "planning.accelerators"),
    ("training", "inference"),
    ("runs",),
    ("evaluation", "interop", "planning", "verification", "benchmarks", "recipes"),
    ("cli",),
    ("lm_eval", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name below tttjax; what exports carry is never imported here."""
    paths = [path for path in ROOT.rglob("*.py") if path.parent.name != "exported_code"]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): ast.parse(p.read_text()) for name, p in names.items()}


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rank_of(name: str) -> int:
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(RANK[prefix] for prefix in prefixes if prefix in RANK)


def test_imports_point_downward():
    upward = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        if name != "__init__"
        for target in imported(tree)
        if target.startswith("tttjax.") and not target.endswith("__version__")
        if rank_of(target.removeprefix("tttjax.")) > rank_of(name)
    ]
    assert not upward


def test_only_models_import_nnx():
    assert {
        name.split(".")[0] for name, tree in modules().items() if "flax.nnx" in imported(tree)
    } <= {"models"}
