"""Experts of diffusers' pipelines: tiny random HiDream-I1 and Nucleus-Image, text encoders too."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import call_main, expect_error, relative_error
from test_report import data_of, table_of

from analysis.counts import RoutingCounts
from analysis.recorder import listen
from analysis.sparse_layers import sparse_layers, weight_similarity
from extras.ablation import expert_removed, load_ablation
from extras.prompts import PromptSettings, generate, open_prompt_pipeline, read_prompts
from moe_kernels.quantized import quantize
from routers import Routing
from runtime import files
from runtime.errors import UserError
from tools.tiny_pipeline import PIPELINES, PROMPTS, tiny_nucleus

pytest.importorskip("transformers", reason="needs transformers")

STEPS, IMAGES = 2, 3
MAKE = PIPELINES
SIZE = {"hidream": (112, 144), "nucleus": (16, 16)}  # 63 of HiDream's 64 patches are in the image
PATCHES = {"hidream": 63, "nucleus": 16}
names = pytest.mark.parametrize("name", MAKE)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, DiffusionPipeline]:
    """The pipelines, saved in folders of their names under `root`."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in MAKE:
        call_main("tools.tiny_pipeline", name, root / name)
    shutil.copy(root / "nucleus" / "prompts.txt", root)
    made = {name: make() for name, make in MAKE.items()}
    for part in ("text_encoder_4", "tokenizer_4"):
        shutil.copytree(root / "hidream" / part, root / "llama", dirs_exist_ok=True)
    return {"root": root, **made}


def flags(pipelines: dict, name: str, output: Path, *more) -> tuple:
    root = pipelines["root"]
    return (
        "--pipeline", root / name, "--prompts", root / "prompts.txt", "--output", output,
        "--num-sampling-steps", STEPS, "--image-size", *SIZE[name], "--precision", "fp32", *more,
    )  # fmt: skip


def draw(pipeline, name: str, guidance: float = 3.0, batch: int = IMAGES) -> torch.Tensor:
    settings = PromptSettings(num_steps=STEPS, cfg_scale=guidance, image_size=SIZE[name])
    texts = [line.split("\t")[1] for line in PROMPTS.splitlines() if line][:batch]
    return generate(pipeline, texts, range(len(texts)), settings)


class ExpertInputs:
    """Records the rows that enter the experts of a layer, in the order of the experts."""

    def __init__(self, layer):
        self.rows: list[list[torch.Tensor]] = []  # by call, by expert
        self.x: list[torch.Tensor] = []  # input of the layer by call
        layer.module.register_forward_pre_hook(self.start)
        if layer.module_name == "NucleusMoELayer":
            layer.module.experts.register_forward_pre_hook(self.split)
        else:
            for number, expert in enumerate(layer.module.experts):
                expert.register_forward_pre_hook(
                    lambda module, inputs, number=number: self.note(number, *inputs)
                )

    def start(self, module, inputs) -> None:
        self.x.append(inputs[0].flatten(0, 1))
        self.rows.append([inputs[0].new_empty(0, inputs[0].shape[-1])] * 8)

    def note(self, number: int, rows: torch.Tensor) -> None:
        self.rows[-1][number] = rows

    def split(self, module, inputs) -> None:
        for number, rows in enumerate(inputs[0].split(inputs[1].tolist())):
            self.note(number, rows)


@pytest.mark.parametrize(
    "name, fields, dtype",
    [("hidream", {}, torch.float32), ("hidream", {}, torch.bfloat16),
     ("nucleus", {}, torch.bfloat16), ("nucleus", {"use_grouped_mm": True}, torch.bfloat16),
     ("nucleus", {"use_sigmoid": True}, torch.float32)],
)  # fmt: skip
def test_the_rows_of_the_routing_are_those_that_enter_the_experts(name, fields, dtype):
    pipeline = MAKE[name](**fields).to(dtype)
    want = draw(pipeline, name, batch=1)
    layers = sparse_layers(pipeline.transformer)
    inputs = [ExpertInputs(layer) for layer in layers]
    heard: list[list[Routing]] = [[] for _ in layers]
    outputs = []

    def hear(number: int, output: torch.Tensor, routing: Routing) -> None:
        heard[number].append(routing)
        outputs.append(output)

    with listen(pipeline.transformer, hear):
        assert draw(pipeline, name, batch=1).equal(want)
    assert len(layers) == {"hidream": 3, "nucleus": 2}[name]
    for layer, routings, entered in zip(layers, heard, inputs, strict=True):
        calls = STEPS * (2 if name == "nucleus" else 1)  # Nucleus-Image calls twice a step
        assert len(routings) == len(entered.rows) == calls
        for routing, x, rows in zip(routings, entered.x, entered.rows, strict=True):
            assert routing.load.mean().item() == pytest.approx(1)
            for expert in range(layer.num_experts):
                chosen = x[routing.token[routing.expert == expert]]
                # In which order the rows of one expert enter does not matter.
                assert torch.equal(sort_rows(chosen), sort_rows(rows[expert])), (name, expert)
    assert all(output.ndim == 3 for output in outputs)


