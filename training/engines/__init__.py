"""Engines. The settings decide which one holds a run; see `training.engine.Engine`."""

from training.engine import Engine
from training.sections import EngineConfig


def engine_for(config: EngineConfig) -> type[Engine]:
    """Returns the engine, whose module takes seconds to import."""
    if config.deepspeed_config:
        from training.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine
    if config.shard:
        from training.engines.fsdp import FSDPEngine

        return FSDPEngine
    from training.engines.ddp import DDPEngine

    return DDPEngine
