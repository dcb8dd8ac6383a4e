#!/usr/bin/env bash
# DiT-XL/2-8E2A, ImageNet 256, rectified flow, sharded (FSDP2). See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
split 64
launch train.py --shard --compile --model DiT-XL/2 --num_experts 8 \
    --qk-norm --rf --image-size 256 --global-batch-size "$BATCH" --accum_iter "$ACCUM" \
    "${PAPER[@]}" "$@"
