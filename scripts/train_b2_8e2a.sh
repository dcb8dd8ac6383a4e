#!/usr/bin/env bash
# DiT-B/2-8E2A, ImageNet 256, Gaussian diffusion. See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
split 64
launch train.py --model DiT-B/2 --num_experts 8 --image-size 256 \
    --global-batch-size "$BATCH" --accum_iter "$ACCUM" --compile "${PAPER[@]}" "$@"
