"""A DiT-MoE as diffusers knows models and pipelines; export.py copies this file, and all of the
repository that it needs, into the folders that it writes.

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipeline(class_labels=["cat", 3], seed=0).images
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from latents.autoencoder import decode
from models import DiT
from sampling.generate import SamplerSettings, generate, parse_labels


class DiTMoETransformer(ModelMixin, ConfigMixin):
    """`models.DiT` as `model`; `dit` are its fields, `info` what the checkpoint says of itself."""

    @register_to_config
    def __init__(self, dit: dict, info: dict):
        super().__init__()
        self.model = DiT(**dit)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and balance loss, see `models.DiT.forward`."""
        return self.model(x, t, y)


class DiTMoEPipeline(DiffusionPipeline):
    """From classes and a seed to images, the same as sample.py draws."""

    def __init__(self, transformer: DiTMoETransformer, vae: AutoencoderKL):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    @property
    def class_names(self) -> list[str]:
        names = self.transformer.config.info.get("class_names")
        return names or [str(label) for label in range(self.transformer.model.config.num_classes)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
    ) -> ImagePipelineOutput:
        """Draws an image of each label; image i comes from seed + i, whatever the batch.

        What is None is as in sample.py: guidance 1.5 (1 for a model without label dropout), on 3
        channels for Gaussian diffusion and on all for flow; the objective's first sampler.
        """
        info = self.transformer.config.info
        objective = info.get("objective") or "gaussian"
        latents = generate(
            self.transformer.model,
            parse_labels(class_labels, self.class_names),
            range(seed, seed + len(class_labels)),
            SamplerSettings(
                objective,
                sampler,
                num_inference_steps,
                guidance_scale,
                objective_options=info.get("objective_options", {}),
            ),  # fmt: skip
        )
        pixels = decode(self.vae, latents).permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3) uint8
        return ImagePipelineOutput(images=[Image.fromarray(image) for image in pixels])
