#!/usr/bin/env bash
# DiT-B/2-8E2A, ImageNet 256, Gaussian diffusion, sharded (FSDP2), which leaves memory for
# micro-batches of 128 images per GPU. See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
split 128
launch train.py --shard --config config/recipes/dit_moe_b2_8e2a.yaml --image-size 256 \
    --global-batch-size "$BATCH" --accum_iter "$ACCUM" --compile "$@"
