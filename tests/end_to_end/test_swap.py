"""The server on real vLLM: versions are published under load, and every reply is its version's."""

import asyncio
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.own_numbers import check_numbers
from tests.publishing import Publisher, RealSpeaker
from tests.serving import Running
from thumbloop.artifacts import WEIGHTS, folder_of
from thumbloop.client import GenerateOptions
from thumbloop.config import State
from thumbloop.errors import ThumbloopError
from thumbloop.rendering import VerdictTokens
from thumbloop.store import interactions, reading
from thumbloop.types import DEFAULT_POLICY, Interaction
from thumbloop.v1 import admin_pb2, policy_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")

USERS = 6
MOST_TOKENS = 200


class Crowd:
    """Users who ask and rate without pause, some of them pinned to version 0."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self._stopping = asyncio.Event()
        self.failures: list[ThumbloopError] = []
        self.replies: list[policy_pb2.GenerateResponse] = []
        self._tasks = [asyncio.create_task(self._use(i)) for i in range(USERS)]

    async def _use(self, number: int) -> None:
        options = GenerateOptions(
            max_tokens=8, num_candidates=2, policy_version=0 if number == 0 else None
        )
        while not self._stopping.is_set():
            question = f"{'what did you think of the film ' * (number % 3)}{len(self.replies)}?"
            try:
                reply = await self._server.client.generate(
                    question, user_id=str(number), options=options, timeout_s=30
                )
                await self._server.client.rate(reply.response_id, up=True, user_id=str(number))
            except ThumbloopError as error:
                self.failures.append(error)
            else:
                self.replies.append(reply)

    async def goes_on(self, replies: int = 12) -> None:
        """Wait until there are so many replies more."""
        enough = len(self.replies) + replies
        async with asyncio.timeout(60):
            while len(self.replies) < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def leaves(self) -> None:
        self._stopping.set()
        await asyncio.gather(*self._tasks)


async def state_of(server: Running, version: int) -> admin_pb2.PolicyVersion:
    """Return a version once the server has made up its mind about it."""
    undecided = (
        admin_pb2.POLICY_VERSION_STATE_PUBLISHED,
        admin_pb2.POLICY_VERSION_STATE_ATTESTED,
    )
    request = admin_pb2.GetPolicyVersionRequest(policy_version=version)
    async with asyncio.timeout(60):
        while True:
            shown = (await server.admin.GetPolicyVersion(request)).policy_version
            if shown.state not in undecided:
                return shown
            await asyncio.sleep(0.01)


def _poison(folder: Path) -> None:
    values = load_file(folder / "policy" / WEIGHTS)
    next(iter(values.values())).fill_(float("nan"))
    save_file(values, folder / "policy" / WEIGHTS)


def _do_nothing(folder: Path) -> None:
    """Make the policy adapter one that changes nothing, under probes of one that does."""
    values = load_file(folder / "policy" / WEIGHTS)
    save_file(
        {n: t * 0 if n.endswith("lora_B.weight") else t for n, t in values.items()},
        folder / "policy" / WEIGHTS,
    )


async def test_versions_come_and_go_under_load_and_every_reply_is_its_versions_own(
    server: Running,
    publisher: Publisher,
    speaker: RealSpeaker,
    state: State,
    verdict: VerdictTokens,
):
    crowd = Crowd(server)
    await crowd.goes_on()
    states = {}
    for version, parent, options in (
        (1, 0, {}),
        (2, 1, {"spoil": _poison}),
        (3, 1, {"spoil": _do_nothing}),
        (4, 1, {}),
    ):
        await asyncio.to_thread(publisher.publish, version, parent, **options)
        states[version] = await state_of(server, version)
        await crowd.goes_on()
    await crowd.leaves()

    assert crowd.failures == []
    names = {
        v: admin_pb2.PolicyVersionState.Name(s.state).removeprefix("POLICY_VERSION_STATE_")
        for v, s in states.items()
    }
    assert names == {1: "CURRENT", 2: "REJECTED", 3: "REJECTED", 4: "CURRENT"}
    assert states[2].reason.startswith("not_finite")
    assert states[3].reason.startswith("attestation")
    assert {r.policy_version for r in crowd.replies} == {0, 1, 4}
    assert server.engine.most_held <= 10

    assert server.database is not None
    with reading(server.database) as connection:
        rows = interactions.list_since(connection, DEFAULT_POLICY, 0)
    assert {r.response_id for r in crowd.replies} == {row.response_id for row in rows}
    for row in _some_of_each_version(rows, 12):
        folder = state.versions / folder_of(DEFAULT_POLICY, row.policy_version)
        check_numbers(row, None if row.policy_version == 0 else folder, speaker, verdict)


async def test_a_rollback_under_load_reaches_new_requests_at_once_and_fails_none(
    server: Running,
    publisher: Publisher,
    speaker: RealSpeaker,
    state: State,
    verdict: VerdictTokens,
):
    for version in (1, 2):
        await asyncio.to_thread(publisher.publish, version, version - 1)
        await state_of(server, version)
    crowd = Crowd(server)
    await crowd.goes_on()
    shown = await server.client.roll_back(expected_current=2)
    first = await server.client.generate("hello", options=GenerateOptions(max_tokens=1))
    later = len(crowd.replies)
    await crowd.goes_on()
    await crowd.leaves()
    assert (shown.policy_version, first.policy_version) == (1, 1)
    assert crowd.failures == []
    # Those in flight were finished by the version that had begun them.
    assert {r.policy_version for r in crowd.replies[:later]} >= {0, 2}
    assert {r.policy_version for r in crowd.replies[later + USERS :]} == {0, 1}
    assert server.database is not None
    with reading(server.database) as connection:
        rows = interactions.list_since(connection, DEFAULT_POLICY, 0)
    for row in _some_of_each_version(rows, 6):
        folder = state.versions / folder_of(DEFAULT_POLICY, row.policy_version)
        check_numbers(row, None if row.policy_version == 0 else folder, speaker, verdict)


def _some_of_each_version(rows: list[Interaction], most: int) -> list[Interaction]:
    """Return the first and last replies of each version: those nearest to the swaps."""
    found = []
    for version in {row.policy_version for row in rows}:
        of_it = [row for row in rows if row.policy_version == version]
        found += of_it[: most // 2] + of_it[-(most // 2) :]
    return found


async def test_a_version_whose_policy_did_not_change_is_attested_by_its_rewards(
    server: Running,
    publisher: Publisher,
    speaker: RealSpeaker,
    state: State,
    verdict: VerdictTokens,
):
    for version, parent, is_unchanged in ((1, 0, True), (2, 1, False), (3, 2, True)):
        await asyncio.to_thread(
            publisher.publish, version, parent, is_policy_unchanged=is_unchanged
        )
        shown = await state_of(server, version)
        assert shown.state == admin_pb2.POLICY_VERSION_STATE_CURRENT, shown.reason
        row = server.stored((await server.generate("hello")).response_id)
        assert row.policy_version == version
        folder = state.versions / folder_of(DEFAULT_POLICY, version)
        check_numbers(row, folder, speaker, verdict)


async def test_a_call_that_is_given_up_is_aborted_in_the_engine(server: Running):
    request = policy_pb2.GenerateRequest(
        text="hello",
        sampling=policy_pb2.SamplingParams(max_tokens=MOST_TOKENS),
        guidance=policy_pb2.GuidanceParams(num_candidates=16),  # one may end of itself, not all
    )
    call = server.policy.Generate(request)  # no deadline: the nearer it is, the less is sampled
    unfinished = server.engine._llm.output_processor.request_states
    async with asyncio.timeout(10):
        while not unfinished:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    candidates = [*unfinished.values()]
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(10):
        while unfinished:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert all(len(c.logprobs_processor.logprobs) < MOST_TOKENS for c in candidates)
    assert (await server.generate("hello")).response_id


async def test_the_real_speaker_agrees_with_itself(speaker: RealSpeaker):
    """The yardstick: token by token gives what all at once gives."""
    prompt = (40, 41, 42)
    tokens = speaker.continue_greedily(None, prompt)
    one_by_one = [
        speaker.next_logprobs(None, [*prompt, *tokens[:i]], (token,))[0]
        for i, token in enumerate(tokens)
    ]
    assert speaker.logprobs(None, prompt, tokens) == pytest.approx(one_by_one, abs=1e-5)
