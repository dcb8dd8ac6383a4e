"""Moving averages: what they remember, which one is loaded, and others that are rebuilt."""

import pytest
import torch
from conftest import call_main, expect_error, only_run, step_folder
from safetensors.torch import load_file

from checkpoints import load_model, read_checkpoint
from runtime.errors import UserError
from training.ema import ExponentialEMA, PowerEMA
from training.rebuilding import snapshots_of


def test_a_warm_up_forgets_the_first_weights():
    ema = ExponentialEMA(decay=0.9999, warmup=True)
    assert ema.kept(1) == 2 / 11 and ema.kept(10**6) == 0.9999
    assert ema.start_share(100) < 1e-9 and ExponentialEMA(decay=0.99).start_share(100) > 0.36


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_profile_of_a_power_average_is_as_wide_as_asked_for(length):
    ema = PowerEMA(length=length)
    ema.start([torch.full((400,), 1e6, dtype=torch.float64)])
    for step, weights in enumerate(torch.eye(400, dtype=torch.float64), 1):  # each has one number
        ema.update([weights], step)
    profile, t = ema.averages[0], (torch.arange(400) + 0.5) / 400
    mean = (profile * t).sum()
    assert profile.sum() == pytest.approx(1)  # and nothing of the first weights
    assert ((profile * (t - mean) ** 2).sum().sqrt()).item() == pytest.approx(length, rel=1e-3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_flags):
    """Runs that differ only by what averages they track; the first keeps ten snapshots of each."""
    folders = {}
    for name, flags in {
        "tracked": ["--ema-length", "0.05", "0.1", "--keep-last=1", "--ckpt-every=4"],
        "wanted": ["--ema-length", "0.07"],
    }.items():
        folders[name] = folder = tmp_path_factory.mktemp(name)
        common = {"global-batch-size": 4, "max-steps": 40, "ema-decay": 0.999, "lr": 0.01}
        names = ["--ema", "exponential", "power"]
        call_main("train.py", *train_flags(folder, **common), *names, *flags)
    return folders


def test_a_run_leaves_snapshots_from_which_another_length_is_rebuilt(runs, tmp_path):
    run, file = only_run(runs["tracked"]), tmp_path / "rebuilt.safetensors"
    assert len(snapshots_of(run)) == 20
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["0000040", "snapshots"]
    call_main("rebuild_ema.py", run, "--length=0.07", f"--output={file}")
    got = load_file(file)
    want, one, other = (
        load_file(step_folder(runs[run], 40) / f"model-ema-power-{length}.safetensors")
        for run, length in (("wanted", 0.07), ("tracked", 0.05), ("tracked", 0.1))
    )
    error, apart = (
        sum((a[name] - b[name]).square().sum() for name in a).sqrt()
        for a, b in ((got, want), (one, other))
    )
    assert error < 0.05 * apart
    assert read_checkpoint(file).record.ema == "power-0.07"


def test_each_average_of_a_checkpoint_is_loaded_by_its_name(runs, capsys):
    run = only_run(runs["tracked"])
    models = {ema: load_model(run, ema=ema) for ema in (None, "0.999", "power-0.05", "power-0.1")}
    weights = {ema: model.blocks[0].attn.qkv.weight for ema, model in models.items()}
    assert torch.equal(weights[None], weights["0.999"])
    assert len({weight.sum().item() for weight in weights.values()}) == 3
    with pytest.raises(UserError, match="0.5.*0.999, power-0.05, power-0.1"):
        load_model(run, ema="0.5")
    assert "--ema" in expect_error(capsys, "sample.py", f"--ckpt={run}", "--ema=0.5")


def test_training_and_sampling_say_that_an_average_still_has_the_first_weights(runs, capsys):
    run = only_run(runs["tracked"])
    (line,) = [x for x in (run / "log.txt").read_text().splitlines() if "first weights" in x]
    assert "after 40 steps 96% of EMA 0.999" in line
    flags = ["--num-sampling-steps=1", f"--output={run / 'sample.png'}", "--images-per-class=1"]
    for ema, is_said in (("0.999", True), ("power-0.1", False)):
        call_main("sample.py", f"--ckpt={run}", f"--ema={ema}", *flags)
        assert ("96% of EMA 0.999" in capsys.readouterr().out) == is_said


def test_a_plan_has_the_disk_that_checkpoints_and_snapshots_take(train_flags, tmp_path, capsys):
    flags = {"max-steps": 12, "ckpt-every": 1, "keep-last": 1, "ema": "power", "ema-decay": None}
    call_main("train.py", *train_flags(tmp_path, **flags, **{"global-batch-size": 4}), "--dry-run")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("disk")]
    assert "for 1 checkpoint" in line and "11 snapshots" in line
