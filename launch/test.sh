#!/usr/bin/env bash
# Runs all checks: lint, formatting, types, tests. Needs only Python 3.11 or newer.
#
#   bash launch/test.sh                          all checks
#   bash launch/test.sh --fast                   lint and the fast tests, during development
#   bash launch/test.sh tests/cli/test_main.py   the checks and these tests (arguments of pytest)
#
# Makes or reuses a virtual environment in .venv. PYTHON and VENV: see launch/_venv.sh.
# EXTRAS: extras to install (default test,interop). WORKERS: test processes (default 2).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
ensure_venv "${EXTRAS:-test,interop}"

failed=()
check() {
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
if [[ "${1:-}" == --fast ]]; then
    shift
    set -- -m "not slow" "$@"
else
    check "mypy" mypy
fi
check "pytest" python -m pytest -n "${WORKERS:-2}" "$@" </dev/null

if ((${#failed[@]})); then
    printf 'failed: %s\n' "$(IFS=, && echo "${failed[*]}")" >&2
    exit 1
fi
