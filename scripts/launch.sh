# Sourced by the recipes: `launch SCRIPT FLAGS...` runs a script under torchrun on every GPU.
#
#   DATA=/imagenet/train bash scripts/train_s2_8e2a.sh                   one node of 8 GPUs
#   DATA=... NODES=4 NODE_RANK=0 HOST=node0 bash scripts/train_l2_8e2a.sh  the first of four nodes
#
# DATA class folders; VAE autoencoder; NODES, GPUS (of a node), NODE_RANK, HOST (of node 0), PORT.
# Arguments of a recipe go on to the script: --dry-run, --max-steps 1000, --results-dir ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NODES=${NODES:-1} GPUS=${GPUS:-8}
# The paper's settings: AdamW at a constant 1e-4, no weight decay, EMA 0.9999, 1024 images a step.
BATCH=${BATCH:-1024}
PAPER=(--lr 1e-4 --weight-decay 0 --ema-decay 0.9999 --num_experts_per_tok 2)
[ -z "${DATA:-}" ] || PAPER+=(--data-path "$DATA")
[ -z "${VAE:-}" ] || PAPER+=(--vae-path "$VAE")

launch() {
    torchrun --nnodes="$NODES" --nproc_per_node="$GPUS" --node_rank="${NODE_RANK:-0}" \
        --master_addr="${HOST:-localhost}" --master_port="${PORT:-29500}" "$@"
}

# Images of one GPU and step; with --accum_iter N they are computed in N micro-batches.
per_gpu() {
    if ((BATCH % (NODES * GPUS))); then
        echo "BATCH: got $BATCH, expected a multiple of $NODES nodes x $GPUS GPUs" >&2
        exit 2
    fi
    echo $((BATCH / (NODES * GPUS)))
}
