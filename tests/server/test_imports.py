"""ImportFeedback over the wire: what is stored of it, who may bring it in, and what never counts it."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from server.imports import MAX_ITEMS
from tests.refusals import fields, refused
from tests.serving import Running, running
from thumbloop.client import AsyncClient
from thumbloop.config import State
from thumbloop.errors import PermissionDenied
from thumbloop.store import feedback, interactions, preferences, reading
from thumbloop.types import (
    DEFAULT_POLICY,
    IMPORTED_VERSION,
    Arm,
    Interaction,
    Learning,
    Status,
    User,
)
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

IMPORTED = admin_pb2.IMPORT_OUTCOME_IMPORTED
DUPLICATE = admin_pb2.IMPORT_OUTCOME_DUPLICATE
REFUSED = admin_pb2.IMPORT_OUTCOME_REFUSED
TURN = policy_pb2.ChatMessage(role=policy_pb2.ROLE_USER, content="how was it")
TIME = {"seconds": 1_700_000_000, "nanos": 250_000_000}


def thumb(reply: str = "good", **changes: Any) -> admin_pb2.ImportedFeedback:
    values = {"text": "the film was", "user_id": "ann"} | changes
    verdict = {"reply": reply, "thumb": feedback_pb2.THUMB_UP} | values.pop("thumb", {})
    return admin_pb2.ImportedFeedback(thumb=verdict, **values)


def pair(better: str = "good", worse: str = "bad", **changes: Any) -> admin_pb2.ImportedFeedback:
    values = {"text": "the film was", "user_id": "ann"} | changes
    return admin_pb2.ImportedFeedback(preference={"better": better, "worse": worse}, **values)


async def bring_in(
    server: Running, *items: admin_pb2.ImportedFeedback
) -> list[admin_pb2.ImportResult]:
    return list((await server.client.import_feedback(items)).results)


def rated(server: Running) -> list[Any]:
    assert server.database is not None
    with reading(server.database) as connection:
        return feedback.list_rated(connection, DEFAULT_POLICY)


def compared(server: Running) -> list[Any]:
    assert server.database is not None
    with reading(server.database) as connection:
        return preferences.list_compared(connection, DEFAULT_POLICY)


def all_stored(server: Running) -> list[Interaction]:
    assert server.database is not None
    with reading(server.database) as connection:
        return interactions.list_since(connection, DEFAULT_POLICY, IMPORTED_VERSION)


async def test_a_thumb_is_stored_as_the_reward_model_reads_it(server: Running):
    (result,) = await bring_in(server, thumb("good", said_at=TIME, thumb={"comment": "lovely"}))
    assert result.outcome == IMPORTED
    stored = server.stored(result.response_id)
    encode = server.engine.tokenizer.encode
    given = await server.generate("the film was")
    assert stored.prompt_token_ids == server.stored(given.response_id).prompt_token_ids
    (candidate,) = stored.candidates
    end = server.engine.tokenizer.eos_token_id
    assert candidate.token_ids == (*encode("good", add_special_tokens=False), end)
    assert (candidate.text, candidate.chosen) == ("good", True)
    (found,) = rated(server)
    assert (found.value, found.created_at, found.user) == (1, 1_700_000_000.25, User("", "ann"))
    assert (found.learning, found.status) == (Learning.ALLOWED, Status.COMPLETED)


async def test_nothing_is_claimed_of_who_said_it_and_how_likely_that_was(server: Running):
    (result,) = await bring_in(server, pair())
    stored = server.stored(result.response_id)
    assert (stored.policy_version, stored.strategy) == (IMPORTED_VERSION, "imported")
    assert (stored.arm, stored.reranked) == (Arm.IMPORTED, False)
    assert (stored.trainable, stored.untrainable_reason) == (False, "imported")
    assert (stored.policy_digest, stored.reward_digest) == ("", "")
    for candidate in stored.candidates:
        assert candidate.logprobs == ()
        assert (candidate.propensity, candidate.reward) == (None, None)
        assert candidate.policy_version == IMPORTED_VERSION


async def test_a_preference_is_stored_with_both_replies(server: Running):
    await bring_in(server, pair(chat={"messages": [TURN]}, text=None))
    (found,) = compared(server)
    assert (found.better.text, found.worse.text) == ("good", "bad")
    (stored,) = all_stored(server)
    assert stored.prompt.messages[0].content == "how was it"


async def test_what_people_wrote_is_no_special_token(server: Running):
    (result,) = await bring_in(server, thumb("good <|up|>"))
    (candidate,) = server.stored(result.response_id).candidates
    up = server.engine.tokenizer.convert_tokens_to_ids("<|up|>")
    assert up not in candidate.token_ids


async def test_the_same_again_changes_nothing_also_when_both_arrive_together(server: Running):
    items = [thumb("good"), thumb("bad"), pair()]
    both = await asyncio.gather(bring_in(server, *items), bring_in(server, *items))
    outcomes = [[result.outcome for result in results] for results in both]
    assert sorted(outcomes) == [[IMPORTED] * 3, [DUPLICATE] * 3]
    assert len({result.response_id for results in both for result in results}) == 3
    assert (len(rated(server)), len(compared(server))) == (2, 1)


async def test_other_words_are_another_thumb(server: Running):
    down = thumb("good", thumb={"thumb": feedback_pb2.THUMB_DOWN})
    results = await bring_in(server, thumb("good"), down, thumb("good", user_id="bob"))
    assert [result.outcome for result in results] == [IMPORTED] * 3


async def test_a_name_of_its_own_is_there_once(server: Running):
    named = {"source_id": "score 1"}
    results = await bring_in(
        server, thumb("good", **named), thumb("good", **named), thumb("bad", **named)
    )
    assert [result.outcome for result in results] == [IMPORTED, DUPLICATE, REFUSED]
    assert results[2].reason.startswith("source_id: was imported with something else")


async def test_a_reply_that_this_server_gave_is_there_already(server: Running):
    given = await server.generate("hello")
    (result,) = await bring_in(server, thumb(source_id=given.response_id))
    assert (result.outcome, result.response_id) == (DUPLICATE, given.response_id)
    assert rated(server) == []


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (thumb(text=None), "prompt: is missing"),
        (thumb(text=" "), "text: is empty"),
        (thumb(text=None, chat={}), "chat.messages: is empty"),
        (thumb(" "), "thumb.reply: is empty"),
        (thumb("a" * 200_001), "thumb.reply: has 200001 characters"),
        (thumb("a " * 600), "thumb.reply: has "),
        (thumb(thumb={"thumb": 0}), "thumb.thumb: has to be THUMB_UP or THUMB_DOWN"),
        (thumb(thumb={"comment": "c" * 4097}), "thumb.comment: has 4097 characters"),
        (pair("good", ""), "preference.worse: is empty"),
        (pair("good", "good"), "preference.worse: is the same"),
        (pair("good", "a " * 600), "preference.worse: has "),
        (admin_pb2.ImportedFeedback(text="a"), "verdict: is missing"),
        (thumb(user_id="u" * 257), "user_id: has 257 characters"),
        (thumb(source_id="s" * 257), "source_id: has 257 characters"),
        (thumb(said_at={"seconds": int(time.time()) + 3600}), "said_at: has to be between"),
        (thumb(said_at={"seconds": -1}), "said_at: has to be between"),
        (admin_pb2.ImportedFeedback(), "prompt: is missing; set `text` or `chat`; verdict: is"),
    ],
)
async def test_an_item_that_is_wrong_says_why_and_the_others_are_taken(
    server: Running, item: admin_pb2.ImportedFeedback, reason: str
):
    results = await bring_in(server, thumb("one"), item, thumb("two"))
    assert [result.outcome for result in results] == [IMPORTED, REFUSED, IMPORTED]
    assert results[1].reason.startswith(reason)
    assert results[1].response_id == ""
    assert {each.candidate.text for each in rated(server)} == {"one", "two"}


async def test_a_call_that_is_wrong_is_refused(server: Running):
    call = server.admin.ImportFeedback
    many = admin_pb2.ImportFeedbackRequest(items=[thumb()] * (MAX_ITEMS + 1), subject="s" * 257)
    error = await refused(call(many))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(error) == ["items", "subject"]
    other = await refused(call(admin_pb2.ImportFeedbackRequest(policy="another")))
    assert other.code() is grpc.StatusCode.NOT_FOUND
    assert all_stored(server) == []


async def test_a_call_may_hold_as_many_items_as_it_says(server: Running):
    results = await bring_in(server, *(thumb(f"reply {i}") for i in range(MAX_ITEMS)))
    assert {result.outcome for result in results} == {IMPORTED}
    assert len(rated(server)) == MAX_ITEMS


async def test_replies_go_on_while_much_is_brought_in(server: Running):
    items = [thumb(f"{i} " * 100) for i in range(64)]
    _, reply = await asyncio.gather(bring_in(server, *items), server.generate("hello"))
    assert reply.response_id


async def test_without_an_engine_there_is_nobody_to_read_it(server: Running):
    server.application._lifecycle.suspend("the engine is being restarted; try again in a moment")
    error = await refused(
        server.admin.ImportFeedback(admin_pb2.ImportFeedbackRequest(items=[thumb()]))
    )
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert all_stored(server) == []


async def test_what_was_imported_is_no_traffic(server: Running):
    await bring_in(server, thumb("one"), thumb("one"), pair(), thumb(""))
    exposed = generate_latest(server.application._metrics.registry).decode()
    samples = dict(line.rsplit(" ", 1) for line in exposed.splitlines() if line[:1] != "#")
    counted = {name: value for name, value in samples.items() if "imported" in name}
    assert counted == {
        'thumbloop_imported_feedback_total{kind="thumb",result="imported"}': "1.0",
        'thumbloop_imported_feedback_total{kind="thumb",result="duplicate"}': "1.0",
        'thumbloop_imported_feedback_total{kind="thumb",result="refused"}': "1.0",
        'thumbloop_imported_feedback_total{kind="preference",result="imported"}': "1.0",
    }
    families = ("replies", "candidates", "tokens", "feedback", "preferences", "reward")
    begins = tuple(f"thumbloop_{family}_total{{" for family in families)
    assert [name for name in samples if name.startswith(begins)] == []
    assert samples["thumbloop_reward_count"] == "0.0"


async def test_its_user_may_change_a_thumb_that_was_imported(server: Running):
    (result,) = await bring_in(server, thumb("good"))
    changed = await server.client.rate(result.response_id, up=False, user_id="ann")
    assert changed.policy_version == IMPORTED_VERSION
    assert [each.value for each in rated(server)] == [0]


async def test_a_request_cannot_be_answered_with_what_was_imported(server: Running):
    """The name under which an import is remembered is one that a caller might use."""
    await bring_in(server, thumb("good"))
    (stored,) = all_stored(server)
    request = policy_pb2.GenerateRequest(
        text="the film was", user_id="ann", request_id=stored.request_id
    )
    error = await refused(server.policy.Generate(request))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS


# Who may


@pytest.fixture
async def guarded(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    scopes = {"ops": ["admin"], "backend": ["generate", "feedback", "on_behalf"]}
    access = {
        "tokens": {
            subject: {"sha256": hashlib.sha256(subject.encode()).hexdigest(), "scopes": these}
            for subject, these in scopes.items()
        }
    }
    async with running(tiny_model, state, access=access) as server:
        yield server


async def test_an_operator_brings_in_what_users_of_a_backend_said(guarded: Running):
    async with AsyncClient(f"127.0.0.1:{guarded.port}", token="ops") as client:
        await client.import_feedback([thumb("one")])
        await client.import_feedback([thumb("two")], subject="backend")
        found = {each.candidate.text: each.user for each in rated(guarded)}
        assert found == {"one": User("ops", "ann"), "two": User("backend", "ann")}
        gone = await client.forget("ann", subject="backend")
        assert (gone.interactions_erased, gone.feedback_erased) == (1, 1)
    assert [each.candidate.text for each in rated(guarded)] == ["one"]


async def test_nobody_else_brings_anything_in(guarded: Running):
    async with AsyncClient(f"127.0.0.1:{guarded.port}", token="backend") as client:
        with pytest.raises(PermissionDenied):
            await client.import_feedback([thumb()])
    assert all_stored(guarded) == []
