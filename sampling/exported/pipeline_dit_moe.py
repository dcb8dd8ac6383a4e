"""The pipeline of DiT-MoE for diffusers: images from classes or texts.

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipeline("cat", generator=torch.Generator().manual_seed(0)).images

This file requires only torch and diffusers; the transformer's code is beside its weights.
"""

import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

CLASS = "DiTMoETransformer2DModel"
Labels = int | str | list[int | str] | Tensor


class DiTMoEPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """Generates images with a DiT-MoE transformer.

    scheduler: of flow matching for a flow, of noise or v prediction for Gaussian diffusion
    vae: absent for a model of pixels
    id2label: names of the classes by number
    words: the words of the condition "text"; number i of `input_ids` is words[i - 1]
    objective: gaussian, gaussian_v, rectified_flow, flow_x (the network predicts the data) or
        mean_flow
    guidance_scale, num_inference_steps: defaults of `__call__`
    guidance_channels: number of leading channels that guidance acts on; None: all
    guidance_interval: first and last time, relative to that of pure noise, at which guidance acts;
        None: all
    noise_scale: standard deviation of the initial noise
    velocity_clamp: lower bound of t as the denominator of flow_x
    latents_shift, latents_scale: latents are (z - shift) * scale for samples z of the
        autoencoder's posterior, as numbers or one per channel; None: those of the autoencoder
    record: facts about the training, which the DiT-MoE repository reads
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        id2label: dict[str, str] | None = None,
        words: list[str] | None = None,
        objective: str = "rectified_flow",
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        guidance_channels: int | None = None,
        guidance_interval: list[float] | None = None,
        noise_scale: float = 1.0,
        velocity_clamp: float = 0.05,
        latents_shift: float | list[float] | None = None,
        latents_scale: float | list[float] | None = None,
        record: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label, words=words, objective=objective, guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps, guidance_channels=guidance_channels,
            guidance_interval=guidance_interval, noise_scale=noise_scale,
            velocity_clamp=velocity_clamp, latents_shift=latents_shift,
            latents_scale=latents_scale, record=record,
        )  # fmt: skip
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options):
        """Loads a pipeline as diffusers does; code that this process runs already is trusted."""
        folder = Path(pretrained_model_name_or_path)
        code = [folder / "pipeline.py", folder / "transformer" / "transformer_dit_moe.py"]
        running = {
            Path(module.__file__).read_bytes() for name, module in list(sys.modules.items())
            if name.endswith(("pipeline", "pipeline_dit_moe", "transformer_dit_moe"))
            and Path(getattr(module, "__file__", None) or "").is_file()
        }  # fmt: skip
        if all(path.is_file() and path.read_bytes() in running for path in code):
            options["trust_remote_code"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options):
        """Makes a pipeline of another one's components."""
        return super().from_pipe(pipeline, **{**pipeline.components, **options})

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **options):
        known = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(known, **options)

    @property
    def is_flow(self) -> bool:
        return self.config.objective in ("rectified_flow", "flow_x", "mean_flow")

    def get_label_ids(self, label: int | str | list[int | str]) -> list[int]:
        """Returns the numbers of classes, given as names, in any case, or as numbers.

        Raises ValueError for an unknown one.
        """
        known = {name.lower(): number for name, number in self.labels.items()} | self.labels
        count, found = self.transformer.config.num_classes, []
        for one in label if isinstance(label, list | tuple) else [label]:
            if isinstance(one, list | tuple):
                found += self.get_label_ids(one)
                continue
            number = known.get(one, known.get(one.lower())) if isinstance(one, str) else int(one)
            if number is None or not 0 <= number < count:
                some = ", ".join(list(self.labels)[:20]) or "names are not recorded"
                raise ValueError(f"class_labels: got {one}, expected 0 to {count - 1} or: {some}")
            found.append(number)
        return found

    def word_ids(self, prompt: str | list[str]) -> Tensor:
        """Returns the numbers (N, L) of the words of texts; an unknown word is no word."""
        length = self.transformer.conditions["text"][0]
        numbers = {word: number for number, word in enumerate(self.config.words, 1)}
        rows = []
        for text in [prompt] if isinstance(prompt, str) else prompt:
            found = [numbers[w] for w in re.findall(r"\w+", text.casefold()) if w in numbers]
            rows.append((found + [0] * length)[:length])
        return torch.tensor(rows)

    def check_inputs(self, class_labels, prompt, negative_prompt, callback_inputs, output_type):
        conditions, names = self.transformer.conditions, self._callback_tensor_inputs
        if "label" not in conditions and class_labels is not None:
            raise ValueError("class_labels: got classes, but the model has no condition label")
        if "text" not in conditions and (prompt is not None or negative_prompt is not None):
            raise ValueError("prompt: got a text, but the model has no condition text")
        if "text" in conditions and "label" not in conditions and prompt is None:
            raise ValueError('prompt: is required by a model of text ("" for no text)')
        if any(name not in names for name in callback_inputs):
            got = f"callback_on_step_end_tensor_inputs: got {callback_inputs}"
            raise ValueError(f"{got}, expected some of {names}")
        is_flow = "FlowMatch" in type(self.scheduler).__name__
        is_flow |= self.scheduler.config.get("prediction_type") == "flow_prediction"
        if is_flow != self.is_flow:
            expected = "flow matching" if self.is_flow else "noise prediction"
            raise ValueError(
                f"scheduler: got {type(self.scheduler).__name__}, expected one of "
                f"{expected} for a model trained with {self.config.objective}"
            )
        is_latent = self.transformer.config.in_channels != 3
        if self.vae is None and is_latent and output_type != "latent":
            raise ValueError('vae: got none, expected an autoencoder, or output_type="latent"')

    def set_timesteps(self, steps: int, device: torch.device) -> Tensor:
        """Sets the scheduler's times and returns them.

        A flow takes equal steps from 1 to 0, which the scheduler shifts. Some schedulers do not
        take times, and would begin or end at another one.
        """
        scheduler = self.scheduler
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and self.is_flow:
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
        else:
            spacing = scheduler.config.get("timestep_spacing")
            if isinstance(scheduler, DDIMScheduler) and spacing == "linspace":
                # Its steps are 1000 // steps long, which the distances of "linspace" are not.
                scheduler.register_to_config(timestep_spacing="leading")
            if "FlowMatch" in type(scheduler).__name__:  # Heun's method
                scheduler.sigma_min = 1 / steps
            scheduler.set_timesteps(steps, device=device)
            if scheduler.config.get("use_flow_sigmas"):  # DPM-Solver++ and UniPC
                shift = scheduler.config.flow_shift
                times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
                times = shift * times / (1 + (shift - 1) * times)
                scheduler.sigmas = times.clamp(max=1 - 1e-6)  # they compute log(1 - t)
                scheduler.timesteps = (1000 * times[:-1]).float().to(device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler.timesteps

    def prepare_latents(
        self, count: int, generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None, device: torch.device,
    ) -> Tensor:  # fmt: skip
        """Returns the initial noise (N, C, h, w), fp32."""
        config = self.transformer.config
        size = config.sample_size
        shape = (count, config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents: got {tuple(latents.shape)}, expected {shape}")
            return latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator: got a list of {len(generator)}, expected {count}")
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        scale = getattr(self.scheduler, "init_noise_sigma", 1.0)
        return latents * (scale * self.config.noise_scale)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Returns images (N, 3, H, W) in [-1, 1]."""
        shift, scale = self.config.latents_shift, self.config.latents_scale
        if self.vae is not None:
            shift = self.vae.config.get("shift_factor") if shift is None else shift
            scale = self.vae.config.get("scaling_factor") if scale is None else scale

        def per_channel(value: float | list[float] | None, default: float) -> Tensor:
            value = latents.new_tensor(default if value is None else value)
            return value.view(-1, 1, 1)

        latents = latents / per_channel(scale, 1.0) + per_channel(shift, 0.0)
        if self.vae is None:
            return latents
        latents, kind = latents.to(self.vae.dtype), type(self.vae).__name__
        if kind == "AutoencoderKLFlux2":  # whose latents are patches
            latents = F.pixel_shuffle(latents, self.vae.config.patch_size[0])
        if kind == "AutoencoderKLQwenImage":  # which decodes videos
            return self.vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]
        return self.vae.decode(latents, return_dict=False)[0]

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        conditions: dict[str, Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        class_labels: names or numbers of classes; may be absent if there is only one class, or
            with a prompt, which then means "no class"
        prompt: a text, or one per class; "" means no text
        negative_prompt: in place of no text, for guidance
        guidance_scale: scale of classifier-free guidance, 1 for none; None: the model's default
        num_inference_steps: None: the model's default
        num_images_per_prompt: images per class or prompt
        generator: one for all images, or one per image. With one per image, seeded s, s + 1, ...,
            the images are those of `sample.py --seed s`, with the same sampler.
        latents: initial noise (N, C, h, w)
        conditions: further arguments of the transformer by name, with one row, or one per class or
            prompt: pooled_projections, encoder_hidden_states or added_sizes
        output_type: pil; np (N, H, W, 3) or pt (N, 3, H, W), both in [0, 1]; or latent (N, C, h, w)
        callback_on_step_end: called as callback(pipeline, step, timestep, {"latents": ...}); may
            return other latents

        Raises ValueError for wrong arguments.
        """
        self.check_inputs(class_labels, prompt, negative_prompt, callback_on_step_end_tensor_inputs,
                          output_type)  # fmt: skip
        transformer, device = self.transformer, self._execution_device
        config, known = transformer.config, transformer.conditions
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        steps = num_inference_steps or self.config.num_inference_steps
        self._guidance_scale, self._interrupt = scale, False
        if scale != 1 and not config.has_null_class:
            raise ValueError(
                f"guidance_scale: got {scale}, expected 1, because the model was "
                "trained without dropout of its conditions"
            )

        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        if class_labels is None and config.num_classes == 1 and prompt is None:
            class_labels = [0]
        texts = None if prompt is None else self.word_ids(prompt)           # (N or 1, L)
        if class_labels is not None:
            labels = self.get_label_ids(class_labels)
        elif prompt is None and "label" in known:
            raise ValueError("class_labels: got none, expected the class of each image")
        else:
            rows = texts if texts is not None else next(iter((conditions or {}).values()), [0])
            labels = [config.num_classes] * len(rows)
        if texts is not None and len(labels) != len(texts):
            if 1 not in (len(labels), len(texts)):
                raise ValueError(f"prompt: got {len(texts)}, expected {len(labels)}, one per class")
            labels = labels * (len(texts) if len(labels) == 1 else 1)
        if not labels:
            raise ValueError("class_labels: got an empty list, expected at least one class")
        count = len(labels) * num_images_per_prompt

        def repeated(rows: Tensor, name: str) -> Tensor:
            if len(rows) not in (1, len(labels)):
                raise ValueError(f"{name}: got {len(rows)}, expected 1 or {len(labels)}")
            rows = rows.to(device).expand(len(labels), *rows.shape[1:])
            return rows.repeat_interleave(num_images_per_prompt, dim=0)

        inputs, null = {}, {}
        if "label" in known:
            inputs["class_labels"] = repeated(torch.tensor(labels), "class_labels")
            null["class_labels"] = torch.full_like(inputs["class_labels"], config.num_classes)
        if texts is not None:
            inputs["input_ids"] = repeated(texts, "prompt")
            null["input_ids"] = torch.zeros_like(inputs["input_ids"])
            if negative_prompt is not None:
                negative = self.word_ids(negative_prompt)
                null["input_ids"] = repeated(negative, "negative_prompt")
        for name, value in (conditions or {}).items():
            inputs[name] = repeated(value, name)
            is_kept = name == "added_sizes"  # which guidance does not drop
            null[name] = inputs[name] if is_kept else torch.zeros_like(inputs[name])
        guided_inputs = {name: torch.cat([inputs[name], null[name]]) for name in inputs}

        latents = self.prepare_latents(count, generator, latents, device)
        timesteps = self.set_timesteps(steps, device)
        self._num_timesteps = len(timesteps)
        accepted = inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator} if "generator" in accepted else {}
        low, high = self.config.guidance_interval or (0.0, 1.0)
        channels = self.config.guidance_channels or config.in_channels
        last = self.scheduler.config.num_train_timesteps - (not self.is_flow)
        with self.progress_bar(total=len(timesteps)) as progress:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                time = (timestep / last if self.is_flow else timestep).to(device)
                inside = low - 1e-6 <= timestep.item() / last <= high + 1e-6
                is_guided = scale != 1 and inside
                x = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    x = self.scheduler.scale_model_input(x, timestep)
                x = torch.cat([x, x]) if is_guided else x
                span = {}
                if "span" in known and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
                    span["r_timestep"] = self.scheduler.sigmas[step + 1].to(device)
                output = transformer(
                    x.to(transformer.dtype), time.expand(len(x)),
                    **(guided_inputs if is_guided else inputs), **span, return_dict=False,
                )[0].float()  # fmt: skip
                if is_guided:
                    output, base = output.chunk(2)
                    base = base[:, :channels]
                    guided = base + scale * (output[:, :channels] - base)
                    output = torch.cat([guided, output[:, channels:]], dim=1)
                latents = self.scheduler.step(
                    self.for_scheduler(output, latents, time), timestep, latents,
                    **step_options, return_dict=False,
                )[0]  # fmt: skip
                if callback_on_step_end is not None:
                    names = callback_on_step_end_tensor_inputs
                    found = callback_on_step_end(
                        self, step, timestep, dict.fromkeys(names, latents)
                    )
                    latents = (found or {}).get("latents", latents)
                progress.update()

        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(
                self.decode_latents(latents).float(), output_type=output_type
            )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def for_scheduler(self, output: Tensor, latents: Tensor, time: Tensor) -> Tensor:
        """Returns what the scheduler expects for the transformer's output at `time`."""
        is_learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        if is_learned and isinstance(self.scheduler, DDPMScheduler):
            return output
        if is_learned:  # other schedulers would take three channels for the mean
            self.scheduler.register_to_config(variance_type=None)
        output = output[:, : latents.shape[1]]
        if self.config.objective == "flow_x":  # from data to velocity
            return (latents - output) / time.clamp_min(self.config.velocity_clamp)
        return output

    def save_config(self, save_directory: str | Path, *args, **options) -> None:
        """Saves model_index.json as diffusers does, this file, and the names of the code."""
        super().save_config(save_directory, *args, **options)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        index["_class_name"] = ["pipeline", type(self).__name__]
        index["transformer"] = ["transformer_dit_moe", CLASS]
        index["auto_map"] = {"AutoModel": f"transformer_dit_moe.{CLASS}"}  # for its subfolder
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if Path(__file__).resolve() != (folder / "pipeline.py").resolve():
            shutil.copyfile(__file__, folder / "pipeline.py")
