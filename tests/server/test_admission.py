"""The queue that every call for a reply waits in, the quotas before it, and both through a server."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from random import Random

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from server.admission import Admission, Cost, Quota
from tests.neighbours import MODEST, UnhurriedEngine, calls, least_of, success, typical_s
from tests.refusals import detail_of, fields, refused
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.config.server import Limits, Quotas
from thumbloop.errors import InvalidRequest, Overloaded
from thumbloop.types import User
from thumbloop.v1 import feedback_pb2, policy_pb2

ONE = Cost(1, 10)


def admission(
    candidates: int = 4, tokens: int = 1000, queued: int = 100, retry_after_s: float = 2.5
) -> Admission:
    return Admission(
        Limits(
            max_candidates_in_flight=candidates,
            max_tokens_in_flight=tokens,
            max_queued_candidates=queued,
            retry_after_s=retry_after_s,
        )
    )


class Call:
    """One call: enters when it may, and stays until it is let go."""

    def __init__(self, queue: Admission, cost: Cost = ONE, *, is_background: bool = False) -> None:
        self.is_inside = False
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(queue, cost, is_background))

    async def _run(self, queue: Admission, cost: Cost, is_background: bool) -> None:
        async with queue.enter(cost, is_background=is_background):
            self.is_inside = True
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task


async def settle() -> None:
    """Let everybody who can move on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def counts(queue: Admission) -> tuple[int, int, int]:
    return queue.candidates, queue.tokens, queue.queued


EMPTY = (0, 0, 0)


async def test_calls_are_let_in_until_candidates_or_tokens_are_used_up():
    queue = admission(candidates=4, tokens=100)
    calls = [Call(queue, Cost(1, 40)) for _ in range(3)]
    await settle()
    assert [c.is_inside for c in calls] == [True, True, False]
    assert counts(queue) == (2, 80, 1)
    await calls[0].leave()
    await settle()
    assert calls[2].is_inside
    for call in calls[1:]:
        await call.leave()
    assert counts(queue) == EMPTY


async def test_who_waits_is_let_in_in_the_order_of_coming():
    queue, order = admission(candidates=1), []

    async def call(number: int) -> None:
        async with queue.enter(ONE):
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(call(i) for i in range(20)))
    assert order == list(range(20))
    assert counts(queue) == EMPTY


async def test_a_big_call_is_not_overtaken_by_small_ones_that_would_fit():
    queue = admission(candidates=4)
    inside = Call(queue, Cost(2, 10))
    await settle()
    big, small = Call(queue, Cost(4, 10)), Call(queue)
    await settle()
    assert (big.is_inside, small.is_inside) == (False, False)
    await inside.leave()
    await settle()
    assert (big.is_inside, small.is_inside) == (True, False)
    await big.leave()
    await small.leave()
    assert counts(queue) == EMPTY


async def test_calls_that_nobody_waits_for_come_after_all_others():
    queue = admission(candidates=1)
    inside = Call(queue)
    await settle()
    background = Call(queue, is_background=True)
    await settle()
    late = Call(queue)
    await settle()
    await inside.leave()
    await settle()
    assert (background.is_inside, late.is_inside) == (False, True)
    await late.leave()
    await background.leave()
    assert counts(queue) == EMPTY


async def test_a_call_with_room_does_not_wait_for_a_big_one_that_nobody_waits_for():
    queue = admission(candidates=4)
    inside = Call(queue, Cost(2, 10))
    await settle()
    background = Call(queue, Cost(4, 10), is_background=True)
    await settle()
    other = Call(queue, Cost(1, 10), is_background=True)
    small = Call(queue, Cost(2, 10))
    await settle()
    assert (background.is_inside, other.is_inside, small.is_inside) == (False, False, True)
    for call in (inside, small, background, other):
        await call.leave()
    assert counts(queue) == EMPTY


async def test_a_waiter_that_gives_up_leaves_the_queue_to_those_behind_it():
    queue = admission(candidates=4)
    inside = Call(queue, Cost(2, 10))
    await settle()
    big, small = Call(queue, Cost(4, 10)), Call(queue)
    await settle()
    big.task.cancel()
    await settle()
    assert big.task.cancelled()
    assert small.is_inside
    assert counts(queue) == (3, 20, 0)
    await inside.leave()
    await small.leave()
    assert counts(queue) == EMPTY


