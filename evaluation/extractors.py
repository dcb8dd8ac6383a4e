"""Networks whose features the metrics compare.

Shape legend: N images of a batch, H x W image
"""

from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from latents.features import FeatureNetwork, load_features
from runtime.errors import UserError, reported_as


class InceptionFeatures(FeatureExtractorInceptionV3):
    """torch-fidelity's port of the TensorFlow Inception of 2015, with ADM's spatial features.

    The spatial features are the first 7 channels of "mixed_6/conv", 17 x 17 x 7 = 2023 numbers in
    the order height, width, channel.

    weights: torch-fidelity's file; None: the library downloads the file
    """

    name = "inception-v3-compat"

    def __init__(self, weights: Path | None):
        features, path = ["2048", "logits_unbiased"], str(weights) if weights else None
        super().__init__(self.name, features, feature_extractor_weights_path=path)
        self.spatial: Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self.keep_spatial)

    def keep_spatial(self, module, inputs, output: Tensor) -> None:
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 2023)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Takes uint8 (N, 3, H, W); returns pool (N, 2048), spatial (N, 2023), logits (N, 1008)."""
        pool, logits = self(images)
        return {"pool": pool, "spatial": self.spatial, "logits": logits}


def load_extractor(
    backbone: str, weights: Path | None, device: torch.device
) -> InceptionFeatures | FeatureNetwork:
    """Loads inception, efficientnet-lite0 or timm:MODEL[@PIXELS] in eval mode."""
    if backbone != "inception":
        return load_features(backbone, device, "--backbone")
    got = "--backbone inception: its weights cannot be downloaded"
    if weights is not None:
        got = f"--inception-weights: got {weights}, expected torch-fidelity's Inception"
    message = (
        f"{got}; download {URL_INCEPTION_V3} for --inception-weights, or use --backbone "
        "efficientnet-lite0, which needs no download"
    )
    if weights is not None:
        try:
            # The library loads the file without weights_only, so check first that this is safe.
            torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # its message recommends weights_only=False, so omit it
            raise UserError(f"{message} ({type(error).__name__})") from None
    with reported_as(message, OSError, RuntimeError, ValueError, EOFError):
        return InceptionFeatures(weights).to(device).eval()
