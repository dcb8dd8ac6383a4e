#!/usr/bin/env bash
# Trains a small DiT-MoE on Fashion-MNIST, samples a grid of all classes, and maps the experts of the
# tokens. The demo takes some minutes on 2 CPU cores, without GPU and, once installed, without
# network. Run it again to resume after an interruption.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1
out=results/demo
data=data/fashion-mnist

# --flip False, because all shoes of this data set point to the same side.
python scripts/prepare_fashion_mnist.py --output "$data"
python cache_latents.py --data-path "$data" --vae-path assets/vae-fashion-mnist --image-size 32 \
    --flip False --output "$data-latents"
python train.py --latents-path "$data-latents" --config config/recipes/fast.yaml \
    --model DiT-Ti/2 --num_experts 8 --num_experts_per_tok 2 --rf --max-steps "${DEMO_STEPS:-640}" \
    --objective-mean -0.4 --objective-std 0.85 --run-name demo \
    --log-every 20 --sample-every 160 --num-sample 20 --sample-cfg-scale 2.5
draw="--ckpt $out --sampler sde --num-sampling-steps 50 --cfg-scale 2.5"
python sample.py $draw --images-per-class 10 --batch-size 100 --precision bf16 \
    --output "$out/samples.png"
python sample.py $draw --class-labels ankle-boot dress bag \
    --output "$out/three.png" --experts "$out/experts.png"
python expert_data.py $draw --images-per-class 20 --batch-size 100 --precision bf16 \
    --output "$out/expert_data.npz"
for map in class timestep patch; do
    python "heatmap_$map.py" --data "$out/expert_data.npz" --output "$out/heatmap_$map.png" &
done
python plot_run.py "$out"
for job in $(jobs -p); do wait "$job"; done
cat <<EOF

The pictures, all in $out:
    samples.png    ten images per class            experts.png    experts of each patch over time
    run.png        losses, speed, expert load      heatmap_class.png, _timestep, _patch
Try next:
    python sample.py --ckpt $out --class-labels sneaker --images-per-class 16 --seed 1000
    python train.py --latents-path $data-latents --model DiT-Ti/2 --rf --router expert_choice \\
        --global-batch-size 64 --max-steps 400 --lr 2e-3 --ema-decay 0.99 --run-name expert-choice
    python plot_run.py $out results/expert-choice
EOF
