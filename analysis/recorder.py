"""Counts, while a DiT samples, which experts the tokens of every layer chose.

    with RoutingRecorder(model, num_steps=50) as recorder:
        recorder.start_batch(labels)
        pipeline.latents(labels, seeds, callback=recorder.end_step)
    recorder.by_class                                       # (L, C, E)

The counts are all that is kept, so memory does not depend on the number of images, and they stay on
the model's device, so no step waits for one. The recorder listens to the blocks, which return what
their routers decided.

Shape legend:
    N images of a batch, T tokens per image, E experts, K experts per token,
    L sparse layers, C classes, S sampling steps
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models import DiT


class RoutingRecorder:
    """Context manager that counts every layer's choices of experts, of the conditional rows alone.

    A guided batch is [conditional; unconditional], an unguided one all conditional: either way the
    conditional images come first, as many as there are labels. `by_class` (L, C, E), `by_step`
    (L, S, E) and `by_position` (L, T, E) are int64 counts of assignments, K for each token; `times`
    (S,) float64 is the t that the model was given at each step. The model must be called once a
    step. On leaving, also by an exception, the model is as it was.
    """

    def __init__(self, model: DiT, num_steps: int):
        config, device = model.config, model.pos_embed.device
        self.blocks = [block for block in model.blocks if block.moe is not None]
        self.num_experts_per_tok = config.num_experts_per_tok
        self.num_tokens = model.x_embedder.num_patches
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.labels: Tensor | None = None
        self.step = 0

        def zeros(rows: int) -> Tensor:
            shape = (len(self.blocks), rows, config.num_experts)
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.by_class = zeros(config.num_classes)
        self.by_step = zeros(num_steps)
        self.by_position = zeros(self.num_tokens)
        self.times = torch.full((num_steps,), torch.nan, dtype=torch.float64, device=device)

    def __enter__(self) -> "RoutingRecorder":
        for layer, block in enumerate(self.blocks):
            hook = partial(self.count, layer)
            self.handles.append(block.register_forward_hook(hook))
        return self

    def __exit__(self, *exception) -> None:
        while self.handles:
            self.handles.pop().remove()

    def start_batch(self, labels: Sequence[int]) -> None:
        """Announces a run of the sampler for images of these labels."""
        self.labels = torch.tensor(labels, device=self.by_class.device)  # (N,)
        self.step = 0

    def end_step(self, state: dict) -> None:
        """The sampler's callback: notes the time of the step just done; the next one follows."""
        self.times[self.step] = state["t"][0]
        self.step = state["step"] + 1

    # Not compiled with its block: a graph that holds the step number would be built for every step.
    @torch.compiler.disable
    def count(self, layer: int, block: nn.Module, inputs: tuple, outputs: tuple) -> None:
        """The forward hook of a block, which returns (x, routing)."""
        if self.labels is None:
            raise RuntimeError("start_batch comes before the model is called")
        x, routing = outputs
        if len(x) not in (len(self.labels), 2 * len(self.labels)):
            raise RuntimeError(
                f"block {layer}: got {len(x)} images, expected {len(self.labels)}, or twice as "
                "many with guidance"
            )
        num_rows, num_experts = len(self.labels) * self.num_tokens, self.by_class.shape[-1]
        # One more image takes the rows that do not count: those without a class.
        token = routing.token.clamp(max=num_rows)
        image, position = token // self.num_tokens, token % self.num_tokens
        table = torch.zeros(
            num_rows + self.num_tokens, num_experts, dtype=torch.int64, device=token.device
        )
        place = (image * self.num_tokens + position) * num_experts + routing.expert
        table.view(-1).scatter_add_(0, place, torch.ones_like(place))
        chosen = table[:num_rows].view(-1, self.num_tokens, num_experts)  # (N, T, E)
        self.by_class[layer].index_add_(0, self.labels, chosen.sum(1))
        self.by_step[layer, self.step] += chosen.sum((0, 1))
        self.by_position[layer] += chosen.sum(0)
