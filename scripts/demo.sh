#!/usr/bin/env bash
# Trains a small DiT-MoE, samples a grid of its classes and maps where the tokens went.
#   bash scripts/demo.sh          Fashion-MNIST: some minutes on 2 CPU cores
#   bash scripts/demo.sh emoji    3D emoji in colour, which takes longer
# Needs no network after installation and no GPU. A demo that was stopped goes on when you run the same
# command again; what is newer than the checkpoint is not made again. DEMO_STEPS=20 bash scripts/demo.sh
# shows in little time that everything works: few steps of training and sampling, and few images.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1
case ${1:-fashion} in
fashion)
    out=results/demo latents=data/fashion-mnist-latents
    images="--data-path data/fashion-mnist --vae-path assets/vae-fashion-mnist --image-size 32"
    train="--objective rectified_flow:mean=-0.4,std=0.85 --sample-every 160"
    draw="--sampler sde --cfg-scale 2.5" steps=640 sampling_steps=50
    classes="" three="ankle-boot dress bag" one=sneaker shown=10 counted=20
    python -m tools.prepare_fashion_mnist --output data/fashion-mnist
    ;;
emoji)
    out=results/demo-emoji latents=data/emoji-latents
    images="--data-path assets/emoji/train.tar --vae-path assets/vae-emoji --image-size 64"
    train="--rf --global-batch-size 64 --lr 1.2e-2 --sample-every 300"
    draw="--sampler heun --cfg-scale 3" steps=900 sampling_steps=25
    classes="--class-labels face-smiling person person-role food-fruit country-flag"
    three="person face-smiling country-flag" one=person shown=8 counted=2
    ;;
*)
    echo "error: got $1, expected fashion or emoji" >&2
    exit 2
    ;;
esac
steps=${DEMO_STEPS:-$steps}
# The images are not mirrored: all shoes of Fashion-MNIST face the same side, and flags have letters.
images="$images --flip False" data="--latents-path $latents"
if [ "$steps" -lt 100 ]; then  # read few images, and do not encode all of them first
    data=$images sampling_steps=5 shown=1 counted=1
fi
if grep -qs '^version: 0\.[12]\.' "$out/config.yaml"; then
    echo "error: $out is of a version before 0.3 and cannot go on: delete or rename it, and start again" >&2
    exit 2
fi
# bf16 is faster than fp32 only where the processor has instructions for bf16.
precision=$(python -c "
import torch
from runtime.devices import lacks_instructions
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
print('fp32' if lacks_instructions(device, torch.bfloat16) else 'bf16')")

[ "$steps" -lt 100 ] || python cache_latents.py $images --output "$latents"
python train.py $data --config config/recipes/fast.yaml $train \
    --max-steps "$steps" --model DiT-Ti/2 --num_experts 8 --num_experts_per_tok 2 --precision "$precision" \
    --optimizer "muon:precision=$precision" --results-dir results --run-name "${out#results/}" \
    --log-every 20 --num-sample 20 --sample-cfg-scale 2.5

# Makes a file by a command, unless it is newer than what it is made of.
make() {  # file, source, command...
    if [ "$1" -nt "$2" ]; then
        echo "$1 is newer than $2"
    else
        "${@:3}"
    fi
}
checkpoint=$(find "$out/checkpoints" -mindepth 1 -maxdepth 1 2> /dev/null | sort | tail -n 1) || true
draw="--ckpt $out $draw --num-sampling-steps $sampling_steps --precision $precision"
make "$out/samples.png" "$checkpoint" python sample.py $draw $classes --images-per-class "$shown" \
    --batch-size 100 --output "$out/samples.png"
make "$out/three.png" "$checkpoint" python sample.py $draw --class-labels $three \
    --output "$out/three.png" --experts "$out/experts.png"
make "$out/expert_data.npz" "$checkpoint" python expert_data.py $draw --images-per-class "$counted" \
    --batch-size 100 --output "$out/expert_data.npz"
for map in class timestep; do
    make "$out/heatmap_$map.png" "$out/expert_data.npz" python "heatmap_$map.py" \
        --data "$out/expert_data.npz" --output "$out/heatmap_$map.png" &
done
make "$out/expert_report.html" "$out/expert_data.npz" \
    python expert_report.py --data "$out/expert_data.npz" &
make "$out/run.png" "$out/log.jsonl" python plot_run.py "$out"
for job in $(jobs -p); do wait "$job"; done
cat <<EOF

The pictures, all in $out:
    samples.png    images of each class            experts.png    where each patch goes as it forms
    run.png        losses, speed, expert load      expert_report.html, heatmap_class.png, _timestep
Try next:
    python sample.py --ckpt $out --class-labels $one --images-per-class 16 --seed 1000
    python train.py $data --model DiT-Ti/2 \\
        --rf --router expert_choice --global-batch-size 64 --max-steps 400 --lr 2e-3 \\
        --ema exponential:decay=0.99 --run-name expert-choice
    python plot_run.py $out results/expert-choice
EOF
