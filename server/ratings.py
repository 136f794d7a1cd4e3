"""Where thumbs and preferences come in, whichever wire they came by. It never waits for the engine."""

import math
import time
from typing import Protocol

from sqlalchemy import Connection

from server.access import Caller
from server.metrics import ServerMetrics
from server.translation import preference_of, thumb_of
from thumbloop import logs
from thumbloop.config.server import FeedbackSettings
from thumbloop.store import GroupWriter, feedback, preferences
from thumbloop.types import Feedback, Preference
from thumbloop.v1 import feedback_pb2


class Listener(Protocol):
    """Whoever wants to hear of feedback that was stored."""

    def rated(self, thumb: Feedback, comment: str) -> None:
        """Hear of a thumb."""

    def compared(self, preference: Preference) -> None:
        """Hear of a preference."""


class Ratings:
    """Stores thumbs and preferences; each is durable when it is answered."""

    def __init__(
        self,
        writer: GroupWriter,
        metrics: ServerMetrics,
        settings: FeedbackSettings,
        listener: Listener | None = None,
    ) -> None:
        self._writer = writer
        self._window_s = math.inf if settings.window_s is None else settings.window_s
        self._metrics = metrics
        self._listener = listener

    async def rate(self, message: feedback_pb2.SubmitFeedbackRequest, caller: Caller) -> Feedback:
        """Store a thumb.

        Raises PermissionDenied, InvalidRequest, UnknownResponse, RequestIdTaken, FeedbackTooLate,
        StoreUnavailable.
        """
        thumb, now = thumb_of(message, caller.user(message.user_id)), time.time()

        def change(connection: Connection) -> Feedback:
            return feedback.submit_thumb(
                connection,
                thumb.response_id,
                thumb.value,
                thumb.user,
                comment=thumb.comment,
                request_id=thumb.request_id,
                at=now,
                window_s=self._window_s,
            )

        stored = await self._writer.run(change)
        logs.note(response_id=stored.response_id)
        self._metrics.observe_feedback(stored)
        if self._listener is not None and not stored.duplicate:
            self._listener.rated(stored, thumb.comment)
        return stored

    async def compare(
        self, message: feedback_pb2.SubmitPreferenceRequest, caller: Caller
    ) -> Preference:
        """Store that one candidate was better than another.

        Raises PermissionDenied, InvalidRequest, UnknownResponse, RequestIdTaken, FeedbackTooLate,
        StoreUnavailable.
        """
        given, now = preference_of(message, caller.user(message.user_id)), time.time()

        def change(connection: Connection) -> Preference:
            return preferences.submit_preference(
                connection,
                given.response_id,
                given.better,
                given.worse,
                given.user,
                request_id=given.request_id,
                at=now,
                window_s=self._window_s,
            )

        stored = await self._writer.run(change)
        logs.note(response_id=stored.response_id)
        self._metrics.observe_preference(stored)
        if self._listener is not None and not stored.duplicate:
            self._listener.compared(stored)
        return stored
