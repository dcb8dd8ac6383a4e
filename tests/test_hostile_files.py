"""Nothing that a stranger's file says is executed, allocated or believed: every kind is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_files
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MODEL, call_main, expect_error
from test_analysis import random_counts
from test_training import engine_of

from analysis.counts import RoutingCounts
from checkpoints import Record, load_model, read_checkpoint, save_model
from checkpoints.manifest import try_reading
from latents.autoencoder import load_autoencoder
from models import DiT
from runtime.errors import UserError, printable
from runtime.processes import Distributed
from train import DDPEngine
from train_deepspeed import find_state
from training.run import read_settings
from training.tally import Tally
from training.zero_config import Layout, read_config

SECONDS = 20  # of computing, for any one file
MEGABYTES = 700  # beyond what a good file takes; a bomb would take gigabytes


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = DiT(**TINY_MODEL)
    path = tmp_path_factory.mktemp("own") / "model.safetensors"
    save_model(path, model.state_dict(), Record(config=model.config, step=7, objective="gaussian"))
    return path


def arrays_of(counts: RoutingCounts) -> dict[str, np.ndarray]:
    arrays = {name: getattr(counts, name) for name in hostile_files.FIELDS}
    return {**arrays, "settings": np.array(json.dumps(vars(counts.settings)))}


# Reads every file that is named on standard input and says what became of each, then how much
# memory that took at most, beyond what reading a good file had taken, in kB.
READER = """
import json, resource, sys, time
from checkpoints.checkpoint import load_model
from analysis.counts import RoutingCounts
from runtime.errors import UserError

