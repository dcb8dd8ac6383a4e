#!/usr/bin/env bash
# DiT-S/2-16E2A, ImageNet 256, Gaussian diffusion. See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
split 128
launch train.py --config config/recipes/dit_moe_s2_16e2a.yaml --image-size 256 \
    --global-batch-size "$BATCH" --accum_iter "$ACCUM" --compile "$@"
