#!/usr/bin/env bash
# DiT-L/2-8E2A, ImageNet 256, Gaussian diffusion, sharded (FSDP2). See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
split 32
launch train.py --shard --compile --model DiT-L/2 --num_experts 8 \
    --image-size 256 --global-batch-size "$BATCH" --accum_iter "$ACCUM" "${PAPER[@]}" "$@"