@pytest.mark.parametrize("moment", ["before", "together", "after"])
async def test_a_waiter_that_gives_up_as_its_turn_comes_takes_nothing_with_it(moment: str):
    queue = admission(candidates=1)
    inside = Call(queue)
    await settle()
    leaving, next_one = Call(queue), Call(queue)
    await settle()
    if moment == "before":
        leaving.task.cancel()
    inside._leave.set()
    if moment == "after":
        await asyncio.sleep(0)  # its turn has come, and it has not run yet
    if moment != "before":
        leaving.task.cancel()  # together: both run in the loop's next iteration
    await settle()
    assert inside.task.done()
    assert inside.task.exception() is None
    assert leaving.task.cancelled()
    assert not leaving.is_inside
    assert next_one.is_inside
    await next_one.leave()
    assert counts(queue) == EMPTY


async def test_a_call_that_fails_or_is_cancelled_inside_gives_all_back():
    queue = admission()

    async def fail() -> None:
        async with queue.enter(Cost(3, 30)):
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        await fail()
    call = Call(queue, Cost(3, 30))
    await settle()
    call.task.cancel()
    await settle()
    assert counts(queue) == EMPTY


async def test_beyond_the_queues_bound_calls_are_told_when_to_come_again():
    queue = admission(candidates=2, queued=3)
    inside = Call(queue, Cost(2, 10))
    await settle()
    waiting = Call(queue, Cost(2, 10))
    await settle()
    with pytest.raises(Overloaded, match="2 candidates are in flight and 2 wait") as raised:
        async with queue.enter(Cost(2, 10)):
            pytest.fail("let in")
    assert raised.value.retry_after_s == 2.5
    with pytest.raises(Overloaded):
        queue.check(Cost(2, 0))
    queue.check(ONE)  # there is room for one
    for call in (inside, waiting):
        await call.leave()
    queue.check(Cost(2, 0))
    assert counts(queue) == EMPTY


async def test_without_a_queue_calls_are_let_in_at_once_or_refused():
    queue = admission(candidates=2, queued=0)
    call = Call(queue, Cost(2, 10))
    await settle()
    assert call.is_inside
    with pytest.raises(Overloaded):
        queue.check(ONE)
    await call.leave()


async def test_a_call_of_more_tokens_than_may_ever_be_in_flight_is_refused_for_good():
    queue = admission(tokens=100)
    with pytest.raises(InvalidRequest, match=r"prompt: .* 101 tokens, more than the 100"):
        async with queue.enter(Cost(1, 101)):
            pytest.fail("let in")
    assert counts(queue) == EMPTY


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("come"), st.integers(1, 4), st.integers(0, 60), st.booleans(), st.just(0)
        ),
        st.tuples(st.just("go"), st.just(0), st.just(0), st.just(False), st.integers(0, 30)),
        st.tuples(st.just("give up"), st.just(0), st.just(0), st.just(False), st.integers(0, 30)),
        st.tuples(st.just("run"), st.just(0), st.just(0), st.just(False), st.just(0)),
    ),
    min_size=20,
    max_size=60,
)


@given(ACTIONS)
@settings(max_examples=300, deadline=None)
def test_whoever_comes_goes_or_gives_up_counts_stay_within_limits_and_end_at_0(actions):
    async def play() -> None:
        queue, calls = admission(candidates=4, tokens=100, queued=6), []
        for kind, candidates, tokens, is_background, which in actions:
            if kind == "come":
                calls.append(Call(queue, Cost(candidates, tokens), is_background=is_background))
            elif kind == "run":
                await asyncio.sleep(0)
            elif calls:
                call = calls[which % len(calls)]
                call._leave.set() if kind == "go" else call.task.cancel()
            assert 0 <= queue.candidates <= 4
            assert 0 <= queue.tokens <= 100
            assert 0 <= queue.queued <= 6
        await settle()
        assert queue.queued == 0 or queue.candidates > 0  # nobody waits for nothing
        for call in calls:
            call._leave.set()
        async with asyncio.timeout(5):
            ends = await asyncio.gather(*(c.task for c in calls), return_exceptions=True)
        assert all(isinstance(e, Overloaded | asyncio.CancelledError | None) for e in ends), ends
        assert counts(queue) == EMPTY

    asyncio.run(play())


