#!/usr/bin/env bash
# DiT-G/2-16E2A, ImageNet 512, rectified flow, sharded (FSDP2). See launch.sh for the variables.
source "$(dirname "$0")/launch.sh"
launch_g 512 4 32 "$@"
