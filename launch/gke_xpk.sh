#!/usr/bin/env bash
# Trains on one or more TPU slices of a GKE cluster with XPK (github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=mine ZONE=... TPU_TYPE=v5p-64 IMAGE=... NAME=run125m \
#       CONFIG=paper:125m,ttt_e2e,pretrain WORKDIR=/shared/runs/125m \
#       launch/gke_xpk.sh --config.mesh.fsdp=4
#
# CLUSTER, ZONE  the cluster, made with `xpk cluster create`                            (required)
# TPU_TYPE       type of slice, as named by XPK                                         (required)
# IMAGE          container image with Python 3.11 or newer and `tttjax[tpu]`, and the
#                checkout as its working folder                                         (required)
# NAME           name of the workload                                                   (required)
# CONFIG         experiment file with its argument                                      (required)
# WORKDIR        folder for checkpoints and metrics, on storage attached to the cluster (see `xpk
#                storage attach`)                                                       (required)
# PROJECT        Google Cloud project                                     (default: gcloud's own)
# NUM_SLICES     number of slices (default 1)
# MAX_RESTARTS   restarts after preemption, from the last checkpoint (default 10)
#
# Other arguments are passed to `tttjax train`. jax.distributed detects the hosts of all slices.
set -euo pipefail

: "${CLUSTER:?set CLUSTER to the name of the cluster}"
: "${ZONE:?set ZONE to the zone of the cluster}"
: "${TPU_TYPE:?set TPU_TYPE to the type of slice}"
: "${IMAGE:?set IMAGE to a container image with tttjax[tpu]}"
: "${NAME:?set NAME to a name for the workload}"
: "${CONFIG:?set CONFIG to an experiment file, such as paper:125m,ttt_e2e,pretrain}"
: "${WORKDIR:?set WORKDIR to a folder shared by all hosts}"
where=(--cluster "$CLUSTER" --zone "$ZONE")
[[ -n "${PROJECT:-}" ]] && where+=(--project "$PROJECT")

exec xpk workload create "${where[@]}" --workload "$NAME" --tpu-type "$TPU_TYPE" \
    --num-slices "${NUM_SLICES:-1}" --max-restarts "${MAX_RESTARTS:-10}" \
    --docker-image "$IMAGE" \
    --command "$(printf '%q ' tttjax train --distributed "--config=$CONFIG" "--workdir=$WORKDIR" "$@")"