def sort_rows(x: torch.Tensor) -> torch.Tensor:
    return x[np.lexsort(x.float().numpy().T)]


@names
def test_the_routing_of_an_offloaded_transformer_is_the_same(name):
    accelerate = pytest.importorskip("accelerate")
    pipeline = MAKE[name]()
    experts: list[torch.Tensor] = []
    with listen(pipeline.transformer, lambda layer, x, routing: experts.append(routing.expert)):
        want = draw(pipeline, name, batch=1)
        accelerate.cpu_offload(pipeline.transformer, execution_device="cpu", offload_buffers=True)
        assert draw(pipeline, name, batch=1).equal(want)
    first, second = experts[: len(experts) // 2], experts[len(experts) // 2 :]
    assert all(map(torch.equal, first, second))


@names
def test_the_weights_of_the_routing_reproduce_the_output_of_the_layer(name, pipelines):
    """The layer's output is the weighted sum of the experts' rows, plus the shared expert's."""
    layer = sparse_layers(pipelines[name].transformer)[-1]
    heard = []
    width = layer.module.gate.weight.shape[1] // (2 if name == "nucleus" else 1)
    x, time = torch.randn(2, 24, width), torch.randn(2, width)
    arguments = (x,) if name == "hidream" else (x, x.flip(-1), time)
    with torch.no_grad(), layer.listen(lambda output, routing: heard.append((output, routing))):
        layer.module(*arguments)
        (output, routing), flat = heard[0], x.flatten(0, 1)
        shared = "shared_experts" if name == "hidream" else "shared_expert"
        want = getattr(layer.module, shared)(x).flatten(0, 1)
        for token, expert, weight in zip(*routing[:3], strict=True):
            if name == "hidream":
                row = layer.module.experts[expert](flat[token])
            else:
                gate, up = (flat[token] @ layer.module.experts.gate_up_proj[expert]).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                row = hidden @ layer.module.experts.down_proj[expert]
            want[token] += weight * row
    assert relative_error(output.flatten(0, 1), want) < 1e-5


@names
def test_expert_data_counts_the_conditional_tokens_of_a_pipeline(name, pipelines, tmp_path):
    call_main("expert_data.py", *flags(pipelines, name, tmp_path / "c.npz", "--cfg-scale", 3))
    counts = RoutingCounts.load(tmp_path / "c.npz")
    patches = PATCHES[name]
    layers, experts, per_patch = {"hidream": (3, 4, 2), "nucleus": (2, 8, 2)}[name]
    assert counts.by_step.shape == (STEPS, layers, experts)
    per_step = (counts.by_step.sum(-1) == IMAGES * patches * per_patch).all()
    assert per_step and list(counts.class_names) == ["cat", "moon"]
    assert ([2 * STEPS * patches * 2, STEPS * patches * 2] == counts.by_class.sum(-1).T).all()
    assert counts.by_position.sum() == counts.by_class.sum()
    assert counts.kept[:-1].sum() > 0 and (counts.persistence() <= 1).all()
    if name == "nucleus":  # an expert's places in an image: 2 * 16 / 8
        assert (counts.by_step == 4 * IMAGES).all() and not counts.other_by_step.any()
        weights = counts.weight_by_step.sum(-1)
        assert (weights <= 2.5 * IMAGES * patches * 1.01).all()  # route_scale, bf16-free
    else:
        # Tokens of the prompts: T5 has one for each word and </s>, Llama has one for each word;
        # single-stream blocks see T5's once and Llama's twice.
        words = [
            len(prompt.split()) for _, prompt in read_prompts(pipelines["root"] / "prompts.txt")
        ]
        text = sum(3 * number + 1 for number in words)
        assert (counts.other_by_step[:, 0] == 0).all()
        assert (counts.other_by_step[:, 1:].sum(-1) == 2 * text).all()
    shown = counts.gallery_image >= 0
    assert shown.any() and (counts.gallery_place[shown] < patches).all()
    assert counts.gallery_image.max() == IMAGES - 1 and len(counts.crop_ends)
    call_main("expert_report.py", "--data", tmp_path / "c.npz")
    data = data_of(tmp_path / "expert_report.html")
    assert np.array_equal(table_of(data, "byClass"), counts.by_class)
    assert np.array_equal(table_of(data, "other"), counts.other_by_step)
    assert data["gallery"][0][0][0][3] in (0, 1) and data["classes"] == ["cat", "moon"]
    one = tmp_path / "one.npz"  # guidance and the batch do not change what is conditional
    more = ("--text-encoder", pipelines["root"] / "llama") if name == "hidream" else ()
    more += ("--cfg-scale", 1, "--batch-size", 3)
    call_main("expert_data.py", *flags(pipelines, name, one, *more))
    first = RoutingCounts.load(one)
    assert np.array_equal(first.other_by_step.sum(-1), counts.other_by_step.sum(-1))
    assert np.array_equal(first.by_step[0], counts.by_step[0])  # the first step has the same noise


@names
def test_an_expert_left_out_is_an_expert_whose_last_matrix_is_zero(name, pipelines, tmp_path):
    pipeline, other = pipelines[name], MAKE[name]()
    whole = draw(pipeline, name, batch=1)
    with expert_removed(pipeline.transformer, 1, 2):
        without = draw(pipeline, name, batch=1)
    experts = sparse_layers(other.transformer)[1].module.experts
    with torch.no_grad():
        (experts[2].w2.weight if name == "hidream" else experts.down_proj[2]).zero_()
    assert without.equal(draw(other, name, batch=1)) and not without.equal(whole)
    assert draw(pipeline, name, batch=1).equal(whole)


def test_the_ablation_of_a_pipeline_has_a_row_for_each_expert(pipelines, tmp_path):
    output = tmp_path / "ablation.jsonl"
    quick = ("--num-sampling-steps", 1, "--cfg-scale", 1, "--batch-size", 3)
    call_main("expert_ablation.py", *flags(pipelines, "nucleus", output, *quick))
    _, rows = load_ablation(output)
    assert [(row.layer, row.expert) for row in rows] == [(i, j) for i in (0, 1) for j in range(8)]
    assert all(row.loss is None for row in rows) and max(row.pictures for row in rows) > 0


@names
def test_the_similarity_of_weights_is_the_cosine_of_the_flattened_experts(name, pipelines):
    layer = sparse_layers(pipelines[name].transformer)[0]
    experts = layer.module.experts
    with torch.no_grad():
        flat = torch.stack(
            [torch.cat([p.flatten() for p in expert.parameters()]) for expert in experts]
            if name == "hidream" else
            [torch.cat([p[i].flatten() for p in experts.parameters()]) for i in range(8)]
        )  # fmt: skip
        want = torch.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(weight_similarity(layer), want, atol=1e-6, rtol=0)


@names
@pytest.mark.parametrize("kind, bound", [("int8", 0.02), ("int4", 0.3)])
def test_quantised_experts_of_a_pipeline_stay_close(name, kind, bound):
    """Every dequantised matrix is that of `quantize`; the output of a layer is close."""
    pipeline = MAKE[name](**({"use_grouped_mm": True} if name == "nucleus" else {}))
    pipeline.transformer.to(torch.bfloat16)
    layer = sparse_layers(pipeline.transformer)[-1]
    width = pipeline.transformer.inner_dim
    x, time = torch.randn(2, 64, width).bfloat16(), torch.randn(2, width).bfloat16()
    arguments = (x,) if name == "hidream" else (x, x.flip(-1), time)
    with torch.no_grad():
        want, before = layer.module(*arguments), [weight.clone() for weight in layer.weights()]
        if name == "nucleus" and kind == "int4":  # groups of 32 inputs do not divide 16
            with pytest.raises(ValueError, match="expected a multiple of 32"):
                layer.quantize(kind)
            return
        layer.quantize(kind)
        for weight, whole in zip(layer.weights(), before, strict=True):
            rows = whole if name == "hidream" else whole.mT
            exact = quantize(rows.contiguous(), kind).to(torch.bfloat16)
            assert torch.equal(weight, exact if name == "hidream" else exact.mT)
        assert 0 < relative_error(layer.module(*arguments), want) < bound
        shared = "shared_experts" if name == "hidream" else "shared_expert"
        routed = [y - getattr(layer.module, shared)(x) for y in (layer.module(*arguments), want)]
        assert relative_error(*routed) < 2 * bound
    assert not [p for p in layer.module.experts.parameters() if p.ndim > 1]
    stored = [b for b in layer.module.experts.buffers() if b.dtype in (torch.int8, torch.uint8)]
    per_byte = 1 if kind == "int8" else 2
    assert sum(b.numel() for b in stored) * per_byte == sum(w.numel() for w in before)
    assert layer.without(1) and weight_similarity(layer).diagonal().allclose(torch.ones(1))


def test_wrong_pipelines_and_prompts_are_one_line_errors(pipelines, tmp_path, capsys):
    root, empty = pipelines["root"], tmp_path / "empty.txt"
    empty.write_text("\n\n")
    (tmp_path / "tab.txt").write_text("cat\t\n")
    index = json.loads((root / "nucleus" / "model_index.json").read_text())
    for name, transformer in (
        ("flux", ["diffusers", "FluxTransformer2DModel"]),
        ("code", ["dit_moe", "NucleusMoEImageTransformer2DModel"]),
    ):
        (tmp_path / name).mkdir()
        text = json.dumps(index | {"transformer": transformer})
        (tmp_path / name / "model_index.json").write_text(text)
    (tmp_path / "no-llama").mkdir()
    index = json.loads((root / "hidream" / "model_index.json").read_text())
    text = json.dumps(index | {"text_encoder_4": [None, None]})
    (tmp_path / "no-llama" / "model_index.json").write_text(text)
    dense = tiny_nucleus(moe_enabled=False)
    dense.save_pretrained(tmp_path / "dense")
    prompts = ("--prompts", root / "prompts.txt")
    for arguments, message in (
        ((), "got neither of --ckpt and --pipeline"),
        (("--ckpt", "x", "--pipeline", "y"), "got both of --ckpt and --pipeline"),
        (("--pipeline", root / "nucleus"), "got no --prompts"),
        (("--ckpt", "x", "--text-encoder", "y"), "--text-encoder: has no effect with --ckpt"),
        (("--pipeline", root / "nucleus", *prompts, "--ema", "0.9"), "--ema: has no effect"),
        (("--pipeline", root / "nucleus", "--prompts", empty), "has no prompts"),
        (("--pipeline", root / "nucleus", "--prompts", tmp_path / "tab.txt"), "line 1"),
        (("--pipeline", root / "nucleus", "--prompts", tmp_path / "none"), "cannot read"),
        (("--pipeline", tmp_path / "flux", *prompts), "got FluxTransformer2DModel"),
        (("--pipeline", tmp_path / "code", *prompts), "of the library dit_moe"),
        (("--pipeline", tmp_path / "none", *prompts), "expected a folder or hub id"),
        (("--pipeline", tmp_path / "no-llama", *prompts), "expected it in --text-encoder"),
    ):
        line = expect_error(capsys, "expert_data.py", *arguments, "--output", tmp_path / "c.npz")
        assert message in line
    with pytest.raises(UserError, match="its transformer is dense"):
        open_prompt_pipeline(str(tmp_path / "dense"), "fp32")
    with pytest.raises(UserError, match="expected a model with experts"):
        sparse_layers(torch.nn.Linear(1, 1))


def test_a_failed_script_leaves_no_folder_for_its_output(tmp_path, monkeypatch, capsys):
    at_exit = []
    register = SimpleNamespace(register=lambda *call: at_exit.append(partial(*call)))
    monkeypatch.setattr(files, "atexit", register)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "new" / "deep" / "counts.npz"
    prompts.write_text(PROMPTS)
    flags = ("--pipeline", tmp_path / "none", "--prompts", prompts, "--output", output)
    assert "expected a folder or hub id" in expect_error(capsys, "expert_data.py", *flags)
    assert output.parent.is_dir()
    for call in at_exit:
        call()
    assert [*tmp_path.iterdir()] == [prompts]
