"""Experiments: questions, and the arms that each question compares, as listed in arms.yaml.

An arm is one configuration in a comparison: a name and a list of flags for train.py.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Question:
    """A comparison: all arms are compared with the arm `reference`."""

    title: str
    reference: str
    arms: dict[str, str]  # flags by arm

    @property
    def has_own_lengths(self) -> bool:
        """Whether the flags of each arm set the number of steps."""
        return "--max-steps" in self.arms[self.reference]


def read_questions() -> dict[int, Question]:
    """Reads arms.yaml, in which an arm has the same flags in all questions."""
    path, flags, questions = Path(__file__).with_suffix(".yaml"), {}, {}
    for number, fields in yaml.safe_load(path.read_text()).items():
        base, common = fields.pop("base", ""), fields.pop("common", "")
        for arm, words in fields["arms"].items():
            has_model = "--num_experts" in (words or "").split()
            parts = ("" if has_model else base, words, common)
            fields["arms"][arm] = " ".join(filter(None, parts))
            if flags.setdefault(arm, fields["arms"][arm]) != fields["arms"][arm]:
                raise ValueError(f"{path}: question {number} has different flags for {arm}")
        questions[number] = Question(**fields)
        if questions[number].reference not in fields["arms"]:
            raise ValueError(f"{path}: question {number} has no arm {fields['reference']}")
    return questions


QUESTIONS = read_questions()


def arm_flags(arm: str) -> list[str]:
    """Returns the flags of an arm, which are the same in every question; [] for an unknown arm."""
    return next((q.arms[arm] for q in QUESTIONS.values() if arm in q.arms), "").split()
