#!/usr/bin/env bash
# Trains on one or more TPU slices of a GKE cluster, through XPK (github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=mine ZONE=... TPU_TYPE=v5p-64 IMAGE=... NAME=run125m \
#       CONFIG=paper:125m,ttt_e2e,pretrain WORKDIR=/shared/runs/125m \
#       launch/gke_xpk.sh --config.mesh.fsdp=4
#
# CLUSTER, ZONE  the cluster, made with `xpk cluster create`                            (required)
# TPU_TYPE       kind of slice, as XPK names it                                         (required)
# IMAGE          container image with Python 3.11 or newer and `tttjax[tpu]`, checkout as its
#                working folder                                                         (required)
# NAME           of the workload                                                        (required)
# CONFIG         experiment file with its argument                                      (required)
# WORKDIR        folder for checkpoints and metrics, on storage that is attached to the cluster and
#                mounted in every pod (see `xpk storage attach`)                        (required)
# PROJECT        Google Cloud project                                     (default: gcloud's own)
# NUM_SLICES     slices (default 1)
# MAX_RESTARTS   restarts after preemption; each resumes from the newest checkpoint (default 10)
#
# Other arguments go to `tttjax train`. jax.distributed finds all hosts of all slices by itself.
set -euo pipefail

: "${CLUSTER:?set CLUSTER to the name of the cluster}"
: "${ZONE:?set ZONE to the zone of the cluster}"
: "${TPU_TYPE:?set TPU_TYPE to the kind of slice}"
: "${IMAGE:?set IMAGE to a container image with tttjax[tpu]}"
: "${NAME:?set NAME to a name for the workload}"
: "${CONFIG:?set CONFIG to an experiment file, such as paper:125m,ttt_e2e,pretrain}"
: "${WORKDIR:?set WORKDIR to a folder that all hosts see}"
where=(--cluster "$CLUSTER" --zone "$ZONE")
[[ -n "${PROJECT:-}" ]] && where+=(--project "$PROJECT")

exec xpk workload create "${where[@]}" --workload "$NAME" --tpu-type "$TPU_TYPE" \
    --num-slices "${NUM_SLICES:-1}" --max-restarts "${MAX_RESTARTS:-10}" \
    --docker-image "$IMAGE" \
    --command "$(printf '%q ' tttjax train --distributed "--config=$CONFIG" "--workdir=$WORKDIR" "$@")"
