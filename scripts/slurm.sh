#!/usr/bin/env bash
#SBATCH --job-name=dit-moe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# Runs a recipe on all nodes of a Slurm job; submitted again, or requeued, it goes on where it was:
#   DATA=/imagenet/train sbatch --nodes=4 scripts/slurm.sh scripts/train_g2_16e2a_rf_256.sh
set -euo pipefail
export NODES=$SLURM_JOB_NUM_NODES GPUS=${SLURM_GPUS_ON_NODE:-8}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HOST
exec srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' _ "$@"
