"""What of a model is trained: all of it but for --freeze, or the gates only."""

from fnmatch import fnmatchcase

from torch import nn

from runtime.errors import UserError
from training.config import StepConfig


def freeze(model: nn.Module, config: StepConfig) -> None:
    """Freezes the parameters that --freeze names (shell style; a module stands for all in it), and
    with --train-router-only all but the gates.

    UserError when a pattern names nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in config.freeze:
        matching = [
            n for n in parameters if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")
        ]
        if not matching:
            raise UserError(
                f"--freeze: got {pattern}, expected the name of a parameter, such as "
                f"{next(iter(parameters))}"
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if config.train_router_only:
        for name, weight in parameters.items():
            weight.requires_grad_(weight.requires_grad and ".moe.gate." in name)
    if not any(weight.requires_grad for weight in parameters.values()):
        flag = "--train-router-only" if config.train_router_only else "--freeze"
        raise UserError(f"{flag}: got a model with nothing left to train, expected some of it")
