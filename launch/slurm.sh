#!/usr/bin/env bash
# Trains on the hosts of a Slurm cluster: one process per host, with all of its GPUs.
#
#   CONFIG=paper:125m,ttt_e2e,pretrain WORKDIR=/shared/runs/125m \
#       sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config.mesh.fsdp=8
#
# CONFIG   experiment file with its argument                                         (required)
# WORKDIR  shared folder for checkpoints and metrics                                 (required)
# VENV     shared virtual environment with `tttjax[cuda]`    (default: .venv in the checkout)
# PORT     coordinator port on the first host                (default: from the job ID)
# REQUEUE  yes: requeue an interrupted job after it has saved (default yes)
#
# Other arguments are passed to `tttjax train`. Two minutes before the time limit (`--signal` below)
# and on preemption, Slurm sends SIGTERM: training saves and stops. The job is then requeued and
# resumes from the last checkpoint, as when the same command is submitted again.
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
if [[ ! -x "$VENV/bin/tttjax" ]]; then
    echo "error: $VENV/bin/tttjax is missing; install tttjax[cuda] in $VENV, or set VENV." >&2
    exit 2
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# SLURM_PROCID differs between hosts, so it is expanded there. SLURM_LOCALID is unset so that JAX
# does not restrict the only process of a host to a single GPU.
cd "$REPOSITORY"
code=0
# shellcheck disable=SC2016
srun bash -c '
    exec env -u SLURM_LOCALID "$0" train --coordinator "$1" --process-count "$SLURM_NTASKS" \
        --process-id "$SLURM_PROCID" "${@:2}"
' "$VENV/bin/tttjax" "${hosts[0]}:$PORT" --config="$CONFIG" --workdir="$WORKDIR" "$@" || code=$?

interrupted=75 # exit code of `tttjax train` when it is stopped and has saved
if ((code == interrupted)) && [[ "${REQUEUE:-yes}" == yes ]]; then
    echo "interrupted and saved; requeueing"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
