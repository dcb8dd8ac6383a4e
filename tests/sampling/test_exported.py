"""The exported model and pipeline compute what ours do, and are read back unchanged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    PipelineQuantizationConfig,
    TorchAoConfig,
    UniPCMultistepScheduler,
)
from helpers import (
    assert_same_values,
    call_main,
    needs_extras,
    relative_error,
    save_checkpoint,
)
from PIL import Image
from test_models import randomised, resolved
from test_text import model_of

from checkpoints import Checkpoint, Record, read_checkpoint
from checkpoints.diffusers_layout import config_from_exported, from_exported, to_exported
from models import DiT
from routers import ROUTERS
from sampling.exported.pipeline_dit_moe import DiTMoEPipeline
from sampling.exported.transformer_dit_moe import DiTMoETransformer2DModel
from sampling.formats import write_pipeline
from sampling.pipeline import open_pipeline
from sampling.sampling_config import SamplingConfig

CONDITIONS = {
    "label": None,
    "size": torch.tensor([[0.5, 1.0, 0.1, 0.2], [1.0, 1.0, 0, 0], [2.0, 1.5, 0.3, 0]]),
    "vector": torch.randn(3, 5),
    "text": torch.tensor([[1, 2, 0], [0, 0, 0], [3, 0, 0]]),
    "tokens": torch.cat([torch.randn(3, 2, 5), torch.zeros(3, 1, 5)], dim=1),
    "span": torch.tensor([0.1, 0.0, 0.3]),
}
NAMES = {"size": "added_sizes", "vector": "pooled_projections", "text": "input_ids",
         "tokens": "encoder_hidden_states"}  # fmt: skip
CONFIGS: dict[str, dict] = {
    **{router: {"router": router} for router in ROUTERS},
    **{word: {"router": word} for word in (
        "topk:renormalize=true", "topk:gating=sigmoid", "topk:input=normalised",
        "topk:input=normalised_time", "sigmoid:scale=1.7", "sigmoid:input=normalised",
        "expert_choice:gating=identity", "expert_choice:capacity_rounding=down",
        "prototype:choice=expert", "prototype:unconditional_expert=false",
    )},
    "dense": {"num_experts": 0}, "dense swiglu": {"num_experts": 0, "mlp_type": "swiglu"},
    "gelu experts": {"mlp_type": "gelu"}, "swiglu with bias": {"mlp_type": "swiglu_bias"},
    "every second": {"sparse_layers": "every-second", "dense_mlp_type": "silu"},
    "no shared expert": {"n_shared_experts": 0}, "rms": {"norm": "rms", "qk_norm": True},
    "rope": {"rope": True, "absolute_positions": False, "qk_norm": True, "qk_norm_eps": 1e-5},
    "class tokens": {"class_tokens": 3, "class_tokens_start": 1, "rope": True},
    "bottleneck": {"patch_bottleneck": 6, "time_scale": 1000.0, "timestep_frequency_shift": 1},
    "oblong": {"input_size": (4, 8)}, "one sigma": {"learn_sigma": False},
    "no dropout": {"class_dropout_prob": 0.0},
    "all conditions": {"conditions": ("label", "size", "vector:5", "text:3x4", "tokens:3x5")},
    "span": {"conditions": ("label", "span")}, "text alone": {"conditions": ("text:3x4",)},
    "text, prototype": {"conditions": ("text:3x4",), "router": "prototype"},
}  # fmt: skip
OF_EXTRAS = ("all conditions", "span", "mean")  # cases with a condition of extras/


def cases(table: dict) -> list:
    marks = {name: [needs_extras] for name in OF_EXTRAS}
    return [pytest.param(name, marks=marks.get(name, ())) for name in table]


def model_with(fields: dict) -> DiT:
    """A model whose weights and buffers are random, so that every part of it matters."""
    word = fields.get("router", "topk")
    fields = {"class_dropout_prob": 0.1, **fields}
    model = randomised(**fields).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("threshold", "e_score_correction_bias")):
            buffer.uniform_(-0.1, 0.1) if "bias" in name else buffer.add_(0.02)
            buffer.add_(0.45 * ("batch_pool" in word))  # sigmoids are compared with it
    return model


def inputs_of(model: DiT) -> tuple[tuple, dict]:
    """Returns the arguments of our model and of the exported one."""
    size = model.config.input_size
    x = torch.randn(3, 4, *((size, size) if isinstance(size, int) else size))
    t, label = torch.tensor([0.2, 0.7, 0.9]), torch.tensor([1, 10, 9])
    if not model.config.dropout:
        label[1] = 0
    y = {name: CONDITIONS[name] for name in model.conditions if name != "label"}
    theirs = {"hidden_states": x, "timestep": t}
    theirs |= {NAMES[name]: value for name, value in y.items() if name != "span"}
    if "span" in y:
        theirs["r_timestep"] = t - y["span"]
    if "label" in model.conditions:
        theirs["class_labels"] = y["label"] = label
    return (x, t, y), theirs


@pytest.mark.parametrize("case", cases(CONFIGS))
def test_an_exported_model_predicts_the_same_and_is_read_back_unchanged(case):
    model = model_with(CONFIGS[case])
    weights, fields = to_exported(model.state_dict(), model.config)
    exported = DiTMoETransformer2DModel(**fields).eval()
    exported.load_state_dict(weights)
    ours, theirs = inputs_of(model)
    with torch.no_grad():
        want = model(*ours)[0]
        got = exported(**theirs).sample
    assert relative_error(got, want) < 1e-6
    config = Record.from_dict({"config": config_from_exported(fields)}).config
    assert resolved(config) == resolved(model.config)
    assert_same_values(from_exported(exported.state_dict(), config), model.state_dict())
    if not model.config.num_experts:
        return
    sparse = [block.ff for block in exported.transformer_blocks if hasattr(block.ff, "experts")]
    counts = [
        expert.register_forward_hook(lambda *call: calls.append(len(call[1][0])))
        for block in sparse for expert in block.experts
    ]  # fmt: skip
    calls: list[int] = []
    exported(**theirs)
    assert len(counts) == len(calls) and sum(calls) > 0  # experts compute rows, and matter
    with torch.no_grad():
        for block in sparse:
            for expert in block.experts:
                expert.down_proj.weight *= 1.1
        assert relative_error(exported(**theirs).sample, want) > 1e-4


def write(model: DiT, folder: Path, vae: Path | None, **facts) -> DiffusionPipeline:
    """Exports a model, and loads it as a user does."""
    if vae is not None:
        AutoencoderKL.from_pretrained(vae).save_pretrained(folder / "vae")
    facts = {"objective": "rectified_flow", "class_names": ("ape", "bee", "Cat"), **facts}
    record = Record(config=model.config, **facts)
    write_pipeline(Checkpoint(Path("model"), model.state_dict(), record), folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(first, first + count)]


@pytest.fixture(scope="module")
def flow(tiny_vae, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "flow"
    write(randomised(class_dropout_prob=0.1, num_classes=3, learn_sigma=False), folder, tiny_vae)
    return folder


@pytest.fixture
def pipeline(flow):
    pipeline = DiffusionPipeline.from_pretrained(flow, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SCHEDULERS = {  # objective, sampler, scheduler and its options in place of the exported one
    "euler": ("rectified_flow", "euler", None),
    "shifted": ("rectified_flow:shift=3", "euler", None),
    "heun": ("rectified_flow", "heun", (FlowMatchHeunDiscreteScheduler, {})),
    "flow_dpm++": ("rectified_flow", "dpm-solver++", (DPMSolverMultistepScheduler, {
        "use_flow_sigmas": True, "prediction_type": "flow_prediction"})),
    "data": ("flow_x", "euler", None),
    "mean": ("mean_flow", "mean", None),
    "ddpm": ("gaussian", "ddpm", None),
    "ddpm_fixed": ("gaussian", "ddpm", None),
    "v": ("gaussian_v", "ddpm", None),
    "ddim": ("gaussian", "ddim", (DDIMScheduler, {})),
    "chain_dpm++": ("gaussian", "dpm-solver++", (DPMSolverMultistepScheduler, {})),
}  # fmt: skip


@pytest.mark.parametrize("case", cases(SCHEDULERS))
def test_diffusers_schedulers_sample_what_our_samplers_do(case, tmp_path, tiny_vae):
    objective, sampler, other = SCHEDULERS[case]
    conditions = ("label", "span") if case == "mean" else ("label",)
    learns = objective.startswith("gaussian") and case != "ddpm_fixed"
    model = randomised(
        0.02, num_classes=3, class_dropout_prob=0.1, learn_sigma=learns, conditions=conditions
    )
    pipeline = write(model, tmp_path / "out", None, objective=objective)
    steps = 10 if objective.startswith("gaussian") else 4
    if other:
        kind, options = other
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    got = pipeline(
        ["Cat", 0], guidance_scale=2.0, num_inference_steps=steps, generator=seeded(7, 2),
        output_type="latent",
    ).images  # fmt: skip
    path = save_checkpoint(model, tmp_path / "model.safetensors", objective=objective)
    ours = open_pipeline(SamplingConfig(
        ckpt=path, sampler=sampler, cfg_scale=2.0, vae_path=str(tiny_vae),
        num_sampling_steps=f"ddim{steps}" if case == "ddim" else steps,
    ))  # fmt: skip
    want = ours.latents([2, 0], range(7, 9))
    assert relative_error(got, want) < 1e-5


def test_a_solver_of_another_order_converges_to_the_same_latents(pipeline):
    def draw(steps: int) -> torch.Tensor:
        options = {"output_type": "latent", "generator": seeded(0, 2)}
        return pipeline(["Cat", 0], num_inference_steps=steps, **options).images

    want, coarse = draw(200), draw(20)
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, **options)
    assert relative_error(draw(20), want) < relative_error(coarse, want) / 2


def test_classes_are_given_as_numbers_names_lists_or_tensors(pipeline):
    options = {"num_inference_steps": 2, "output_type": "latent"}

    def draw(labels, **more) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(labels, generator=generator, **options, **more).images

    assert pipeline.get_label_ids(["ape", "CAT"]) == [0, 2]
    assert pipeline.get_label_ids("bee") == [1]
    want = draw([2])
    for labels in (2, "cat", ["Cat"], torch.tensor([2])):
        assert torch.equal(draw(labels), want)
    assert not torch.equal(draw("ape"), want)
    rows = draw(["ape", "bee"], num_images_per_prompt=2)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(["ape", "ape", "bee", "bee"], latents=noise), rows)
    for labels, message in (
        ("fox", "class_labels: got fox, expected 0 to 2 or: ape, bee, Cat"),
        (3, "got 3, expected 0 to 2"), ([], "got an empty list"), (None, "got none, expected the"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pipeline(labels)


def test_a_model_of_one_class_requires_no_labels(tmp_path, tiny_vae):
    one = write(randomised(num_classes=1), tmp_path / "one", tiny_vae, class_names=())
    options = {"num_inference_steps": 1, "output_type": "np", "guidance_scale": 1}
    images = [
        one(*labels, generator=torch.Generator().manual_seed(0), **options).images
        for labels in ((), (0,))
    ]
    assert (images[0] == images[1]).all()


def test_every_call_of_the_transformer_is_seen_by_hooks(pipeline):
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *call: calls.append(call))
    pipeline("ape", num_inference_steps=3, output_type="latent")
    assert len(calls) == 3
    pipeline.transformer.forward = lambda x, *rest, **options: (torch.zeros_like(x),)
    noise = torch.randn(1, 4, 8, 8)
    unmoved = pipeline("ape", latents=noise, num_inference_steps=3, output_type="latent").images
    assert torch.equal(unmoved, noise)


def test_an_own_autoencoder_or_scheduler_is_used(flow, pipeline, tiny_vae):
    vae = AutoencoderKL.from_pretrained(tiny_vae)
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    torch.nn.init.constant_(vae.decoder.conv_out.bias, 0.5)
    own = DiffusionPipeline.from_pretrained(flow, vae=vae, trust_remote_code=True)
    assert own.vae is vae
    grey = own("ape", num_inference_steps=1, output_type="np").images
    assert np.abs(grey - 0.75).max() < 1e-6
    heun = FlowMatchHeunDiscreteScheduler()
    own = DiffusionPipeline.from_pretrained(flow, scheduler=heun, trust_remote_code=True)
    assert own.scheduler is heun
    for other in (DDIMScheduler(), DPMSolverMultistepScheduler()):
        own = DiffusionPipeline.from_pretrained(flow, scheduler=other, trust_remote_code=True)
        with pytest.raises(ValueError, match="scheduler: got .*, expected one of flow matching"):
            own("ape")
    again = DiTMoEPipeline.from_pipe(pipeline)
    assert again.vae is pipeline.vae
    assert again("ape", num_inference_steps=1).images[0].size == (16, 16)


def test_a_callback_sees_and_changes_the_latents_and_can_stop(pipeline):
    seen = []

    def callback(pipe, step, timestep, values):
        seen.append((step, float(timestep)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(values["latents"])}

    options = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}
    (latents,) = pipeline("ape", callback_on_step_end=callback, **options)
    assert [step for step, _ in seen] == [0, 1] and not latents.any()


def test_a_prompt_is_of_all_images_and_an_unknown_word_is_no_word(tmp_path, tiny_vae):
    model = model_of("label", "text:3x2")
    pipeline = write(model, tmp_path / "out", tiny_vae, words=("red", "blue"), class_names=())

    def draw(*labels, **options):
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        options |= {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2}
        count = max(len(list(options.get("prompt", "") if labels == () else labels[0])), 1)
        return pipeline(*labels, latents=noise[:count], **options).images

    one, each, other, unknown = (
        draw([0, 1], prompt=prompt)
        for prompt in ("red", ["red", "red"], ["blue", "red"], "a RED flurble")
    )
    assert torch.equal(one, each) and torch.equal(one, unknown)
    assert torch.equal(one[1], other[1]) and not torch.equal(one[0], other[0])
    assert not torch.equal(draw([0, 1], prompt="red", negative_prompt="blue"), one)
    assert draw(prompt=["red"]).shape == one[:1].shape  # no class
    with pytest.raises(ValueError, match="prompt: got 3, expected 2, one per class"):
        draw([0, 1], prompt=["red"] * 3)
    with pytest.raises(ValueError, match="negative_prompt: got 3, expected 1 or 2"):
        draw([0, 1], prompt="red", negative_prompt=["blue"] * 3)


def test_features_of_tokens_are_of_all_images_or_of_each(tmp_path, tiny_vae):
    pipeline = write(model_of("tokens:3x5"), tmp_path / "out", tiny_vae, class_names=())

    def draw(rows: torch.Tensor, number: int = 1) -> torch.Tensor:
        options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2}
        options |= {"generator": seeded(0, len(rows) * number), "num_images_per_prompt": number}
        return pipeline(conditions={"encoder_hidden_states": rows}, **options).images

    tokens = torch.randn(4, 3, 5)
    each = draw(tokens)
    assert len(each) == 4 and relative_error(draw(tokens[:1], 2)[0], each[0]) < 1e-5
    assert not torch.allclose(draw(tokens[[0, 0]])[1], each[1])


def test_fine_tuned_adapters_become_a_checkpoint_again(tmp_path, tiny_vae):
    from peft import LoraConfig

    model = randomised(class_dropout_prob=0.1, num_classes=3, learn_sigma=False)
    pipeline = write(model, tmp_path / "out", tiny_vae)
    transformer, untouched = pipeline.transformer, model.state_dict()
    names = ["to_q", "to_v", "gate_proj", "up_proj", "down_proj"]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=names))
    trained = [p for p in transformer.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * (2 + 5 * 3)  # two of each of two layers' linear layers
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    x, t, y = torch.randn(6, 4, 8, 8), torch.rand(6), torch.tensor([0, 1, 2] * 2)
    losses = []
    for _ in range(3):
        loss = transformer.train()(x, t, y).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    moved = [p.detach().ne(0).any() for n, p in transformer.named_parameters() if "lora_B" in n]
    assert all(moved)
    with torch.no_grad():
        want = transformer.eval()(x, t, y).sample
    transformer.save_lora_adapter(tmp_path / "lora")
    transformer.fuse_lora()
    transformer.unload_lora()
    pipeline.save_pretrained(tmp_path / "merged")
    merged = read_checkpoint(tmp_path / "merged")
    assert merged.config == read_checkpoint(tmp_path / "out").config
    changed = {n for n, value in merged.state_dict.items() if not torch.equal(value, untouched[n])}
    parts = ("attn.qkv.weight", "experts.gate_up_proj", "experts.down_proj", "shared_experts.")
    assert all(any(part in name for name in changed) for part in parts)
    assert all(any(part in name for part in parts) for name in changed)
    ours = DiT(**vars(merged.config)).eval()
    ours.load_state_dict(merged.state_dict)
    with torch.no_grad():
        assert relative_error(ours(x, t, y)[0], want) < 1e-5
    flags = ("--class-labels", "ape", "--num-sampling-steps", 2)
    call_main("sample.py", "--ckpt", tmp_path / "merged", *flags, "--output", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] >= 16


@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_an_exported_model_is_traced_for_any_batch_size_and_compiled(router):
    fields = {"router": router} if router else {"num_experts": 0}
    model = model_with(fields)
    weights, config = to_exported(model.state_dict(), model.config)
    exported = DiTMoETransformer2DModel(**config).eval()
    exported.load_state_dict(weights)
    options, count = {"return_dict": False}, torch.export.Dim("count", min=1, max=64)

    def inputs(number: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(number, 4, 8, 8), torch.rand(number), torch.arange(number) % 11

    shapes = {name: {0: count} for name in ("hidden_states", "timestep", "class_labels")}
    shapes["return_dict"] = None
    traced = torch.export.export(exported, inputs(3), options, dynamic_shapes=shapes).module()
    compiled = torch.compile(exported, backend="aot_eager")
    with torch.no_grad():
        for number in (1, 2, 5):
            some = inputs(number)
            want = exported(*some).sample
            assert torch.equal(traced(*some, **options)[0], want)
            assert relative_error(compiled(*some).sample, want) < 1e-6


def test_torchao_quantises_each_expert_of_a_pipeline(flow, pipeline):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    config = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    quantised = DiffusionPipeline.from_pretrained(
        flow, quantization_config=config, trust_remote_code=True
    )
    for name, module in quantised.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_int8 = type(module.weight.data).__name__ == "Int8Tensor"
            assert is_int8 == ("router" not in name), name
    noise = torch.randn(2, 4, 8, 8)
    got, want = (
        pipe([0, 1], latents=noise, num_inference_steps=2, output_type="latent").images
        for pipe in (quantised, pipeline)
    )
    assert 0 < relative_error(got, want) < 0.02
