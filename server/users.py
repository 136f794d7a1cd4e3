"""Protocol buffers -> the users whose data a call is about."""

from server.access import Caller
from server.violations import Violations
from thumbloop.types import MAX_ID, User
from thumbloop.v1 import admin_pb2, feedback_pb2

Message = feedback_pb2.DeleteUserDataRequest | admin_pb2.GetUserLineageRequest


def user_to_forget(message: feedback_pb2.DeleteUserDataRequest, caller: Caller) -> User:
    """Return the user whose data is to be erased. Raises InvalidRequest, PermissionDenied."""
    wrong = _of_names(message)
    is_given = message.HasField("user_id")
    wrong.expect(is_given, "user_id", "is missing; empty means whoever the subject itself is")
    wrong.raise_if_any()
    return _of_whom(message, caller)


def user_to_trace(message: admin_pb2.GetUserLineageRequest, caller: Caller) -> User:
    """Return the user whose influence is asked for. Raises InvalidRequest, PermissionDenied."""
    _of_names(message).raise_if_any()
    return _of_whom(message, caller)


def _of_names(message: Message) -> Violations:
    wrong = Violations()
    wrong.storable(message.user_id, MAX_ID, "user_id")
    wrong.storable(message.subject, MAX_ID, "subject")
    return wrong


def _of_whom(message: Message, caller: Caller) -> User:
    subject = message.subject if message.HasField("subject") else None
    return caller.any_user(subject, message.user_id)
