"""What a conversation becomes when somebody asks, rates, picks and undoes; and what a browser may hand in."""

import json
from dataclasses import replace

import pytest

from thumbloop.types import Message, Role
from thumbloop.v1 import policy_pb2
from web.conversation import Conversation, Reply, Turn, kept, opened, turn_of

ONE = Turn("How was it?", "r1", 3, (Reply("Good."),))
PAIR = Turn("And the food?", "r2", 4, (Reply("Salty.", 0), Reply("Fine.", 1)), chosen=1)
SAID = Conversation("ann", "s", (ONE, PAIR))


def answer(
    *texts: str, chosen: int = 0, aborted: tuple[int, ...] = ()
) -> policy_pb2.GenerateResponse:
    ended = {True: policy_pb2.FINISH_REASON_ABORTED, False: policy_pb2.FINISH_REASON_STOP}
    candidates = [
        policy_pb2.Candidate(text=text, index=n, finish_reason=ended[n in aborted])
        for n, text in enumerate(texts)
    ]
    return policy_pb2.GenerateResponse(
        response_id="r", text=texts[chosen], policy_version=7, candidates=candidates
    )


def test_a_question_follows_all_that_was_said():
    assert SAID.messages("Why?") == [
        Message(Role.USER, "How was it?"),
        Message(Role.ASSISTANT, "Good."),
        Message(Role.USER, "And the food?"),
        Message(Role.ASSISTANT, "Fine."),
        Message(Role.USER, "Why?"),
    ]


def test_a_thumb_can_be_changed_and_touches_no_other_turn():
    up = SAID.rated(0, up=True)
    assert [turn.thumb for turn in up.turns] == [True, None]
    assert [turn.thumb for turn in up.rated(0, up=False).turns] == [False, None]
    assert replace(up, turns=SAID.turns) == SAID


def test_the_conversation_goes_on_from_the_reply_that_was_picked():
    picked = SAID.picked(1, 0)
    assert picked.messages("Why?")[3] == Message(Role.ASSISTANT, "Salty.")
    assert picked.picked(1, 1).messages("Why?")[3] == Message(Role.ASSISTANT, "Fine.")


def test_a_thumb_is_for_the_servers_choice_alone():
    assert PAIR.can_be_rated
    assert replace(PAIR, picked=1).can_be_rated
    assert not replace(PAIR, picked=0).can_be_rated


def test_undoing_gives_the_question_back():
    before, question = SAID.undone()
    assert question == "And the food?"
    assert before == replace(SAID, turns=(ONE,))


def test_two_replies_are_a_pair_with_their_places_among_the_candidates():
    turn = turn_of("Well?", answer("First.", "Second.", chosen=1))
    assert turn.replies == (Reply("First.", 0), Reply("Second.", 1))
    assert (turn.is_pair, turn.chosen, turn.text, turn.version) == (True, 1, "Second.", 7)


@pytest.mark.parametrize(
    "reply",
    [
        answer("Same.", "Same."),
        answer("Whole.", "Cut", aborted=(1,)),
        answer("Whole.", "  "),
        answer("Alone."),
        policy_pb2.GenerateResponse(response_id="r", text="Alone."),
    ],
    ids=["alike", "aborted", "blank", "one", "not asked for"],
)
def test_what_cannot_be_compared_is_one_reply(reply: policy_pb2.GenerateResponse):
    turn = turn_of("Well?", reply)
    assert not turn.is_pair
    assert turn.text == reply.text


def test_a_browser_gets_back_what_it_kept():
    conversation = SAID.rated(0, up=False).picked(1, 0)
    assert opened(json.loads(json.dumps(kept(conversation)))) == conversation


@pytest.mark.parametrize(
    "found",
    [
        None,
        "nonsense",
        {"user_id": "ann"} | {"turns": [{"question": "?"}]},
        kept(Conversation("ann", "s", (ONE,)))
        | {"turns": [kept(SAID)["turns"][0] | {"picked": 7}]},
    ],
    ids=["nothing", "text", "half a turn", "a reply that is not there"],
)
def test_what_cannot_be_read_is_a_new_conversation_of_a_new_user(found: object):
    first, second = opened(found), opened(found)
    assert first.turns == ()
    assert first.user_id != second.user_id
    assert first.user_id.startswith("web-")


def test_another_name_begins_a_conversation_of_its_own():
    assert opened(kept(SAID), "ann") == SAID
    bobs = opened(kept(SAID), "bob")
    assert (bobs.user_id, bobs.turns) == ("bob", ())
    assert bobs.session_id != SAID.session_id
