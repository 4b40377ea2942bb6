#!/usr/bin/env bash
# Trains on the GPU hosts of a Kubernetes cluster: prints a Job with one pod per host.
#
#   NAME=run125m HOSTS=4 GPUS=8 IMAGE=... CONFIG=paper:125m,ttt_e2e,pretrain \
#       WORKDIR=/shared/runs/125m CLAIM=shared launch/gke_gpu.sh --config.mesh.fsdp=8 |
#       kubectl apply -f -
#
# NAME     name of the job, and of the service through which its pods connect           (required)
# IMAGE    container image with Python 3.11 or newer and `tttjax[cuda]`, and the checkout as its
#          working folder                                                               (required)
# CONFIG   experiment file with its argument                                            (required)
# WORKDIR  shared folder for checkpoints and metrics; in /shared with CLAIM             (required)
# HOSTS    pods, one per host (default 1)
# GPUS     GPUs of each host (default 8)
# CLAIM    persistent volume claim, mounted at /shared (default: none)
# RETRIES  restarts of a failed pod, from the last checkpoint (default 10)
#
# Other arguments are passed to `tttjax train`.
set -euo pipefail

: "${NAME:?set NAME to a name for the job}"
: "${IMAGE:?set IMAGE to a container image with tttjax[cuda]}"
: "${CONFIG:?set CONFIG to an experiment file, such as paper:125m,ttt_e2e,pretrain}"
: "${WORKDIR:?set WORKDIR to a folder shared by all pods}"
HOSTS="${HOSTS:-1}"
PORT=8476

quoted() { # a YAML string in single quotes
    printf "'%s'" "${1//\'/\'\'}"
}

cat <<YAML
apiVersion: v1
kind: Service
metadata:
  name: $NAME
spec:
  clusterIP: None
  publishNotReadyAddresses: true  # pods resolve the first one before it is ready
  selector:
    job-name: $NAME
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $NAME
spec:
  completions: $HOSTS
  parallelism: $HOSTS
  completionMode: Indexed  # numbers the pods: JOB_COMPLETION_INDEX
  backoffLimit: ${RETRIES:-10}
  template:
    spec:
      subdomain: $NAME
      restartPolicy: OnFailure
      terminationGracePeriodSeconds: 300  # time to save after SIGTERM
      containers:
        - name: train
          image: $(quoted "$IMAGE")
          command:
            - tttjax
            - train
            - --coordinator=$NAME-0.$NAME:$PORT
            - --process-count=$HOSTS
            - --process-id=\$(JOB_COMPLETION_INDEX)
            - $(quoted "--config=$CONFIG")
            - $(quoted "--workdir=$WORKDIR")
$(for argument in "$@"; do printf '            - %s\n' "$(quoted "$argument")"; done)
          ports:
            - containerPort: $PORT
          resources:
            limits:
              nvidia.com/gpu: ${GPUS:-8}
          volumeMounts:
            - {name: memory, mountPath: /dev/shm}
$([[ -n "${CLAIM:-}" ]] && printf '            - {name: shared, mountPath: /shared}\n')
      volumes:
        - name: memory
          emptyDir: {medium: Memory}
$([[ -n "${CLAIM:-}" ]] && printf '        - name: shared\n          persistentVolumeClaim: {claimName: %s}\n' "$CLAIM")
YAML
