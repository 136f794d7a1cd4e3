"""The base model of experiments: the demo's, half as wide, so that a run takes a minute or two."""

from pathlib import Path

from demo.base_model import CACHE, Recipe, build

RECIPE = Recipe(hidden=160, intermediate=432)


def base_model() -> Path:
    """Return its folder; it is trained where it is missing, which takes some minutes."""
    return build(CACHE / RECIPE.digest(), recipe=RECIPE)
