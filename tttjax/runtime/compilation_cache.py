"""JAX's persistent compilation cache, in one folder per user and kind of processor.

TTTJAX_COMPILATION_CACHE names another folder, or is `off`. JAX_COMPILATION_CACHE_DIR and JAX's
other variables take precedence. Kinds of processor are separate because CPU programs are machine
code.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
from pathlib import Path

from tttjax.io.paths import local_path

VARIABLE = "TTTJAX_COMPILATION_CACHE"
MAX_BYTES = 2 << 30  # beyond it the least recently used programs are removed
MIN_SECONDS = 0.3  # programs that compile faster are not cached


def enable_compilation_cache() -> Path | None:
    """Enables JAX's compilation cache; returns its folder, or None if it is off.

    Call it before importing JAX, which reads the environment then. The cache stays off if the
    folder is not writable. Raises UserError if the variable names a bucket or a URL.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or "jax" in sys.modules:
        return None
    setting = os.environ.get(VARIABLE, "")
    if setting.lower() in ("off", "0", "false", "no"):
        return None
    try:
        folder = (local_path(setting, VARIABLE) if setting else _default_folder()) / _machine()
        # The cache holds machine code that is executed, so no other user may write to it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    if not os.access(folder, os.W_OK):
        return None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(MIN_SECONDS))
    return folder


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tttjax" / "compiled"


def _machine() -> str:
    """The architecture and a hash of the processor's features."""
    features = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        prefixes = ("flags", "Features", "model name")
        features = "\n".join(dict.fromkeys(line for line in lines if line.startswith(prefixes)))
    digest = hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
    return f"{platform.machine()}-{digest}"


def last_seconds(program: str) -> float | None:
    """Recorded duration of this program's last first step; None if unknown."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return float(json.loads(_seconds_path(program).read_text(encoding="utf-8")))
    return None


def record_seconds(program: str, seconds: float) -> None:
    """Stores a duration for `last_seconds`, if there is a cache."""
    with contextlib.suppress(OSError):
        path = _seconds_path(program)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(round(seconds, 1)), encoding="utf-8")
        os.replace(temporary, path)


def _seconds_path(program: str) -> Path:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        raise OSError("there is no cache")
    name = hashlib.blake2b(program.encode(), digest_size=8).hexdigest()
    return Path(folder) / f"{name}.seconds"
