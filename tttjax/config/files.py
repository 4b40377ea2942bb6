"""Experiment files: Python files with `get_config(arg) -> ConfigDict`, and overrides of them."""

import ast
import contextlib
import fnmatch
import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tttjax.config.build import from_config_dict
from tttjax.config.custom_code import CustomCode, add_custom_code
from tttjax.config.schema import Config, all_fields, first_names
from tttjax.config.values import check_value, nearest, parse_value
from tttjax.errors import UserError
from tttjax.io.paths import local_path

if TYPE_CHECKING:  # slow to import, and not needed for `tttjax COMMAND --help`
    from ml_collections import ConfigDict

OVERRIDE_PREFIX = "--config."
RECIPES = Path(__file__).parents[1] / "recipes"


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of an experiment file with overrides.

    spec: `path/file.py`, or the name of a recipe file of tttjax/recipes, as `quickstart`; then
        perhaps `:arg`, which is handed to its `get_config`.
    overrides: `--config.train.steps=100` (the prefix may be left out), applied in order.
    Raises UserError for anything wrong with file, argument or override.
    """
    config = load_config_dict(spec)
    for override in overrides:
        apply_override(config, override)
    return from_config_dict(config)


def load_config_dict(spec: str) -> "ConfigDict":
    """What the `get_config` of an experiment file returns, before any check of its values."""
    from ml_collections import ConfigDict

    path, arg = split_spec(spec)
    module = _run_file(path)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path} has no function get_config(arg) that returns a ConfigDict.")
    config = _call(get_config, path, arg)
    code = _add_code(path, module)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of {path} returned {type(config).__name__}, not a ConfigDict; start from "
            "tttjax.config.default_config()."
        )
    _use_current_names(config)
    if code:
        _set_value(config, "inner.code", code)
    return config


def use_code(path: str | Path) -> str:
    """Runs a file that defines a custom inner rule or loss; returns its sha256 (`inner.code`).

    Runs that were trained with the same file can then be opened (`config.custom_code`). Raises
    UserError if it defines none.
    """
    path = local_path(path, "--code")
    if not path.is_file():
        raise UserError(f"There is no file {path}; give the recipe file of the run.")
    code = _add_code(path, _run_file(path))
    if not code:
        raise UserError(f"{path} defines neither inner_rule nor inner_loss.")
    return code


def _add_code(path: Path, module: ModuleType) -> str:
    """Makes the custom rule and loss of a file known; their sha256, "" if there are none."""
    functions = [getattr(module, name, None) for name in ("inner_rule", "inner_loss")]
    if not any(functions):
        return ""
    source = path.read_bytes()
    _check_complete(path, source)
    rule, loss = (_blaming(path, function) if function else None for function in functions)
    sha256 = hashlib.sha256(source).hexdigest()
    add_custom_code(sha256, CustomCode(path, source, rule, loss))
    return sha256


def _check_complete(path: Path, source: bytes) -> None:
    """Raises UserError if a file imports from its own folder, which a run does not keep."""
    folder = path.resolve().parent.name
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = ["" if node.level else str(node.module)]
        if any(module.split(".")[0] in ("", folder) for module in modules):
            raise UserError(
                f"{path} defines a custom inner rule or loss and imports from {folder}/, line "
                f"{getattr(node, 'lineno', 0)}: a run keeps the one file, so it may import "
                "installed packages only."
            )


def _blaming(path: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with _blamed_on(path):
            return function(*args)

    return call


def _use_current_names(config: "ConfigDict") -> None:
    """Renames the fields that a file sets by their first names, so that overrides find them."""
    from ml_collections import ConfigDict

    for first, current in first_names().items():
        section, _, key = first.partition(".")
        values = config.get(section)
        if isinstance(values, ConfigDict) and key in values:
            value = values[key]
            with values.unlocked():
                del values[key]
            _set_value(config, current, value)


def split_spec(spec: str) -> tuple[Path, str | None]:
    """`file.py:arg` or `name:arg` as path and argument (None if absent)."""
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", spec)
    if match is None:
        name, colon, arg = spec.partition(":")
        if name not in recipe_names():
            raise UserError(
                f"--config={spec} must name a Python file, or one of the recipes "
                f"{', '.join(recipe_names())}.{nearest(name, recipe_names())}"
            )
        return RECIPES / f"{name}.py", arg if colon else None
    path = local_path(match[1], "--config")
    if not path.is_file():
        siblings = [str(file) for file in sorted(path.parent.glob("*.py"))]
        raise UserError(
            f"There is no experiment file {path}; give the path of one, or one of the recipes "
            f"{', '.join(recipe_names())}.{nearest(str(path), siblings)}"
        )
    return path, match[2]


def recipe_names() -> list[str]:
    """The recipe files of tttjax/recipes that `--config=NAME:arg` reaches by name."""
    files = sorted(RECIPES.glob("*.py"))
    return [file.stem for file in files if "\ndef get_config(" in file.read_text("utf-8")]


def matching_specs(spec: str) -> list[str]:
    """`file.py:arg` with `*` in its argument: the recipes of `recipes()` that match.

    Without `*`, the word itself. Raises UserError if none matches.
    """
    path, arg = split_spec(spec)
    if arg is None or "*" not in arg:
        return [spec]
    recipes = getattr(_run_file(path), "recipes", None)
    if not callable(recipes):
        raise UserError(f"{path} has no function recipes(), so * cannot be used in its argument.")
    known = [str(recipe) for recipe in recipes()]
    matching = [word for word in known if fnmatch.fnmatchcase(word, arg)]
    if not matching:
        raise UserError(
            f"{arg!r} matches no recipe of {path}; there are {', '.join(known[:10])} ..."
        )
    return [f"{spec.removesuffix(arg)}{word}" for word in matching]


def apply_override(config: "ConfigDict", override: str) -> None:
    """Sets one field of `config` in place from `--config.section.field=value`."""
    name, equals, text = override.removeprefix(OVERRIDE_PREFIX).partition("=")
    if not equals:
        raise UserError(
            f"{override} has no value; write {OVERRIDE_PREFIX}{name}=VALUE, without spaces."
        )
    _set_value(config, name, parse_value(name, text))


def set_values(config: "ConfigDict", values: Mapping[str, Any], prefix: str = "") -> None:
    """Sets fields of `config` in place, by dotted name or by section. UserError for wrong ones."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            set_values(config, value, f"{name}.")
        else:
            _set_value(config, name, check_value(name, value))


