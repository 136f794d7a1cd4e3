"""What a stream's reader hears: in order, once, in time, and no more than it may leave unread."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.speech import Speech
from thumbloop.errors import EngineUnavailable, ReaderTooSlow


class Reader:
    """Writes down what it is given; with `is_stuck` it never takes a second piece."""

    def __init__(self, *, is_stuck: bool = False) -> None:
        self.pieces: list[str] = []
        self.was_cancelled = False
        self._is_stuck = is_stuck

    async def __call__(self, piece: str) -> None:
        self.pieces.append(piece)
        if self._is_stuck:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture
async def complaints() -> AsyncIterator[list[dict[str, Any]]]:
    """Collects what the event loop has to say of callbacks that failed; there may be nothing."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: found.append(context))
    yield found
    assert found == []


def making() -> "asyncio.Future[str]":
    return asyncio.get_running_loop().create_future()


async def steps(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_pieces_come_as_they_are_said_and_the_reply_at_the_end(complaints):
    speech, made, reader = Speech(100), making(), Reader()
    delivering = asyncio.create_task(speech.deliver(made, reader))
    for text in ("On", "Once", "Once upon"):
        speech.say(text)
        await steps()
    assert reader.pieces == ["On", "ce", " upon"]
    assert not delivering.done()
    made.set_result("a reply")
    assert await delivering == "a reply"


async def test_what_was_said_before_anybody_listened_is_heard_too():
    speech, made, reader = Speech(100), making(), Reader()
    speech.say("Once")
    speech.say("Once upon")
    made.set_result("a reply")
    assert await speech.deliver(made, reader) == "a reply"
    assert reader.text == "Once upon"


async def test_what_does_not_continue_what_was_said_is_not_heard():
    speech, made, reader = Speech(100), making(), Reader()
    for text in ("Once", "On", "Twice upon", "Once", "Once upon"):
        speech.say(text)
    made.set_result("a reply")
    await speech.deliver(made, reader)
    assert reader.text == "Once upon"


async def test_an_error_comes_at_once_even_where_a_write_is_stuck(complaints):
    speech, made, reader = Speech(100), making(), Reader(is_stuck=True)
    delivering = asyncio.create_task(speech.deliver(made, reader))
    speech.say("Once")
    await steps()
    made.set_exception(EngineUnavailable("dead"))
    with pytest.raises(EngineUnavailable, match="dead"):
        await asyncio.wait_for(delivering, 1)
    assert reader.was_cancelled


async def test_a_write_that_fails_ends_the_delivery(complaints):
    async def fail(_piece: str) -> None:
        raise ConnectionResetError

    speech, made = Speech(100), making()
    speech.say("Once")
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(speech.deliver(made, fail), 1)


async def test_a_delivery_that_is_cancelled_ends_its_write():
    speech, made, reader = Speech(100), making(), Reader(is_stuck=True)
    delivering = asyncio.create_task(speech.deliver(made, reader))
    speech.say("Once")
    await steps()
    delivering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivering
    assert reader.was_cancelled


@pytest.mark.parametrize("steps_between", range(6))
@pytest.mark.parametrize("is_error", [True, False])
async def test_the_end_may_come_at_any_moment_of_the_last_write(
    complaints: list[dict[str, Any]], steps_between: int, is_error: bool
):
    speech, made, reader = Speech(100), making(), Reader()
    delivering = asyncio.create_task(speech.deliver(made, reader))
    await steps()
    speech.say("Once")
    await steps(steps_between)
    if is_error:
        made.set_exception(EngineUnavailable("dead"))
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(delivering, 1)
    else:
        made.set_result("a reply")
        assert await asyncio.wait_for(delivering, 1) == "a reply"
        assert reader.text == "Once"
    await steps()


async def test_who_leaves_too_much_unread_is_too_slow():
    speech, made, reader = Speech(10), making(), Reader(is_stuck=True)
    delivering = asyncio.create_task(speech.deliver(made, reader))
    speech.say("a")
    await steps()  # and never reads again
    speech.say("a" + "b" * 11)
    with pytest.raises(ReaderTooSlow, match="more than 10 characters") as raised:
        speech.say("a" + "b" * 12)
    assert raised.value.retry_after_s == 1
    made.set_exception(raised.value)
    with pytest.raises(ReaderTooSlow):
        await delivering
    assert reader.pieces == ["a"]


async def test_who_keeps_up_may_be_told_any_length_at_once_and_gets_it_in_pieces():
    speech, made, reader = Speech(10), making(), Reader()
    text = "".join(chr(97 + i % 26) for i in range(100_000))
    speech.say(text)
    made.set_result("a reply")
    await speech.deliver(made, reader)
    assert reader.text == text
    assert max(map(len, reader.pieces)) < 10_000


async def test_the_first_text_is_waited_for_and_timed():
    speech, made = Speech(100), making()
    waiting = asyncio.create_task(speech.first(made))
    speech.begin("a name")
    await steps()
    assert (waiting.done(), speech.response_id, speech.first_text_s) == (False, "a name", 0.0)
    await asyncio.sleep(0.02)
    speech.say("Once")
    await waiting
    first_s = speech.first_text_s
    assert 0.02 <= first_s < 5
    await asyncio.sleep(0.01)
    speech.say("Once upon")
    assert speech.first_text_s == first_s


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (lambda made: made.set_result("a reply"), None),
        (lambda made: made.set_exception(EngineUnavailable("dead")), EngineUnavailable),
        (lambda made: made.cancel(), asyncio.CancelledError),
    ],
    ids=["an empty reply", "an error", "cancelled"],
)
async def test_waiting_for_the_first_text_ends_with_the_reply(
    end: Callable[["asyncio.Future[str]"], object], error: type[BaseException] | None
):
    speech, made = Speech(100), making()
    waiting = asyncio.create_task(speech.first(made))
    await steps()
    end(made)
    if error is None:
        await asyncio.wait_for(waiting, 1)
    else:
        with pytest.raises(error):
            await asyncio.wait_for(waiting, 1)


@given(st.lists(st.tuples(st.text(max_size=5), st.integers(0, 3)), max_size=20))
def test_whenever_it_is_said_all_of_it_is_heard_once(said: list[tuple[str, int]]):
    async def play() -> None:
        speech, made, reader, text = Speech(1000), making(), Reader(), ""
        delivering = asyncio.create_task(speech.deliver(made, reader))
        for piece, pause in said:
            text += piece
            speech.say(text)
            await steps(pause)
        made.set_result("a reply")
        assert await asyncio.wait_for(delivering, 1) == "a reply"
        assert reader.text == text
        assert "" not in reader.pieces

    asyncio.run(play())
