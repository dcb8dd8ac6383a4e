#!/usr/bin/env bash
# DiT-G/2-16E2A, ImageNet 256, rectified flow. See launch.sh for the variables. One node trains in
# shards (FSDP2) and recomputes blocks in the backward pass; several nodes use ZeRO-2 with expert
# parallelism, where all processes wait while the EMA is gathered, so there is one save an hour.
source "$(dirname "$0")/launch.sh"
G=(--model DiT-G/2 --num_experts 16 --qk-norm --rf --image-size 256 "${PAPER[@]}")
if [ "$NODES" -eq 1 ]; then
    split 128
    launch train.py --shard --gradient-checkpointing --compile --global-batch-size "$BATCH" \
        --accum_iter "$ACCUM" "${G[@]}" "$@"
else
    split 16
    launch train_deepspeed.py --deepspeed_config config/zero2_ep.json --save-minutes 60 \
        --train_batch_size "$MICRO" --accum_iter "$ACCUM" "${G[@]}" "$@"
fi
