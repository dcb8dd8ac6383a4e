"""The objectives by name, as --objective and checkpoints have it."""

from diffusion.gaussian import Gaussian
from diffusion.objective import Objective
from diffusion.rectified_flow import DataFlow, RectifiedFlow

OBJECTIVES: dict[str, type[Objective]] = {
    "gaussian": Gaussian,
    "rectified_flow": RectifiedFlow,
    "flow_x": DataFlow,
}


def objective_named(objective: str | None, rf: bool | None) -> str | None:
    """The objective that --objective or the published --rf names; ValueError if they differ."""
    published = {None: objective, True: "rectified_flow", False: "gaussian"}[rf]
    if objective not in (None, published):
        raise ValueError(f"objective: got {objective} beside rf {rf}, expected one of them")
    return published
