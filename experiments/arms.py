"""What is compared: arms, which are flags of train.py, by question.

All arms have the same active size: multiply-adds of one token within 5%. DiT-Ti/2 is 128 wide; an
expert of --mlp-ratio r has 128 r hidden units, and K experts with shared ones of width s take part
in a token as K r + s units of the model's width.

The arms of questions 1 to 6 clip gradients at 0.5, as ProMoE does, and have beta2 0.95: without
clipping, the first gradients of prototype's contrastive loss stay in Adam's second moment. Those of
question 8 are recipes of their own, and runs of their own length: `fast-1.6e-2-400` has that rate
and that many steps.
"""

from dataclasses import dataclass

ACTIVE_RATIO = 6  # K r + s of every arm: hidden units of a token over the model's width
TIME_TO_QUALITY = 8  # the number of the question whose arms are runs of several lengths
CLIPPED = "--grad-clip 0.5 --optimizer-betas 0.9 0.95"


@dataclass(frozen=True)
class Question:
    """Arms by name; each is compared with the one named `reference`."""

    title: str
    reference: str
    arms: dict[str, str]  # the flags of each


def experts(num_experts: int, chosen: int, shared: int, more: str = "") -> str:
    """The flags of a mixture whose active experts fill up ACTIVE_RATIO."""
    ratio = (ACTIVE_RATIO - shared) / chosen
    return (
        f"--num_experts {num_experts} --num_experts_per_tok {chosen} --n-shared-experts {shared} "
        f"--mlp-ratio {ratio:g} {more}"
    ).strip()


def standard(more: str = "") -> str:
    """Two of eight experts and two shared ones, as published."""
    return experts(8, 2, 2, f"{more} {CLIPPED}")


def recipe(name: str, rate: str, steps: int, more: str = "", mixture: str | None = None) -> str:
    """A recipe of config/recipes at a rate and a length; the experts are as published."""
    mixture = mixture or experts(8, 2, 2)
    return f"{mixture} --config config/recipes/{name}.yaml --lr {rate} --max-steps {steps} {more}"


MUON = "--optimizer muon --optimizer-weight-decay 0.1 --lr-schedule cosine"
PUBLISHED_RATE = "4e-3"  # the best of four in a pilot, as the other arms' rates are
# One setting beside the published recipe, each.
SETTINGS = {
    "qk-norm": "--qk-norm",
    "rope": "--rope",
    "times-uniform": "--objective-times uniform",
    "flow-x": "--objective flow_x",  # its loss is that of the velocity too
    "expert-choice": "--router expert_choice",
    "ema": "--ema exponential power --ema-length 0.05 0.1 0.2",  # lengths of one run
}
QUALITY = {
    **{f"published-{rate}-800": recipe("published", rate, 800)
       for rate in ("1e-3", "2e-3", PUBLISHED_RATE, "8e-3")},
    f"published-{PUBLISHED_RATE}-400": recipe("published", PUBLISHED_RATE, 400),
    **{f"{name}-{PUBLISHED_RATE}-400": recipe("published", PUBLISHED_RATE, 400, more)
       for name, more in SETTINGS.items()},
    f"narrow-{PUBLISHED_RATE}-400": recipe(
        "published", PUBLISHED_RATE, 400, mixture=experts(32, 8, 2)),
    **{f"stable-{rate}-{steps}": recipe("stable", rate, steps)
       for rate, steps in (("4e-3", 400), ("8e-3", 400), ("8e-3", 800))},
    **{f"muon-{rate}-{steps}": recipe("stable", rate, steps, MUON)
       for rate, steps in (("8e-3", 400), ("1.6e-2", 400), ("3.2e-2", 400), ("1.6e-2", 560))},
    **{f"muon-{name}-1.6e-2-400": recipe("stable", "1.6e-2", 400, f"{MUON} {SETTINGS[name]}")
       for name in ("qk-norm", "rope")},
    **{f"fast-{rate}-{steps}": recipe("fast", rate, steps)
       for rate, steps in (("1.6e-2", 320), ("1.6e-2", 400), ("2.4e-2", 400))},
    **{f"fast-cosine-{rate}-{steps}": recipe("fast", rate, steps, "--lr-schedule cosine")
       for rate, steps in (("8e-3", 400), ("1.6e-2", 320), ("1.6e-2", 400), ("1.6e-2", 480),
                           ("2.4e-2", 400))},
    "fast-cosine-ema-1.6e-2-400": recipe(
        "fast", "1.6e-2", 400, f"--lr-schedule cosine {SETTINGS['ema']}"),
}  # fmt: skip

DENSE = f"--num_experts 0 --mlp-type swiglu --mlp-ratio {ACTIVE_RATIO} {CLIPPED}"

QUESTIONS = {
    1: Question(
        "dense against topk: K = 2 or 1 of 8, with and without shared experts",
        "dense",
        {
            "dense": DENSE,
            "topk": standard(),
            "topk-unshared": experts(8, 2, 0, CLIPPED),
            "topk-k1": experts(8, 1, 2, CLIPPED),
            "topk-k1-unshared": experts(8, 1, 0, CLIPPED),
        },
    ),
    2: Question(
        "six routers, 2 of 8 and two shared experts",
        "topk",
        {
            "topk": standard(),
            **{
                name: standard(f"--router {name}")
                for name in ("sigmoid", "expert_choice", "batch_pool", "prototype")
            },
            # The paper does not say the weight of its loss; this is that of re-implementations.
            "race": standard("--router race --aux-loss-alpha 1e-4"),
        },
    ),
    3: Question(
        "gating: softmax, sigmoid or identity",
        "topk",
        {
            "topk": standard(),
            "topk-sigmoid": standard("--router-gating sigmoid"),
            "topk-identity": standard("--router-gating identity"),
            "expert_choice": standard("--router expert_choice"),
            "expert_choice-sigmoid": standard("--router expert_choice --router-gating sigmoid"),
            "expert_choice-identity": standard("--router expert_choice --router-gating identity"),
        },
    ),
    4: Question(
        "granularity: 1 of 4 wide experts to 8 of 32 narrow ones",
        "topk",
        {
            "topk-1of4": experts(4, 1, 2, CLIPPED),
            "topk": standard(),
            "topk-4of16": experts(16, 4, 2, CLIPPED),
            "topk-8of32": experts(32, 8, 2, CLIPPED),
        },
    ),
    5: Question(
        "balance: the weight of topk's loss, or sigmoid's bias",
        "topk",
        {
            "topk-alpha0": standard("--aux-loss-alpha 0"),
            "topk-alpha0.005": standard("--aux-loss-alpha 0.005"),
            "topk": standard(),
            "topk-alpha0.05": standard("--aux-loss-alpha 0.05"),
            "topk-alpha0.5": standard("--aux-loss-alpha 0.5"),
            "sigmoid": standard("--router sigmoid"),
        },
    ),
    6: Question(
        "experts in all blocks, or in the shallow half, the deep half or every second",
        "topk",
        {
            "topk": standard(),
            **{
                f"topk-{name}": standard(f"--sparse-layers {name}")
                for name in ("shallow-half", "deep-half", "every-second")
            },
        },
    ),
    TIME_TO_QUALITY: Question(
        "time to quality: the steps at which recipes reach the published one's loss",
        f"published-{PUBLISHED_RATE}-800",
        QUALITY,
    ),
}


def flags_of(arm: str) -> list[str]:
    """The flags of an arm, which mean the same in every question."""
    return next(q.arms[arm] for q in QUESTIONS.values() if arm in q.arms).split()
