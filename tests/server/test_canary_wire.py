"""A whole server tries a version: users over the wire, operators, metrics."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.publishing import publisher_of
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.v1 import admin_pb2, policy_pb2

USERS = [f"user {n}" for n in range(80)]
CANARY = admin_pb2.POLICY_VERSION_STATE_CANARY


@pytest.fixture
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """Version 1 is tried on half of the users."""
    delivery = {"mode": "canary", "canary": {"share": 0.5, "look_interval_s": 0.02}}
    async with running(tiny_model, state, delivery=delivery) as server:
        publisher = publisher_of(server, tiny_model, state)
        publisher.publish(1)
        await until(lambda: server.application._routes.routed == (0, 1))
        yield server


async def ask(server: Running, user: str, **fields: object) -> policy_pb2.GenerateResponse:
    return await server.generate("A film", user_id=user, **fields)


async def state_of(server: Running, number: int) -> int:
    shown = await server.client.version(number)
    return shown.policy_version.state


async def test_users_keep_the_version_that_they_got_and_pins_are_kept_too(server: Running):
    first = {user: (await ask(server, user)).policy_version for user in USERS[:20]}
    assert set(first.values()) == {0, 1}
    for user, version in first.items():
        assert (await ask(server, user)).policy_version == version
        assert (await ask(server, user, policy_version=0)).policy_version == 0
        assert (await ask(server, user, policy_version=1)).policy_version == 1


async def test_a_session_stands_for_who_has_no_name(server: Running):
    sessions = [f"session {n}" for n in range(20)]
    first = {s: (await server.generate("A film", session_id=s)).policy_version for s in sessions}
    assert set(first.values()) == {0, 1}
    for session, version in first.items():
        again = await server.generate("A film", session_id=session)
        assert again.policy_version == version


async def test_all_candidates_of_a_reply_are_of_the_version_that_it_names(server: Running):
    for user in USERS[:10]:
        reply = await ask(server, user)
        stored = server.stored(reply.response_id)
        assert {c.policy_version for c in stored.candidates} == {reply.policy_version}
        assert stored.policy_version == reply.policy_version


async def test_thumbs_decide_and_operators_see_why(server: Running):
    before = await server.client.version(1)
    assert before.policy_version.state == CANARY
    for user in USERS:
        reply = await ask(server, user)
        await server.client.rate(reply.response_id, up=reply.policy_version == 1, user_id=user)
        if await state_of(server, 1) != CANARY:
            break
    await until(lambda: server.application._routes.routed == (1, None))
    after = await server.client.version(1)
    assert after.policy_version.state == admin_pb2.POLICY_VERSION_STATE_CURRENT
    kinds = [
        admin_pb2.PolicyVersionState.Name(e.state).rpartition("STATE_")[2] for e in after.events
    ]
    assert kinds == ["ATTESTED", "CANARY", "CURRENT"]
    decided = after.events[-1]
    assert decided.actor == "server"
    assert decided.reason.startswith("thumbs: 1.000 of ")
    thumbs = decided.evidence[0]
    assert (thumbs.name, thumbs.canary_mean, thumbs.current_mean) == ("thumbs", 1.0, 0.0)
    assert thumbs.log_higher == thumbs.log_held > 3 > thumbs.log_lower
    assert not after.trial


async def test_sessions_vote_where_nobody_has_a_name(server: Running):
    for n in range(len(USERS)):
        reply = await server.generate("A film", session_id=f"session {n}")
        await server.client.rate(reply.response_id, up=reply.policy_version == 1)
        if await state_of(server, 1) != CANARY:
            break
    await until(lambda: server.application._routes.routed == (1, None))
    (decided,) = [e for e in (await server.client.version(1)).events if e.evidence]
    thumbs = decided.evidence[0]
    assert (thumbs.name, thumbs.canary_mean, thumbs.current_mean) == ("thumbs", 1.0, 0.0)


async def test_while_it_is_tried_the_evidence_is_shown(server: Running):
    reply = await ask(server, USERS[0])
    await server.client.rate(reply.response_id, up=True, user_id=USERS[0])
    side = "canary" if reply.policy_version == 1 else "current"
    shown = await server.client.version(1)
    async with httpx2.AsyncClient() as client:
        url = f"http://127.0.0.1:{server.application.metrics_port}/metrics"
        wanted = f'thumbloop_canary_users{{measure="thumbs",side="{side}"}} 1.0'
        text = ""
        while wanted not in text:
            text = (await client.get(url)).text
        shown = await server.client.version(1)
    assert shown.trial[0].name == "thumbs"
    assert shown.trial[0].canary_users + shown.trial[0].current_users == 1
    assert {m.name for m in shown.trial} >= {"errors", "latency", "length"}
    assert f'thumbloop_canary_mean{{measure="thumbs",side="{side}"}} 1.0' in text
    assert 'thumbloop_canary_log_evidence{direction="higher",measure="thumbs"} 0.0' in text
    assert 'thumbloop_canary_log_evidence{direction="held",measure="thumbs"} 0.0' in text
    assert "thumbloop_policy_version_info{policy_digest=" in text
    assert 'state="canary",version="1"' in text
    assert not (await server.client.version(0)).trial


async def test_an_operator_ends_the_trial(server: Running):
    moved = await server.client.roll_back(0, expected_current=0, reason="it swears")
    assert moved.policy_version == 0
    assert await state_of(server, 1) == admin_pb2.POLICY_VERSION_STATE_ROLLED_BACK
    for user in USERS[:20]:
        assert (await ask(server, user)).policy_version == 0
    last = (await server.client.version(1)).events[-1]
    assert (last.actor, last.reason) == ("operator", "it swears")


async def test_a_trial_compares_replies_of_as_many_candidates(tiny_model: Path, state: State):
    delivery = {"mode": "canary", "canary": {"share": 0.5}}
    guidance = {"first_wave": 2, "min_audits": 6, "audit_share": 0.5}
    async with running(tiny_model, state, delivery=delivery, guidance=guidance) as server:
        publisher = publisher_of(server, tiny_model, state)
        publisher.publish(1)
        await until(lambda: server.application._routes.routed == (0, 1))
        await server.client.promote(1, expected_current=0)
        by_trainer = server.engine.reward

        async def sizes(users: int) -> set[int]:
            server.engine.reward = lambda _tokens: 1.0  # none is better than any audit's best
            replies = [
                await ask(server, user, sampling=policy_pb2.SamplingParams(seed=seed))
                for seed, user in enumerate(USERS[:users])
            ]
            server.engine.reward = by_trainer
            return {r.num_candidates for r in replies if r.policy_version == 1}

        assert await sizes(30) == {2, 4}
        publisher.publish(2, parent=1)
        await until(lambda: server.application._routes.routed == (1, 2))
        assert await sizes(10) == {4}  # of the canary there are too few audits yet