ANN, BOB = User("web", "ann"), User("web", "bob")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that quotas go by: the beginning of a minute, until a test moves it."""
    now = [1_700_000_040.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_a_users_quota_counts_candidates_and_comes_back_with_time(clock: list[float]):
    quota = Quota(Quotas(per_user="10/minute"))
    quota.use(ANN, 8)
    with pytest.raises(
        Overloaded, match="user has used its quota of 10 candidates in 60 s"
    ) as full:
        quota.use(ANN, 3)
    assert 0 < full.value.retry_after_s <= 60
    quota.use(ANN, 2)
    quota.use(BOB, 10)
    clock[0] += 121
    quota.use(ANN, 10)


def test_who_comes_back_when_told_to_is_let_in(clock: list[float]):
    quota = Quota(Quotas(per_user="10/minute"))
    quota.use(ANN, 10)
    waited = 0.0
    for _ in range(60):
        try:
            quota.use(ANN, 1)
        except Overloaded as full:
            waited += full.retry_after_s
            clock[0] += full.retry_after_s
        else:
            break
    assert 6 <= waited <= 70  # a tenth of the window at the least, and not much more than all of it


def test_a_tokens_quota_is_shared_by_its_users_and_not_by_other_tokens(clock: list[float]):
    quota = Quota(Quotas(per_token="10/minute"))
    quota.use(ANN, 6)
    with pytest.raises(Overloaded, match="token has used"):
        quota.use(BOB, 6)
    quota.use(User("app", "ann"), 10)


def test_who_is_refused_uses_up_nothing_of_the_others(clock: list[float]):
    quota = Quota(Quotas(per_user="4/minute", per_token="12/minute"))
    quota.use(ANN, 4)
    for _ in range(20):
        with pytest.raises(Overloaded, match="user"):
            quota.use(ANN, 4)
    quota.use(BOB, 4)
    quota.use(User("web", "eve"), 4)
    with pytest.raises(Overloaded, match="token"):
        quota.use(User("web", "dan"), 4)


def test_users_are_told_apart_whatever_their_names(clock: list[float]):
    quota = Quota(Quotas(per_user="1/minute"))
    for user in (User("a", "b/c"), User("a/b", "c"), User("", "a/b/c"), User("a'", ", 'b")):
        quota.use(user, 1)


def test_a_call_above_the_whole_quota_is_not_told_to_come_again():
    quota = Quota(Quotas(per_user="4/minute"))
    with pytest.raises(InvalidRequest, match=r"guidance\.num_candidates: is above"):
        quota.use(ANN, 5)


def test_without_quotas_everybody_may_ask_for_everything():
    quota = Quota(Quotas())
    for _ in range(100):
        quota.use(ANN, 1000)


@pytest.mark.parametrize("text", ["600", "0/minute", "-1/hour", "5/fortnight", "5 per minute", "x"])
def test_a_quota_that_cannot_be_read_is_refused_with_an_example(text: str):
    with pytest.raises(ValidationError, match="has to be like 600/minute"):
        Quotas(per_user=text)
    with pytest.raises(ValidationError, match="has to be like 600/minute"):
        Quotas(per_token=text)


GREETING = policy_pb2.GenerateRequest(text="hello")


async def health_of(server: Running) -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest())).status


async def test_a_full_server_says_no_at_once_while_thumbs_and_health_are_answered(
    tiny_model: Path, state: State
):
    limits = {
        "max_candidates": 4,
        "max_candidates_in_flight": 8,
        "max_queued_candidates": 4,
        "retry_after_s": 1.75,
    }
    async with running(tiny_model, state, limits=limits) as server:
        rated = await server.generate("hello")
        server.engine.may_sample.clear()
        inside = [asyncio.create_task(server.generate("hello")) for _ in range(3)]
        await server.sampling(8)
        await until(lambda: server.application._admission.queued == 4)
        took = []
        for method in (server.policy.Generate, server.policy.StreamGenerate):
            for _ in range(20):
                started = time.perf_counter()
                if method is server.policy.Generate:
                    error = await refused(method(GREETING))
                else:
                    stream = method(policy_pb2.StreamGenerateRequest(request=GREETING))
                    error = await refused(stream.read())
                took.append(time.perf_counter() - started)
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                delay = detail_of(error, error_details_pb2.RetryInfo).retry_delay
                assert delay.ToMilliseconds() == 1750
        assert sorted(took)[len(took) // 2] < 0.05
        assert await health_of(server) == health_pb2.HealthCheckResponse.SERVING
        thumb = feedback_pb2.SubmitFeedbackRequest(
            response_id=rated.response_id, thumb=feedback_pb2.THUMB_UP
        )
        assert (await server.feedback.SubmitFeedback(thumb, timeout=2)).feedback_id == 1
        assert (await server.client.versions()).current_version == 0
        server.engine.may_sample.set()
        replies = await asyncio.gather(*inside)
        assert all(reply.text for reply in replies)
        assert counts(server.application._admission) == EMPTY


async def test_a_call_that_is_refused_costs_no_quota(tiny_model: Path, state: State):
    limits = {"max_candidates": 4, "max_candidates_in_flight": 4, "max_queued_candidates": 0}
    limits |= {"max_prompt_tokens": 40}
    quotas = {"per_user": "8/minute"}
    async with running(tiny_model, state, limits=limits, quotas=quotas) as server:
        server.engine.may_sample.clear()
        inside = asyncio.create_task(server.generate("hello"))
        await server.sampling(4)
        for _ in range(5):
            assert "are in flight" in (await refused(server.generate("hello"))).details()
        server.engine.may_sample.set()
        await inside
        for _ in range(5):
            assert fields(await refused(server.generate("hello " * 100))) == ["prompt"]
        assert (await server.generate("hello")).text
        assert "quota" in (await refused(server.generate("hello"))).details()


async def test_a_prompt_too_long_for_the_tokens_in_flight_is_named(tiny_model: Path, state: State):
    async with running(tiny_model, state, limits={"max_tokens_in_flight": 65}) as server:
        assert fields(await refused(server.generate("hello there"))) == ["prompt"]
        assert (await server.generate("a", guidance={"num_candidates": 3})).text


async def test_one_user_at_ten_times_the_quota_leaves_the_others_alone(
    tiny_model: Path, state: State
):
    def unhurried(model: Path, _config: object) -> UnhurriedEngine:
        return UnhurriedEngine(model)

    async def cost() -> float:
        quotas = {"per_user": "40/minute"}  # ten calls of four candidates
        async with running(tiny_model, state, make_engine=unhurried, quotas=quotas) as server:
            alone = await calls(server, MODEST, per_s=20, duration_s=2)
            greedy, beside = await asyncio.gather(
                calls(server, ["greedy"], per_s=50, duration_s=2),
                calls(server, MODEST, per_s=20, duration_s=2),
            )
            error = await refused(server.generate("hi", user_id="greedy"))
        assert Counter(call.status for call in greedy) == {"OK": 10, "RESOURCE_EXHAUSTED": 90}
        wait_ms = detail_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds()
        assert 0 < wait_ms <= 60_000
        assert success(alone) == success(beside) == 1
        return typical_s(beside) / typical_s(alone)

    assert await least_of(cost, enough=1.5) <= 1.5


async def test_calls_of_all_sizes_come_and_go_and_nothing_is_left(tiny_model: Path, state: State):
    limits = {"max_candidates_in_flight": 16, "max_queued_candidates": 40}
    rng = Random(1)
    async with running(tiny_model, state, limits=limits) as server:
        queue = server.application._admission
        most = 0

        async def call() -> str:
            nonlocal most
            size = {"num_candidates": rng.randrange(1, 17)}
            priority = rng.choice([policy_pb2.PRIORITY_INTERACTIVE, policy_pb2.PRIORITY_BACKGROUND])
            running_call = server.policy.Generate(
                policy_pb2.GenerateRequest(text="hello", guidance=size, priority=priority),
                timeout=rng.choice([None, None, rng.random() / 5]),
            )
            try:
                reply = await running_call
            except grpc.aio.AioRpcError as error:
                return error.code().name
            most = max(most, queue.candidates)
            assert reply.num_candidates <= 16
            return "OK"

        async def watch() -> None:
            while True:
                assert 0 <= queue.candidates <= 16
                assert 0 <= queue.queued <= 40
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        ends = await asyncio.gather(*(call() for _ in range(200)))
        assert not watching.done()
        watching.cancel()
        assert set(ends) == {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        await until(lambda: counts(queue) == EMPTY, 2)
