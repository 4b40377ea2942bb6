#!/usr/bin/env bash
# Trains on one or more TPU slices of a GKE cluster with XPK (github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=mine ZONE=... TPU_TYPE=v5p-64 IMAGE=... NAME=run125m \
#       CONFIG=paper:125m,ttt_e2e,pretrain WORKDIR=/shared/runs/125m \
#       launch/gke_xpk.sh --config.mesh.fsdp=4
#
# CLUSTER, ZONE  the cluster, made with `xpk cluster create`                            (required)
# TPU_TYPE       type of slice, as named by XPK                                         (required)
# IMAGE          container image, as launch/Dockerfile builds it with EXTRA=tpu         (required)
# NAME           name of the workload                                                   (required)
# CONFIG         experiment file with its argument                                      (required)
# WORKDIR        folder for checkpoints and metrics, on storage attached to the cluster (see `xpk
#                storage attach`)                                                       (required)
# PROJECT        Google Cloud project                                     (default: gcloud's own)
# NUM_SLICES     number of slices (default 1)
# GRACE          seconds to save in after SIGTERM (default 300)
# MAX_RESTARTS   restarts of all hosts (default 1000; see below)
# XPK_FLAGS      more options of `xpk workload create`, separated by spaces, such as
#                "--priority=high --storage=disk"                                  (default: none)
# TTTJAX_COMPILATION_CACHE  folder of compiled programs
#               (default: compiled, beside WORKDIR; /tmp/tttjax/compiled if that is in a bucket)
#
# Other arguments are passed to `tttjax train`. jax.distributed detects the hosts of all slices.
# When a host ends with any exit code but 0 and 2, all hosts start again from the last checkpoint.
# Exit code 2 ends the workload; `tttjax train` exits with it when nothing but a user can help, which
# includes too many starts in a row without a new step (train.max_failed_starts).
set -euo pipefail

: "${CLUSTER:?set CLUSTER to the name of the cluster}"
: "${ZONE:?set ZONE to the zone of the cluster}"
: "${TPU_TYPE:?set TPU_TYPE to the type of slice}"
: "${IMAGE:?set IMAGE to a container image with tttjax[tpu]}"
: "${NAME:?set NAME to a name for the workload}"
: "${CONFIG:?set CONFIG to an experiment file, such as paper:125m,ttt_e2e,pretrain}"
: "${WORKDIR:?set WORKDIR to a folder shared by all hosts}"
folder="$(dirname "$WORKDIR")"
[[ "$WORKDIR" != *://* ]] || folder=/tmp/tttjax # a bucket
CACHE="${TTTJAX_COMPILATION_CACHE:-$folder/compiled}"
where=(--cluster "$CLUSTER" --zone "$ZONE")
[[ -n "${PROJECT:-}" ]] && where+=(--project "$PROJECT")
read -ra more <<<"${XPK_FLAGS:-}"

# XPK restarts on 42 and 127 to 255 by itself. `exec`, because its shell sends SIGTERM to its child
# and waits for that one's exit code.
exec xpk workload create "${where[@]}" --workload "$NAME" --tpu-type "$TPU_TYPE" \
    --num-slices "${NUM_SLICES:-1}" --max-restarts "${MAX_RESTARTS:-1000}" \
    --restart-on-exit-codes=1,3-126 --termination-grace-period-seconds "${GRACE:-300}" \
    --docker-image "$IMAGE" --env "TTTJAX_COMPILATION_CACHE=$CACHE" ${more[@]+"${more[@]}"} \
    --command "exec $(printf '%q ' tttjax train --distributed "--config=$CONFIG" "--workdir=$WORKDIR" "$@")"
