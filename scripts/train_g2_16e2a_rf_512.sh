#!/usr/bin/env bash
# DiT-G/2-16E2A, ImageNet 512, rectified flow, ZeRO-3 with expert parallelism. See launch.sh for the
# variables.
source "$(dirname "$0")/launch.sh"
split 8
launch train_deepspeed.py --deepspeed_config config/zero3_ep.json --model DiT-G/2 \
    --num_experts 16 --qk-norm --rf --image-size 512 --gradient-checkpointing \
    --train_batch_size "$MICRO" --accum_iter "$ACCUM" "${PAPER[@]}" "$@"
