"""A version is tried on real vLLM: its users keep it over a restart, and what they say decides."""

import asyncio
import time
from pathlib import Path

import pytest

from server.canary import Canary, unit_of
from tests.end_to_end.conftest import Lend
from tests.own_numbers import check_numbers
from tests.prometheus import Query, prometheus, queries
from tests.publishing import Publisher, RealSpeaker
from tests.serving import Running, until
from thumbloop.client import GenerateOptions
from thumbloop.config import State, Verdict
from thumbloop.rendering import verdict_tokens
from thumbloop.types import User
from thumbloop.v1 import admin_pb2, policy_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")

SHARE = 0.5
TRIALS = {"mode": "canary", "canary": {"share": SHARE, "look_interval_s": 0.05}}
GROUP = Canary(1, SHARE)
USERS = [f"user {n}" for n in range(60)]
SHORT = GenerateOptions(max_tokens=8, num_candidates=2)


async def ask(server: Running, user: str) -> policy_pb2.GenerateResponse:
    return await server.client.generate("what did you think", user_id=user, options=SHORT)


def lines_without_data(server: Running, folder: Path) -> set[Query]:
    """Return the lines of the dashboard about a trial that show nothing of this one."""
    targets = {"thumbloop-server": f"127.0.0.1:{server.application.metrics_port}"}
    with prometheus(folder / "prometheus", targets) as watching:
        empty, deadline = queries(of_trials=True), time.monotonic() + 20
        assert empty
        while empty and time.monotonic() < deadline:
            time.sleep(0.5)
            empty = watching.without_data(empty)
        return empty


def has_it(user: str) -> bool:
    return GROUP.has(unit_of(User("", user), ""))


async def test_a_canary_keeps_its_users_over_a_restart_and_their_thumbs_promote_it(
    lend: Lend, tiny_model: Path, state: State, speaker: RealSpeaker, tmp_path: Path
):
    async with lend(delivery=TRIALS) as server:
        verdict = verdict_tokens(Verdict(), server.engine.tokenizer)
        publisher = Publisher(tiny_model, state.versions, server.database, verdict, speaker)
        await asyncio.to_thread(publisher.publish, 1)
        await until(lambda: server.application._routes.routed == (0, 1))
        for user in USERS[:6]:
            assert (await ask(server, user)).policy_version == int(has_it(user))
        assert await asyncio.to_thread(lines_without_data, server, tmp_path) == set()
    async with lend(delivery=TRIALS) as server:
        assert server.engine.most_held == 3  # the base model's, and two of the canary
        for user in USERS:
            reply = await ask(server, user)
            if server.application._routes.routed.current == 1:
                break
            assert reply.policy_version == int(has_it(user))
            folder = state.versions / "default/000001" if reply.policy_version else None
            check_numbers(server.stored(reply.response_id), folder, speaker, verdict)
            await server.client.rate(reply.response_id, up=has_it(user), user_id=user)
        await until(lambda: server.application._routes.routed == (1, None))
        shown = await server.client.version(1)
        assert shown.policy_version.state == admin_pb2.POLICY_VERSION_STATE_CURRENT
        assert shown.events[-1].reason.startswith("thumbs: 1.000 of ")
