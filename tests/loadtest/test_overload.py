"""What is made of calls at a server's capacity, and far beyond it."""

import pytest

from loadtest.figures import Figure
from loadtest.overload import Run, describe_overload
from loadtest.setting import CallsFailed
from loadtest.workload import Answer, Call


def call(
    due_s: float, took_s: float, status: str = "OK", *, candidates: int = 8, late_s: float = 0.0
) -> Call:
    """A call that was sent so late, and took so long from then."""
    answer = Answer(10, 80, 1, num_candidates=candidates) if status == "OK" else None
    sent_s = due_s + late_s
    return Call("best_of_n:8", due_s, sent_s, sent_s + took_s, status, answer)


def refused(due_s: float, took_ms: float, *, late_s: float = 0.0) -> Call:
    return call(due_s, took_ms / 1000, "RESOURCE_EXHAUSTED", late_s=late_s)


AT_CAPACITY = [call(second, 0.4) for second in range(10)]
BEYOND = [
    call(1.0, 0.6, candidates=6),
    call(2.0, 1.0),
    call(3.0, 1.0),
    refused(4.0, 4.0, late_s=5.0),
    refused(5.0, 2.0),
    refused(5.5, 90.0),
    call(10.0, 1.0),
]


def test_the_figures_are_those_of_the_answered_and_of_the_refused():
    found = describe_overload([Run(0.5, AT_CAPACITY, BEYOND)])
    values = {name.removeprefix("overload."): figure.value for name, figure in found.items()}
    assert values == {
        "goodput_ratio": pytest.approx(0.8),  # 4 answers in 10 seconds, of 0.5 per second
        "p99_ratio": pytest.approx(2.5, rel=1e-3),
        "reject_ms_p50": pytest.approx(4.0),
        "candidates": 7.5,
    }


def test_an_answers_latency_counts_from_when_its_call_was_due():
    late = [*BEYOND, call(6.0, 1.0, late_s=1.0)]
    found = describe_overload([Run(0.5, AT_CAPACITY, late)])
    assert found["overload.p99_ratio"].value == pytest.approx(5.0, rel=1e-3)


def test_repeats_give_the_median_and_the_range_of_ratios():
    runs = [Run(capacity, AT_CAPACITY, BEYOND) for capacity in (0.5, 0.4, 1.0)]
    goodput = describe_overload(runs)["overload.goodput_ratio"]
    assert goodput == pytest.approx(Figure(0.8, 0.4, 1.0))


@pytest.mark.parametrize(
    ("at_capacity", "beyond", "said"),
    [
        ([], BEYOND, "none of 0 calls was answered"),
        (AT_CAPACITY, [], "none of 0 calls was answered"),
        ([refused(0, 1)], BEYOND, "none of 1 calls was answered"),
        (AT_CAPACITY, [refused(0, 1), refused(1, 1)], "none of 2 calls was answered"),
        (AT_CAPACITY, AT_CAPACITY, "none of 10 calls was refused: this was no overload"),
        (AT_CAPACITY, [*BEYOND, call(6, 1, "UNAVAILABLE")], "calls ended with UNAVAILABLE;"),
        (
            [*AT_CAPACITY, call(1, 9, "INTERNAL")],
            [*BEYOND, call(6, 1, "DEADLINE_EXCEEDED")],
            "calls ended with DEADLINE_EXCEEDED, INTERNAL;",
        ),
    ],
)
def test_what_is_no_measurement_is_said(at_capacity: list[Call], beyond: list[Call], said: str):
    good = Run(0.5, AT_CAPACITY, BEYOND)
    with pytest.raises(CallsFailed, match=said):
        describe_overload([good, Run(0.5, at_capacity, beyond)])
