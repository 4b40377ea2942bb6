"""What a run writes beside its results: resolved configuration, versions, git revision.

It also checks whether a work directory belongs to a configuration. It does not read environment
variables, so no secret can end up in a file.
"""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tttjax.config.build import from_config_dict, replace_values, to_dict, to_flat_dict
from tttjax.config.custom_code import CODE, custom_code
from tttjax.config.fields import field_info, fingerprint_values, get_value
from tttjax.config.schema import SECTIONS, Config, all_fields
from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import absolute_path, is_bucket, storage_path

FORMAT = 1  # of a work directory's files; config.json carries it
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
PACKAGES = (
    *("tttjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("ml-collections", "tensorstore", "tokenizers", "sentencepiece", "backports.zstd"),
)


def fixed_values(config: Config) -> dict[str, Any]:
    """By dotted name, what must stay the same between resumes of one work directory.

    Everything that decides the numbers, and not the mesh, evaluation, logging or checkpoint
    cadence; nor the number of steps where `optim.decay_steps` fixes the schedule.
    """
    fields = all_fields()
    values = to_flat_dict(config)
    fixed = {
        name: v for name, v in values.items() if not field_info(fields[name]).mutable_on_resume
    }
    if config.optim.decay_steps:
        del fixed["train.steps"]
    return fixed


def config_fingerprint(config: Config) -> str:
    """A short hash of `fixed_values`: equal for two runs that compute the same numbers.

    Those of older runs stay valid (`fingerprint_values`).
    """
    fixed = fixed_values(config)
    values = {
        f"{section}.{first_name}": fixed[f"{section}.{name}"]
        for section in SECTIONS
        for name, first_name, _ in fingerprint_values(getattr(config, section))
        if f"{section}.{name}" in fixed
    }
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_environment(with_devices: bool = False) -> dict[str, Any]:
    """Versions of Python and packages, platform, git revision of the code (None outside git).

    with_devices: also JAX's backend and devices, which starts the backend.
    """
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_revision(),
    }
    if with_devices:
        import jax

        devices = jax.devices()
        environment["backend"] = jax.default_backend()
        environment["devices"] = {"count": len(devices), "kind": devices[0].device_kind}
        environment["processes"] = jax.process_count()
    return environment


