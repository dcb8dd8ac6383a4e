#!/usr/bin/env bash
# DiT-G/2-16E2A, ImageNet 512, rectified flow, ZeRO-2 with expert parallelism. See launch.sh for
# the variables. A single node has to compute blocks again in the backward pass. All wait
# for a save, 198 GB of state and 66 of EMA, so there is one an hour.
source "$(dirname "$0")/launch.sh"
split 4
RECOMPUTE=()
[ "$NODES" -gt 1 ] || RECOMPUTE=(--gradient-checkpointing)
launch train_deepspeed.py --deepspeed_config config/zero2_ep.json --model DiT-G/2 \
    --num_experts 16 --qk-norm --rf --image-size 512 --save-minutes 60 \
    "${RECOMPUTE[@]}" --train_batch_size "$MICRO" --accum_iter "$ACCUM" "${PAPER[@]}" "$@"
