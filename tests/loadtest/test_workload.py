import asyncio
import itertools
from random import Random

import grpc
import pytest

from loadtest.workload import Answer, Call, arrivals, closed_loop, mixture, open_loop
from thumbloop.errors import Overloaded


def refusal(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


def answer(tokens: int = 1) -> Answer:
    return Answer(reply_tokens=tokens, decoded_tokens=tokens)


async def test_a_closed_loop_keeps_so_many_calls_under_way_and_no_more():
    under_way, most = 0, 0

    async def ask(number: int) -> Answer:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        return answer()

    done = await closed_loop(ask, range(20), 4)
    assert most == 4
    assert len(done.answers) == 20


async def test_answers_come_in_the_order_of_their_questions():
    async def ask(number: int) -> Answer:
        await asyncio.sleep(0.002 * (3 - number))
        return answer(number)

    done = await closed_loop(ask, range(3), 3)
    assert [a.reply_tokens for a in done.answers] == [0, 1, 2]


async def test_a_refused_call_is_counted_and_the_others_go_on():
    async def ask(number: int) -> Answer:
        if number == 1:
            raise refusal(grpc.StatusCode.UNAVAILABLE)
        return answer()

    done = await closed_loop(ask, range(3), 1)
    assert (len(done.answers), done.failed) == (2, 1)


async def test_rates_count_all_candidates_tokens():
    async def ask(number: int) -> Answer:
        await asyncio.sleep(0.01)
        return Answer(reply_tokens=3, decoded_tokens=12)

    done = await closed_loop(ask, range(4), 4)
    assert done.tokens_per_s == pytest.approx(48 / done.seconds)
    assert done.requests_per_s == pytest.approx(4 / done.seconds)


async def test_a_slow_answer_delays_no_later_call_and_counts_from_when_it_was_due():
    async def ask(number: int) -> Answer:
        await asyncio.sleep(0.2 if number == 0 else 0)
        return answer()

    calls = await open_loop({"a": ask}, [0.0, 0.01, 0.02], ["a"] * 3)
    assert [c.due_s for c in calls] == [0.0, 0.01, 0.02]
    assert calls[0].done_s > max(calls[1].done_s, calls[2].done_s)
    assert calls[0].latency_s >= 0.2


def test_latency_holds_what_the_generator_was_late():
    call = Call("a", due_s=1.0, sent_s=1.5, done_s=1.6, status="OK", answer=None)
    assert call.latency_s == pytest.approx(0.6)


async def test_an_open_loop_notes_failures_and_goes_on():
    async def ask(number: int) -> Answer:
        if number == 0:
            raise Overloaded("full", retry_after_s=1.0)
        return answer()

    calls = await open_loop({"a": ask}, [0.0, 0.001], ["a", "a"])
    assert [c.status for c in calls] == ["RESOURCE_EXHAUSTED", "OK"]


def test_arrivals_are_a_poisson_process():
    moments = list(arrivals(50.0, 100.0, Random(0)))
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert len(moments) == pytest.approx(5000, rel=0.05)
    assert spread == pytest.approx(mean, rel=0.05)  # an exponential's deviation is its mean
    assert moments == sorted(moments)
    assert moments[-1] < 100.0


def test_a_mixture_has_its_shares():
    kinds = mixture({"a": 3.0, "b": 1.0}, Random(0))
    drawn = [next(kinds) for _ in range(4000)]
    assert drawn.count("a") / 4000 == pytest.approx(0.75, abs=0.03)
