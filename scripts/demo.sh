#!/usr/bin/env bash
# Trains a small DiT-MoE on Fashion-MNIST, samples a grid of all classes and maps where the tokens
# went. Needs no network after installation and no GPU; about 10 minutes on 2 CPU cores. Stopped
# half-way, it goes on where it was when run again.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1
out=results/demo
data=data/fashion-mnist

python scripts/prepare_fashion_mnist.py --output "$data"
python train.py --data-path "$data" --vae-path assets/vae-fashion-mnist --image-size 32 \
    --model DiT-Ti/2 --num_experts 8 --num_experts_per_tok 2 --rf \
    --global-batch-size 128 --max-steps "${DEMO_STEPS:-1400}" --lr 2e-3 --warmup-steps 50 \
    --ema-decay 0.995 --precision fp32 --num-workers 1 --run-name demo \
    --log-every 50 --ckpt-every 350 --sample-every 350 --num-sample 20 --sample-cfg-scale 2.5
python sample.py --ckpt "$out" --images-per-class 10 --cfg-scale 2.5 --batch-size 100 \
    --output "$out/samples.png"
python expert_data.py --ckpt "$out" --images-per-class 20 --cfg-scale 2.5 --batch-size 100 \
    --output "$out/expert_data.npz"
for map in class timestep patch; do
    python "heatmap_$map.py" --data "$out/expert_data.npz" --output "$out/heatmap_$map.png"
done
echo
echo "the pictures, all in $out: samples.png, heatmap_class.png, heatmap_timestep.png, heatmap_patch.png"
