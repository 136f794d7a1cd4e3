"""What a line of the log says, and what it keeps to itself."""

import asyncio
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextvars import copy_context

import pytest

from thumbloop import logs
from thumbloop.config.shared import Logging
from thumbloop.errors import StoreUnavailable

CANARY = "my secret diary"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Give the root logger back what it had."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs.OURS}
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("server.x", logging.INFO, "x.py", 1, message, (), None)
    made.__dict__.update(fields)
    return made


def failing(error: Exception, cause: Exception | None = None) -> logging.LogRecord:
    def fail() -> None:
        raise error from cause

    try:
        fail()
    except Exception:
        return record("it failed", exc_info=sys.exc_info())


def in_a_call(line: logging.LogRecord, formatter: logging.Formatter, **facts: object) -> str:
    def say() -> str:
        logs.begin(**facts)
        return formatter.format(line)

    return copy_context().run(say)


def test_a_json_line_is_one_object_with_what_is_known():
    line = record("two\nlines", facts={"code": "OK"})
    said = json.loads(written := in_a_call(line, logs.JsonLines(), request_id="r-1"))
    assert "\n" not in written
    assert said.pop("time").endswith("+00:00")
    assert said == {
        "level": "INFO",
        "logger": "server.x",
        "message": "two\nlines",
        "request_id": "r-1",
        "code": "OK",
    }


def test_a_text_line_has_the_facts_behind_it():
    line = in_a_call(record("done"), logs.TextLines(), method="Generate", request_id="r-1")
    assert line.endswith("INFO server.x: done [method=Generate request_id=r-1]")
    assert logs.TextLines().format(record("done")).endswith("INFO server.x: done")


def test_an_id_cannot_begin_a_line_of_its_own():
    line = in_a_call(record("done"), logs.TextLines(), request_id="r\n2026 ERROR server: forged")
    assert "\n" not in line


@pytest.mark.parametrize("formatter", [logs.TextLines, logs.JsonLines])
def test_what_an_unexpected_error_says_is_left_out(formatter):
    said = formatter().format(failing(ValueError(CANARY), KeyError(CANARY)))
    assert CANARY not in said
    assert "ValueError" in said
    assert "KeyError" in said
    assert "in failing" in said


@pytest.mark.parametrize("formatter", [logs.TextLines, logs.JsonLines])
@pytest.mark.parametrize("error", [StoreUnavailable("locked"), OSError(28, "no space")])
def test_what_our_errors_and_the_systems_say_is_written(formatter, error):
    assert str(error) in formatter().format(failing(error))


@pytest.mark.parametrize("formatter", [logs.TextLines, logs.JsonLines])
def test_content_is_written_where_it_is_wanted(formatter):
    assert f"ValueError: {CANARY}" in formatter(content=True).format(failing(ValueError(CANARY)))


async def test_tasks_of_a_call_share_its_facts_and_other_calls_do_not():
    async def call(name: str) -> dict[str, object]:
        logs.begin(request_id=name)

        async def inner() -> None:
            logs.note(response_id=f"of {name}")

        await asyncio.create_task(inner())
        return dict(logs.known())

    first, second = await asyncio.gather(call("a"), call("b"))
    assert first == {"request_id": "a", "response_id": "of a"}
    assert second == {"request_id": "b", "response_id": "of b"}
    assert logs.known() == {}


def test_nobody_hears_of_facts_outside_calls():
    logs.note(response_id="lost")
    assert logs.known() == {}


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_is_that_of_our_lines(level, capsys):
    logs.configure(Logging(level=level, format="json"))
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger("server.x").log(number, "ours")
        logging.getLogger("foreign").log(number, "theirs")
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    ours = [line["level"].lower() for line in said if line["message"] == "ours"]
    assert ours == ["debug", "info", "warning", "error"][-len(ours) :]
    assert ours[0] == level
    assert [line["level"] for line in said if line["message"] == "theirs"] == ["WARNING", "ERROR"]


def test_the_last_word_has_the_form_of_all_others(capsys):
    logs.configure(Logging())
    logs.say_error("no model")
    assert capsys.readouterr().err == "error: no model\n"
    logs.configure(Logging(format="json"))
    logs.say_error("no model")
    said = json.loads(capsys.readouterr().err)
    assert (said["level"], said["message"]) == ("CRITICAL", "no model")


def test_pythons_warnings_are_lines_too(capsys):
    logs.configure(Logging(format="json"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of a library", FutureWarning, stacklevel=1)
    said = json.loads(capsys.readouterr().err)
    assert (said["logger"], said["level"]) == ("py.warnings", "WARNING")
    assert "FutureWarning: of a library" in said["message"]


def test_progress_is_a_line_each(capsys):
    logs.configure(Logging(format="json"))
    print("round 1: begins\n\n  probes 0.1 s", file=logs.Progress("trainer"))
    said = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert said == ["round 1: begins", "probes 0.1 s"]
