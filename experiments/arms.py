"""What is compared: arms, which are flags of train.py, by question, as arms.yaml lists them."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Question:
    """Arms by name; each is compared with the one named `reference`."""

    title: str
    reference: str
    arms: dict[str, str]  # the flags of each
    has_own_lengths: bool = False  # whether the arms are runs of several lengths


def read_questions() -> dict[int, Question]:
    """Reads arms.yaml; ValueError where an arm has other flags in another question, or where the
    reference is no arm."""
    path, flags, questions = Path(__file__).with_suffix(".yaml"), {}, {}
    for number, fields in yaml.safe_load(path.read_text()).items():
        base, common = fields.pop("base", ""), fields.pop("common", "")
        for arm, own in fields["arms"].items():
            is_whole = "--num_experts" in (own or "").split()
            fields["arms"][arm] = " ".join(filter(None, ("" if is_whole else base, own, common)))
            if flags.setdefault(arm, fields["arms"][arm]) != fields["arms"][arm]:
                raise ValueError(f"{path}: got other flags of {arm} in question {number}")
        questions[number] = Question(**fields)
        if questions[number].reference not in fields["arms"]:
            raise ValueError(f"{path}: got no arm {fields['reference']} in question {number}")
    return questions


QUESTIONS = read_questions()


def arm_flags(arm: str) -> list[str]:
    """The flags of an arm, which are the same in every question; none of an unknown one."""
    return next((q.arms[arm] for q in QUESTIONS.values() if arm in q.arms), "").split()
