"""What a run writes beside its results: resolved configuration, versions, git revision.

And the other side of it: whether a work directory belongs to a configuration. Nothing here reads
the environment's variables, so no secret can end up in a file.
"""

import hashlib
import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tttjax.config.build import to_dict, to_flat_dict
from tttjax.config.schema import Config, all_fields, field_info
from tttjax.errors import UserError

RUN_INFO = "run_info.json"
PACKAGES = (
    *("tttjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record"),
    *("numpy", "ml-collections", "tensorstore", "tokenizers", "sentencepiece", "zstandard"),
)


def fixed_values(config: Config) -> dict[str, Any]:
    """By dotted name, what must stay the same between resumes of one work directory.

    Everything that decides the numbers; not the mesh, evaluation, logging or checkpoint cadence.
    """
    fields = all_fields()
    values = to_flat_dict(config)
    return {name: v for name, v in values.items() if not field_info(fields[name]).may_change}


def config_fingerprint(config: Config) -> str:
    """A short hash of `fixed_values`: equal for two runs that compute the same numbers."""
    text = json.dumps(fixed_values(config), sort_keys=True)
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


def write_run_info(workdir: str | Path, config: Config, with_devices: bool = False) -> Path:
    """Writes `run_info.json`, adding this start to those of earlier ones. Returns its path.

    Call it from one process. Raises UserError as `check_same_run` does.
    """
    check_same_run(workdir, config)
    previous = read_run_info(workdir) or {"starts": []}
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": to_dict(config),
        "environment": describe_environment(with_devices),
    }
    info = {
        "fingerprint": config_fingerprint(config),
        "config": to_dict(config),
        "starts": [*previous["starts"], start],
    }
    path = Path(workdir) / RUN_INFO
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(info, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def read_run_info(workdir: str | Path) -> dict[str, Any] | None:
    """The contents of a work directory's `run_info.json`; None if it has none."""
    path = Path(workdir) / RUN_INFO
    if not path.exists():
        return None
    try:
        info = json.loads(path.read_text())
        info["config"], info["starts"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it or choose another workdir."
        ) from None
    return info


def check_same_run(workdir: str | Path, config: Config) -> None:
    """UserError, naming the differences, if `workdir` belongs to another configuration."""
    info = read_run_info(workdir)
    if info is None:
        return
    differences = []
    for name, value in fixed_values(config).items():
        section, _, key = name.partition(".")
        saved = info["config"].get(section, {}).get(key, all_fields()[name].default)
        saved = list(saved) if isinstance(saved, tuple) else saved
        if saved != value:
            differences.append(f"{name} was {saved!r}, is {value!r}")
    if differences:
        shown = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
        raise UserError(
            f"The work directory {workdir} belongs to another configuration ({shown}); choose "
            "another --workdir or go back to the first values."
        )


def _version(package: str) -> str | None:
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
