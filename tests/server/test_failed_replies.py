"""What the store keeps of requests that came to nothing: a version is judged by them, too."""

import math
from dataclasses import replace
from typing import Any

import grpc
import pytest
from sqlalchemy import select

from tests.serving import Running, until
from thumbloop.errors import Overloaded
from thumbloop.store import reading
from thumbloop.store.schema import interactions


def rows(server: Running) -> list[Any]:
    assert server.database is not None
    with reading(server.database) as connection:
        return list(connection.execute(select(interactions)).mappings())


async def test_a_reply_says_how_long_it_took(server: Running):
    await server.generate("A film")
    (row,) = rows(server)
    assert 0 < row["duration_s"] < 30


async def test_a_request_that_failed_leaves_a_row_that_nothing_learns_from(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_arguments: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(server.engine, "speak", fail)
    with pytest.raises(grpc.aio.AioRpcError, match="internal error"):
        await server.generate("A film", request_id="r1")
    await until(lambda: rows(server))
    (row,) = rows(server)
    assert (row["status"], row["untrainable_reason"], row["trainable"]) == ("failed", "failed", 0)
    monkeypatch.undo()
    again = await server.generate("A film", request_id="r1")  # a retry is answered
    assert again.text


@pytest.mark.parametrize("number", [math.nan, -math.inf])
async def test_a_reply_whose_numbers_are_none_is_refused_and_counted(
    server: Running, monkeypatch: pytest.MonkeyPatch, number: float
):
    speak = server.engine.speak

    def corrupt(*arguments: Any) -> Any:
        said = speak(*arguments)
        return replace(said, logprobs=(number, *said.logprobs[1:]))

    monkeypatch.setattr(server.engine, "speak", corrupt)
    with pytest.raises(grpc.aio.AioRpcError, match="version 0 gave log-probabilities") as refused:
        await server.generate("A film")
    assert refused.value.code() is grpc.StatusCode.INTERNAL
    await until(lambda: rows(server))
    assert rows(server)[0]["untrainable_reason"] == "corrupted"


async def test_what_is_not_the_version_s_fault_leaves_no_row(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    def full(*_arguments: Any) -> Any:
        raise Overloaded("the engine's queue is full", retry_after_s=0.1)

    monkeypatch.setattr(server.engine, "speak", full)
    with pytest.raises(grpc.aio.AioRpcError, match="queue is full"):
        await server.generate("A film")
    assert rows(server) == []
