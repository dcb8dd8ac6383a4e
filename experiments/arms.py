"""What is compared: arms, which are flags of train.py, by question, as arms.yaml lists them."""

from dataclasses import dataclass
from pathlib import Path

import yaml

TIME_TO_QUALITY = 8  # the number of the question whose arms are runs of several lengths


@dataclass(frozen=True)
class Question:
    """Arms by name; each is compared with the one named `reference`."""

    title: str
    reference: str
    arms: dict[str, str]  # the flags of each


def read_questions() -> dict[int, Question]:
    """Reads arms.yaml; ValueError where an arm has other flags in another question, or where the
    reference is no arm."""
    path, flags = Path(__file__).with_suffix(".yaml"), {}
    listed = yaml.safe_load(path.read_text()).items()
    questions = {number: Question(**fields) for number, fields in listed}
    for number, question in questions.items():
        if question.reference not in question.arms:
            raise ValueError(f"{path}: got no arm {question.reference} in question {number}")
        for arm, own in question.arms.items():
            if flags.setdefault(arm, own) != own:
                raise ValueError(f"{path}: got other flags of {arm} in question {number}")
    return questions


QUESTIONS = read_questions()


def flags_of(arm: str) -> list[str]:
    """The flags of an arm, which are the same in every question; none of an unknown one."""
    return next((q.arms[arm] for q in QUESTIONS.values() if arm in q.arms), "").split()
