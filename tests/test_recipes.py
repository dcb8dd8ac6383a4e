"""Recipes are command lines in files: each is one, and `published` is what no flag gives."""

import pytest
from conftest import ROOT

from engines.flags import DDPFlags
from training.config import parse_training, resolve

RECIPES = [ROOT / "config" / "recipes" / f"{name}.yaml" for name in ("published", "stable", "fast")]


def config_of(*flags: object):
    return resolve(parse_training(DDPFlags, None, list(map(str, flags))), DDPFlags)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_obeyed_and_the_command_wins(recipe):
    config, changed = config_of("--config", recipe), config_of("--config", recipe, "--lr", 1)
    assert config.given.keys() > {"optimizer", "lr", "grad_clip"} and changed.step.lr == 1
    assert (config.settings() == config_of().settings()) == (recipe.stem == "published")
