"""OpenAI's own client at the HTTP port: what it asks, streams, names, and how it says what was refused."""

import hashlib
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from tests.over_http import Halting
from tests.serving import Running, running
from thumbloop.config import State
from thumbloop.errors import EngineUnavailable
from thumbloop.types import Message, Role, Status, Strategy

TOKEN = "the-token-of-a-backend"
ASK: ChatCompletionUserMessageParam = {"role": "user", "content": "How was it?"}


def talker(server: Running, token: str = "none") -> openai.AsyncOpenAI:
    url = f"http://127.0.0.1:{server.application.http_port}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key=token, max_retries=0)


@pytest.fixture
async def client(server: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with talker(server) as client:
        yield client


async def listen(stream: openai.AsyncStream[Any], heard: list[Any]) -> None:
    """Add what is heard to a list, so that it is kept where the stream breaks."""
    async for chunk in stream:
        heard.append(chunk)  # noqa: PERF401


# Answers


async def test_the_models_are_listed(client: openai.AsyncOpenAI):
    names = [model.id async for model in client.models.list()]
    assert names == ["default", *(f"default:{strategy}" for strategy in sorted(Strategy))]


async def test_a_text_is_continued(server: Running, client: openai.AsyncOpenAI):
    reply = await client.completions.create(model="default", prompt="The soup was", max_tokens=9)
    stored = server.stored(reply.id)
    assert (stored.prompt.text, stored.sampling.max_tokens) == ("The soup was", 9)
    assert reply.object == "text_completion"
    assert reply.choices[0].text == stored.chosen.text
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(stored.chosen.token_ids)


async def test_a_text_is_continued_as_a_stream(server: Running, client: openai.AsyncOpenAI):
    stream = await client.completions.create(
        model="default",
        prompt=["The soup was"],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = [chunk async for chunk in stream]
    stored = server.stored(last.id)
    assert "".join(chunk.choices[0].text for chunk in chunks) == stored.chosen.text
    assert chunks[-1].choices[0].finish_reason == stored.chosen.finish_reason.value
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(stored.chosen.token_ids)


async def test_a_conversation_goes_on_with_the_reply_as_the_client_holds_it(
    server: Running, client: openai.AsyncOpenAI
):
    reply = await client.chat.completions.create(model="default", messages=[ASK])
    said = reply.choices[0].message
    assert said.content == server.stored(reply.id).chosen.text
    turn: Any = said.model_dump()
    next_reply = await client.chat.completions.create(model="default", messages=[ASK, turn, ASK])
    asked = Message(Role.USER, "How was it?")
    heard = server.stored(next_reply.id).prompt.messages
    assert heard == (asked, Message(Role.ASSISTANT, said.content), asked)
    assert reply.model_extra is not None
    assert reply.model_extra["thumbloop"]["num_candidates"] == 4


async def test_a_conversation_is_streamed(server: Running, client: openai.AsyncOpenAI):
    stream = await client.chat.completions.create(
        model="default", messages=[ASK], stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    stored = server.stored(last.id)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == stored.chosen.text
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(stored.prompt_token_ids)


async def test_the_clients_own_helper_for_streams_understands_them(
    server: Running, client: openai.AsyncOpenAI
):
    async with client.chat.completions.stream(model="default", messages=[ASK]) as stream:
        reply = await stream.get_final_completion()
    assert reply.choices[0].message.content == server.stored(reply.id).chosen.text


async def test_the_models_name_or_the_extra_body_says_the_guidance(
    server: Running, client: openai.AsyncOpenAI
):
    suffix = await client.chat.completions.create(model="default:best_of_n", messages=[ASK])
    assert server.stored(suffix.id).strategy == Strategy.BEST_OF_N
    assert suffix.model == "default:best_of_n"
    extra = await client.completions.create(
        model="default",
        prompt="The soup was",
        extra_body={"guidance": {"strategy": "best_of_n", "num_candidates": 3}, "top_k": 5},
    )
    stored = server.stored(extra.id)
    assert (stored.strategy, len(stored.candidates)) == (Strategy.BEST_OF_N, 3)
    assert stored.sampling.top_k == 5


async def test_neutral_values_of_what_is_not_served_are_taken(
    server: Running, client: openai.AsyncOpenAI
):
    reply = await client.chat.completions.create(
        model="default",
        messages=[ASK],
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        logprobs=False,
        n=1,
        parallel_tool_calls=False,
        response_format={"type": "text"},
        seed=-1,
        stop=None,
        store=False,
        stream=False,
        tools=[],
        extra_body={"user": None},
    )
    assert server.stored(reply.id).status is Status.COMPLETED


# Refusals


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": 1.9, "top_p": 1.5}, "top_p"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"extra_body": {"guidance": {"num_candidates": 99}}}, "guidance.num_candidates"),
    ],
)
async def test_a_wrong_field_is_named(
    server: Running, client: openai.AsyncOpenAI, wrong: dict[str, Any], param: str
):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            await client.chat.completions.create(
                model="default", messages=[ASK], stream=stream, **wrong
            )
        error = raised.value
        assert (error.param, error.code) == (param, "invalid_argument")
        assert param in error.message
    assert server.engine.started == 0


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI):
    with pytest.raises(openai.NotFoundError, match="served: default"):
        await client.chat.completions.create(model="gpt-4o", messages=[ASK])


async def test_who_has_no_token_or_not_the_scope_is_told_so(tiny_model: Path, state: State):
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    tokens = {"backend": {"sha256": digest, "scopes": ["generate"]}}
    async with running(tiny_model, state, access={"tokens": tokens}) as server:
        async with talker(server, "another") as stranger:
            with pytest.raises(openai.AuthenticationError) as raised:
                await stranger.chat.completions.create(model="default", messages=[ASK])
            assert raised.value.code == "unauthenticated"
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        async with talker(server, TOKEN) as backend:
            assert (await backend.completions.create(model="default", prompt="A")).choices
            with pytest.raises(openai.PermissionDeniedError):
                await backend.completions.create(model="default", prompt="A", user="ann")


async def test_who_comes_too_often_is_told_when_to_come_back(tiny_model: Path, state: State):
    async with (
        running(tiny_model, state, quotas={"per_user": "4/hour"}) as server,
        talker(server) as client,
    ):
        await client.completions.create(model="default", prompt="A")
        with pytest.raises(openai.RateLimitError) as raised:
            await client.completions.create(model="default", prompt="A")
    headers = raised.value.response.headers
    assert headers["retry-after"] == str(math.ceil(float(headers["retry-after-ms"]) / 1000))
    assert raised.value.code == "resource_exhausted"


async def test_what_fails_in_the_middle_of_a_stream_is_an_error(tiny_model: Path, state: State):
    async with (
        running(tiny_model, state, make_engine=lambda model, _config: Halting(model)) as server,
        talker(server) as client,
    ):
        server.engine.failure = EngineUnavailable("the engine stopped")
        server.engine.may_go_on.set()
        for create, asked in (
            (client.chat.completions.create, {"messages": [ASK]}),
            (client.completions.create, {"prompt": "The soup was"}),
        ):
            stream = await create(model="default:none", stream=True, **asked)
            heard: list[Any] = []
            with pytest.raises(openai.APIError, match="the engine stopped") as raised:
                await listen(stream, heard)
            assert heard
            assert raised.value.code == "unavailable"
