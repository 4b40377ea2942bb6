#!/usr/bin/env bash
# Runs all checks: lint, formatting, types, tests. Needs only Python 3.11 or newer.
#
#   bash launch/test.sh                          all checks, without the exhaustive tests
#   bash launch/test.sh --fast                   lint and the fast tests, during development
#   bash launch/test.sh --exhaustive             the exhaustive tests: more cases of what others test
#   bash launch/test.sh tests/cli/test_main.py   the checks and these tests (arguments of pytest)
#
# Makes or reuses a virtual environment in .venv. PYTHON and VENV: see launch/_venv.sh.
# EXTRAS: extras to install (default test,interop). WORKERS: test processes (default 2).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source launch/_venv.sh
ensure_venv "${EXTRAS:-test,interop}"

without=exhaustive
case "${1:-}" in
    --fast) without=slow && shift ;;
    --exhaustive)
        shift
        exec python -m pytest -n "${WORKERS:-2}" -m exhaustive "$@" </dev/null
        ;;
    ?*) without= ;; # given tests are all run
esac

failed=()
check() {
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
[[ "$without" == slow ]] || check "mypy" mypy
check "pytest" python -m pytest -n "${WORKERS:-2}" ${without:+-m "not $without"} "$@" </dev/null

if ((${#failed[@]})); then
    printf 'failed: %s\n' "$(IFS=, && echo "${failed[*]}")" >&2
    exit 1
fi
