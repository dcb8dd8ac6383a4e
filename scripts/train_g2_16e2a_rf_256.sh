#!/usr/bin/env bash
# DiT-G/2-16E2A, ImageNet 256, rectified flow, sharded (FSDP2). See launch.sh for the variables.
# On several nodes, the experts are distributed over the GPUs of a node. A single node gathers the
# experts instead, and recomputes blocks in the backward pass.
source "$(dirname "$0")/launch.sh"
if [ "$NODES" -gt 1 ]; then
    split 16
    LAYOUT=(--expert-parallel "$GPUS")
else
    split 128
    LAYOUT=(--gradient-checkpointing)
fi
launch train.py --shard "${LAYOUT[@]}" --compile --model DiT-G/2 --num_experts 16 --qk-norm --rf \
    --image-size 256 --global-batch-size "$BATCH" --accum_iter "$ACCUM" "${PAPER[@]}" "$@"
