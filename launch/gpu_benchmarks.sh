#!/usr/bin/env bash
# Benchmarks TTT-E2E against full attention (with the library kernel) on this machine's first GPU:
# the train step at 8K tokens, and prefill of 128K tokens. Takes less than ten minutes.
#
#   bash launch/gpu_benchmarks.sh OUT
#
# Writes train_step.json and prefill.json to the folder OUT and prints both, with their ratios. In
# the paper, a step takes 3.4 times as long as full attention's at 8K (H200), and prefill is 2.7
# times as fast at 128K (H100). Results that exceed GPU memory are blank. Needs tttjax on PATH.
#
# TRAIN     arguments of the recipe file paper for the train step (default: 125m,ttt_e2e,pretrain)
# BATCH     batch size of the train step (default: 1)
# PREFILL   model size for prefill (default: 3b)
# LENGTH    prompt length in tokens (default: 131072)
# ROUNDS    timed runs of each (default: 3)
# Anything after OUT, such as --config.model.compute_dtype=float32, applies to all configurations.
set -euo pipefail

if [[ $# -lt 1 || "$1" == -* ]]; then
    sed -n '2,/^# Anything/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0
    exit 2
fi

OUT="$1"
shift
SIZE="${PREFILL:-3b}"
LIMIT=290 # seconds for each benchmark
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
mkdir -p "$OUT"

measure() { # NAME ARGUMENT...
    local name="$1"
    shift
    timeout "$LIMIT" tttjax bench "$@" --rounds="${ROUNDS:-3}" --json >"$OUT/$name.tmp" || {
        local code=$?
        rm -f "$OUT/$name.tmp"
        ((code != 124)) || echo "$name took more than $LIMIT s; try a smaller size." >&2
        return "$code"
    }
    mv "$OUT/$name.tmp" "$OUT/$name.json"
}

failed=0
measure train_step meta-gradient --config="paper:${TRAIN:-125m,ttt_e2e,pretrain}" \
    --config.train.batch_size="${BATCH:-1}" --config.train.accum_steps=1 "$@" || failed=1
measure prefill prefill --lengths="${LENGTH:-131072}" \
    --config="paper:$SIZE,ttt_e2e,pretrain" --config="paper:$SIZE,full,pretrain" "$@" || failed=1

python - "$OUT" <<'EOF'
import json
import sys
from pathlib import Path

for name, key in (("train_step", "step_seconds"), ("prefill", "seconds")):
    path = Path(sys.argv[1], f"{name}.json")
    if not path.is_file():
        continue
    rows = json.loads(path.read_text())
    print(f"\n{name}")
    for row in rows:
        seconds = "does not fit" if row[key] is None else f"{row[key]:.3f} s"
        print(f"  {row['name'].removeprefix('paper:'):24} {seconds}")
    first, last = rows[0][key], rows[-1][key]
    if first and last:
        print(f"  TTT-E2E / full attention: {first / last:.2f}; inverse {last / first:.2f}")
EOF
exit "$failed"
