"""Every router in a run: state, resuming, sampling, export, heat maps, and user-defined parts."""

import math
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    ROOT,
    assert_same_state,
    assert_same_values,
    call_main,
    expect_error,
    only_run,
    rows,
    state_of,
    step_folder,
)
from test_training import break_losses

import routers
import training.step
from analysis.counts import RoutingCounts
from checkpoints import load_model
from checkpoints.costs import count_macs
from diffusion import objectives
from options.parts import Word
from routers import ROUTERS, TopKRouter
from training import optimizers
from training.config import parse_training
from training.run_folder import CONFIG_FILE

STEPS, BROKEN = 4, 3
RESUMED = ("sigmoid", "expert_choice", "race", "prototype")  # batch_pool has the state of race
MORE = {"expert_choice": ["--auxiliary", "sra", "dispersive"]}  # sra has weights of its own


@pytest.fixture(scope="module")
def flags(train_flags):
    values = {
        "num_experts_per_tok": 2, "global-batch-size": 8, "rf": True, "log-every": 1,
        "ckpt-every": 1, "max-steps": STEPS, "run-name": "run",
    }  # fmt: skip

    def make(root: Path, name: str, **changes) -> list[str]:
        return [*train_flags(root / name, router=name, **values | changes), *MORE.get(name, [])]

    return make


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory) -> tuple[Path, dict]:
    """Folder with a run per router, two of `RESUMED`, and the updates of each (True if skipped).

    The runs in "whole" are uninterrupted. The runs in "two" stop after two steps, resume, and use
    gradient checkpointing. Each step has two micro-batches. The loss of the third step is infinite,
    while its gradient is finite, as for a sum with infinity.
    """
    root, seen = tmp_path_factory.mktemp("routers"), {name: [] for name in ROUTERS}
    update = training.step.update_routers

    def watched(model, observed, skipped):
        seen[model.config.router.name].append(bool(skipped))
        update(model, observed, skipped)

    with pytest.MonkeyPatch.context() as patch:
        break_losses({BROKEN: math.inf}, patch)
        patch.setattr(training.step, "update_routers", watched)
        for name in ROUTERS:
            run = partial(flags, name=name, accum_iter=2)
            call_main("train.py", *run(root / "whole"))
            for steps in (2, STEPS) if name in RESUMED else ():
                again = {"max-steps": steps, "gradient-checkpointing": True}
                call_main("train.py", *run(root / "two", **again))
    return root, seen


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_with_any_router_resumes_exactly_with_gradient_checkpointing(trained, name):
    """Gradient checkpointing repeats the forward pass, which must not update a router again.

    test_runs.py and test_models.py have these tests of topk.
    """
    root, _ = trained
    assert "resumed from" in (only_run(root / "two" / name) / "log.txt").read_text()
    whole, two = (step_folder(root / part / name, STEPS) for part in ("whole", "two"))
    assert_same_state(two, whole)
    assert any("/projectors.sra" in title for title in state_of(two)) == (name in MORE)
    load = rows(root / "whole" / name)[-1]
    assert len(load["expert_load"]) == 2 and min(load["expert_load"]) >= 1
    assert 1 < load["experts_per_token"][0] <= 3


@pytest.mark.parametrize("name", ["sigmoid", "race", "batch_pool"])
def test_router_state_is_updated_once_per_step_except_in_skipped_steps(trained, name):
    root, seen = trained
    runs = 1 + (name in RESUMED)
    assert seen[name] == runs * [step == BROKEN for step in range(1, STEPS + 1)]
    assert not seen["topk"] and not seen["expert_choice"] and not seen["prototype"]
    log = rows(root / "whole" / name)
    assert log[BROKEN - 1]["loss"] == "nan" and isinstance(log[-1]["loss"], float)
    assert [row.get("skipped_steps", 0) for row in log] == [0, 0, 1, 1]
    folders = [step_folder(root / "whole" / name, step) for step in range(1, STEPS + 1)]
    assert_same_state(folders[BROKEN - 1], folders[BROKEN - 2])
    ends = (".threshold", ".e_score_correction_bias")
    states = [{k: v for k, v in state_of(at).items() if k.endswith(ends)} for at in folders]
    assert len(states[0]) == 4  # two layers, in the training state and in the EMA file
    for key, last in states[-1].items():
        assert last.any() and not torch.equal(last, states[BROKEN - 1][key])
        assert torch.equal(last, states[-1][key.replace("/model/", "/ema/")])


