"""A reply belongs to the token that asked for it, and to the user that it named."""

from typing import Any

import grpc

from tests.access import as_, bearer, code_of, web
from tests.refusals import refused
from tests.serving import Running
from thumbloop.store import feedback, reading
from thumbloop.types import User
from thumbloop.v1 import feedback_pb2, policy_pb2


async def test_a_user_is_a_tokens_subject_and_the_user_it_names(shared: Running):
    for subject, name in (("backend", "ann"), ("backend", ""), ("single", "")):
        request = policy_pb2.GenerateRequest(text="hello", user_id=name)
        reply = await shared.policy.Generate(request, metadata=as_(subject))
        assert shared.stored(reply.response_id).user == User(subject, name)
        async with web(shared, subject) as client:
            body = {"prompt": "hello", "user": name}
            answer = await client.post("/v1/completions", json=body)
        assert shared.stored(answer.json()["id"]).user == User(subject, name)


async def test_naming_a_user_needs_the_scope_for_it(shared: Running):
    asked = policy_pb2.GenerateRequest(text="hello", user_id="ann")
    streamed = policy_pb2.StreamGenerateRequest(request=asked)
    thumb = feedback_pb2.SubmitFeedbackRequest(response_id="r", thumb=1, user_id="ann")
    for path, message in (
        ("PolicyService/Generate", asked),
        ("PolicyService/StreamGenerate", streamed),
        ("FeedbackService/SubmitFeedback", thumb),
    ):
        code = await code_of(
            shared, f"/thumbloop.v1.{path}", bearer("single"), message.SerializeToString()
        )
        assert code is grpc.StatusCode.PERMISSION_DENIED, path
    async with web(shared, "single") as client:
        for path, body in (
            ("completions", {"prompt": "hello"}),
            ("completions", {"prompt": "hello", "stream": True}),
            ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
            ("feedback", {"response_id": "r", "thumb": "up"}),
        ):
            answer = await client.post(f"/v1/{path}", json={**body, "user": "ann"})
            assert answer.status_code == 403, path
            assert "on_behalf" in answer.json()["error"]["message"]
    assert shared.engine.started == 0


async def test_a_reply_belongs_to_its_subject_and_user_and_for_others_does_not_exist(
    shared: Running,
):
    request = policy_pb2.GenerateRequest(text="hello", user_id="ann")
    reply = await shared.policy.Generate(request, metadata=as_("backend"))

    async def rate(response_id: str, subject: str, name: str) -> Any:
        thumb = feedback_pb2.SubmitFeedbackRequest(
            response_id=response_id, thumb=feedback_pb2.THUMB_UP, user_id=name
        )
        return await shared.feedback.SubmitFeedback(thumb, metadata=as_(subject))

    unknown = await refused(rate("never-given", "rival", "ann"))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND
    for subject, name in (("rival", "ann"), ("backend", "bob"), ("backend", ""), ("single", "")):
        error = await refused(rate(reply.response_id, subject, name))
        assert (error.code(), error.details()) == (unknown.code(), unknown.details())
        async with web(shared, subject) as client:
            body = {"response_id": reply.response_id, "thumb": "up", "user": name}
            answer = await client.post("/v1/feedback", json=body)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == unknown.details()
    assert shared.database is not None
    with reading(shared.database) as connection:
        assert feedback.counts(connection) == (0, 0)
    assert (await rate(reply.response_id, "backend", "ann")).feedback_id == 1


async def test_a_request_id_of_one_subject_is_not_that_of_another(shared: Running):
    request = policy_pb2.GenerateRequest(text="hello", user_id="ann", request_id="q")
    first, again, other = [
        await shared.policy.Generate(request, metadata=as_(subject))
        for subject in ("backend", "backend", "rival")
    ]
    assert first.response_id == again.response_id != other.response_id
