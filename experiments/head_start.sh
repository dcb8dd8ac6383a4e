#!/usr/bin/env bash
# Trains the missing runs of question 21 on one set of images (aligned, shifted or emoji): all arms with one
# seed, then with the next. Then it measures the runs of `topk` for question 22. To go on after an
# interruption, run the same command again. While results/PAUSE exists, no new run starts.
#
#     bash experiments/head_start.sh aligned
set -euo pipefail
name=$1 python=${PYTHON:-python}
output=results/head-start-$name rows=experiments/rows/head_start_$name.jsonl
case $name in
    aligned) train=data/fashion-mnist-train-latents held=data/choosing-latents more="--report-path data/reporting-latents" ;;
    shifted)
        train=data/fashion-mnist-train-shifted-latents held=data/choosing-shifted-latents
        more="--report-path data/reporting-shifted-latents" ;;
    emoji) train=data/emoji-train-latents held=data/emoji-held-out-latents more="--batch-size 64" ;;
    *) echo "got $name, expected aligned, shifted or emoji" >&2; exit 2 ;;
esac
replaced="--report-path data/reporting-latents"
if [[ $name == emoji ]]; then replaced="--report-path $held --batch-size 64"; fi
mkdir -p "$output" results/replaced-$name
if [[ -e experiments/rows/replaced_$name.jsonl && ! -e results/replaced-$name/rows.jsonl ]]; then
    cp experiments/rows/replaced_$name.jsonl results/replaced-$name/rows.jsonl
fi
if [[ -e $rows && ! -e $output/rows.jsonl ]]; then cp "$rows" "$output/rows.jsonl"; fi

train_arm() {  # ARM SEED
    while [[ -e results/PAUSE ]]; do sleep 10; done
    # shellcheck disable=SC2086
    $python -m experiments.routers --latents-path $train --val-path $held $more --questions 21 --steps 1600 \
        --precision fp32 --output "$output" --arms "$1" --first-seed "$2" --seeds 1
    cp "$output/rows.jsonl" "$rows"
}

has_row() {  # ARM SEED
    grep -q "\"arm\": \"$1\", \"seed\": $2," "$output/rows.jsonl"
}

for seed in 0 1 2 3 4 5 6 7; do
    for arm in topk dense class unbalanced embedded biased unmodulated warm-100 warm-200; do
        train_arm $arm-8e-3-1600 $seed
    done
    source=$output/runs/source-8e-3-400-$((seed + 100))
    if [[ ! -e $source/choices.safetensors ]] && ! has_row trained-8e-3-1600 $seed; then
        if has_row source-8e-3-400 $((seed + 100)); then  # trained where its weights are not
            sed -i "/\"source-8e-3-400\", \"seed\": $((seed + 100)),/d" "$output/rows.jsonl"
        fi
        train_arm source-8e-3-400 $((seed + 100))
        $python -m experiments.choice_tables --latents-path $train --runs "$source"
    fi
    train_arm trained-8e-3-1600 $seed
    topk=$output/runs/topk-8e-3-1600-$seed
    if [[ $name != shifted && -e $topk ]]; then  # the weights of earlier runs may be gone
        # shellcheck disable=SC2086
        $python -m experiments.replaced_gates --latents-path $train $replaced --runs "$topk" \
            --output results/replaced-$name/rows.jsonl
        cp results/replaced-$name/rows.jsonl experiments/rows/replaced_$name.jsonl
    fi
done
