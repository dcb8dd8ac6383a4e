"""The condition `size`: size and crop of the original image."""

import torch
from torch import Tensor

from conditions import CONDITIONS, WAVES, Condition, EmbedderConfig, sinusoids, two_layers


class SizeEmbedder(Condition):
    """Embeds the size and the crop of the original image (SDXL, Podell et al. 2023, arXiv
    2307.01952, section 2.2).

    The values (N, 4) are height and width of the original image, and top and left edge of the crop,
    relative to the training image: (2, 2, 0, 0) is an original twice as large. The default
    (1, 1, 0, 0) is an original of the training size. As in SDXL, guidance does not drop the size.
    """

    def __init__(self, config: EmbedderConfig):
        super().__init__(config)
        self.mlp = two_layers(4 * WAVES, config.hidden_size)

    def default(self, count: int, device: torch.device) -> Tensor:
        values = torch.zeros(count, 4, device=device)  # without a copy from the host
        values[:, :2] = 1
        return values

    def forward(self, values: Tensor) -> Tensor:
        waves = sinusoids(1000 * values.flatten(), WAVES)  # (4 N, 256)
        return self.mlp(waves.view(len(values), -1).to(self.mlp[0].weight.dtype))  # (N, D)


CONDITIONS["size"] = SizeEmbedder
