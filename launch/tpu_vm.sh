#!/usr/bin/env bash
# Installs and trains on all hosts of a Cloud TPU slice with `gcloud`.
#
#   TPU_NAME=mine ZONE=... TPU_TYPE=v5p-64 CONFIG=paper:125m,ttt_e2e,pretrain \
#       WORKDIR=/shared/runs/125m launch/tpu_vm.sh run --config.mesh.fsdp=4
#   TPU_NAME=mine ZONE=... launch/tpu_vm.sh log
#
# run      makes the slice if there is none, as a queued resource; installs, trains and waits; starts
#          again after a stop, a loss or a crash; makes the slice again when it was preempted. Ends
#          with 0 when training is complete, and with 2 when nothing but a user can help, which
#          includes too many starts in a row without a new step (train.max_failed_starts). Ctrl-C
#          ends the waiting alone; the same command takes it up again.
# install  copies this checkout to all hosts and makes a virtual environment there
# train    trains in the background on all hosts, independent of the connection; the same command
#          resumes; jax.distributed detects the hosts
# log      follows the output of the first host
# stop     sends SIGTERM, and training saves; end `run` first
#
# TPU_NAME, ZONE  the slice; with run also the name of its queued resource              (required)
# PROJECT         Google Cloud project                                      (default: gcloud's own)
# CONFIG          experiment file with its argument                     (required by run and train)
# WORKDIR         shared folder for checkpoints and metrics, on a file system or a mounted bucket
#                                                                       (required by run and train)
# REMOTE          folder of the checkout on the hosts                 (default: tttjax, in the home)
# TPU_TYPE        accelerator type, such as v5p-64, v5litepod-16 or v6e-16       (required by run)
# IMAGE           runtime version of the hosts            (default: Google's for this TPU_TYPE)
# SPOT            yes: a slice that can be preempted                                  (default yes)
# CREATE_FLAGS    more options of `gcloud compute tpus queued-resources create`, separated by spaces,
#                 such as "--network=mine --metadata-from-file=startup-script=mount.sh", which mounts
#                 the shared folder                                                 (default: none)
# POLL            seconds between looks at slice and hosts (default 30)
# GRACE           seconds to save in after SIGTERM (default 300)
# MAX_RESTARTS    starts after which `run` gives up (default 1000)
# TTTJAX_COMPILATION_CACHE  folder of compiled programs
#               (default: compiled, beside WORKDIR; /tmp/tttjax/compiled if that is in a bucket)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${TPU_NAME:?set TPU_NAME to the name of the slice}"
: "${ZONE:?set ZONE to the zone of the slice}"
REMOTE="${REMOTE:-tttjax}"
POLL="${POLL:-30}"
TRIES=5 # to make a slice, install and start, in a row
where=(--zone "$ZONE")
[[ -n "${PROJECT:-}" ]] && where+=(--project "$PROJECT")

on_hosts() { # WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2" </dev/null
}

install_everywhere() (
    folder="$(mktemp -d)"
    trap 'rm -r "$folder"' EXIT
    git archive --format=tar.gz --output="$folder/tttjax.tar.gz" HEAD &&
        gcloud compute tpus tpu-vm scp "$folder/tttjax.tar.gz" "$TPU_NAME:tttjax.tar.gz" \
            "${where[@]}" --worker=all &&
        on_hosts all "mkdir -p $REMOTE && tar -xzf tttjax.tar.gz -C $REMOTE && cd $REMOTE &&
            bash -c 'source launch/_venv.sh && ensure_venv tpu'"
)

check_variables() {
    : "${CONFIG:?set CONFIG to an experiment file, such as paper:125m,ttt_e2e,pretrain}"
    : "${WORKDIR:?set WORKDIR to a folder shared by all hosts}"
}

