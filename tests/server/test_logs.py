"""What the server writes about calls: who can be found by their ids, and nothing of what was said."""

import io
import json
import logging
import logging.config
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from tests.fakes import FakeEngine
from tests.over_http import Halting, web
from tests.refusals import refused
from tests.serving import Running, running, until
from thumbloop import logs
from thumbloop.config import State
from thumbloop.config.shared import Logging
from thumbloop.v1 import feedback_pb2, policy_pb2

CANARY = "zebra-umbrella"
ROOT = Path(__file__).parents[2]


class Log(io.StringIO):
    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]

    def ended(self, **facts: object) -> list[dict[str, Any]]:
        """Return the lines of calls that ended, of those that say so."""
        of_calls = [line for line in self.lines if line["logger"] == "server.calls"]
        return [line for line in of_calls if facts.items() <= line.items()]


@pytest.fixture
def listen() -> Iterator[Callable[[str], Log]]:
    """Write the log, in a form, into memory."""
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in logs.OURS]
    handlers, level, levels = root.handlers[:], root.level, [log.level for log in ours]

    def listen(form: str) -> Log:
        logs.configure(Logging(format=form, level="debug"))
        (handler,) = root.handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(log := Log())
        return log

    yield listen
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    for log, before in zip(ours, levels, strict=True):
        log.setLevel(before)


@pytest.fixture
def log(listen: Callable[[str], Log]) -> Log:
    return listen("json")


GENERATE = "/thumbloop.v1.PolicyService/Generate"


async def test_a_call_leaves_a_line_by_which_it_is_found(server: Running, log: Log):
    reply = await server.generate("hello", request_id="r-1", user_id="ann")
    await until(lambda: log.ended(method=GENERATE))
    (line,) = log.ended(method=GENERATE)
    assert (line["request_id"], line["response_id"]) == ("r-1", reply.response_id)
    assert (line["code"], line["level"]) == ("OK", "INFO")
    assert 0 < line["duration_s"] < 30
    assert "ann" not in log.getvalue()


async def test_a_call_without_an_id_gets_one_in_the_log(server: Running, log: Log):
    for _ in range(2):
        await server.generate("hello")
    await until(lambda: len(log.ended(method=GENERATE)) == 2)
    first, second = log.ended(method=GENERATE)
    assert first["request_id"] != second["request_id"]
    assert len(first["request_id"]) == 36


async def test_a_refused_call_leaves_its_code(server: Running, log: Log):
    request = policy_pb2.GenerateRequest(text="hello", policy="nobody")
    await refused(server.policy.Generate(request))
    await until(lambda: log.ended(method=GENERATE, code="NOT_FOUND"))


async def test_what_happens_in_a_call_is_said_with_its_ids(
    server: Running, log: Log, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_arguments: Any) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(FakeEngine, "speak", fail)
    request = policy_pb2.GenerateRequest(text="hello", request_id="r-7")
    await refused(server.policy.Generate(request))
    (failure,) = [line for line in log.lines if line["level"] == "ERROR"]
    assert failure["request_id"] == "r-7"
    assert "RuntimeError" in failure["trace"]
    await until(lambda: server.found(failure["response_id"]))
    assert server.stored(failure["response_id"]).status == "failed"


async def test_a_thumb_leaves_the_id_of_its_reply(server: Running, log: Log):
    reply = await server.generate("hello")
    await server.client.rate(reply.response_id, up=True)
    method = "/thumbloop.v1.FeedbackService/SubmitFeedback"
    await until(lambda: log.ended(method=method, response_id=reply.response_id))


async def test_an_http_request_leaves_a_line(http: httpx2.AsyncClient, log: Log):
    body = {"prompt": "hello", "request_id": "r-2"}
    reply = (await http.post("/v1/completions", json=body)).json()
    await until(lambda: log.ended(code="200"))
    (line,) = log.ended(code="200")
    assert (line["method"], line["request_id"]) == ("POST /v1/completions", "r-2")
    assert line["response_id"] == reply["id"]
    await http.get(f"/{CANARY}")
    await until(lambda: log.ended(method="HTTP", code="404"))
    assert CANARY not in log.getvalue()


async def test_a_stream_leaves_its_line_when_it_has_ended(tiny_model: Path, state: State, log: Log):
    make = lambda folder, _config: Halting(folder)  # noqa: E731
    async with running(tiny_model, state, make_engine=make) as server, web(server) as http:
        body = {"prompt": "hello", "stream": True, "guidance": {"num_candidates": 1}}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            chunks = answer.aiter_text()
            await anext(chunks)
            assert log.ended(method="POST /v1/completions") == []
            server.engine.may_go_on.set()
            assert "[DONE]" in "".join([chunk async for chunk in chunks])
        await until(lambda: log.ended(method="POST /v1/completions", code="200"))


@pytest.mark.parametrize("form", ["text", "json"])
async def test_nothing_that_users_wrote_is_written(
    form: str,
    listen: Callable[[str], Log],
    tiny_model: Path,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
):
    log = listen(form)
    async with running(tiny_model, state) as server, web(server) as http:

        async def use() -> None:
            said = f"is {CANARY} good?"
            for n, text in enumerate((said, said * 10_000)):  # too long for the context
                asked = policy_pb2.GenerateRequest(text=text, user_id=CANARY, session_id=CANARY)
                try:
                    reply = await server.policy.Generate(asked)
                except grpc.aio.AioRpcError:
                    continue
                await server.client.rate(
                    reply.response_id, up=True, user_id=CANARY, comment=f"{CANARY} {n}"
                )
            thumb = feedback_pb2.SubmitFeedbackRequest(response_id=CANARY, comment=CANARY)
            await refused(server.feedback.SubmitFeedback(thumb))
            for stream in (False, True):
                body = {"prompt": said, "stream": stream, "user": CANARY}
                await http.post("/v1/completions", json=body)
            chat = {"messages": [{"role": CANARY, "content": said}]}
            await http.post("/v1/chat/completions", json=chat)
            await http.post("/v1/chat/completions", content=CANARY)

        await use()

        def fail(*arguments: Any) -> None:
            raise RuntimeError(f"{arguments[0]} of {CANARY}") from ValueError(CANARY)

        monkeypatch.setattr(FakeEngine, "speak", fail)
        await use()
    assert "RuntimeError" in log.getvalue()
    assert "in fail" in log.getvalue()
    assert CANARY not in log.getvalue()


def test_vllms_lines_are_ours_too(capsys: pytest.CaptureFixture[str]):
    vllm = logging.getLogger("vllm")
    handlers, level, propagate = vllm.handlers[:], vllm.level, vllm.propagate
    logging.config.dictConfig(json.loads((ROOT / "server/engine/json_logs.json").read_text()))
    try:
        logging.getLogger("vllm.engine").info("hello")
    finally:
        vllm.handlers[:], vllm.propagate = handlers, propagate
        vllm.setLevel(level)
    said = json.loads(capsys.readouterr().err)
    assert (said["logger"], said["message"]) == ("vllm.engine", "hello")
