#!/usr/bin/env bash
# DiT-B/2-8E2A, ImageNet 256, Gaussian diffusion. See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
split 64
launch train.py --config config/recipes/dit_moe_b2_8e2a.yaml --image-size 256 \
    --global-batch-size "$BATCH" --accum_iter "$ACCUM" --compile "$@"
