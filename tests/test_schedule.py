"""The learning rate over a run, and what is said when a longer run lifts it again."""

import pytest
from conftest import call_main, only_run

from training.config import StepConfig
from training.schedule import jump_note, rate_factor


def test_a_straight_line_falls_from_the_warm_up_to_zero():
    config = StepConfig(lr_schedule="linear", warmup_steps=2)
    rates = [rate_factor(config, done, 6) for done in range(1, 7)]
    assert rates == pytest.approx([1 / 2, 1, 3 / 4, 1 / 2, 1 / 4, 0])


def test_a_trapezoid_is_constant_and_then_falls_to_zero():
    config = StepConfig(lr_schedule="trapezoid", warmup_steps=10, decay_share=0.25)
    rates = [rate_factor(config, done, 100) for done in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(rates[10:75]) == {1.0}
    assert rates[75:] == pytest.approx([1 - step / 25 for step in range(1, 26)])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "trapezoid"])
def test_a_jump_is_noted_for_what_falls_alone(schedule):
    config = StepConfig(lr_schedule=schedule, lr=0.01)
    assert (jump_note(config, 100, 100, 200) is None) == (schedule == "constant")
    assert jump_note(config, 50, 100, 100) is None and jump_note(config, 0, 100, 200) is None


def test_a_run_that_is_made_longer_after_its_fall_says_so(train_flags, tmp_path):
    flags = {"lr-schedule": "cosine", "global-batch-size": 4, "run-name": "run"}
    for steps in (2, 2, 4):
        call_main("train.py", *train_flags(tmp_path, **flags, **{"max-steps": steps}))
    lines = (only_run(tmp_path) / "log.txt").read_text().splitlines()
    (line,) = [line for line in lines if "the rate fell" in line]
    assert "fell to 0 by step 2" in line and "for 4 it jumps to 0.0005" in line
