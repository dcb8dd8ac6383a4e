"""Runs of recipes at their own rates and lengths, and what is said of the steps that they need."""

import re

from engines.flags import DDPFlags
from experiments.arms import QUESTIONS
from experiments.report import steps_to_quality
from experiments.routers import ExperimentConfig, command_of
from training.config import parse_training, resolve

QUESTION = next(question for question in QUESTIONS.values() if question.has_own_lengths)


def test_an_arm_is_its_recipe_at_its_rate_and_length():
    config = ExperimentConfig(latents_path="latents", val_path="others", steps=7)
    for arm in QUESTION.arms:
        asked = resolve(parse_training(DDPFlags, None, command_of(config, arm, seed=0)), DDPFlags)
        name, rate, steps = re.fullmatch(r"(.*)-(\de-3|\d\.\de-2)-(\d+)", arm).groups()
        assert (asked.step.lr, asked.run.max_steps) == (float(rate), int(steps))
        assert asked.engine.global_batch_size == 128 and asked.step.warmup_steps == 50
        assert asked.step.optimizer == ("muon" if name.startswith(("muon", "fast")) else "adamw")


def test_the_steps_to_the_goal_lie_between_the_lengths_that_were_run():
    losses = {QUESTION.reference: 0.64, "fast-1.6e-2-320": 0.66, "fast-1.6e-2-400": 0.62,
              "published-4e-3-400": 0.69, "muon-1.6e-2-400": 0.63}  # fmt: skip
    rows = [{"arm": arm, "seed": 0, "val_loss": loss} for arm, loss in losses.items()]
    rows = [row | {"report_loss": row["val_loss"] - 0.1} for row in rows]
    times = {"fast-1.6e-2-320": 100.0}
    text = steps_to_quality(rows, QUESTION, times)
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert "| 0.6600, 0.6200 | 0.5600, 0.5200 | 360 | 45% | 36 |" in lines["| fast-1.6e-2"]
    assert "| 800 | 100% |" in lines["| published-4e-3"]
    assert "| at most 400 | 50% |" in lines["| muon-1.6e-2"]
