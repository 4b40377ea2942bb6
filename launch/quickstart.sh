#!/usr/bin/env bash
# Trains and evaluates a small TTT-E2E model on any machine with Python 3.11.
#
#   bash launch/quickstart.sh                 on the sources of Python's standard library
#   bash launch/quickstart.sh --text PATH     on your file or folder of text
#
# Makes a virtual environment, prepares the text, trains a small TTT-E2E model and a control (a
# sliding-window Transformer of equal size, on the same tokens), and compares them on held-out
# documents, at 1, 2, 4 and 8 windows of context. Takes about ten minutes on two CPU cores after the
# installation. If interrupted, the same command resumes.
#
#   --out DIR         output folder (default: quickstart)
#   --steps N         outer steps of each model; must exceed the 60 steps of learning-rate warm-up
#                     (default: see tttjax/recipes/quickstart.py)
#   --tokenizer KIND  sentencepiece, trained on the text, or bytes (default: bytes for texts of less
#                     than 200,000 bytes, which are too small for a vocabulary of 1024)
#
# PYTHON and VENV: see launch/_venv.sh.
set -euo pipefail
# shellcheck source=launch/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

TEXT=stdlib
OUT=quickstart
TOKENIZER=
SMALL=200000
OVERRIDES=()

_usage() {
    sed -n '2,/^# PYTHON/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

while (($#)); do
    case "$1" in
        -h | --help) _usage && exit 0 ;;
        --text | --out | --steps | --tokenizer)
            [[ $# -ge 2 && -n "$2" ]] || _fail "$1 needs a value; see bash $0 --help."
            case "$1" in
                --text) TEXT="$2" ;;
                --out) OUT="$2" ;;
                --tokenizer) TOKENIZER="$2" ;;
                --steps) OVERRIDES+=("--config.train.steps=$2") ;;
            esac
            shift 2
            ;;
        --text=*) set -- --text "${1#*=}" "${@:2}" ;;
        --out=*) set -- --out "${1#*=}" "${@:2}" ;;
        --steps=*) set -- --steps "${1#*=}" "${@:2}" ;;
        --tokenizer=*) set -- --tokenizer "${1#*=}" "${@:2}" ;;
        *) _fail "unknown option $1; see bash $0 --help." ;;
    esac
done
[[ "$TEXT" == stdlib || -e "$TEXT" ]] || _fail "--text $TEXT: no such file or folder."

ensure_venv
started=$SECONDS

_say() {
    printf '\n== %s\n' "$1"
}

# Whether $TEXT has fewer than $SMALL bytes in total; reads no more than that.
_is_small() {
    local bytes
    bytes="$({ find -L "$TEXT" -type f -exec cat {} + || true; } 2>/dev/null | head -c "$SMALL" | wc -c)"
    ((bytes < SMALL))
}

if [[ -z "$TOKENIZER" ]]; then
    TOKENIZER=sentencepiece
    if [[ -e "$TEXT" ]] && _is_small; then
        TOKENIZER=bytes
    fi
fi
VOCABULARY=()
[[ "$TOKENIZER" == sentencepiece ]] && VOCABULARY=(--vocab-size=1024)

_say "1/4 preparing $TEXT"
# Both splits get only documents of at least 513 tokens (a sequence and its last target): short
# documents do not exercise memory beyond the window.
tttjax prepare "$TEXT" --out="$OUT/data" --tokenizer="$TOKENIZER" \
    ${VOCABULARY[@]+"${VOCABULARY[@]}"} --min-document-tokens=513 --val-fraction=0.1

_train() {
    tttjax train --config="quickstart:$1" --workdir="$OUT/$1" \
        --config.data.sources="$OUT/data" ${OVERRIDES[@]+"${OVERRIDES[@]}"}
}
_say "2/4 training TTT-E2E: the outer gradient differentiates through all inner updates"
_train ttt_e2e
_say "3/4 training the control: window attention only, with equal parameters and tokens"
_train window

_say "4/4 evaluating on held-out documents, with test-time training on and off"
tttjax evaluate "$OUT/ttt_e2e" "$OUT/window" --out="$OUT/results"
printf '\nDone in %d min %d s. The plot: %s\n' \
    $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) \
    "$OUT/results/loss_by_position.png"
prompt='def __init__(self'
[[ "$TEXT" == stdlib ]] || prompt=The
printf '\nNext, generate text from a prompt:\n\n    %q generate %q --prompt=%q\n' \
    "$VENV/bin/tttjax" "$OUT/ttt_e2e" "$prompt"
