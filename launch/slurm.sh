#!/usr/bin/env bash
# Trains on the hosts of a Slurm cluster: one process per host, with all of its GPUs.
#
#   CONFIG=paper:125m,ttt_e2e,pretrain WORKDIR=/shared/runs/125m \
#       sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config.mesh.fsdp=8 \
#       --config.data.sources=/shared/data
#
# CONFIG        experiment file with its argument                                     (required)
# WORKDIR       shared folder for checkpoints and metrics                             (required)
# VENV          shared virtual environment with `tttjax[cuda]` (default: .venv in the checkout)
# IMAGE         container image in place of VENV, as launch/Dockerfile builds it with EXTRA=cuda,
#               for clusters with the plugin pyxis                               (default: none)
# MOUNTS        folders to mount in the container, separated by commas, as pyxis takes them; with
#               the data                               (default: the folder that holds WORKDIR)
# PORT          coordinator port on the first host               (default: from the job ID)
# REQUEUE       yes: start the job again after a stop or a loss  (default yes)
# MAX_RESTARTS  starts of the job after which it is left alone   (default 1000)
# TTTJAX_COMPILATION_CACHE  folder of compiled programs
#               (default: compiled, beside WORKDIR; /tmp/tttjax/compiled if that is in a bucket)
#
# Other arguments are passed to `tttjax train`. Two minutes before the time limit (`--signal` below;
# for another time, `sbatch --signal=TERM@SECONDS`) and on preemption, Slurm sends SIGTERM: training
# saves and stops. When a host ends with any exit code but 0 and 2, the others are ended, and the job
# is requeued and resumes from the last checkpoint. If a node fails, Slurm requeues the job itself
# (`--requeue` below; JobRequeue=1 in slurm.conf, the default). Exit code 2 of one host ends the job;
# `tttjax train` exits with it when nothing but a user can help, which includes too many starts in a
# row without a new step (train.max_failed_starts).
#
#SBATCH --job-name=tttjax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

: "${CONFIG:?set CONFIG to an experiment file, such as paper:125m,ttt_e2e,pretrain}"
: "${WORKDIR:?set WORKDIR to a folder shared by all hosts}"
: "${SLURM_JOB_ID:?submit this script with sbatch}"
# Slurm runs a copy of this script; sbatch was called in the checkout.
REPOSITORY="${REPOSITORY:-$SLURM_SUBMIT_DIR}"
VENV="${VENV:-$REPOSITORY/.venv}"
PORT="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
folder="$(dirname "$WORKDIR")"
[[ "$WORKDIR" != *://* ]] || folder=/tmp/tttjax # a bucket
export TTTJAX_COMPILATION_CACHE="${TTTJAX_COMPILATION_CACHE:-$folder/compiled}"
if [[ -n "${IMAGE:-}" ]]; then
    container=(--container-image="$IMAGE" --container-mounts="${MOUNTS:-$folder:$folder}")
    program=tttjax
else
    container=()
    program="$VENV/bin/tttjax"
    if [[ ! -x "$program" ]]; then
        echo "error: $program is missing; install tttjax[cuda] in $VENV, or set VENV." >&2
        exit 2
    fi
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# srun ends all tasks when one fails. Its own exit code may be that of a task that it ended, so a line
# says that a task exited with 2; of a pipe, the last code that is not 0 counts (pipefail). `trap`
# lets the shell of a task wait for its process when both have got SIGTERM.
# SLURM_PROCID differs between hosts, so it is expanded there. SLURM_LOCALID is unset so that JAX
# does not restrict the only process of a host to a single GPU.
cd "$REPOSITORY"
refused="exit code 2 of process"
pass_on() { # copies the output; fails with 2 if a task was refused
    local line result=0
    while IFS= read -r line; do
        printf '%s\n' "$line"
        [[ "$line" != *"$refused"* ]] || result=2
    done
    return "$result"
}
code=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 ${container[@]+"${container[@]}"} bash -c '
    trap : TERM
    env -u SLURM_LOCALID "$0" train --coordinator "$1" --process-count "$SLURM_NTASKS" \
        --process-id "$SLURM_PROCID" "${@:3}"
    code=$?
    ((code != 2)) || echo "$2 $SLURM_PROCID"
    exit "$code"
' "$program" "${hosts[0]}:$PORT" "$refused" --config="$CONFIG" --workdir="$WORKDIR" "$@" 2>&1 |
    pass_on || code=$?

if ((code != 0 && code != 2)) && [[ "${REQUEUE:-yes}" == yes ]]; then
    if ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-1000})); then
        echo "exit code $code: requeueing"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "exit code $code after $SLURM_RESTART_COUNT restarts; see MAX_RESTARTS" >&2
    fi
fi
exit "$code"
