#!/usr/bin/env bash
# DiT-L/2-8E2A, ImageNet 256, Gaussian diffusion, ZeRO-2. See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
split 32
launch train_deepspeed.py --deepspeed_config config/zero2.json --model DiT-L/2 --num_experts 8 \
    --image-size 256 --train_batch_size "$MICRO" --accum_iter "$ACCUM" "${PAPER[@]}" "$@"