def _set_value(config: "ConfigDict", name: str, value: Any) -> None:
    from ml_collections import ConfigDict

    *sections, key = name.split(".")
    with config.unlocked(), config.ignore_type():
        inner = config
        for section in sections:
            if section not in inner:
                inner[section] = ConfigDict()
            inner = inner[section]
        inner[key] = value


def _run_file(path: Path) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} cannot be read as a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    with _blamed_on(path), _importable_from(path.resolve().parent.parent):
        module_spec.loader.exec_module(module)
    return module


def _call(get_config: Callable[..., Any], path: Path, arg: str | None) -> Any:
    if arg is not None and not inspect.signature(get_config).parameters:
        raise UserError(f"get_config of {path} takes no argument, but {arg!r} was given.")
    with _blamed_on(path), _importable_from(path.resolve().parent.parent):
        return get_config() if arg is None else get_config(arg)


@contextlib.contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    """Lets files of one folder import each other, `from experiments.sizes import ...`.

    A folder inside a package needs nothing, and its modules must not be found as top-level ones.
    """
    if (folder / "__init__.py").exists():
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _blamed_on(path: Path) -> Iterator[None]:
    """Turns an error in the user's file into one sentence with file and line."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        where = error.filename or str(path)
        line = f", line {error.lineno}" if error.lineno else ""  # none for NUL bytes
        raise UserError(f"{where}{line}: {error.msg}.") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        line = f", line {inside[-1].lineno}" if inside else ""
        raise UserError(f"{path}{line}: {_in_short(error)}") from error


def _in_short(error: Exception) -> str:
    """One line; a ConfigDict's own error about an unknown field would print the whole section."""
    locked = re.search(r'Key \\?"(\w+)\\?" does not exist', str(error))
    if locked is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    for first, current in first_names().items():
        if first.rpartition(".")[2] == locked[1]:
            return f"{first} is now {current}."
    leaves = [name.rpartition(".")[2] for name in all_fields()]
    return f"there is no configuration field {locked[1]!r}.{nearest(locked[1], leaves)}"
