#!/usr/bin/env bash
# Trains on many hosts of a Slurm cluster: one process per host, each with all of its GPUs.
#
#   CONFIG=paper:125m,ttt_e2e,pretrain WORKDIR=/shared/runs/125m \
#       sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config.mesh.fsdp=8
#
# CONFIG   experiment file with its argument                                         (required)
# WORKDIR  folder for checkpoints and metrics, on a file system all hosts see        (required)
# VENV     virtual environment with `tttjax[cuda]`, seen by all hosts   (default: .venv of the checkout)
# PORT     port of the first host, where the others report      (default: from the job's number)
# REQUEUE  yes: a job that is interrupted and has saved is put back into the queue (default yes)
#
# Other arguments go to `tttjax train`. Two minutes before the time limit Slurm sends SIGTERM
# (`--signal` below), on which training saves and stops; so it does when the job is preempted. The
# job then goes back into the queue and resumes from the newest checkpoint, as it does when the same
# command is submitted again.
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
: "${WORKDIR:?set WORKDIR to a folder on a file system that all hosts see}"
: "${SLURM_JOB_ID:?submit this script with sbatch}"
# Slurm runs a copy of this script; the checkout is where sbatch was called.
REPOSITORY="${REPOSITORY:-$SLURM_SUBMIT_DIR}"
VENV="${VENV:-$REPOSITORY/.venv}"
PORT="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
if [[ ! -x "$VENV/bin/tttjax" ]]; then
    echo "error: there is no $VENV/bin/tttjax; install tttjax[cuda] there, or set VENV." >&2
    exit 2
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# The process's number differs from host to host, so it is read there, not here. Without
# SLURM_LOCALID, JAX does not take over and give this one process of the host a single GPU.
cd "$REPOSITORY"
code=0
# shellcheck disable=SC2016
srun bash -c '
    exec env -u SLURM_LOCALID "$0" train --coordinator "$1" --process-count "$SLURM_NTASKS" \
        --process-id "$SLURM_PROCID" "${@:2}"
' "$VENV/bin/tttjax" "${hosts[0]}:$PORT" --config="$CONFIG" --workdir="$WORKDIR" "$@" || code=$?

interrupted=75 # what `tttjax train` returns when it was asked to stop and has saved
if ((code == interrupted)) && [[ "${REQUEUE:-yes}" == yes ]]; then
    echo "interrupted and saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
