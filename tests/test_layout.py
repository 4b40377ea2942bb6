"""Imports point downward, flax.nnx stays in models, and the core neither prints nor parses."""

import ast
from pathlib import Path

from tttjax.config import schema
from tttjax.update_rules import rules

ROOT = Path(__file__).parents[1] / "tttjax"

# From the bottom up; a module imports from its own layer and those below.
LAYERS = (
    {"errors", "types", "chips", "progress"},
    {"limits", "memory", "without_tpu", "paths"},
    {"locks", "compilation_cache"},
    {"whole_files", "sealed", "batching", "flag_types", "coordinator"},
    {"config"},
    {"ops", "divided"},
    {"update_rules"},
    {"inner_loop"},
    {"models"},
    {"history", "chunk_step", "fast_layers"},
    {"fast_gradient"},
    {"meta"},
    {"optim", "sharding", "flops", "checkpoint", "checkpoint_io", "data", "interop", "precision"},
    {"metrics", "run_control", "inference"},
    {"attention_kernels", "workdir"},
    {"train_step"},
    {"starting_weights"},
    {"prepare", "train", "evaluate", "verify", "bench", "plan"},
    {"report", "generate", "importing", "export"},
    {"read", "sessions", "lm_eval"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
CORE = (
    *("batching", "ops", "divided", "update_rules", "inner_loop", "models"),
    *("history", "chunk_step", "fast_gradient", "meta", "train_step"),
)
COMMANDS = (
    *("prepare", "train", "evaluate", "verify", "bench", "plan", "report"),
    *("generate", "read", "sessions", "importing", "export", "cli", "flag_types"),
)

# What exports carry is run by transformers, and never imported here.
FILES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py" and path.parent.name != "exported_code"
}


def module_of(path: Path) -> str:
    """The name under tttjax/ that a file belongs to: `ops` for ops/rope.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, those of functions and type checking included."""
    found = set()
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """Names under tttjax/ that a file imports from."""
    parts = [name.split(".") for name in imports(path)]
    return {words[1] for words in parts if words[0] == "tttjax" and len(words) > 1}


def test_every_module_has_a_rank():
    assert {module_of(path) for path in FILES} == set(RANK)


def test_imports_point_downward():
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in own_imports(path)
        if RANK.get(name, 0) > RANK[module_of(path)]
    ]
    assert not upward


def test_flax_nnx_stays_in_models():
    users = {
        module_of(path)
        for path in FILES
        if any(name.startswith(("flax.nnx", "flax.linen")) for name in imports(path))
    }
    assert users == {"models"}


def test_operations_and_models_know_no_configuration():
    below = ("ops", "update_rules", "inner_loop", "models", "meta")
    assert not [p for p in FILES if module_of(p) in below and "config" in own_imports(p)]


def test_the_core_does_not_print():
    calls = [
        (path, node.func)
        for path, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    printers = {module_of(p) for p, f in calls if isinstance(f, ast.Name) and f.id == "print"}
    assert "cli" in printers
    assert not printers & set(CORE)


def test_only_commands_parse_flags():
    parsers = {"argparse", "absl.flags", "sys.argv"}
    assert {module_of(path) for path in FILES if parsers & imports(path)} <= set(COMMANDS)


def test_the_configuration_offers_the_rules_that_there_are():
    """It lists them again, because reading a configuration must not import JAX."""
    assert schema.RULES == rules.RULES
