"""Langfuse's scores, beside the traces or observations they are about -> feedback on the wire.

Fields are named as in its exports (`trace_id`) or as in its API (`traceId`).
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from thumbloop.errors import InvalidRequest
from thumbloop.exchange.files import Line
from thumbloop.exchange.incoming import (
    Item,
    content_of,
    prompt_of,
    reply_of,
    set_prompt,
    set_time,
    text_of,
)
from thumbloop.exchange.shapes import Prompts
from thumbloop.types import Prompt
from thumbloop.v1 import admin_pb2, feedback_pb2

USER_FEEDBACK = "user-feedback"
"""What Langfuse's own examples call the score of a thumb."""


class Scores(NamedTuple):
    """Which scores are thumbs: those of this name; up where the value is at least `up_from`, None: 1 is up, 0 and -1
    are down, and nothing else is a thumb."""

    name: str = USER_FEEDBACK
    up_from: float | None = None


class _Score(NamedTuple):
    place: str
    is_up: bool
    score_id: str
    user_id: str
    comment: str
    at: object


def is_score(record: Mapping[str, Any]) -> bool:
    """Say whether a record is a score."""
    return "name" in record and "value" in record and ("trace_id" in record or "traceId" in record)


def items_of(
    scores: Iterable[Line],
    name: str,
    traces: Iterable[Line],
    which: Scores,
    plain: Prompts,
    user_id: str,
) -> Iterator[Item]:
    """Yield what scores of a file called `name` say of traces; scores of other names are passed over.

    Scores are held in memory, traces are not. `plain` and `user_id` as in incoming.items_of.
    """
    waiting: dict[tuple[str, str], list[_Score]] = defaultdict(list)
    for line in scores:
        place = f"{name}:{line.number}"
        try:
            key, score = _score_of(line, place, which)
        except InvalidRequest as error:
            yield Item(place, None, str(error))
        else:
            if score is not None:
                waiting[key].append(score)
    for line in traces:
        if line.record is not None and line.record.get("output") not in (None, ""):
            for key in _keys_of(line.record):
                for score in waiting.pop(key, ()):
                    yield _item_of(score, line.record, plain, user_id)
    for (kind, number), left in waiting.items():
        for score in left:
            yield Item(score.place, None, f"there is no {kind} {number} with an output")


def _score_of(line: Line, place: str, which: Scores) -> tuple[tuple[str, str], _Score | None]:
    """Return what a score is about, and the thumb that it is, if it is one. Raises InvalidRequest."""
    if line.record is None:
        raise InvalidRequest.of("record", line.problem)
    record = line.record
    if not is_score(record):
        raise InvalidRequest.of("record", "has to be a score with trace_id, name and value")
    if text_of(record, "name") != which.name:
        return ("", ""), None
    observation = text_of(record, "observation_id", "observationId")
    trace = text_of(record, "trace_id", "traceId")
    if not (observation or trace):
        raise InvalidRequest.of("trace_id", "is missing; a score of a session is no thumb")
    score = _Score(
        place,
        _is_up(record, which.up_from),
        text_of(record, "id"),
        text_of(record, "user_id", "userId"),
        text_of(record, "comment"),
        record.get("timestamp"),
    )
    return ("observation", observation) if observation else ("trace", trace), score


def _is_up(record: Mapping[str, Any], up_from: float | None) -> bool:
    kind = text_of(record, "data_type", "dataType") or "NUMERIC"
    value = record["value"]
    if kind not in ("NUMERIC", "BOOLEAN") or not isinstance(value, int | float):
        raise InvalidRequest.of("value", f"of {kind} is no thumb; a number or a boolean is")
    if up_from is not None:
        return value >= up_from
    if value not in (1, 0, -1):
        raise InvalidRequest.of(
            "value", f"{value:g} is no thumb; say --up-from which number is one up"
        )
    return value == 1


def _keys_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what scores may call a record: a trace by its id, an observation too, and the root of a trace by that."""
    number, trace = record.get("id"), record.get("trace_id", record.get("traceId"))
    if trace is None:
        return [("trace", str(number))]
    parent = record.get("parent_observation_id", record.get("parentObservationId"))
    is_root = parent in (None, "")
    return [("observation", str(number)), *([("trace", str(trace))] if is_root else [])]


def _item_of(score: _Score, record: Mapping[str, Any], plain: Prompts, user_id: str) -> Item:
    try:
        found = admin_pb2.ImportedFeedback(
            user_id=text_of(record, "user_id", "userId") or score.user_id or user_id,
            source_id=score.score_id,
        )
        set_prompt(found, _prompt_of(_decoded(record.get("input")), plain))
        set_time(found, score.at, "timestamp")
        found.thumb.reply = _reply_of(record["output"])
        found.thumb.thumb = feedback_pb2.THUMB_UP if score.is_up else feedback_pb2.THUMB_DOWN
        found.thumb.comment = score.comment
    except InvalidRequest as error:
        return Item(score.place, None, str(error))
    except UnicodeEncodeError:
        return Item(score.place, None, "holds what is no Unicode text")
    return Item(score.place, found)


def _decoded(value: object) -> object:
    """Return what a text holds that is JSON of something else than a number: exports have it so."""
    if isinstance(value, str) and value[:1] in ("[", "{", '"'):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _prompt_of(value: object, plain: Prompts) -> Prompt:
    """Return what went into a model: a text, messages, or OpenAI's request. Raises InvalidRequest."""
    if isinstance(value, Mapping):
        value = value.get("messages", [value])
    return prompt_of(value, plain, "input")


def _reply_of(value: object) -> str:
    """Return what came out: a text, a message, messages, or OpenAI's response; other JSON is the text it is.

    Raises InvalidRequest.
    """
    found: Any = _decoded(value)
    if isinstance(found, Mapping) and "choices" in found:
        found = found["choices"]
        found = found[0].get("message") if _is_list_of_objects(found) else None
    if isinstance(found, Mapping) and "messages" in found:
        found = found["messages"]
    if _is_list_of_objects(found) and "role" in found[-1]:
        return reply_of(found[-1:], "output")
    if isinstance(found, Mapping) and "content" in found:
        return content_of(found["content"], "output.content")
    if isinstance(found, str):
        return found
    return reply_of(value, "output")


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[-1], Mapping)
