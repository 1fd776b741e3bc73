#!/bin/bash
# DeepSeek-R1-Zero, 671 B parameters, 512 GPUs. From the root of the repository:
#
#   sbatch slurm/r1_zero_671b.sh [section.field=value ...]
#
# One task per GPU. Every task runs the same `r1-megatron train` as on a laptop; it finds RANK, WORLD_SIZE and
# LOCAL_RANK in its environment and joins the job's rendezvous instead of starting ranks of its own.
# Set VENV to the virtual environment on a shared file system (default: .venv in the repository).

#SBATCH --job-name=r1_zero_671b
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.log
# Half an hour before the time limit every rank is asked to end: rollouts stop where they are, a checkpoint is written.
# The same sbatch command again goes on with the run.
#SBATCH --signal=USR1@1800

set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
source "${VENV:-.venv}/bin/activate"
config=slurm/r1_zero_671b.yaml

# What the job will do, on the first lines of its log. A configuration with problems ends here, on one core.
r1-megatron explain "$config" "$@"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts[0]}
# Two jobs on one first node do not meet: the port follows the job's number.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export WORLD_SIZE=$SLURM_NTASKS
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export PYTORCH_ALLOC_CONF=expandable_segments:True

# srun does not inherit --cpus-per-task since Slurm 22.05. One task that fails takes the others down within seconds.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --label \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec r1-megatron train "$@"' r1-megatron "$config" "$@"
