"""Optimizers, learning rate schedules, and EMAs."""

import pytest
import torch
from helpers import (
    TINY_MODEL,
    call_main,
    expect_error,
    only_run,
    step_folder,
)
from torch import nn

from checkpoints import load_model, read_checkpoint
from models import DiT
from runtime.errors import UserError
from training.ema import ExponentialEMA, PowerEMA
from training.lr_schedule import SCHEDULES, rate_factor
from training.optimizers import (
    OPTIMIZERS,
    AdamW,
    Optimizer,
    hidden_matrices,
    planned_state,
)


def make(seed: int = 0, **fields) -> tuple[DiT, dict]:
    torch.manual_seed(seed)
    model = DiT(**{**TINY_MODEL, **fields})
    named = dict(model.named_parameters())
    for weight in named.values():
        weight.data = torch.randn_like(weight)
    return model, named


def draw_gradients(named: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in named.values():
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_the_state_of_an_optimizer_with_tensors_of_its_own_is_planned_by_real_steps():
    factor = torch.tensor(0.5)

    class Half(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for weight in self.param_groups[0]["params"]:
                self.state[weight]["half"] = weight.grad * factor

    class Mine(AdamW):
        def make(self, named, lr, matrices):
            return Half(list(named.values()), lr=lr)

    found = planned_state(Mine(), {"a": torch.Size([3, 2]), "b": torch.Size([4])}, {"a": 1})
    assert {name: state["half"].shape for name, state in found.items()} == {"a": (3, 2), "b": (4,)}


def test_an_optimizer_whose_state_no_checkpoint_can_hold_is_refused(monkeypatch, capsys):
    """As that of SOAP, whose state has lists of matrices."""

    class Listing(torch.optim.SGD):
        def step(self, closure=None):
            for weight in self.param_groups[0]["params"]:
                self.state[weight]["factors"] = [weight.grad]

    class Soap(Optimizer):
        def make(self, named, lr, matrices):
            return Listing(list(named.values()), lr=lr)

    monkeypatch.setitem(OPTIMIZERS, "soap", Soap)
    words = "--dry-run", "--optimizer", "soap", "--model", "DiT-Ti/2", "--depth", 1
    line = expect_error(capsys, "train.py", *words)
    assert line.startswith("error: --optimizer: Soap keeps a list as factors for ")


def test_the_model_lists_its_matrices_and_how_many_are_fused_in_each_weight():
    model = make(router="batch_pool")[0]
    # Parameters of a layer of one's own are vectors, and kernels of a convolution no matrices.
    model.blocks[0].table = nn.Parameter(torch.zeros(6, 32))
    model.blocks[0].convolution = nn.Conv2d(32, 32, 3)
    model.blocks[0].pair = nn.Sequential(nn.Linear(32, 48))
    model.blocks[0].pair.matrices = {"0.weight": 2}
    found = hidden_matrices(model)
    block = {k.removeprefix("blocks.0."): cut for k, cut in found.items() if "blocks.0" in k}
    assert block == {
        "attn.qkv.weight": 3, "attn.proj.weight": 1, "adaLN_modulation.1.weight": 6,
        "moe.gate.weight": 0, "convolution.weight": 0, "pair.0.weight": 2,
        "moe.gate.predictor.0.weight": 1, "moe.gate.predictor.2.weight": 1,
        "moe.experts.gate_up_proj": 2, "moe.experts.down_proj": 1,
        "moe.shared_experts.gate_proj.weight": 1, "moe.shared_experts.up_proj.weight": 1,
        "moe.shared_experts.down_proj.weight": 1,
    }  # fmt: skip
    outside = {name: count for name, count in found.items() if not name.startswith("blocks.")}
    assert outside == {
        "x_embedder.proj.weight": 0, "t_embedder.mlp.0.weight": 1, "t_embedder.mlp.2.weight": 1,
        "y_embedder.embedding_table.weight": 0, "final_layer.linear.weight": 0,
        "final_layer.adaLN_modulation.1.weight": 0,
    }  # fmt: skip
    assert hidden_matrices(make(router="race")[0])["blocks.1.moe.gate.hidden"] == 1
    gelu = hidden_matrices(make(mlp_type="gelu")[0])
    assert "blocks.0.moe.experts.up_proj" in gelu and not [n for n in gelu if "bias" in n]


def test_the_linear_schedule_falls_from_the_warm_up_to_zero():
    rates = [rate_factor(SCHEDULES["linear"](), 2, done, 6) for done in range(1, 7)]
    assert rates == pytest.approx([1 / 2, 1, 3 / 4, 1 / 2, 1 / 4, 0])


def test_the_trapezoid_schedule_is_constant_and_then_falls_to_zero():
    schedule = SCHEDULES["trapezoid"](decay_share=0.25)
    rates = [rate_factor(schedule, 10, done, 100) for done in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(rates[10:75]) == {1.0}
    assert rates[75:] == pytest.approx([1 - step / 25 for step in range(1, 26)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "trapezoid"])
def test_a_learning_rate_schedule_ends_at_lr_floor(schedule, capsys):
    rates, free = (
        [rate_factor(SCHEDULES[schedule](lr_floor=floor), 0, done, 100) for done in range(1, 101)]
        for floor in (0.1, 0.0)
    )
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.1)
    assert rates == pytest.approx([0.1 + 0.9 * rate for rate in free])
    constant = "train.py", "--lr-schedule=constant:lr_floor=0.1", "--data-path=/nowhere"
    assert "constant has no options" in expect_error(capsys, *constant)


def test_adamw_uses_the_given_eps_and_can_exclude_vectors_from_decay():
    """With a zero gradient, a weight changes only by its decay."""
    named = {"matrix": nn.Parameter(torch.ones(2, 2)), "vector": nn.Parameter(torch.ones(2))}
    named["up_bias"] = nn.Parameter(torch.ones(4, 2))  # vectors of four experts
    for decay_vectors, left in ((True, 0.95), (False, 1.0)):
        for weight in named.values():
            weight.data.fill_(1.0)
            weight.grad = torch.zeros_like(weight)
        options = {"weight_decay": 0.5, "eps": 0.25, "decay_vectors": decay_vectors}
        optimizer = AdamW(**options).make(named, 0.1, {"matrix": 0})
        optimizer.step()
        assert named["matrix"].tolist() == [[pytest.approx(0.95)] * 2] * 2
        assert named["vector"].tolist() == [pytest.approx(left)] * 2
        assert named["up_bias"][0].tolist() == [pytest.approx(left)] * 2
        assert {group["eps"] for group in optimizer.param_groups} == {0.25}


def test_ema_warm_up_forgets_the_initial_weights():
    ema = ExponentialEMA(decay=0.9999, warmup=True)
    assert ema.decay_at(1) == 2 / 11 and ema.decay_at(10**6) == 0.9999
    assert (
        ema.initial_fraction(100) < 1e-9 and ExponentialEMA(decay=0.99).initial_fraction(100) > 0.36
    )


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_profile_of_a_power_ema_has_the_requested_width(length):
    ema = PowerEMA(length=length)
    ema.start([torch.full((400,), 1e6, dtype=torch.float64)])
    for step, weights in enumerate(torch.eye(400, dtype=torch.float64), 1):  # one 1 per step
        ema.update([weights], step)
    profile, t = ema.averages[0], (torch.arange(400) + 0.5) / 400
    mean = (profile * t).sum()
    assert profile.sum() == pytest.approx(1)  # the initial weights have no influence
    assert ((profile * (t - mean) ** 2).sum().sqrt()).item() == pytest.approx(length, rel=1e-3)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, train_flags):
    """The folder of a run with three EMAs."""
    folder, common = tmp_path_factory.mktemp("tracked"), {"global-batch-size": 4, "max-steps": 40}
    flags = train_flags(folder, **common, **{"lr": 0.01, "keep-last": 1, "ckpt-every": 20})
    emas = ["exponential:decay=0.999", "power:length=0.05", "power:length=0.1"]
    call_main("train.py", *flags, "--ema", *emas)
    return folder


def test_each_ema_of_a_checkpoint_is_loaded_by_name(tracked, capsys):
    run = only_run(tracked)
    models = {ema: load_model(run, ema=ema) for ema in (None, "0.999", "power-0.05", "power-0.1")}
    weights = {ema: model.blocks[0].attn.qkv.weight for ema, model in models.items()}
    assert torch.equal(weights[None], weights["0.999"])
    assert len({weight.sum().item() for weight in weights.values()}) == 3
    with pytest.raises(UserError, match="0.5.*0.999, power-0.05, power-0.1"):
        load_model(run, ema="0.5")
    assert "--ema" in expect_error(capsys, "sample.py", f"--ckpt={run}", "--ema=0.5")


def test_a_branch_continues_each_ema_by_name(tracked, train_flags, tmp_path):
    source = step_folder(tracked, 40)
    common = {"global-batch-size": 4, "max-steps": 41, "resume": source, "lr": 0}
    swapped = ["--ema", "power:length=0.05", "exponential:decay=0.999"]
    call_main("train.py", *train_flags(tmp_path / "swapped", **common), *swapped)
    names = ("power-0.05", "0.999")
    new = only_run(tmp_path / "swapped")
    assert read_checkpoint(new).record.ema == names[0]
    for name, other in (names, names[::-1]):
        got, want, wrong = (
            load_model(path, ema=ema).blocks[0].attn.qkv.weight
            for path, ema in ((new, name), (source, name), (source, other))
        )
        assert (got - want).norm() < 0.5 * (got - wrong).norm()
    call_main("train.py", *train_flags(tmp_path / "new", **common), "--ema=exponential:decay=0.5")
    log = (only_run(tmp_path / "new") / "log.txt").read_text()
    assert "changed: EMA 0.5 begins" in log and "changed: EMA power-0.05 ends" in log


def test_training_and_sampling_warn_that_an_ema_still_contains_the_initial_weights(tracked, capsys):
    run = only_run(tracked)
    (line,) = [x for x in (run / "log.txt").read_text().splitlines() if "96% of EMA" in x]
    assert "after 40 steps 96% of EMA 0.999" in line
    flags = ["--num-sampling-steps=1", f"--output={run / 'sample.png'}", "--images-per-class=1"]
    for ema, is_noted in (("0.999", True), ("power-0.1", False)):
        call_main("sample.py", f"--ckpt={run}", f"--ema={ema}", *flags)
        assert ("96% of EMA 0.999" in capsys.readouterr().out) == is_noted


def test_the_plan_includes_the_disk_space_of_checkpoints(train_flags, tmp_path, capsys):
    flags = {"max-steps": 12, "ckpt-every": 1, "keep-last": 1, "ema": "power"}
    call_main("train.py", *train_flags(tmp_path, **flags, **{"global-batch-size": 4}), "--dry-run")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("disk")]
    # at once: the kept checkpoint, the rolling one, and the one that is written
    assert "for 3 checkpoints" in line
