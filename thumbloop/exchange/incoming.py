"""Records of files -> feedback on the wire: the shapes that `shapes` writes and TRL reads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from thumbloop.errors import FieldViolation, InvalidRequest
from thumbloop.exchange.files import Line
from thumbloop.exchange.shapes import Prompts, Record
from thumbloop.messages import ROLES
from thumbloop.types import Message, Prompt, Role
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

_ALIASES = {"developer": Role.SYSTEM}
_NO_SHAPE = "has to hold prompt, completion and label, or prompt, chosen and rejected"


class Item(NamedTuple):
    """What a place in a file says, or what is wrong with it."""

    place: str
    feedback: admin_pb2.ImportedFeedback | None
    problem: str = ""


def items_of(lines: Iterable[Line], name: str, plain: Prompts, user_id: str) -> Iterator[Item]:
    """Yield what the lines of a file called `name` say, in their order.

    `plain` is what a prompt that is a mere string means, and `user_id` who said what names nobody.
    """
    for line in lines:
        place = f"{name}:{line.number}"
        if line.record is None:
            yield Item(place, None, line.problem)
        else:
            yield item_of(place, line.record, plain, user_id)


def item_of(place: str, record: Record, plain: Prompts, user_id: str) -> Item:
    """Return what a record says."""
    try:
        return Item(place, _feedback_of(record, plain, user_id))
    except InvalidRequest as error:
        return Item(place, None, str(error))
    except UnicodeEncodeError:
        return Item(place, None, "holds what is no Unicode text")


def _feedback_of(
    record: Mapping[str, Any], plain: Prompts, user_id: str
) -> admin_pb2.ImportedFeedback:
    """Return a record as it travels. Raises InvalidRequest, UnicodeEncodeError."""
    found = admin_pb2.ImportedFeedback(
        user_id=text_of(record, "user_id") or user_id,
        source_id=text_of(record, "response_id") or text_of(record, "id"),
    )
    set_prompt(found, prompt_of(record.get("prompt"), plain, "prompt"))
    set_time(found, record.get("created_at", record.get("timestamp")), "created_at")
    if "label" in record:
        found.thumb.reply = reply_of(record.get("completion"), "completion")
        found.thumb.thumb = _thumb_of(record["label"])
        found.thumb.comment = text_of(record, "comment")
    elif "chosen" in record:
        found.preference.better = reply_of(record["chosen"], "chosen")
        found.preference.worse = reply_of(record.get("rejected"), "rejected")
    else:
        raise InvalidRequest.of("record", _NO_SHAPE)
    return found


def _thumb_of(label: object) -> feedback_pb2.Thumb.ValueType:
    if label not in (True, False):  # 1 and 0 are those
        raise InvalidRequest.of("label", "has to be true or false")
    return feedback_pb2.THUMB_UP if label else feedback_pb2.THUMB_DOWN


def prompt_of(value: object, plain: Prompts, field: str) -> Prompt:
    """Return a prompt: a string, or messages with role and content. Raises InvalidRequest."""
    if isinstance(value, str):
        if plain is Prompts.TEXT:
            return Prompt(text=value)
        return Prompt(messages=(Message(Role.USER, value),))
    if not isinstance(value, Sequence) or not value:
        raise InvalidRequest.of(field, "has to be a text, or a list of messages")
    return Prompt(messages=tuple(_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value)))


def reply_of(value: object, field: str) -> str:
    """Return a reply: a string, or a list of one message of an assistant's. Raises InvalidRequest."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and len(value) == 1:
        turn = _turn(value[0], f"{field}[0]")
        if turn.role is Role.ASSISTANT:
            return turn.content
    raise InvalidRequest.of(field, "has to be a text, or a list of one message by an assistant")


def _turn(value: object, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise InvalidRequest.of(field, "has to be a message with role and content")
    role, content = value.get("role"), value.get("content")
    known = _ALIASES.get(str(role)) or next((each for each in Role if each == role), None)
    if known is None:
        raise InvalidRequest.of(f"{field}.role", "has to be system, user or assistant")
    return Message(known, content_of(content, f"{field}.content"))


def content_of(value: object, field: str) -> str:
    """Return what a message says: a string, or OpenAI's list of parts that are texts. Raises InvalidRequest."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value:
        parts = [p.get("text") if isinstance(p, Mapping) else None for p in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    raise InvalidRequest.of(field, "has to be a text")


def text_of(record: Mapping[str, Any], *fields: str) -> str:
    """Return the first of these fields that is there, empty where none is. Raises InvalidRequest: it is no text."""
    for field in fields:
        value = record.get(field)
        if isinstance(value, str):
            return value
        if value is not None:
            raise InvalidRequest.of(field, "has to be a text")
    return ""


def set_prompt(found: admin_pb2.ImportedFeedback, prompt: Prompt) -> None:
    """Write a prompt into a message."""
    if prompt.text is not None:
        found.text = prompt.text
        return
    found.chat.messages.extend(
        policy_pb2.ChatMessage(role=ROLES[turn.role], content=turn.content)
        for turn in prompt.messages
    )


def set_time(found: admin_pb2.ImportedFeedback, value: object, field: str) -> None:
    """Write when something was said into a message; None leaves it out. Raises InvalidRequest."""
    if value is None:
        return
    try:
        found.said_at.CopyFrom(_timestamp(value))
    except (ValueError, TypeError, OverflowError):
        raise InvalidRequest(
            FieldViolation(field, "has to be a time: ISO 8601, or seconds since 1970")
        ) from None


def _timestamp(value: object) -> Timestamp:
    """Return a time; one without a zone is UTC. Raises ValueError, TypeError, OverflowError."""
    stamp = Timestamp()
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        stamp.FromDatetime(value if value.tzinfo else value.replace(tzinfo=UTC))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        stamp.FromMicroseconds(round(value * 1e6))
    else:
        raise TypeError
    return stamp
