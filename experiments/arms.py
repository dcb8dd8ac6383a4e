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


QUESTIONS: dict[int, Question] = {
    number: Question(**fields)
    for number, fields in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()).items()
}


def flags_of(arm: str) -> list[str]:
    """The flags of an arm, which mean the same in every question."""
    return next(q.arms[arm] for q in QUESTIONS.values() if arm in q.arms).split()
