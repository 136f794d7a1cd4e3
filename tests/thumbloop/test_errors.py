import inspect
import re

import grpc
import pytest

from thumbloop import errors
from thumbloop.errors import (
    MOST_BYTES,
    MOST_NAMED,
    BadPolicyVersion,
    FieldViolation,
    InvalidRequest,
    ThumbloopError,
    clipped,
)

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ThumbloopError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_a_status(kind: type[ThumbloopError]):
    assert isinstance(kind.code, grpc.StatusCode)
    assert kind.code is not grpc.StatusCode.OK


def test_the_tree_in_the_docstring_is_the_tree():
    """Name, depth and status of every class; a status that is not drawn is the parent's."""
    assert errors.__doc__ is not None
    drawn = {}
    for line in errors.__doc__.splitlines():
        if found := re.match(r"([│├└─ ]*)(\w+)(?: {2,}([A-Z_]+) )?", line):
            branches, name, status = found.groups()
            if name in {kind.__name__ for kind in CLASSES}:
                drawn[name] = (len(branches) // 4, status)
    depth = {kind.__name__: len(kind.__mro__) - len(ThumbloopError.__mro__) for kind in CLASSES}
    assert {name: d for name, (d, _) in drawn.items()} == depth
    for kind in CLASSES:
        status = drawn[kind.__name__][1]
        if status is not None:
            assert kind.code.name == status
        else:
            assert kind.code is kind.__mro__[1].code  # type: ignore[attr-defined]


def test_an_invalid_request_names_every_field_that_is_wrong():
    error = InvalidRequest(FieldViolation("text", "is empty"), FieldViolation("seed", "is odd"))
    assert str(error) == "text: is empty; seed: is odd"
    assert [v.field for v in error.violations] == ["text", "seed"]
    assert InvalidRequest.of("text", "is empty").violations == error.violations[:1]


def test_of_very_many_violations_the_first_are_named_and_the_others_counted():
    violations = [FieldViolation(f"stop[{i}]", "is empty") for i in range(100)]
    error = InvalidRequest(*violations)
    assert error.violations == tuple(violations[:MOST_NAMED])
    assert str(error).endswith("stop[15]: is empty; and 84 more")
    assert str(InvalidRequest(*violations[:MOST_NAMED])).endswith("stop[15]: is empty")


@pytest.mark.parametrize("letter", ["a", "\u00fc", "\U0001f600", "\ud800"])
def test_long_words_are_clipped_and_take_the_room_of_later_ones(letter: str):
    long = FieldViolation("text", letter * 10_000)
    error = InvalidRequest(FieldViolation("seed", "is odd"), long, long, long)
    assert [v.field for v in error.violations] == ["seed", "text"]
    assert error.violations[1].description.endswith("...")
    assert str(error).endswith("...; and 2 more")
    assert len(str(error).encode(errors="replace")) <= MOST_BYTES
    assert InvalidRequest(*error.violations).violations == error.violations


def test_a_field_of_any_length_is_named():
    (violation,) = InvalidRequest.of("x" * 10_000, "y" * 10_000).violations
    assert violation.field.startswith("xxx")
    assert violation.description.startswith("yyy")


def test_what_fits_is_not_clipped_and_no_letter_is_cut_in_two():
    assert clipped("\u00fc" * 5, 10) == "\u00fc" * 5
    assert clipped("\u00fc" * 6, 10) == "\u00fc" * 3 + "..."


def test_a_bad_version_says_its_reason_first():
    error = BadPolicyVersion("not_finite", "layer 3 holds NaN")
    assert (error.reason, str(error)) == ("not_finite", "not_finite: layer 3 holds NaN")
