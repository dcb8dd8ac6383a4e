"""Fine-tuning and other kinds of training: dense, unconditional, and with frozen weights."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    SMALL,
    assert_same_values,
    call_main,
    expect_error,
    only_run,
    rows,
    save_checkpoint,
)
from PIL import Image
from test_layouts import DENSE, random_diffusers_model
from test_models import randomised
from test_sampling import randomised_preset

from checkpoints import Record, config_of
from checkpoints.checkpoint import load_model, read_checkpoint
from checkpoints.meta import initial_weights
from checkpoints.published import to_published
from latents.cache import read_settings
from runtime.errors import UserError
from training.config import TrainConfig
from training.engine import freeze
from training.finetune import open_weights
from training.sections import StepConfig


@pytest.fixture
def arguments(train_flags, tmp_path):
    """Function that returns the arguments of a train.py run of two steps."""
    values = {
        "model": None, "num_experts": None, "global-batch-size": 4, "log-every": 1, "max-steps": 2,
        "lr": None,
    }  # fmt: skip
    return partial(train_flags, tmp_path / "results", **values)


@pytest.fixture
def flags(arguments, tmp_path):
    """Function that runs train.py in this process and returns the run folder."""

    def run(**changes) -> Path:
        call_main("train.py", *arguments(**changes))
        return only_run(tmp_path / "results")

    return run


def test_a_dense_model_trains_and_samples_without_expert_load(flags, tmp_path):
    run = flags(model="DiT-Ti/2", **SMALL, num_experts=0, rf=True, **{"num-sample": 4})
    assert "dense" in run.name
    assert all("expert_load" not in row and row["aux_loss"] == 0 for row in rows(run.parent))
    model = load_model(run)
    assert model.config.expert_mlp == "gelu" and all(block.moe is None for block in model.blocks)
    call_main(
        "sample.py", "--ckpt", run, "--num-sampling-steps", 2, "--class-labels", "class-1", 3,
        "--output", tmp_path / "grid.png",
    )  # fmt: skip
    assert Image.open(tmp_path / "grid.png").height > 20


def test_a_folder_without_classes_trains_unconditionally(flags, image_tree, tmp_path, capsys):
    run = flags(model="DiT-Ti/2", **SMALL, **{"data-path": image_tree / "class-0", "num-sample": 4})
    stored = read_checkpoint(run)
    assert stored.config.num_classes == 1 and stored.config.dropout == 0
    call_main(
        "sample.py", "--ckpt", run, "--num-sampling-steps", 2, "--output", tmp_path / "grid.png"
    )
    assert "guidance 1," in capsys.readouterr().out
    moved = shutil.copytree(image_tree / "class-0", tmp_path / "moved")  # it names the class
    call_main(
        "train.py", "--finetune", run, "--data-path", moved, "--image-size", 16, "--lr", 0,
        "--max-steps", 1, "--global-batch-size", 8, "--num-workers", 0, "--num-sample", 0,
        "--run-name", "more", "--results-dir", tmp_path,
    )  # fmt: skip
    more = read_checkpoint(tmp_path / "more")
    assert more.record.class_names == ("moved",)
    assert all(torch.equal(more.state_dict[n], value) for n, value in stored.state_dict.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints by the words of `BAD_FLAGS`."""
    folder, sparse = tmp_path_factory.mktemp("files"), randomised_preset(**SMALL)
    names = ("class-3", "class-1", "horse", "class-0")
    info = {"class_names": names, "model": "DiT-Ti/2", "objective": "gaussian", "step": 9}
    paths = {
        "SOURCE": save_checkpoint(sparse, folder / "source.safetensors", **info),
        "DENSE": save_checkpoint(randomised(**DENSE), folder / "dense.safetensors"),
        "CLASS": save_checkpoint(randomised(class_tokens=2), folder / "class.safetensors"),
    }
    for name in ("export", "run/checkpoints/0000001", "run/checkpoints/0000002"):
        (folder / name).mkdir(parents=True)
        shutil.copy(paths["SOURCE"], folder / name / "model.safetensors")
    return paths | {"EXPORT": folder / "export", "GONE": folder / "run/checkpoints/0000009"}


@pytest.fixture
def source(files, tmp_path) -> Path:
    """Sparse model for 16-pixel images. Its four classes differ from those of the image tree."""
    return Path(shutil.copy(files["SOURCE"], tmp_path / "source.safetensors"))


