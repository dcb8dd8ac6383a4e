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
# Runs a recipe on all nodes of a Slurm job. A job that is submitted again, or requeued, goes on with the
# run of its name:
#   RUN=g2 DATA=/imagenet/train sbatch --nodes=4 scripts/slurm.sh scripts/train_g2_16e2a_rf_256.sh
# The images are encoded once, before the first step; see LATENTS in launch.sh.
#
# Time limit: five minutes before the limit, Slurm sends SIGUSR1. Training saves and ends. If a step and
# a save take longer, pass for example --signal=B:USR1@900.
# Failure: when a process dies, srun ends the other processes.
# After both, the job requeues itself if it saved a checkpoint, or encoded a shard of images, since it
# started. Otherwise the next start would end in the same way, so the job ends.
# Preemption: the job gets SIGTERM, saves within the partition's GraceTime, and Slurm requeues it.
set -uo pipefail
export NODES=$SLURM_JOB_NUM_NODES GPUS=${SLURM_GPUS_ON_NODE:-8}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HOST

# Training adds the path of each checkpoint that it saves to this file, and cache_latents.py each shard.
export DIT_MOE_SAVED=$PWD/slurm-$SLURM_JOB_ID.saved
rm -f "$DIT_MOE_SAVED" # left by a node that failed
trap 'rm -f "$DIT_MOE_SAVED"' EXIT

trap 'kill -USR1 $!' USR1 # srun forwards the signal to torchrun on every node
# Use the complete node: all memory by --mem=0, and all cores by a number, which srun does not inherit.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' _ "$@" &
wait $!
status=$?
while kill -0 $! 2> /dev/null; do # a signal ends `wait`, not the job
    wait $!
    status=$?
done
if [ "$status" -ne 0 ] && [ -s "$DIT_MOE_SAVED" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 75 # EX_TEMPFAIL
fi
exit "$status"
