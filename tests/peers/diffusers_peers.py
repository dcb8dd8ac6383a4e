"""diffusers' own tests of models and pipelines, for exported models; see test_diffusers.py.

EXPORTS names a folder of exported pipelines. The tests are those of a checkout of diffusers, whose
root is on the path.
"""

import json
import os
import unittest
from pathlib import Path

import diffusers
import torch
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from tests.models.testing_utils import (
    AttentionTesterMixin,
    BaseModelTesterConfig,
    LoraTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TorchAoTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from tests.pipelines.test_pipelines_common import PipelineTesterMixin
from tests.testing_utils import torch_device

EXPORTS = Path(os.environ["EXPORTS"])
PARTS = {
    "": ModelTesterMixin, "Training": TrainingTesterMixin, "Memory": MemoryTesterMixin,
    "Attention": AttentionTesterMixin, "LoRA": LoraTesterMixin, "Compile": TorchCompileTesterMixin,
    "TorchAo": TorchAoTesterMixin,
}  # fmt: skip


def code_of(folder: Path, file: str, name: str, subfolder: str | None = None) -> type:
    return get_class_from_dynamic_module(
        str(folder), module_file=file, class_name=name, subfolder=subfolder, trust_remote_code=True
    )


def model_tests(folder: Path) -> type:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    fields = {k: v for k, v in config.items() if not k.startswith("_") and k != "auto_map"}
    kind = code_of(folder, "transformer_dit_moe.py", "DiTMoETransformer2DModel", "transformer")
    size = fields["sample_size"]

    class Config(BaseModelTesterConfig):
        model_class = kind
        main_input_name = "hidden_states"
        input_shape = fields["in_channels"], size, size
        output_shape = fields["out_channels"], size, size
        model_split_percents = [0.7, 0.9]
        pretrained_model_name_or_path = str(folder)
        pretrained_model_kwargs = {"subfolder": "transformer"}

        def get_init_dict(self) -> dict:
            return dict(fields)

        def get_dummy_inputs(self, batch_size: int = 2) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(0)
            latents = torch.randn(batch_size, *self.input_shape, generator=generator)
            inputs = {
                "hidden_states": latents,
                "timestep": torch.linspace(0.2, 0.8, batch_size),
                "class_labels": torch.arange(batch_size),
            }
            return {name: value.to(torch_device) for name, value in inputs.items()}

    class Checkpointing:
        """Tests that expect the name of the class as an argument."""

        def test_gradient_checkpointing_is_applied(self):
            super().test_gradient_checkpointing_is_applied({kind.__name__})

    bases = {part: (mixin,) for part, mixin in PARTS.items()}
    bases["Training"] = Checkpointing, TrainingTesterMixin
    return {
        f"TestModel{part}{folder.name.title().replace('-', '')}": type(part, (Config, *more), {})
        for part, more in bases.items()
    }


def pipeline_tests(folder: Path) -> type:
    kind = code_of(folder, "pipeline.py", "DiTMoEPipeline")

    class Tests(PipelineTesterMixin, unittest.TestCase):
        pipeline_class = kind
        params = frozenset({"class_labels", "guidance_scale"})
        batch_params = frozenset({"class_labels"})

        def get_dummy_components(self) -> dict:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
            return {name: getattr(pipeline, name) for name in ("transformer", "scheduler", "vae")}

        def get_dummy_inputs(self, device, seed: int = 0) -> dict:
            return {
                "class_labels": [1],
                "generator": torch.Generator(device).manual_seed(seed),
                "num_inference_steps": 2,
                "output_type": "np",
            }

        def test_save_load_optional_components(self):
            if self.get_dummy_components()["vae"] is not None:
                raise unittest.SkipTest("the autoencoder is optional only for a model of pixels")
            super().test_save_load_optional_components()

    return {f"TestPipeline{folder.name.title().replace('-', '')}": Tests}


for found in sorted(EXPORTS.iterdir()):
    for tests in (model_tests(found), pipeline_tests(found)):
        for name, one in tests.items():
            one.__name__ = one.__qualname__ = name
            one.__module__ = __name__
            globals()[name] = one
del one
