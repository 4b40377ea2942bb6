#!/usr/bin/env bash
# Prints the cost of the paper's recipes on several accelerators as one Markdown table: runs `tttjax
# plan` for each recipe and pod, with one sequence per chip and gradient accumulation. A second table
# has the FLOPs of TTT-E2E relative to full attention, both with the pod's attention kernels.
#
#   bash launch/scaling_table.sh OUT
#
# Writes one JSON file per recipe and pod to the folder OUT and prints the table. Takes hours,
# because each plan is a compilation; the same command resumes with the missing plans. OUT also has
# the logs of failed plans. Needs tttjax with the extras `plan` and `plan-gpu` on PATH.
#
# RECIPES   arguments of the recipe file paper (default: TTT-E2E and full attention, all sizes at
#           8K, and 3b's extensions to 16K, 32K, 64K and 128K)
# PODS      topologies (default: 4 chips of v5e, v5p, v6e, H100, H200 and B200)
# FSDP      chips that parameters and optimizer state are sharded over (default: 4)
set -euo pipefail

if [[ $# -ne 1 || "$1" == -* ]]; then
    sed -n '2,/^# FSDP/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0
    exit 2
fi

OUT="$1"
FSDP="${FSDP:-4}"
PODS="${PODS:-v5e:2x2 v5p:2x2x1 v6e:2x2 gpu:h100:4 gpu:h200:4 gpu:b200:4}"
if [[ -z "${RECIPES:-}" ]]; then
    for system in ttt_e2e full; do
        for size in 125m 350m 760m 1b 3b; do
            RECIPES="${RECIPES:-} $size,$system,pretrain"
        done
        for context in 16k 32k 64k 128k; do
            RECIPES="$RECIPES 3b,$system,extend,$context"
        done
    done
fi
NUM_CHIPS=4

mkdir -p "$OUT"
plans=()
for recipe in $RECIPES; do
    batch="$(python -c 'import sys; from tttjax.config import load_config
print(load_config(sys.argv[1]).train.batch_size)' "paper:$recipe")"
    for pod in $PODS; do
        file="$OUT/${recipe//,/-}-${pod//:/-}.json"
        if [[ ! -s "$file" ]]; then
            status=0
            tttjax plan --config="paper:$recipe" --topology="$pod" --json \
                --config.mesh.fsdp="$FSDP" --config.train.accum_steps="$((batch / NUM_CHIPS))" \
                >"$file.tmp" 2>"$file.log" || status=$?
            # 1: the recipe does not fit, which is a valid plan.
            if ((status > 1)); then
                echo "$recipe on $pod: $(tail -n 1 "$file.log")" >&2
                rm -f "$file.tmp"
                continue
            fi
            mv "$file.tmp" "$file"
            rm -f "$file.log"
        fi
        plans+=("$file")
    done
done
((${#plans[@]})) || exit 1
tttjax plan --table "${plans[@]}"
python - "${plans[@]}" <<'EOF'
import json
import sys
from pathlib import Path

plans = {Path(path).stem: json.loads(Path(path).read_text()) for path in sys.argv[1:]}
rows = []
for name, plan in plans.items():
    full = plans.get(name.replace("-ttt_e2e-", "-full-"))
    if full and full is not plan:
        program = plan["program_flops"] / full["program_flops"]
        method = plan["flops"]["total"] / full["flops"]["total"]
        rows.append(f"| {name} | {program:.2f} | {method:.2f} |")
if rows:
    print("\n| FLOPs relative to full attention | program | method |")
    print("| --- | --- | --- |", *rows, sep="\n")
EOF