def test_fine_tuning_keeps_matching_weights_and_lists_the_rest(flags, source):
    run = flags(finetune=source, lr=0.0, **{"image-size": 24})
    log = (run / "log.txt").read_text()
    table = "y_embedder.embedding_table.weight"
    assert all(name in log for name in (f"started from {source}", "pos_embed", table))
    before, after = read_checkpoint(source), read_checkpoint(run)
    assert after.config.input_size == 12 and after.config.num_experts == 4
    new, old = (c.state_dict[table] for c in (after, before))
    assert torch.equal(new[[0, 1, 3, 4]], old[[3, 1, 0, 4]])  # by name, and that of "no class"
    assert not any(torch.equal(new[2], row) for row in old)
    assert f"{table}: new rows for 1 of 4 classes" in log
    for name in ("blocks.1.attn.qkv.weight", "final_layer.linear.weight"):
        assert torch.equal(after.state_dict[name], before.state_dict[name])
    origin = {"path": str(source), "step": 9, "model": "DiT-Ti/2"}
    assert after.record.initialized_from == origin


@pytest.mark.parametrize("changes, names", [
    ({"depth": 3}, "blocks.2"),
    ({"qk-norm": True}, "blocks.*.attn.q_norm, blocks.*.attn.k_norm"),
])  # fmt: skip
def test_fine_tuning_draws_the_weights_that_its_source_lacks(flags, source, changes, names):
    """A block at the end starts as the identity, so the model's predictions stay as they were."""
    run = flags(finetune=source, lr=0.0, **changes)
    before, after = read_checkpoint(source).state_dict, read_checkpoint(run).state_dict
    assert (
        f"note: {source} has no {names}: drawn as in a new model\n" in (run / "log.txt").read_text()
    )
    new = after.keys() - before.keys()
    torch.manual_seed(0)
    drawn = dict(initial_weights(read_checkpoint(run).config))
    assert new and all(torch.equal(after[name], drawn[name]) for name in new)
    assert all(torch.equal(after[name], before[name]) for name in before if "y_emb" not in name)


def test_images_are_encoded_by_the_autoencoder_that_the_weights_record(flags, source, tiny_vae):
    model, info = load_model(source), {"objective": "gaussian", "step": 9}
    own = shutil.copytree(tiny_vae, source.parent / "own")
    save_checkpoint(model, source, vae_path=str(own), **info)
    values = {"finetune": source, "vae-path": None, "run-name": "tuned"}
    for steps in (1, 2):  # begins and resumes
        record = read_checkpoint(flags(**values, **{"max-steps": steps})).record
        assert (record.vae_path, record.step) == (str(own), steps)
    shutil.rmtree(own)
    with pytest.raises(UserError, match=f"--finetune: .* autoencoder {own}, which does not exist"):
        flags(**values | {"run-name": "other"})


def test_cached_latents_name_the_autoencoder_and_not_the_weights(flags, source, latent_cache):
    info = {"objective": "gaussian", "step": 9, "vae_path": "/an/autoencoder/that/is/gone"}
    save_checkpoint(load_model(source), source, **info)
    paths = {"vae-path": None, "data-path": None, "image-size": None, "latents-path": latent_cache}
    record = read_checkpoint(flags(finetune=source, **paths)).record
    assert record.vae_path == read_settings("", latent_cache).vae_path


def test_an_interrupted_fine_tuning_resumes_and_keeps_its_origin(flags, files, tmp_path):
    """The source weights have a size without a preset, and are deleted."""
    source = Path(shutil.copy(files["DENSE"], tmp_path))
    values = {"finetune": source, "run-name": "tuned"}
    run = flags(**values, **{"max-steps": 1})
    flags(**values)
    source.unlink()
    flags(**values, **{"max-steps": 3})
    call_main("train.py", "--resume", run, "--max-steps", 4)
    assert [row["step"] for row in rows(run.parent) if "loss" in row] == [1, 2, 3, 4]
    record = read_checkpoint(run).record
    assert record.step == 4 and record.initialized_from["path"] == str(source)


