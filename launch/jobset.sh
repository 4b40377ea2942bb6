#!/usr/bin/env bash
# Trains on the GPU hosts or TPU slices of a Kubernetes cluster: prints a JobSet
# (github.com/kubernetes-sigs/jobset, version 0.7 or newer) with one pod per host.
#
#   NAME=run125m HOSTS=4 GPUS=8 IMAGE=... CONFIG=paper:125m,ttt_e2e,pretrain \
#       WORKDIR=/shared/runs/125m CLAIM=shared launch/jobset.sh --config.mesh.fsdp=8 \
#       --config.data.sources=/shared/data | kubectl apply -f -
#   NAME=run125m TPU=tpu-v5p-slice TOPOLOGY=2x4x4 ...                       the same on GKE's TPUs
#
# NAME          name of the JobSet                                                     (required)
# IMAGE         container image, as launch/Dockerfile builds it with EXTRA=cuda or EXTRA=tpu
#                                                                                      (required)
# CONFIG        experiment file with its argument                                      (required)
# WORKDIR       shared folder for checkpoints and metrics; in /shared with CLAIM       (required)
# CLAIM         persistent volume claim, mounted at /shared (default: none)
# HOSTS, GPUS   GPU hosts (default 1) and GPUs of each (default 8)
# TPU           kind of TPU, as GKE's label cloud.google.com/gke-tpu-accelerator (default: GPUs)
# TOPOLOGY      chips of a slice, such as 2x4x4                               (required with TPU)
# CHIPS         chips of a TPU host (default 4)
# NUM_SLICES    TPU slices (default 1)
# GRACE         seconds to save in after SIGTERM (default 300)
# MAX_RESTARTS  restarts of all pods (default 1000; see below)
# TTTJAX_COMPILATION_CACHE  folder of compiled programs
#               (default: compiled, beside WORKDIR; /tmp/tttjax/compiled if that is in a bucket)
#
# Other arguments are passed to `tttjax train`. When a pod ends with any exit code but 0 and 2, or is
# lost, all pods start again from the last checkpoint. Exit code 2 ends the JobSet; `tttjax train`
# exits with it when nothing but a user can help, which includes too many starts in a row without a
# new step (train.max_failed_starts).
set -euo pipefail

: "${NAME:?set NAME to a name for the JobSet}"
: "${IMAGE:?set IMAGE to a container image with tttjax[cuda] or tttjax[tpu]}"
: "${CONFIG:?set CONFIG to an experiment file, such as paper:125m,ttt_e2e,pretrain}"
: "${WORKDIR:?set WORKDIR to a folder shared by all pods}"
folder="$(dirname "$WORKDIR")"
[[ "$WORKDIR" != *://* ]] || folder=/tmp/tttjax # a bucket
CACHE="${TTTJAX_COMPILATION_CACHE:-$folder/compiled}"
PORT=8476

quoted() { # a YAML string in single quotes
    printf "'%s'" "${1//\'/\'\'}"
}

if [[ -n "${TPU:-}" ]]; then
    : "${TOPOLOGY:?set TOPOLOGY to the chips of a slice, such as 2x4x4}"
    CHIPS="${CHIPS:-4}"
    HOSTS=$(((${TOPOLOGY//x/*} + CHIPS - 1) / CHIPS))
    resource=google.com/tpu amount="$CHIPS"
    # GKE tells the pods of a slice about each other, and JAX detects it.
    start=(--distributed)
else
    HOSTS="${HOSTS:-1}"
    resource=nvidia.com/gpu amount="${GPUS:-8}"
    first="$NAME-host-0-0.$NAME"
    start=("--coordinator=$first:$PORT" "--process-count=$HOSTS" "--process-id=\$(JOB_COMPLETION_INDEX)")
    # The first pod has a name once it has a node.
    await="until getent hosts $first >/dev/null; do sleep 1; done; "
fi

cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
$([[ -z "${TPU:-}" ]] || printf '  annotations:  # a slice is a node pool\n    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool\n')
spec:
  network:
    enableDNSHostnames: true
    subdomain: $NAME
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: ${MAX_RESTARTS:-1000}
    restartStrategy: BlockingRecreate  # no new pod before all old ones have ended
    rules:
      - name: refused
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: host
      replicas: ${NUM_SLICES:-1}
      template:
        spec:
          completions: $HOSTS
          parallelism: $HOSTS
          completionMode: Indexed  # numbers the pods: JOB_COMPLETION_INDEX
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: ${GRACE:-300}
$([[ -z "${TPU:-}" ]] || printf '              nodeSelector:\n                cloud.google.com/gke-tpu-accelerator: %s\n                cloud.google.com/gke-tpu-topology: %s\n' "$(quoted "$TPU")" "$(quoted "$TOPOLOGY")")
              tolerations:
                - {key: $resource, operator: Exists}
              containers:
                - name: train
                  image: $(quoted "$IMAGE")
                  command: [sh, -c, $(quoted "${await:-}exec tttjax train \"\$@\""), tttjax]
                  args:
$(for argument in "${start[@]}" "--config=$CONFIG" "--workdir=$WORKDIR" "$@"; do printf '                    - %s\n' "$(quoted "$argument")"; done)
                  env:
                    - {name: TTTJAX_COMPILATION_CACHE, value: $(quoted "$CACHE")}
                  ports:
                    - containerPort: $PORT
                  resources:
                    limits:
                      $resource: $amount
                  volumeMounts:
                    - {name: memory, mountPath: /dev/shm}
$([[ -z "${CLAIM:-}" ]] || printf '                    - {name: shared, mountPath: /shared}\n')
              volumes:
                - name: memory
                  emptyDir: {medium: Memory}
$([[ -z "${CLAIM:-}" ]] || printf '                - name: shared\n                  persistentVolumeClaim: {claimName: %s}\n' "$CLAIM")
YAML
