#!/usr/bin/env bash
#SBATCH --job-name=dit-moe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Runs a recipe on all nodes of a Slurm job; submitted again, or requeued, it goes on where it was:
#   DATA=/imagenet/train sbatch --nodes=4 scripts/slurm.sh scripts/train_g2_16e2a_rf_256.sh
# The images are encoded once, before the first step; launch.sh says where to.
# Five minutes before the time limit Slurm sends SIGUSR1: the training saves and ends, and the job
# requeues itself. A model that takes longer for a step and a save needs more: --signal=B:USR1@900.
# When a process dies, srun ends the job's other processes, and the job requeues itself if a new
# checkpoint was written since it started. Without a new checkpoint it would fail again: it ends.
# A job that is preempted gets SIGTERM, saves just so in the partition's GraceTime, and is requeued
# by Slurm.
set -uo pipefail
export NODES=$SLURM_JOB_NUM_NODES GPUS=${SLURM_GPUS_ON_NODE:-8}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HOST TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # no store outlives its processes

newest() { # the newest complete checkpoint below the results folder
    find -L "${RESULTS:-results}" -path '*/checkpoints/[0-9]*' -prune -printf '%T@ %p\n' 2> /dev/null |
        sort -n | tail -n 1
}

stopped=
before=$(newest)
trap 'stopped=1; kill -USR1 "$job"' USR1 # srun passes it on to torchrun on every node
# A node is all ours: its memory by --mem=0, its cores by a number, which srun does not inherit.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' _ "$@" &
job=$!
wait "$job"
status=$?
while kill -0 "$job" 2> /dev/null; do # a signal ends `wait`, not the job
    wait "$job"
    status=$?
done
if [ "$status" -ne 0 ] && { [ -n "$stopped" ] || [ "$(newest)" != "$before" ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 75 # EX_TEMPFAIL
fi
exit "$status"