@pytest.mark.parametrize(
    ("classes", "probability", "now", "kept"),
    [(1, 0, 1, 0), (1, 0.1, 1, 0.1), (9, 0.1, 1, 0), (1, 0, 9, 0.1), (9, 0.2, 9, 0.2)],
)
def test_the_dropout_of_weights_follows_the_number_of_classes_if_it_did_before(
    classes, probability, now, kept
):
    sizes = {"num_classes": classes, "class_dropout_prob": probability}
    record = Record(config=config_of("DiT-Ti/2", **sizes))
    config = TrainConfig.of_weights(record).changed({"num_classes": now})
    assert config.model.dropout == kept


def test_the_plan_of_a_run_has_its_classes_although_the_data_are_not_there(
    flags, image_tree, tmp_path, capsys
):
    data = shutil.copytree(image_tree, tmp_path / "data")
    run = flags(**SMALL, **{"max-steps": 1, "data-path": data})
    shutil.rmtree(data)
    capsys.readouterr()
    call_main("train.py", "--resume", run, "--dry-run")
    assert "4 classes" in capsys.readouterr().out
    call_main("train.py", "--finetune", run, "--dry-run")
    assert "4 classes" in capsys.readouterr().out
    call_main("train.py", "--finetune", run, "--dry-run", "--num-classes", 3)
    assert "3 classes" in capsys.readouterr().out


def test_published_and_diffusers_weights_are_fine_tuned_to_new_classes(flags, tmp_path):
    model = randomised_preset(depth=2)
    torch.save(to_published(model.state_dict(), model.config), tmp_path / "published.pt")
    run = flags(finetune=tmp_path / "published.pt", **{"num-classes": 4})
    assert "started from" in (run / "log.txt").read_text()
    shutil.rmtree(run)
    random_diffusers_model().save_pretrained(tmp_path / "dit")
    run = flags(finetune=tmp_path / "dit")
    assert "y_embedder.embedding_table.weight" in (run / "log.txt").read_text()


def test_training_changes_only_weights_that_are_not_frozen(flags, source):
    run = flags(finetune=source, **{"train-router-only": True})
    before, after = (read_checkpoint(path).state_dict for path in (source, run))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed - {"y_embedder.embedding_table.weight"} == {
        f"blocks.{layer}.moe.gate.weight" for layer in range(2)
    }
    (note,) = re.findall("note: (.*) is frozen, but not as in", (run / "log.txt").read_text())
    assert note == "y_embedder.embedding_table.weight"


def test_published_weights_keep_the_number_of_heads_of_their_width(tmp_path):
    model = randomised(hidden_size=128, num_heads=4, depth=1, num_experts=0)
    torch.save(to_published(model.state_dict(), model.config), tmp_path / "published.pt")
    opened = open_weights(str(tmp_path / "published.pt"), {})
    assert opened.config.num_heads == 4


def test_freeze_patterns_match_parameters_and_modules():
    model = randomised()
    freeze(model, StepConfig(freeze=("blocks.*.attn", "x_embedder.proj.bias")))
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert "x_embedder.proj.bias" in frozen and "x_embedder.proj.weight" not in frozen
    assert sum(".attn." in name for name in frozen) == len(frozen) - 1 == 8
    with pytest.raises(UserError, match="--train-router-only: freezes all parameters"):
        freeze(randomised(**DENSE), StepConfig(train_router_only=True))


def test_fine_tuning_flags_that_change_no_weights_are_applied_and_logged(flags, source):
    changed = {
        "rope": True, "num_experts_per_tok": 1, "aux-loss-alpha": 0.5, "mlp-norm-eps": 1e-5,
        "absolute-positions": False,
    }  # fmt: skip
    others = {"max-steps": 1, "warmup-steps": 4, "objective": "rectified_flow"}
    run = flags(finetune=source, router="topk:gating=sigmoid", **changed, **others)
    stored, before = (read_checkpoint(path) for path in (run, source))
    assert (before.record.objective.name, stored.record.objective.name) == (
        "gaussian",
        "rectified_flow",
    )
    for flag, value in changed.items():
        now, was = (getattr(c.config, flag.replace("-", "_")) for c in (stored, before))
        assert now == value != was
        is_noted = f"--{flag.replace('_', '-')}: was" in (run / "log.txt").read_text()
        assert is_noted == (flag != "aux-loss-alpha")  # changes no output of the model
    for note in (
        "--objective: was gaussian, is rectified_flow",
        "gating=softmax",
        "gating=sigmoid",
        "after 1 step 90% of EMA 0.9 will still be the weights that it began with",
        "note: --warmup-steps 4 is more than the 1 step of the run",
    ):
        assert note in (run / "log.txt").read_text()


