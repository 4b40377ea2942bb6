#!/usr/bin/env bash
# Installs and trains on all hosts of a Cloud TPU slice with `gcloud`.
#
#   TPU_NAME=mine ZONE=... launch/tpu_vm.sh install
#   TPU_NAME=mine ZONE=... CONFIG=paper:125m,ttt_e2e,pretrain \
#       WORKDIR=/shared/runs/125m launch/tpu_vm.sh train --config.mesh.fsdp=4
#   TPU_NAME=mine ZONE=... launch/tpu_vm.sh log | stop
#
# TPU_NAME, ZONE  existing slice (made with `gcloud compute tpus tpu-vm create`)        (required)
# PROJECT         Google Cloud project                                      (default: gcloud's own)
# CONFIG          experiment file with its argument                            (required by train)
# WORKDIR         shared folder for checkpoints and metrics, on a file system or a mounted bucket
#                                                                              (required by train)
# REMOTE          folder of the checkout on the hosts                 (default: tttjax, in the home)
#
# install copies this checkout to all hosts and makes a virtual environment there. train runs on all
# hosts in the background, independent of the connection; jax.distributed detects the hosts. log
# follows the output of the first host. stop sends SIGTERM, and training saves. The same train
# command resumes a stopped or preempted run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${TPU_NAME:?set TPU_NAME to the name of the slice}"
: "${ZONE:?set ZONE to the zone of the slice}"
REMOTE="${REMOTE:-tttjax}"
where=(--zone "$ZONE")
[[ -n "${PROJECT:-}" ]] && where+=(--project "$PROJECT")

on_hosts() { # WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}

install_everywhere() {
    local archive
    archive="$(mktemp -d)/tttjax.tar.gz"
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:tttjax.tar.gz" "${where[@]}" --worker=all
    rm -r "$(dirname "$archive")"
    on_hosts all "mkdir -p $REMOTE && tar -xzf tttjax.tar.gz -C $REMOTE && cd $REMOTE &&
        bash -c 'source launch/_venv.sh && ensure_venv tpu'"
}

train_everywhere() {
    : "${CONFIG:?set CONFIG to an experiment file, such as paper:125m,ttt_e2e,pretrain}"
    : "${WORKDIR:?set WORKDIR to a folder shared by all hosts}"
    local command
    command="$(printf '%q ' .venv/bin/tttjax train --distributed "--config=$CONFIG" "--workdir=$WORKDIR" "$@")"
    on_hosts all "cd $REMOTE && { ! [ -f train.pid ] || ! kill -0 \$(cat train.pid) 2>/dev/null ||
        { echo 'error: training is already running' >&2; exit 2; }; } &&
        { nohup $command >train.log 2>&1 </dev/null & echo \$! >train.pid; }"
}

action="${1:-}"
shift || true
case "$action" in
    install) install_everywhere ;;
    train) train_everywhere "$@" ;;
    log) on_hosts 0 "tail -n 100 -F $REMOTE/train.log" ;;
    stop) on_hosts all "kill -TERM \$(cat $REMOTE/train.pid)" ;;
    *)
        echo "error: give an action: install, train, log or stop (see the top of $0)." >&2
        exit 2
        ;;
esac
