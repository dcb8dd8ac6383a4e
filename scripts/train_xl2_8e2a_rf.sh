#!/usr/bin/env bash
# DiT-XL/2-8E2A, ImageNet 256, rectified flow, ZeRO-2. See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
split 32
launch train_deepspeed.py --deepspeed_config config/zero2.json --model DiT-XL/2 --num_experts 8 \
    --qk-norm --rf --image-size 256 --train_batch_size "$MICRO" --accum_iter "$ACCUM" \
    "${PAPER[@]}" "$@"
