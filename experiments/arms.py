"""What is compared: arms, which are flags of train.py, by question.

All arms have the same active size: multiply-adds of one token within 5%. DiT-Ti/2 is 128 wide; an
expert of --mlp-ratio r has 128 r hidden units, and K experts with shared ones of width s take part
in a token as K r + s units of the model's width.
"""

from dataclasses import dataclass

ACTIVE_RATIO = 6  # K r + s of every arm: hidden units of a token over the model's width


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
    return experts(8, 2, 2, more)


DENSE = f"--num_experts 0 --mlp-type swiglu --mlp-ratio {ACTIVE_RATIO}"

QUESTIONS = {
    1: Question(
        "dense against topk: K = 2 or 1 of 8, with and without shared experts",
        "dense",
        {
            "dense": DENSE,
            "topk": standard(),
            "topk-unshared": experts(8, 2, 0),
            "topk-k1": experts(8, 1, 2),
            "topk-k1-unshared": experts(8, 1, 0),
        },
    ),
    2: Question(
        "six routers, 2 of 8 and two shared experts",
        "topk",
        {
            "topk": standard(),
            **{
                name: standard(f"--router {name}")
                for name in ("sigmoid", "expert_choice", "race", "batch_pool", "prototype")
            },
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
            "topk-1of4": experts(4, 1, 2),
            "topk": standard(),
            "topk-4of16": experts(16, 4, 2),
            "topk-8of32": experts(32, 8, 2),
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
}


def flags_of(arm: str) -> list[str]:
    """The flags of an arm, which mean the same in every question."""
    return next(q.arms[arm] for q in QUESTIONS.values() if arm in q.arms).split()
