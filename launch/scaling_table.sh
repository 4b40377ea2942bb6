#!/usr/bin/env bash
# The cost of the paper's recipes on every kind of chip, as one Markdown table: `tttjax plan` for
# each recipe and pod, one sequence per chip at a time, the rest of the batch by accumulation.
#
#   bash launch/scaling_table.sh OUT
#
# Writes one JSON file per recipe and pod to the folder OUT and prints the table. Hours for all of
# it: each TPU plan is a compilation. Started again, it goes on with those that are missing; a plan
# that failed leaves its message in OUT beside them. Needs tttjax with the extra `plan` on PATH.
#
# RECIPES   arguments of the recipe file paper (default: TTT-E2E and full attention, all sizes at 8K,
#           and 3b's extensions to 16K, 32K, 64K and 128K)
# PODS      topologies (default: 4 chips of v5e, v5p, v6e, H100 and H200)
# FSDP      chips that weights and optimizer are divided among (default: 4)
set -euo pipefail

if [[ $# -ne 1 || "$1" == -* ]]; then
    sed -n '2,/^# FSDP/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0
    exit 2
fi

OUT="$1"
FSDP="${FSDP:-4}"
PODS="${PODS:-v5e:2x2 v5p:2x2x1 v6e:2x2 gpu:h100:4 gpu:h200:4}"
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
CHIPS=4

mkdir -p "$OUT"
kept=()
for recipe in $RECIPES; do
    batch="$(python -c 'import sys; from tttjax.config import load_config
print(load_config(sys.argv[1]).train.batch_size)' "paper:$recipe")"
    for pod in $PODS; do
        file="$OUT/${recipe//,/-}-${pod//:/-}.json"
        if [[ ! -s "$file" ]]; then
            status=0
            tttjax plan --config="paper:$recipe" --topology="$pod" --json \
                --config.mesh.fsdp="$FSDP" --config.train.accum_steps="$((batch / CHIPS))" \
                >"$file.tmp" 2>"$file.log" || status=$?
            # 1: the recipe does not fit, which is an answer too.
            if ((status > 1)); then
                echo "$recipe on $pod: $(tail -n 1 "$file.log")" >&2
                rm -f "$file.tmp"
                continue
            fi
            mv "$file.tmp" "$file"
            rm -f "$file.log"
        fi
        kept+=("$file")
    done
done
((${#kept[@]})) || exit 1
tttjax plan --table "${kept[@]}"
