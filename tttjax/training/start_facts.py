"""What all processes of a run must have in common at its start; see `parallel.agreement`."""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path

import tttjax
from tttjax.config import Config, to_flat_dict
from tttjax.config.placement import most_sequences
from tttjax.config.run_info import PACKAGES
from tttjax.data.shards import read_manifest
from tttjax.io.paths import storage_path
from tttjax.parallel.agreement import agree
from tttjax.parallel.pod import Pod
from tttjax.training import checkpoints
from tttjax.training.checkpoint_format import completed_checkpoints
from tttjax.training.checkpoint_integrity import CHECKSUMS

_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# Of JAX's variables, JAX_*: those of one host, or that change no number.
_OWN_VARIABLES = (
    *("ADDRESS", "PROCESS", "LOCAL_DEVICE", "VISIBLE_DEVICES", "_INDEX", "CACHE", "DUMP", "LOG"),
    *("TRACEBACK", "PROFIL", "PROXY", "MTLS"),
)


def agree_on_start(
    pod: Pod,
    config: Config,
    workdir: str | os.PathLike,
    stop_after: int | None,
    from_step: int | None,
) -> None:
    """Returns when all processes agree; touches no device. Raises UserError where one differs."""
    path = storage_path(workdir, "--workdir")
    agree(pod, start_facts(config, path, stop_after, from_step), path)


def start_facts(
    config: Config, workdir: Path, stop_after: int | None, from_step: int | None
) -> dict[str, str]:
    """By name, every setting and input of a start.

    All fields of the configuration, also those that may change on resuming, since they decide when
    all processes save or stop together; the content of the data and of the initial weights; the
    code and its libraries; the environment of the compiler; the checkpoint to resume from.
    Raises UserError if data are missing.
    """
    facts = {name: repr(value) for name, value in to_flat_dict(config).items()}
    facts |= {"--stop-after": str(stop_after), "--from-step": str(from_step)}
    for source in config.data.sources:
        facts[f"the content of the data in {source}"] = _data_content(storage_path(source))
    if config.train.init_from:
        facts["the checkpoint in train.init_from"] = _newest(config.train.init_from)
    facts["the newest checkpoint in --workdir"] = _newest(workdir / checkpoints.CHECKPOINT_DIR)
    facts["the sequences per device in environment.json"] = str(most_sequences(config, workdir))
    facts["the code of tttjax"] = _code_content(Path(tttjax.__file__).parent)
    facts["the version of python"] = platform.python_version()
    for package in (*PACKAGES, "libtpu"):
        facts[f"the version of {package}"] = _version(package)
    for variable, value in sorted(os.environ.items()):
        is_jax = variable.startswith("JAX_") and not any(w in variable for w in _OWN_VARIABLES)
        if is_jax or variable in _VARIABLES:
            words = [word for word in value.split() if not word.startswith("--xla_dump")]
            facts[variable] = repr(" ".join(words))
    return facts


def _data_content(folder: Path) -> str:
    """A hash of the manifest, which has the size and checksum of every file."""
    return _short_hash(json.dumps(read_manifest(folder), sort_keys=True).encode())


def _newest(path: str | Path) -> str:
    """The newest completed checkpoint of a folder and a hash of its checksums, or "none"."""
    folder = checkpoints.absolute(path)
    if (folder / checkpoints.CHECKPOINT_DIR).exists():
        folder = folder / checkpoints.CHECKPOINT_DIR
    completed = [folder] if (folder / CHECKSUMS).exists() else completed_checkpoints(folder)
    if not completed:
        return "none"
    sums = completed[-1] / CHECKSUMS
    return (
        f"{completed[-1].name} ({_short_hash(sums.read_bytes()) if sums.exists() else 'no sums'})"
    )


def _code_content(package: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
