"""What the chat shows."""

from typing import Any

from web.conversation import Conversation, Reply, Turn
from web.transcript import thumbs, transcript

ONE = Turn("How was it?", "r1", 3, (Reply("Good."),), thumb=True)
PAIR = Turn("And the food?", "r2", 4, (Reply("Salty.", 0), Reply("Fine.", 1)), picked=1)


def words(said: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [one["content"]] if one["role"] == "user" else [part["text"] for part in one["content"]]
        for one in said
    ]


def test_every_reply_says_which_version_gave_it():
    said = transcript(Conversation("ann", "s", (PAIR, ONE)))
    assert words(said) == [
        ["And the food?"],
        ["Fine.", "version 4, picked of two"],
        ["How was it?"],
        ["Good.", "version 3"],
    ]


def test_two_replies_to_pick_from_are_not_in_the_chat_yet():
    conversation = Conversation("ann", "s", (ONE, PAIR))
    assert words(transcript(conversation))[2:] == [["And the food?"]]
    assert words(transcript(conversation, pair_is_open=False))[3][0] == "Fine."


def test_thumbs_are_in_the_order_of_the_replies():
    down = Conversation("ann", "s", (ONE, PAIR, ONE)).rated(2, up=False)
    assert thumbs(down) == ["Like", None, "Dislike"]