def git_revision() -> dict[str, Any] | None:
    """Commit of the checkout this code runs from and whether it was changed; None if no git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "modified": bool(_git(root, "status", "--porcelain", "-uno"))}


def write_run_info(
    workdir: str | Path,
    config: Config,
    with_devices: bool = False,
    placement: Mapping[str, int] | None = None,
) -> None:
    """Writes `config.json`, and adds this start to those in `environment.json`.

    placement: the fields of `config.placement.Placement`. Call it from one process.
    Raises UserError as `check_same_run` does, before writing.
    """
    check_same_run(workdir, config)
    folder = storage_path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "workdir": absolute_path(workdir),
        "fingerprint": config_fingerprint(config),
        "environment": describe_environment(with_devices),
        "config": to_dict(config),
    }
    if placement:
        start["placement"] = dict(placement)
    starts = read_environments(folder)
    if config.inner.code:
        with atomic_write(folder / CODE) as temporary:
            temporary.write_bytes(custom_code(config.inner.code).source)
    _write_json(folder / CONFIG, {"format": FORMAT, **to_dict(config)})
    _write_json(folder / ENVIRONMENT, [*starts, start])


def read_environments(workdir: str | Path) -> list[Any]:
    """What `environment.json` holds of every start, in order. Raises UserError if it is damaged."""
    return _read_json(storage_path(workdir) / ENVIRONMENT, list) or []


def read_config(workdir: str | Path) -> Config | None:
    """The configuration that a work directory's run was last started with; None if never.

    Raises UserError for a damaged file, and for one of a later or unknown format.
    """
    path = storage_path(workdir) / CONFIG
    values = _read_json(path, dict)
    if values is None:
        return None
    version = values.pop("format", FORMAT)  # what was written before there was one is the first
    if version != FORMAT:
        raise UserError(
            f"{path} has the format {version!r}, and this version of tttjax reads {FORMAT}; use "
            "the version that wrote it, or a later one"
        )
    return from_config_dict(values)


def check_weights_config(saved: Mapping[str, Any] | None, config: Config, where: str) -> None:
    """UserError, naming the fields, unless weights were trained with `config`.

    saved: the configuration that was stored with the weights; None passes, since nothing is known.
    where: the path of the weights. Fields that a resumed run may change may differ, and paths.
    """
    if saved is None:
        return
    before, now = to_flat_dict(from_config_dict(saved)), fixed_values(config)
    for path in ("data.sources", "train.init_from"):
        now.pop(path, None)
    differing = [name for name, value in now.items() if before[name] != value]
    if differing:
        shown = "; ".join(
            f"{name} was {before[name]!r}, is {now[name]!r}" for name in differing[:5]
        ) + ("; ..." if len(differing) > 5 else "")
        raise UserError(
            f"the weights in {where} were trained with another configuration ({shown}); put "
            f"{CONFIG} back as it was, or give the work directory that they belong to"
        )


def check_same_run(workdir: str | Path, config: Config) -> None:
    """UserError, naming the differences, if `workdir` belongs to another configuration.

    Where data are is not compared: a checkpoint knows its data by their content.
    """
    previous = read_config(workdir)
    if previous is None:
        return
    before, now = to_flat_dict(previous), fixed_values(config)
    del now["data.sources"]
    origin, new_origin = before["train.init_from"], now["train.init_from"]
    if origin and new_origin and is_same_path(origin, new_origin, workdir):
        del now["train.init_from"]
    differences = [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in now.items()
        if before[name] != value
    ]
    if differences:
        shown = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
        raise UserError(
            f"The work directory {workdir} belongs to another configuration ({shown}); choose "
            "another --workdir or go back to the first values."
        )


# Paths of a run -----------------------------------------------------------------------------------


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths.

    Raises UserError for paths that are not of this machine.
    """
    paths: dict[str, str | tuple[str, ...]] = {}
    for name, field in all_fields().items():
        value = get_value(config, name)
        if field_info(field).path and value:
            paths[name] = (
                absolute_path(value, name)
                if isinstance(value, str)
                else tuple(absolute_path(entry, name) for entry in value)
            )
    return replace_values(config, paths)


def workdir_of(source: Path) -> Path:
    """The work directory of a checkpoint; `source` itself if it is one."""
    folders = (source, *source.absolute().parents[:2])
    return next((folder for folder in folders if (folder / CONFIG).exists()), source)


def candidate_paths(path: str, workdir: str | Path) -> list[Path]:
    """Where a path in a run's configuration may be now, the most likely candidate first.

    As it is; then at the same position relative to the work directory, since runs and data may be
    moved together. A relative path of an older run is also tried from the parents of the work
    directory, in one of which the run was started.
    """
    if is_bucket(path):
        return [storage_path(path)]
    home, before = storage_path(absolute_path(workdir)), _earlier_workdir(workdir)
    if is_bucket(home) or is_bucket(before):
        return [Path(path)]
    if not os.path.isabs(path):
        return [Path(path), *(parent / path for parent in home.parents)]
    moved = [Path(os.path.normpath(home / os.path.relpath(path, before)))] if before else []
    return list(dict.fromkeys([Path(path), *moved]))


def is_same_path(before: str, now: str, workdir: str | Path) -> bool:
    """Whether two paths in configurations of a run are one, also if all was moved together."""
    paths = candidate_paths(before, workdir)[: 2 if os.path.isabs(before) else 1]
    expected = {os.path.normpath(absolute_path(path)) for path in paths}
    return os.path.normpath(absolute_path(now)) in expected


def _earlier_workdir(workdir: str | Path) -> str:
    """The work directory's path when its run was last started; "" if not known."""
    starts = _read_json(storage_path(workdir) / ENVIRONMENT)
    last = starts[-1] if isinstance(starts, list) and starts else None
    return last.get("workdir", "") if isinstance(last, dict) else ""


def _read_json(path: Path, kind: type = object) -> Any:
    """What JSON holds, of this type; None if there is no file."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, kind):
            raise ValueError(f"it holds {type(values).__name__}, not {kind.__name__}")
        return values
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it, or choose another --workdir."
        ) from None


def _write_json(path: Path, values: object) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def _version(package: str) -> str | None:
    from importlib import metadata  # slow to import

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
