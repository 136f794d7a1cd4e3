import numpy as np
import pytest

from thumbloop.rounding import LEAST_SURENESS, sureness

ROUNDING = 0.035


def told(step: float, count: int, engine: str, trainer: str = "float32") -> float:
    """How surely a step is told, of which each number has an equal part."""
    return sureness([step / count**0.5] * count, [0.0] * count, engine, trainer)


def test_surely_told_is_half_of_what_the_step_is_over_rounding():
    """By hand: bfloat16 rounds by 0.035, and the middle is half a step away."""
    assert told(0.28, 20, "bfloat16") == pytest.approx(4.0, rel=1e-3)
    assert told(0.56, 20, "bfloat16") == pytest.approx(8.0, rel=1e-3)
    assert told(0.04, 20, "float16") == pytest.approx(4.0, rel=1e-3)
    assert told(1e-3, 20, "float32") == pytest.approx(1e-3 / 2 / (2**0.5 * 1e-5), rel=0.01)
    assert told(0.28, 20, "float8") == told(0.28, 20, "bfloat16")


def test_nothing_is_told_by_no_step_nor_by_what_a_trainer_rounds():
    assert told(0.0, 20, "float32") == 0.0
    by_rounding = ROUNDING * (2 * 300) ** 0.5  # both versions' numbers, 300 of them
    assert told(by_rounding, 300, "bfloat16", "bfloat16") < 0
    assert told(by_rounding, 300, "bfloat16") > LEAST_SURENESS


@pytest.mark.parametrize("trainer", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [4, 20, 300])
def test_what_is_told_surely_enough_is_hardly_ever_taken_for_the_other(trainer: str, count: int):
    """An engine rounds, the trainer too where it does: of 20,000 steps of the least sureness, one in a thousand
    children is refused at most, and of parents in their place one is taken."""
    rng = np.random.default_rng(0)
    trainers = ROUNDING if trainer == "bfloat16" else 0.0
    step = 0.1
    while told((step**2 + 2 * count * trainers**2) ** 0.5, count, "bfloat16", trainer) < 4:
        step *= 1.02  # what is measured is the step and the trainer's rounding

    def rounded(values: float, by: float) -> np.ndarray:
        return values + by * rng.standard_normal((20_000, count))

    each = step / count**0.5
    child, parent = rounded(each, trainers), rounded(0.0, trainers)
    way = child - parent

    def places(engine: np.ndarray) -> np.ndarray:
        return ((engine - parent) * way).sum(1) / (way * way).sum(1)

    as_child, as_parent = (places(rounded(true, ROUNDING)) for true in (each, 0.0))
    assert ((as_child < 0.5) | (as_child > 1.5)).mean() < 1e-3
    assert ((as_parent > 0.5) & (as_parent < 1.5)).mean() < 1e-3
    assert np.median(as_child) > 0.5 > np.median(as_parent)


def test_of_a_smaller_step_many_are_taken_for_the_other():
    rng = np.random.default_rng(0)
    step = 0.07  # told by one standard deviation
    assert told(step, 1, "bfloat16") == pytest.approx(1.0)
    places = (step + ROUNDING * rng.standard_normal(20_000)) / step
    assert (abs(places - 1) > 0.5).mean() == pytest.approx(0.317, abs=0.02)