def test_a_model_without_learn_sigma_and_with_dense_blocks_resumes(flags, tmp_path):
    values = {
        "model": "DiT-Ti/2", **SMALL, "learn-sigma": False, "sparse-layers": "deep-half",
        "num-sample": 4, "max-steps": 1, "run-name": "run",
    }  # fmt: skip
    run = flags(**values)
    call_main("train.py", "--resume", run, "--max-steps", 2)
    flags(**{**values, "max-steps": 3})
    assert [row["step"] for row in rows(run.parent) if "loss" in row] == [1, 2, 3]
    assert rows(run.parent)[-1]["vb"] == 0 and (run / "samples-0000003.png").exists()
    assert load_model(run).out_channels == 4
    random_diffusers_model(out_channels=4).save_pretrained(tmp_path / "dit")
    shutil.rmtree(run)
    assert rows(flags(finetune=tmp_path / "dit").parent)[-1]["step"] == 2


BAD_FLAGS = [
    ({"image-size": "16x24"}, "--image-size: got '16x24', expected"),
    ({"gpus": 8}, "--gpus: has no effect without --dry-run"),
    ({"finetune": "SOURCE", "image-size": "18"}, "--image-size: got 18, expected a multiple of 4"),
    ({"finetune": "SOURCE", "resume": "SOURCE"}, "cannot be combined with --"),
    ({"finetune": "SOURCE", "model": "DiT-S/2"}, "different model: --hidden-size: was 32"),
    ({"finetune": "SOURCE", "num_experts": 6}, "--num-experts: was 4, is 6"),
    ({"finetune": "SOURCE", "mlp-ratio": 3}, "--mlp-ratio: was 2.0, is 3.0"),
    ({"finetune": "SOURCE", "sparse-layers": "deep-half"}, "--sparse-layers: was all, is"),
    ({"finetune": "SOURCE", "depth": 1}, "is a different model: --depth: was 2, is 1"),
    ({"finetune": "SOURCE", "router-scale": 2}, "--router sigmoid:scale=VALUE"),
    ({"finetune": "SOURCE", "learn-sigma": False}, "--learn-sigma: was True, is False"),
    ({"finetune": "DENSE", "num_experts": 16}, "is a dense model; first add experts: python up"),
    (
        {"finetune": "CLASS", "conditions": "size", "class-tokens": 0},
        "is a different model: --class-tokens: was 2, is 0",
    ),
    ({"resume": "SOURCE"}, "RUN/checkpoints/STEP; to start from weights"),
    ({"resume": "EXPORT"}, "RUN/checkpoints/STEP; to start from weights"),
    ({"resume": "GONE"}, "expected a checkpoint of the run: 0000002, 0000001"),
]


def test_a_fine_tuned_run_resumes_after_its_source_was_trained_further(flags, source):
    """Fine-tuning also keeps label dropout off and the class embeddings as they are."""
    folder = source.parent / "source" / "checkpoints"
    names = tuple(f"class-{label}" for label in range(4))
    for step in (1, 2):
        model = randomised_preset(**SMALL, class_dropout_prob=0.0)
        path = folder / f"{step}" / "model.safetensors"
        path.parent.mkdir(parents=True)
        save_checkpoint(model, path, class_names=names, model="DiT-Ti/2", step=step)
        run = flags(finetune=folder.parent, lr=0.0, **{"max-steps": step, "run-name": "tuned"})
    assert rows(run.parent)[-1]["step"] == 2
    got, want = read_checkpoint(run), read_checkpoint(folder.parent)
    assert got.config.dropout == 0
    assert_same_values(got.state_dict, want.state_dict)


@pytest.mark.parametrize("changes, message", BAD_FLAGS, ids=[m for _, m in BAD_FLAGS])
def test_wrong_fine_tuning_flags_are_one_line_errors(arguments, files, changes, message, capsys):
    changes = {name: files.get(str(value), value) for name, value in changes.items()}
    assert message in expect_error(capsys, "train.py", *arguments(**changes))
