"""What the chat shows of a conversation, as Gradio's Chatbot takes it. Pure."""

from typing import Any

from web.conversation import Conversation, Turn

UP, DOWN = "Like", "Dislike"
"""Gradio's names, which it shows as thumbs."""

Said = dict[str, Any]


def transcript(conversation: Conversation, *, pair_is_open: bool = True) -> list[Said]:
    """Return all questions and replies; of two replies to pick from at the end the question alone."""
    said: list[Said] = []
    for turn in conversation.turns:
        said += [by_user(turn.question), by_policy(turn.text, _origin(turn))]
    if pair_is_open and conversation.turns and conversation.turns[-1].is_pair:
        said.pop()
    return said


def thumbs(conversation: Conversation) -> list[str | None]:
    """Return the thumb of each reply, in their order."""
    names = {True: UP, False: DOWN, None: None}
    return [names[turn.thumb] for turn in conversation.turns]


def by_user(text: str) -> Said:
    """Return a question."""
    return {"role": "user", "content": text}


def by_policy(text: str, origin: str = "") -> Said:
    """Return a reply, and below it where it comes from."""
    parts = [text, origin] if origin else [text]
    return {"role": "assistant", "content": [{"type": "text", "text": part} for part in parts]}


def _origin(turn: Turn) -> str:
    picked = "" if turn.picked is None else ", picked of two"
    return f"version {turn.version}{picked}"
