"""A DiT-MoE as a model and pipeline of diffusers.

export.py copies this file, and the modules that it imports, into the exported folder.

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipeline(class_labels=["cat", 3], seed=0).images
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from checkpoints.quantizers import quantizer
from initialization import initialize
from latents.autoencoder import AUTOENCODERS, CONFIG_FILE, LatentNorm, Pixels
from latents.words import Words
from models import DiT
from runtime.files import read_json
from sampling.generate import SamplerSettings, generate, parse_labels, seeds_of

CODE = "dit_moe_sampling_diffusers_pipeline"  # this file's name in an exported folder


def write_index(folder: Path) -> None:
    """Writes the files that point diffusers to the pipeline and the model in dit_moe_*.py."""
    config = folder / "vae" / CONFIG_FILE  # absent for a model of pixels
    vae = ["diffusers", read_json(config)["_class_name"]] if config.exists() else [None, None]
    index = {
        "_class_name": ["pipeline", "DiTMoEPipeline"],
        "transformer": ["dit_moe_transformer", "DiTMoETransformer"],
        "vae": vae,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    modules = sorted(path.stem for path in folder.glob("dit_moe_*.py"))
    lines = [f"    from .{module} import __doc__" for module in modules]
    (folder / "pipeline.py").write_text(
        '"""The entry of this pipeline\'s code."""\n\n'
        f"from .{CODE} import DiTMoEPipeline\n\n"
        "if False:  # diffusers copies the files that are named here\n" + "\n".join(lines) + "\n"
    )
    (folder / "transformer" / "dit_moe_transformer.py").write_text(
        '"""The model; its code is beside pipeline.py, which diffusers loads first."""\n\n'
        f"from . import {CODE} as code\n\n"
        "DiTMoETransformer = code.DiTMoETransformer\n"
    )


class DiTMoETransformer(ModelMixin, ConfigMixin):
    """Wraps `models.DiT`, as attribute `model`.

    dit: fields of the DiT
    info: metadata of the checkpoint
    quantization: int8 or int4 for quantised experts, or None
    """

    # Otherwise diffusers ignores `dtype`, because pos_embed, the first tensor, is always fp32.
    _supports_param_buffer_assignment = False

    @register_to_config
    def __init__(self, dit: dict, info: dict, quantization: str | None = None):
        super().__init__()
        with torch.device("meta"):
            model = DiT(**dit)
        self.model = model.to_empty(device=torch.get_default_device())
        # Within from_pretrained, nn.init does nothing, because the weights are loaded afterwards.
        if nn.init.constant_(torch.zeros(1, device="cpu"), 1.0):
            initialize(self.model)
        if quantization:
            for name in self.model.expert_parameters():
                # diffusers may leave it uninitialised until loading
                self.model.get_parameter(name).data.zero_()
            quantizer(quantization).replace_experts(self.model)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the prediction and the auxiliary loss, see `models.DiT.forward`."""
        return self.model(x, t, y)


class DiTMoEPipeline(DiffusionPipeline):
    """Generates the same images as sample.py, from classes and a seed."""

    _optional_components = ["vae"]

    def __init__(self, transformer: DiTMoETransformer, vae: ModelMixin | None = None):
        super().__init__()
        # A file may hold routers in fp32 next to other weights in 16 bits.
        transformer.model.to(next(transformer.parameters()).dtype)
        self.register_modules(transformer=transformer, vae=vae)

    @property
    def class_names(self) -> list[str]:
        names = self.transformer.config.info.get("class_names")
        return names or [str(label) for label in range(self.transformer.model.config.num_classes)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        conditions: Mapping[str, Tensor] | None = None,
        prompt: str | Sequence[str] | None = None,
    ) -> ImagePipelineOutput:
        """Generates one image per label.

        The seed of image i is seed + i, so an image does not depend on the batch. None selects the
        default of sample.py.

        class_labels: numbers or names; required, unless the model has only one class
        generator: one generator that draws all seeds, or one generator per label
        output_type: "pil"; "np" (N, H, W, 3) or "pt" (N, 3, H, W), both in [0, 1]
        conditions: tensors of conditions besides the class, by name, with one row per label; a
            tensor without this first dimension applies to all images
        prompt: one text, or one per image, for a model with the condition text; "" is no text
        """
        info = self.transformer.config.info
        model = self.transformer.model
        if prompt is not None:
            if "text" not in model.conditions:
                raise ValueError("prompt: the model has no condition text, expected class_labels")
            prompts = [prompt] if isinstance(prompt, str) else prompt
            words = Words(tuple(info["words"]), model.conditions["text"].length)
            rows = words.rows(prompts)
            text = rows[0] if isinstance(prompt, str) else rows  # one text is of all images
            conditions = {**(conditions or {}), "text": text}
        elif "text" in model.conditions and "label" not in model.conditions:
            raise ValueError('prompt: is required by a model of text ("" for no text)')
        if class_labels is None and prompt is not None:
            labels = [None] * len(prompts)
        else:
            if class_labels is None and len(self.class_names) == 1:
                class_labels = [0]
            labels = parse_labels(class_labels, self.class_names, "class_labels")
        count = len(labels)
        seeds: Sequence[int] = range(seed, seed + count)
        if isinstance(generator, torch.Generator):
            seeds = seeds_of(generator, count)
        elif generator is not None:
            if len(generator) != count:
                raise ValueError(f"generator: got {len(generator)}, expected {count}")
            seeds = [seeds_of(one, 1)[0] for one in generator]
        objective = info.get("objective", "gaussian")
        settings = SamplerSettings(objective, sampler, num_inference_steps, guidance_scale)
        latents = generate(self.transformer.model, labels, seeds, settings, conditions=conditions)
        if not latents.isfinite().all():
            raise ValueError("the model's output is not finite; load it in bfloat16 or float32")
        norm = (stored := info.get("latents_norm")) and LatentNorm(**stored)
        kind = AUTOENCODERS[type(self.vae).__name__] if self.vae else None
        vae = kind(self.vae.config, self.vae, norm) if kind else Pixels(norm)
        images = vae.decode(latents)  # (N, 3, H, W) uint8
        if output_type == "pt":
            return ImagePipelineOutput(images=images / 255)
        pixels = images.permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return ImagePipelineOutput(images=pixels / np.float32(255))
        if output_type != "pil":
            raise ValueError(f"output_type: got {output_type}, expected pil, np or pt")
        return ImagePipelineOutput(images=[Image.fromarray(image) for image in pixels])

    def save_pretrained(self, save_directory: str | Path, **options) -> None:
        """Saves the weights as diffusers does, and a copy of the code."""
        super().save_pretrained(save_directory, **options)
        for path in Path(__file__).parent.glob("dit_moe_*.py"):
            if path.stem != "dit_moe_transformer":
                shutil.copy(path, save_directory)
        write_index(Path(save_directory))
