#!/bin/bash
# One study on sixteen GPUs, as a Slurm array. All tasks run the same command on the same PostgreSQL store: the first
# makes the study, the others join it, and together they end exactly the number of trials that is asked for.
#
#   export RIS_HPO_STORAGE_URL=postgresql://me@db.cluster/ris   # the password from ~/.pgpass or a password file
#   ris-hpo prove                                               # once, on any node: the certificate all tasks find
#   sbatch studies/examples/slurm.sh wide 200
#
# A minute before the time limit, or at preemption, Slurm sends SIGTERM: the task checkpoints its trial, puts it back
# and leaves; --requeue starts it again. A node that dies is found by its missing heartbeat. The storage folder is
# shared by the nodes, so that a trial continues from its checkpoint wherever it is taken up again.
#SBATCH --job-name=ris-hpo
#SBATCH --array=0-15
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.log

set -euo pipefail
space=${1:?name or file of the space} trials=${2:?number of trials}

: "${RIS_HPO_STORAGE_URL:?address of the PostgreSQL store}"
export RIS_HPO_STORAGE_DIR=${RIS_HPO_STORAGE_DIR:-$SLURM_SUBMIT_DIR/storage}

exec srun ris-hpo run --space "$space" --n-trials "$trials" --workers 1 --gpus 0
