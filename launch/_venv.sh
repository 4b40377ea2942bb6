# shellcheck shell=bash
# Sourced by the scripts in this folder: makes a virtual environment with tttjax.
#
#   ensure_venv [EXTRA,...]   makes or reuses the environment, installs tttjax from this checkout
#                             with these extras of pyproject.toml, and puts it first on PATH
#
# PYTHON   interpreter (default: the first of python3, python3.14 ... python3.11 that is 3.11 or
#          newer)
# VENV     folder of the environment (default: .venv in the checkout)

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$REPOSITORY/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"

_fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        command -v "$PYTHON" >/dev/null || _fail "PYTHON=$PYTHON is not an executable program."
        _is_new_enough "$PYTHON" || _fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), but tttjax needs Python 3.11 or newer."
        return
    fi
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if _is_new_enough "$candidate"; then
            PYTHON="$candidate"
            return
        fi
    done
    _fail "tttjax needs Python 3.11 or newer, and python3 is $(python3 --version 2>/dev/null || echo 'missing'); install one and set PYTHON, as in PYTHON=python3.12 bash $0"
}

# Whether the environment has this checkout's tttjax and all requirements of pyproject.toml.
_is_up_to_date() {
    [[ -x "$VENV/bin/python" ]] && "$VENV/bin/python" -I - "$REPOSITORY" "$1" <<'PYTHON' 2>/dev/null
import json
import pathlib
import sys
import tomllib
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement

root, extras = pathlib.Path(sys.argv[1]), [e for e in sys.argv[2].split(",") if e]
installed = metadata.distribution("tttjax")
origin = json.loads(installed.read_text("direct_url.json"))
if origin["url"] != root.as_uri() or not origin.get("dir_info", {}).get("editable"):
    sys.exit(1)
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
if {script.name: script.value for script in installed.entry_points} != project["scripts"]:
    sys.exit(1)  # of a version with other commands
requirements = list(project["dependencies"])
for extra in extras:
    requirements += project["optional-dependencies"][extra]
for requirement in map(Requirement, requirements):
    if requirement.marker is None or requirement.marker.evaluate():
        version = metadata.version(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            sys.exit(1)
PYTHON
}

ensure_venv() {
    local extras="${1:-}"
    if ! _is_up_to_date "$extras"; then
        _make_venv "$extras"
    fi
    export PATH="$VENV/bin:$PATH"
    export VIRTUAL_ENV="$VENV"
}

_make_venv() {
    local extras="$1" target="$REPOSITORY"
    [[ -n "$extras" ]] && target="${REPOSITORY}[$extras]"
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        _find_python
        "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
            _fail "$PYTHON cannot make virtual environments; on Debian and Ubuntu, install the package python3-venv."
        if [[ -n "$(ls -A "$VENV" 2>/dev/null)" && ! -f "$VENV/pyvenv.cfg" ]]; then
            _fail "VENV=$VENV holds other files; choose a new folder or a virtual environment."
        fi
        echo "making a virtual environment in $VENV ($("$PYTHON" --version))"
        "$PYTHON" -m venv --clear "$VENV" || _fail "the virtual environment $VENV could not be made (see above)."
    elif ! _is_new_enough "$VENV/bin/python"; then
        _fail "$VENV has $("$VENV/bin/python" --version), but tttjax needs Python 3.11 or newer; delete it or set VENV to another folder."
    fi
    echo "installing tttjax${extras:+ with $extras} into $VENV (takes some minutes the first time)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target" ||
        _fail "the installation failed (see above); fix the problem and run the same command again."
}
