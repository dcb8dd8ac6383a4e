# Sourced by the recipes: `launch SCRIPT FLAGS...` runs a script under torchrun on every GPU.
# The environment need not be activated.
#
#   RUN=s2 DATA=/imagenet/train bash scripts/train_s2_8e2a.sh     one node of 8 GPUs
#   RUN=l2 DATA=... NODES=4 NODE_RANK=0 HOST=node0 bash scripts/train_l2_8e2a.sh    the first of four nodes
#   NODES=4 bash scripts/train_g2_16e2a_rf_256.sh --dry-run       memory and steps only
#
# Variables:
#   RUN        name of the run, results/RUN; the same command again goes on with it
#   DATA       folder of class folders
#   LATENTS    latent cache to train on, created from DATA before the first step (default:
#              data/latents-256, 42 GB for ImageNet). All nodes must see it. Without DATA it must exist.
#   IMAGES=1   train on the images of DATA, with the autoencoder in every step
#   VAE        autoencoder
#   NODES, GPUS (per node), NODE_RANK, HOST (of node 0), PORT (and PORT + 1)
#   BATCH      images per optimizer step
#   MICRO      images per GPU and micro-batch
#   GRACE      seconds that a run gets to save when it has to stop (600)
#   TRACES     folder of the trace files that the processes of a hung run write (traces)
#   PYTHON     interpreter (that of .venv if scripts/setup.sh has created it, else python)
#   NUMA       torchrun's --numa-binding, such as node: binds each process to the cores near its GPU
# The arguments of a recipe are passed to the script: --dry-run, --max-steps 1000, --results-dir ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NODES=${NODES:-1} GPUS=${GPUS:-8}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ ! -x .venv/bin/python ] || PYTHON=$PWD/.venv/bin/python
fi
# The paper's settings: AdamW at a constant 1e-4, no weight decay, EMA 0.9999, 1024 images per step.
BATCH=${BATCH:-1024}
PAPER=(--config config/recipes/published.yaml --num_experts_per_tok 2)

# split N: sets MICRO, at most N (or $MICRO) images per GPU, and ACCUM, the number of micro-batches.
split() {
    local share=$((BATCH / (NODES * GPUS)))
    if ((share * NODES * GPUS != BATCH)); then
        echo "BATCH: got $BATCH, expected a multiple of $NODES nodes x $GPUS GPUs" >&2
        exit 2
    fi
    MICRO=${MICRO:-$1}
    ((MICRO <= share)) || MICRO=$share
    while ((share % MICRO)); do MICRO=$((MICRO - 1)); done
    ACCUM=$((share / MICRO))
}

# processes: sets START, the command that starts a script on every GPU, and its environment.
processes() {
    # torchrun forwards SIGTERM and SIGUSR1. Training then saves, within the given time.
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-600}
    # When a collective hangs, every process writes its last collectives to $TRACES; `torchfrtrace`
    # reads them. Without a limit, each process would start up to 32 compiler threads.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    local traces=${TRACES:-$PWD/traces}
    mkdir -p "$traces"
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$traces/${SLURM_JOB_ID:+job_${SLURM_JOB_ID}_}rank_
    export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
    START=("$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$GPUS"
        --node_rank="${NODE_RANK:-0}" --master_addr="${HOST:-localhost}"
        --master_port="${PORT:-29500}" ${NUMA:+--numa-binding="$NUMA"})
}

launch() {
    local size word name i words=() input=()
    for word in "$@"; do # --image_size=512 becomes --image-size 512
        name=${word%%=*}
        if [[ $word != --* ]]; then
            words+=("$word")
        elif [[ $word == *=* ]]; then
            words+=("${name//_/-}" "${word#*=}")
        else
            words+=("${name//_/-}")
        fi
    done
    set -- "${words[@]}"
    size="$*" size=${size##*--image-size } size=${size%% *}
    for ((i = 0; i < ${#words[@]} - 1; i++)); do
        [[ ${words[i]} != --vae-path ]] || VAE=${words[i + 1]}
        [[ ${words[i]} != --latents-path ]] || LATENTS=${words[i + 1]}
    done
    [ -z "${RUN:-}" ] || set -- "$@" --run-name "$RUN"
    [ -z "${VAE:-}" ] || input+=(--vae-path "$VAE")
    if [[ " $* " == *" --dry-run "* ]]; then
        if [ -n "${LATENTS:-}" ]; then
            input+=(--latents-path "$LATENTS")
        elif [ -n "${DATA:-}" ]; then
            input+=(--data-path "$DATA")
        fi
        WORLD_SIZE=$((NODES * GPUS)) LOCAL_WORLD_SIZE=$GPUS "$PYTHON" "$@" "${input[@]}"
        return
    fi
    if [ -z "${RUN:-}" ]; then
        ((${NODE_RANK:-0})) || echo "RUN: got nothing, expected RUN=NAME, a name for the run folder" >&2
        exit 2
    fi
    processes
    if [ -n "${IMAGES:-}" ]; then
        exec "${START[@]}" "$@" "${input[@]}" --data-path "${DATA:-}"
    fi
    LATENTS=${LATENTS:-data/latents-$size}
    if [ -n "${DATA:-}" ]; then # existing shards are not encoded again
        # Some nodes finish first. Their training waits for the others, and would find the encoding
        # of the others on the same port.
        "${START[@]}" --master_port=$((${PORT:-29500} + 1)) cache_latents.py --data-path "$DATA" \
            --image-size "$size" "${input[@]}" --output "$LATENTS"
        START+=(--rdzv-conf timeout=36000)
        ((NODES == 1)) || echo "training waits up to ten hours until all nodes have encoded their images"
    fi
    exec "${START[@]}" "$@" "${input[@]}" --latents-path "$LATENTS"
}

# launch_g SIZE MANY ONE FLAGS...: trains G on images of SIZE pixels. On several nodes, the experts
# are distributed over the GPUs of a node, with at most MANY images per GPU. A single node gathers
# the experts instead, and recomputes blocks in the backward pass, with at most ONE images per GPU.
launch_g() {
    local size=$1 layout=(--expert-parallel "$GPUS") images=$2
    ((NODES > 1)) || { layout=(--gradient-checkpointing) images=$3; }
    split "$images"
    launch train.py --shard "${layout[@]}" --compile --model DiT-G/2 --num_experts 16 --qk-norm \
        --rf --image-size "$size" --global-batch-size "$BATCH" --accum_iter "$ACCUM" "${PAPER[@]}" \
        "${@:4}"
}