def read(path):
    start = time.process_time()
    try:
        (RoutingCounts.load if path.endswith(".npz") else load_model)(path)
        outcome = "taken"
    except UserError as error:
        outcome = "refused: " + str(error)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome, time.process_time() - start

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
good, *paths = json.load(sys.stdin)
assert read(good)[0] == "taken"
before = peak()
outcomes = {path: read(path) for path in paths}
print(json.dumps([outcomes, peak() - before]))
"""


def read_in_a_process(good: Path, paths: list[Path]) -> tuple[dict[str, tuple[str, float]], int]:
    result = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps([str(good), *map(str, paths)]),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_hostile_files_are_refused_in_bounded_memory_and_execute_nothing(own, tmp_path):
    good = tmp_path / "good.npz"
    random_counts().save(good)
    files = hostile_files.hostile_checkpoints(tmp_path / "weights", own)
    tables = hostile_files.hostile_counts(tmp_path / "counts", arrays_of(random_counts()))
    paths = [*files.values(), *tables.values()]
    assert len(paths) > 200
    RoutingCounts.load(good)
    outcomes, kilobytes = read_in_a_process(own, [good, *paths])
    assert outcomes.pop(str(good))[0] == "taken"
    for path, (outcome, seconds) in outcomes.items():
        assert outcome.startswith("refused: "), f"{path}: {outcome[:500]}"
        assert seconds < SECONDS, path
        assert "\n" not in outcome and len(outcome) < 1500, f"{path}: {outcome[:500]}"
        assert path.rstrip("/") in outcome or Path(path).parent.name in outcome, outcome[:500]
    assert kilobytes < 1000 * MEGABYTES
    for folder in ("weights", "counts"):
        assert not (tmp_path / folder / hostile_files.CANARY).exists()


def test_each_gadget_works_where_nothing_stops_it(tmp_path):
    """So that a canary which stays away means something."""
    import pickle

    tried = 0
    for name, gadget in hostile_files.gadgets(tmp_path / hostile_files.CANARY).items():
        if name in ("bytearray", "huge-tensor", "getattr", "torch-load"):
            continue
        pickle.loads(pickle.dumps(gadget))
        canary = tmp_path / hostile_files.CANARY
        assert canary.exists(), name
        canary.unlink() if canary.is_file() else canary.rmdir()
        tried += 1
    assert tried >= 5


def test_arguments_of_any_kind_do_not_stop_good_weights(own, tmp_path):
    state = read_checkpoint(own).state_dict
    laughs = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    for number, args in enumerate((3, None, [1], {"image_size": [1], "cycle": laughs})):
        path = tmp_path / f"{number}.pt"
        torch.save({"ema": state, "args": args}, path)
        stored = read_checkpoint(path, num_heads=2)
        assert stored.record == Record(config=stored.config) and stored.config.num_heads == 2


def test_weights_of_half_precision_are_good_ones(own, tmp_path):
    stored = read_checkpoint(own)
    halves = {name: value.bfloat16() for name, value in stored.state_dict.items()}
    save_model(tmp_path / "half.safetensors", halves, stored.record)
    model = load_model(tmp_path / "half.safetensors")
    x, t, y = torch.randn(1, 4, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long)
    assert model(x, t, y)[0].dtype == torch.float32


@pytest.mark.parametrize("case", hostile_files.DEEPSPEED)
def test_hostile_deepspeed_json_is_refused(case, tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(hostile_files.DEEPSPEED[case])
    line = expect_error(
        capsys, "train_deepspeed", "--deepspeed_config", path, "--dry-run", "--model", "DiT-S/2"
    )
    assert "--deepspeed_config" in line and "ds.json" in line


def test_a_pipe_or_a_folder_is_no_deepspeed_json(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read_config(str(path))


def test_what_only_deepspeed_can_refuse_is_one_line(tmp_path):
    from training.zero import check_zero_config

    check_zero_config({"zero_optimization": {"stage": 2, "overlap_comm": True}})
    for fields in ({"overlap_comm": "maybe"}, {"no_such_field": 1}, {"sub_group_size": -1}):
        with pytest.raises(UserError, match="DeepSpeed refuses") as caught:
            check_zero_config({"zero_optimization": {"stage": 3, **fields}})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", hostile_files.DOCUMENTS)
def test_hostile_json_of_a_run_is_refused(case, tmp_path):
    text = hostile_files.DOCUMENTS[case]
    for name in ("settings.json", "checksums.json", "progress.json", "deepspeed/layout.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    layout = Layout(world_size=1, zero_stage=1, expert_parallel_size=0)
    tally = Tally(Distributed(0, 0, 1, torch.device("cpu")))
    readers = {
        "settings.json": lambda: read_settings(tmp_path),
        "layout.json": lambda: find_state(tmp_path, layout),
        "progress.json": lambda: tally.load(tmp_path / "progress.json"),
    }
    for name, read in readers.items():
        with pytest.raises(UserError, match=f"{name}.* damaged|{name}: damaged") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    fault = try_reading(tmp_path)
    assert fault.startswith("checksums.json is damaged") and len(fault) < 1000
    for name in ("settings.json", "deepspeed/layout.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    for name in ("settings.json", "layout.json"):
        with pytest.raises(UserError):
            readers[name]()


@pytest.mark.parametrize("content", [
    [], [{}], {"a": 1}, [{"interval": {"sums": [1], "counts": [0, 0, 0], "steps": 1}}],
    [{"interval": {"sums": ["a", 1, 2], "counts": [0, 0, 0], "steps": 1, "seconds": 1}}],
    [{"interval": {"sums": [1, 2, 3], "counts": [[]], "steps": 1, "seconds": 1}}],
])  # fmt: skip
def test_progress_of_another_shape_is_one_line(content, tmp_path):
    (tmp_path / "progress.json").write_text(json.dumps(content))
    tally = Tally(Distributed(0, 0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match="progress.json: damaged"):
        tally.load(tmp_path / "progress.json")


@pytest.mark.parametrize("case", hostile_files.STATES)
def test_hostile_training_states_are_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = engine_of()
    take_step(engine)
    engine.save_state(tmp_path)
    before = [weight.clone() for weight in engine.model.state_dict().values()]
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    hostile_files.STATES[case](state)
    torch.save(state, tmp_path / "training_state.pt")
    with pytest.raises(UserError, match="training_state.pt: .*; remove .* to go on") as caught:
        engine.load_state(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    after = engine.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not Path(hostile_files.CANARY).exists()


def take_step(engine: DDPEngine) -> None:
    x, t, y = torch.randn(1, 4, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long)

    def losses(model: DiT) -> dict[str, torch.Tensor]:
        prediction, aux_loss = model(x, t, y)
        return {"loss": prediction.square().mean(), "aux_loss": aux_loss}

    engine.train_step([losses], lr=0.1)


def test_hostile_autoencoders_are_refused_before_they_are_built(tiny_vae, tmp_path):
    good = json.loads((tiny_vae / "config.json").read_text())
    weights = next(tiny_vae.glob("*.safetensors"))
    changes = [(name, v) for name, values in hostile_files.AUTOENCODERS.items() for v in values]
    texts = [json.dumps({**good, name: value}) for name, value in changes]
    texts += ["[" * 100_000, "[]", "{", '{"_class_name": "x", "_class_name": "AutoencoderKL"}']
    texts.append(json.dumps({**good, "block_out_channels": [4096, 8192]}))
    for number, text in enumerate(texts):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(text)
        (folder / weights.name).symlink_to(weights)
        with pytest.raises(UserError, match="--vae-path") as caught:
            load_autoencoder(str(folder), "cpu", torch.float32)
        assert "\n" not in str(caught.value), text[:100]
    binary = tmp_path / "binary"
    binary.mkdir()
    (binary / "config.json").write_text(json.dumps(good))
    gadget = hostile_files.Gadget(os.mkdir, str(tmp_path / hostile_files.CANARY))
    torch.save({"a": gadget}, binary / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="refused: got pickled 'posix mkdir'"):
        load_autoencoder(str(binary), "cpu", torch.float32)
    assert not (tmp_path / hostile_files.CANARY).exists()


SCRIPTS = {
    "sample": ("--output", "out/s.png"),
    "expert_data": ("--output", "out/e.npz"),
    "export": ("--output", "out"),
    "upcycle": ("--output", "out"),
}
HEAT_MAPS = ("heatmap_class", "heatmap_timestep", "heatmap_patch")


@pytest.mark.parametrize("script", [*SCRIPTS, *HEAT_MAPS])
def test_scripts_say_it_in_one_line_and_exit_with_2(script, own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if script in HEAT_MAPS:
        files = hostile_files.hostile_counts(tmp_path / "counts", arrays_of(random_counts()))
        names, flag = ("objects.npz", "huge-shape.npz", "negative.npz", "pipe.npz"), "--data"
        outputs = ("--output", "out/figure.png")
    else:
        files = hostile_files.hostile_pickles(tmp_path, own)
        files |= hostile_files.hostile_weights(tmp_path, own)
        files |= hostile_files.hostile_nodes(tmp_path, own)
        names, flag, outputs = (
            "system-weights.pt", "exec-old.pt", "weights-nan.safetensors", "weights-escape.pt",
            "billion-laughs.pt", "pipe.safetensors", "run",
        ), "--ckpt", SCRIPTS[script]  # fmt: skip
    for name in names:
        expect_error(capsys, script, flag, files[name], *outputs)
    assert not (tmp_path / hostile_files.CANARY).exists()
    assert not any((tmp_path / "out").glob("*"))


def test_names_in_a_checkpoint_do_not_lead_out_of_the_outputs(own, tiny_vae, tmp_path):
    """Classes are called like paths; all that is written stays where the flags say."""
    names = [
        "../../escaped",
        "/escaped",
        "a/b",
        "..",
        "\x1b[2J",
        "x" * 900,
        "",
        "con",
        "~",
        "$(id)",
    ]
    stored = read_checkpoint(own)
    info = {
        "objective": "rectified_flow", "vae_path": str(tiny_vae), "model": "DiT-S/2",
        "class_names": names, "image_size": 16,
    }  # fmt: skip
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    path = inside / "model.safetensors"
    save_model(path, stored.state_dict, Record(config=stored.config, **info))
    before = set(tmp_path.rglob("*"))
    few = ("--num-sampling-steps", 2, "--seed", 3)
    call_main(
        "sample.py", "--ckpt", path, *few, "--output", inside / "a" / "grid.png", "--output-dir",
        inside / "a" / "images", "--class-labels", "../../escaped", "/escaped", "..",
    )  # fmt: skip
    data = inside / "a" / "counts.npz"
    call_main("export.py", "--ckpt", path, "--output", inside / "a" / "export")
    assert "escaped" in (inside / "a" / "export" / "README.md").read_text()
    call_main("expert_data.py", "--ckpt", path, *few, "--images-per-class", 1, "--output", data)
    call_main("heatmap_class.py", "--data", data, "--output", inside / "a" / "classes.png")
    written = set(tmp_path.rglob("*")) - before
    assert written and all((inside / "a") in [p, *p.parents] for p in written)
    images = sorted(p.name for p in (inside / "a" / "images").iterdir())
    assert images == [f"{3 + n:06d}-class-{label:04d}.png" for n, label in enumerate((0, 1, 3))]


def test_a_line_of_an_error_commands_no_terminal():
    assert printable("a\n\x1b[2Jb\u202e\t c") == "a ?[2Jb? c"
    assert len(printable("x" * 10**6)) < 2100
