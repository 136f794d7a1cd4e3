"""A conversation as its browser keeps it: what asking, rating, picking and undoing make of it.

Pure data. What a browser hands in is checked here; nothing calls the server.
"""

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from thumbloop.types import Message, Role
from thumbloop.v1 import policy_pb2


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply: its text, and its place among the candidates of its request."""

    text: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its reply, or two of them; `chosen` is where in `replies` the server's own choice is.

    `thumb` is what the user said of the server's choice, `picked` which of two replies was called better.
    """

    question: str
    response_id: str
    version: int
    replies: tuple[Reply, ...]
    chosen: int = 0
    thumb: bool | None = None
    picked: int | None = None

    def __post_init__(self) -> None:
        places = range(len(self.replies))
        if self.chosen not in places or (self.picked is not None and self.picked not in places):
            raise ValueError("chosen and picked have to be places in replies")

    @property
    def is_pair(self) -> bool:
        """Say whether there are two replies to pick from."""
        return len(self.replies) > 1

    @property
    def text(self) -> str:
        """Return the reply that the conversation goes on from."""
        return self.replies[self.chosen if self.picked is None else self.picked].text

    @property
    def can_be_rated(self) -> bool:
        """Say whether a thumb would be for this text: it always is for the server's choice."""
        return self.picked in (None, self.chosen)


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one user and the policy said, oldest first."""

    user_id: str
    session_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: tuple[Turn, ...] = ()

    def messages(self, question: str) -> list[Message]:
        """Return what the server is to answer: all that was said, and a new question."""
        said = [
            message
            for turn in self.turns
            for message in (
                Message(Role.USER, turn.question),
                Message(Role.ASSISTANT, turn.text),
            )
        ]
        return [*said, Message(Role.USER, question)]

    def answered(self, turn: Turn) -> "Conversation":
        """Return it with one more turn."""
        return replace(self, turns=(*self.turns, turn))

    def rated(self, place: int, *, up: bool) -> "Conversation":
        """Return it with a thumb on one turn, in the place of an earlier one."""
        return self._with(place, replace(self.turns[place], thumb=up))

    def picked(self, place: int, better: int) -> "Conversation":
        """Return it with one of the two replies of a turn called better."""
        return self._with(place, replace(self.turns[place], picked=better))

    def undone(self) -> tuple["Conversation", str]:
        """Return it as it was before the last turn, and the question that was asked there."""
        *before, last = self.turns
        return replace(self, turns=tuple(before)), last.question

    def _with(self, place: int, turn: Turn) -> "Conversation":
        turns = [*self.turns]
        turns[place] = turn
        return replace(self, turns=tuple(turns))


def turn_of(question: str, reply: policy_pb2.GenerateResponse) -> Turn:
    """Return a turn: with two replies where the server gave two that are whole and differ."""
    replies = _to_compare(reply.candidates)
    chosen = [n for n, candidate in enumerate(replies) if candidate.text == reply.text]
    if len(replies) < 2 or not chosen:
        replies, chosen = [Reply(reply.text)], [0]
    return Turn(question, reply.response_id, reply.policy_version, tuple(replies), chosen[0])


def _to_compare(candidates: Sequence[policy_pb2.Candidate]) -> list[Reply]:
    by_text: dict[str, Reply] = {}
    for candidate in candidates:
        if candidate.finish_reason != policy_pb2.FINISH_REASON_ABORTED and candidate.text.strip():
            by_text.setdefault(candidate.text, Reply(candidate.text, candidate.index))
    return [*by_text.values()][:2]


_KEPT = TypeAdapter(Conversation)


def kept(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation as a browser keeps it, JSON."""
    return asdict(conversation)


def opened(found: object, user_id: str | None = None) -> Conversation:
    """Return the conversation that a browser kept; a new one where it kept none, or that of another user.

    Without a name the user is the browser's own: the one it kept, or a new one.
    """
    try:
        conversation = _KEPT.validate_python(found)
    except ValidationError:  # the first visit, or another release's
        return Conversation(user_id or f"web-{uuid.uuid4().hex}")
    return conversation if user_id in (None, conversation.user_id) else Conversation(user_id)
