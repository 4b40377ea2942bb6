#!/usr/bin/env bash
# Trains systems of `small:6m` on one GPU and evaluates them at 1 to 16 windows (E6 of
# docs/results/preregistration.md).
#
#   bash launch/gpu_systems.sh DATA OUT SYSTEM...
#
# DATA is prepared text with a vocabulary of 4,096. After LIMIT seconds all is saved and the script
# exits with code 75; the same command resumes. Systems can be added later: those that are done are
# not repeated. Compiled programs are kept in OUT/compiled. Needs tttjax on PATH.
#
# LIMIT     seconds (default: 540)
# SIZE      another size of tttjax/recipes/small.py (default: 6m)
# LENGTHS   contexts that are evaluated, in tokens (default: 512,1024,2048,4096,8192)
# FLAGS     further flags of `tttjax sweep`, such as --config.train.steps=20
set -euo pipefail

if [[ $# -lt 3 || -z "$1" || -z "$2" || "$1" == -* ]]; then
    sed -n '2,/^# FLAGS/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0
    exit 2
fi

DATA="$1"
OUT="$2"
shift 2
export JAX_COMPILATION_CACHE_DIR="$OUT/compiled"
if [[ ! "${LIMIT:=540}" =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    echo "error: LIMIT=$LIMIT must be a number of seconds" >&2
    exit 2
fi
# shellcheck disable=SC2086  # FLAGS are words
exec timeout --preserve-status "$LIMIT" tttjax sweep "${@/#/--config=small:${SIZE:-6m},}" \
    --data="$DATA" --split=test --context-lengths="${LENGTHS:-512,1024,2048,4096,8192}" \
    --jobs=1 --out="$OUT" ${FLAGS:-}
