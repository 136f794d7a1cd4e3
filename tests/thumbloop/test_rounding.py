import pytest

from thumbloop.rounding import least_step, sure_step


def test_a_step_has_to_be_a_multiple_of_the_rounding_of_both_sides():
    """By hand: float32 rounds by 1e-5 on both sides, 8 times sqrt(2) of it; bfloat16 by 0.035."""
    assert least_step("float32", "float32", 20) == pytest.approx(8 * 2**0.5 * 1e-5, rel=0.2)
    assert least_step("bfloat16", "float32", 20) == pytest.approx(0.28, rel=1e-3)
    assert sure_step("bfloat16", "float32", 20) == pytest.approx(0.49, rel=1e-3)
    assert least_step("float16", "float32", 20) == pytest.approx(0.04, rel=1e-3)


def test_a_trainer_that_rounds_has_taken_no_step_by_that():
    """Two sets of 20 numbers that differ by rounding alone are 0.035 sqrt(2 * 20) = 0.22 apart."""
    needed = least_step("bfloat16", "bfloat16", 20)
    assert needed == pytest.approx((0.28**2 * 2 + 0.2214**2) ** 0.5, rel=1e-3)
    assert least_step("bfloat16", "bfloat16", 300) > 0.035 * 600**0.5


def test_an_unknown_dtype_rounds_as_the_roughest():
    assert least_step("float8", "float32", 20) == least_step("bfloat16", "float32", 20)