# A shell waits for the program, writes its exit code to train.code and holds train.lock until then.
train_everywhere() {
    local folder command script
    folder="$(dirname "$WORKDIR")"
    [[ "$WORKDIR" != *://* ]] || folder=/tmp/tttjax # a bucket
    local cache="${TTTJAX_COMPILATION_CACHE:-$folder/compiled}"
    command="$(printf '%q ' env "TTTJAX_COMPILATION_CACHE=$cache" .venv/bin/tttjax train \
        --distributed "--config=$CONFIG" "--workdir=$WORKDIR" "$@")"
    script="$command 9>&- & echo \$! >train.pid; wait \$!; echo \$? >train.code"
    on_hosts all "cd $REMOTE && exec 9>train.lock &&
        { flock -n 9 || { echo 'error: training is already running' >&2; exit 2; }; } &&
        rm -f train.code train.pid &&
        { nohup bash -c $(printf '%q' "$script") >>train.log 2>&1 </dev/null & } &&
        until [ -s train.pid ]; do sleep 0.1; done"
}

# A line "training runs" or "training ended with CODE" of every host that answers; 137 if the host
# has ended it.
ask_hosts() {
    on_hosts all "cd $REMOTE 2>/dev/null || exit 0
        if [ -s train.code ]; then echo training ended with \$(cat train.code)
        elif [ -e train.lock ] && ! flock -n train.lock true; then echo training runs
        else echo training ended with 137; fi" 2>/dev/null || true
}

end_everywhere() {
    on_hosts all "cd $REMOTE && kill -TERM \$(cat train.pid); flock -w ${GRACE:-300} train.lock true ||
        { kill -KILL \$(cat train.pid); flock -w 30 train.lock true; }" 2>/dev/null || true
}

slice_state() { # of the queued resource; MISSING, or UNKNOWN if gcloud fails
    local answer
    if answer="$(gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" \
        --format='value(state.state)' 2>&1)"; then
        echo "$answer"
    elif [[ "$answer" == *NOT_FOUND* ]]; then
        echo MISSING
    else
        echo "$answer" >&2
        echo UNKNOWN
    fi
}

make_slice() {
    local flags
    read -ra flags <<<"${CREATE_FLAGS:-}"
    [[ "${SPOT:-yes}" != yes ]] || flags+=(--spot)
    if [[ -z "${IMAGE:-}" ]]; then
        case "$TPU_TYPE" in
            v5p*) IMAGE=v2-alpha-tpuv5 ;;
            v5lite*) IMAGE=v2-alpha-tpuv5-lite ;;
            v6e*) IMAGE=v2-alpha-tpuv6e ;;
            *) IMAGE=tpu-ubuntu2204-base ;;
        esac
    fi
    gcloud compute tpus queued-resources create "$TPU_NAME" "${where[@]}" --node-id="$TPU_NAME" \
        --accelerator-type="$TPU_TYPE" --runtime-version="$IMAGE" ${flags[@]+"${flags[@]}"} --quiet
}

# Waits until the slice is there, and has it made if need be; fails if that fails.
await_slice() {
    local state
    while true; do
        state="$(slice_state)"
        case "$state" in
            ACTIVE) return ;;
            MISSING) make_slice || return ;;
            SUSPENDED | FAILED)
                gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet ||
                    return
                [[ "$state" == SUSPENDED ]] || return 1
                ;;
        esac
        echo "the slice was $state; waiting for it"
        sleep "$POLL"
    done
}

# Waits until training has ended on a host, and ends it on the others; sets `code`.
await_end() {
    local answers
    while sleep "$POLL"; do
        answers="$(ask_hosts)"
        if [[ "$answers" =~ with\ [1-9] ]]; then
            end_everywhere
            answers+=" $(ask_hosts)"
            [[ "$answers" =~ with\ ([1-9][0-9]*) ]] && code="${BASH_REMATCH[1]}"
            [[ ! "$answers" =~ with\ 2([^0-9]|$) ]] || code=2
            return
        elif [[ "$answers" == *"with 0"* && "$answers" != *runs* ]]; then
            code=0
            return
        elif [[ "$answers" != *training* ]]; then
            case "$(slice_state)" in
                ACTIVE | UNKNOWN) echo "no host answers; waiting" ;;
                *)
                    code=76
                    return
                    ;;
            esac
        fi
    done
}

run_everywhere() {
    local restarts=0 failures=0 code
    while true; do
        if await_slice && { [[ "$(ask_hosts)" == *runs* ]] ||
            { install_everywhere && train_everywhere "$@"; }; }; then
            failures=0
            await_end
            echo "training ended with $code"
            ((code != 0 && code != 2 && restarts < ${MAX_RESTARTS:-1000})) || exit "$code"
            restarts=$((restarts + 1))
        else
            failures=$((failures + 1))
            if ((failures == TRIES)); then
                echo "error: no start in $TRIES tries, see above; mend it and run the same command." >&2
                exit 2
            fi
            sleep "$POLL"
        fi
    done
}

action="${1:-}"
shift || true
case "$action" in
    run)
        check_variables
        : "${TPU_TYPE:?set TPU_TYPE to the accelerator type of the slice}"
        run_everywhere "$@"
        ;;
    install) install_everywhere ;;
    train)
        check_variables
        train_everywhere "$@"
        ;;
    log) on_hosts 0 "tail -n 100 -F $REMOTE/train.log" ;;
    stop) on_hosts all "kill -TERM \$(cat $REMOTE/train.pid)" ;;
    *)
        echo "error: give an action: run, install, train, log or stop (see the top of $0)." >&2
        exit 2
        ;;
esac