@pytest.mark.parametrize("name", ["expert_choice", "race", "batch_pool", "prototype"])
def test_a_trained_model_with_any_router_is_exported_sampled_and_mapped(trained, name, tmp_path):
    run, exported = only_run(trained[0] / "whole" / name), tmp_path / "exported"
    few = ("--num-sampling-steps", 2, "--cfg-scale", 2)
    call_main("export.py", "--ckpt", run, "--output", exported, "--samples", 0)
    got, want = load_model(exported), load_model(run)
    assert got.config.router.name == name
    assert_same_values(got.state_dict(), want.state_dict())
    call_main("sample.py", "--ckpt", exported, *few, "--output", tmp_path / "grid.png")
    data = tmp_path / "experts.npz"
    call_main("expert_data.py", "--ckpt", run, *few, "--images-per-class", 2, "--output", data)
    spent = RoutingCounts.load(data).experts_per_token
    assert spent.shape == (2, 16, 2) and spent.max() <= 4
    if name == "prototype":
        assert (spent == 2).all()
    elif name == "expert_choice":
        assert np.allclose(spent.mean(1), 2) and spent.std() > 0
    figure = ("--only", "spending", "--output", tmp_path / "map.png")
    call_main("expert_report.py", "--data", data, *figure)
    if name != "batch_pool":  # its initial thresholds may select every expert for every token
        assert (tmp_path / "map.png").exists() == (name in ("race", "expert_choice"))


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The file of docs/python.md, in two parts, and a function that forgets what it defined."""
    page = (ROOT / "docs" / "python.md").read_text().split("## A router of your own")[1]
    path = tmp_path / "cosine.py"
    first, second = re.findall(r"```python\n(.*?)```", page.split("\n## ")[0], re.DOTALL)
    assert len(first.splitlines()) <= 18
    path.write_text(first + second)
    known, imported = dict(ROUTERS), set(sys.modules)

    def forget() -> None:
        for name in ROUTERS.keys() - known:
            del ROUTERS[name]
        for name in sys.modules.keys() - imported:
            if "cosine" in name:
                del sys.modules[name]

    yield path, forget
    forget()


def test_a_router_in_a_file_of_its_own_is_trained_and_sampled_with_plugin(
    plugin, train_flags, tmp_path, capsys
):
    (path, forget), output = plugin, ("--output", tmp_path / "grid.png")
    flags = {"router": "cosine:temperature=0.2", "run-name": "run", "max-steps": 1}
    flags = train_flags(tmp_path, **flags)
    sample = ["sample.py", "--ckpt", tmp_path / "run", "--num-sampling-steps", 1, *output]
    call_main("train.py", *flags, "--plugin", path)
    forget()
    assert "--plugin FILE.py" in expect_error(capsys, *sample)
    of_step = tmp_path / "run" / "checkpoints" / "0000001", "--ema", "0.9"
    assert "--plugin FILE.py" in expect_error(capsys, "sample.py", "--ckpt", *of_step)
    command, _ = parse_training("train.py", arguments={"plugin": path})
    assert command.plugin == (str(path),)
    forget()
    call_main(*sample, "--plugin", path)
    assert load_model(tmp_path / "run").blocks[0].moe.gate.temperature == 0.2
    assert str(path) not in (tmp_path / "run" / CONFIG_FILE).read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"plugin: [{path}]")
    forget()
    assert "only a command" in expect_error(capsys, "train.py", "--config", recipe)
    assert "cosine" not in ROUTERS
    wrong = expect_error(capsys, *sample, "--plugin", recipe)
    assert "--plugin: got" in wrong and "expected a Python file" in wrong
    upcycle = ("upcycle.py", "--ckpt", tmp_path / "run", "--output", tmp_path / "upcycled")
    assert "expected 0, a dense model" in expect_error(capsys, *upcycle, "--plugin", path)
    forget()
    path.write_text(path.read_text().replace("temperature", "warmth"))
    for command in (sample, ["train.py", "--resume", tmp_path / "run"]):
        line = expect_error(capsys, *command, "--plugin", path)
        assert "cosine:temperature" in line and "declare it again" in line


def test_a_router_that_cannot_be_trained_is_rejected_before_the_run_begins(
    plugin, train_flags, tmp_path, capsys
):
    path = plugin[0]
    path.with_name("cosine_of_mask.py").write_text(
        "import torch\n\nfrom routers import ROUTERS, TopKRouter\n\n\nclass Masked(TopKRouter):\n"
        "    def __post_init__(self):\n        super().__post_init__()\n"
        '        self.register_buffer("mask", torch.ones(1), persistent=False)\n\n\n'
        "class Tied(TopKRouter):\n"
        "    def __post_init__(self):\n        super().__post_init__()\n"
        "        self.first, self.second = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)\n"
        "        self.second.weight = self.first.weight\n\n\n"
        'ROUTERS["masked"], ROUTERS["tied"] = Masked, Tied\n'
    )
    flags = train_flags(tmp_path / "results", router="masked")
    plugins = (path, path.with_name("cosine_of_mask.py"))
    line = expect_error(capsys, "train.py", *flags, "--plugin", *plugins)
    assert "blocks.0.moe.gate.mask" in line
    flags = train_flags(tmp_path / "results", router="tied")
    line = expect_error(capsys, "train.py", *flags, "--plugin", *plugins)
    assert "blocks.0.moe.gate.second.weight" in line
    for name in ("masked", "tied"):
        del ROUTERS[name]
    for plugin_file in plugins:
        del sys.modules[f"plugin:{plugin_file.resolve()}"]
    words = ["--plugin", str(path), "--lr", "1", f"--plugin={plugins[1]}", "--rf"]
    assert parse_training("train.py", None, words)[0].plugin == tuple(map(str, plugins))
    assert {"cosine", "masked", "tied"} <= ROUTERS.keys()
    assert not (tmp_path / "results").exists()


def test_a_checkpoint_of_a_router_whose_k_grows_is_resumed_and_sampled_with_the_k_of_its_step(
    plugin, train_flags, tmp_path
):
    results = tmp_path / "results"
    flags = {"router": "growing:interval=2", "num_experts_per_tok": 3, "log-every": 1,
             "ckpt-every": 1, "global-batch-size": 4, "run-name": "run"}  # fmt: skip
    for steps in (3, 5):
        values = {**flags, "max-steps": steps}
        call_main("train.py", *train_flags(results, **values), "--plugin", plugin[0])
    log = [row for row in rows(results) if "loss" in row]
    assert [row["experts_per_token"][0] for row in log] == [1, 1, 2, 2, 3]
    config = load_model(step_folder(results, 5)).config
    for row, k in ((log[0], 1), (log[-1], 3)):
        macs = count_macs(replace(config, router=Word("topk"), num_experts_per_tok=k))
        assert row["tflops_per_gpu"] * 1e12 == pytest.approx(6 * macs * row["images_per_sec"])
    for step, k in ((3, 2), (5, 3)):
        model = load_model(step_folder(results, step))
        model(torch.randn(2, *model.config.latent_shape), torch.rand(2), torch.tensor([0, 1]))
        assert model.experts_per_token == [k, k]


@pytest.fixture
def documented_parts():
    """Appends each code block to the module that docs/architecture.md names, for one test."""
    page, undo = (ROOT / "docs" / "architecture.md").read_text(), ExitStack()
    places = {
        "router": (routers, ROUTERS), "objective": (objectives, objectives.OBJECTIVES),
        "optimizer": (optimizers, optimizers.OPTIMIZERS),
    }  # fmt: skip
    with undo:
        for part, (module, table) in places.items():
            section = page.split(f"## Add your own {part}")[1]
            code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
            place = str(Path(module.__file__).relative_to(ROOT))
            assert len(code.splitlines()) <= 30 and f"end of `{place}`" in section
            undo.enter_context(patch.dict(vars(module)))
            undo.enter_context(patch.dict(table))
            exec(compile(code, place, "exec"), vars(module))
        yield


def test_the_documented_user_defined_parts_train_resume_and_sample(
    documented_parts, train_flags, tmp_path
):
    values = {
        "router": "mine", "objective": "flow_noise:clamp=0.1", "log-every": 1,
        "optimizer": "adafactor:weight_decay=0.1", "global-batch-size": 8,
        "val-share": 0.5, "val-every": 4, "num-sample": 4, "run-name": "run",
        "vae-path": "pixels", "image-size": 8,  # opens no autoencoder, which takes seconds
    }  # fmt: skip

    for name, steps in (("whole", 4), ("two", 2), ("two", 4)):
        call_main("train.py", *train_flags(tmp_path / name, **values, **{"max-steps": steps}))
    draw = ["--sampler", "heun", "--num-sampling-steps", "2", "--output", tmp_path / "grid.png"]
    call_main("sample.py", "--ckpt", tmp_path / "two" / "run", *draw)
    assert_same_state(step_folder(tmp_path / "two", 4), step_folder(tmp_path / "whole", 4))
    assert (tmp_path / "grid.png").stat().st_size > 100
    settings, _ = yaml.safe_load_all((tmp_path / "two" / "run" / CONFIG_FILE).read_text())
    log = rows(tmp_path / "two")
    assert log[-1]["aux_loss"] > 0 and log[-1]["experts_per_token"] == [2.0] * 2
    assert log[-1]["val_loss"] > 0
    step = settings["step"]
    assert settings["model"]["router"].startswith("mine:")
    assert "clamp=0.1" in step["objective"] and "weight_decay=0.1" in step["optimizer"]


class Counter(TopKRouter):
    """Counts its calls in the forward pass, not in `update`."""

    def __post_init__(self):
        super().__post_init__()
        self.register_buffer("calls", torch.empty(1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.calls.zero_()

    def forward(self, *inputs):
        self.calls += 1
        return super().forward(*inputs)


def test_a_buffer_that_a_forward_pass_changes_is_named(monkeypatch, train_flags, tmp_path, capsys):
    monkeypatch.setitem(ROUTERS, "counter", Counter)
    flags = train_flags(tmp_path, router="counter", **{"max-steps": 1})
    line = expect_error(capsys, "train.py", *flags)
    assert "blocks.0.moe.gate.calls: was changed by a forward pass" in line
