"""Reading and writing of weights: our files, published layouts, diffusers, the hub, upcycling."""

from checkpoints.checkpoint import (
    MODEL_FILE,
    Checkpoint,
    averages_of,
    build_model,
    config_of,
    ema_file,
    load_model,
    read_checkpoint,
    read_record,
    save_model,
    step_folders,
)
from checkpoints.record import Record
