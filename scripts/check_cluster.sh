#!/usr/bin/env bash
# Checks all GPUs of one node, or of any number of nodes, and prints one table:
#   bash scripts/check_cluster.sh
#   sbatch --nodes=4 --time=15 scripts/slurm.sh scripts/check_cluster.sh
# tools/benchmarks/bench_cluster.py describes the checks and the flags. See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
processes
exec "${START[@]}" -m tools.benchmarks.bench_cluster "$@"
