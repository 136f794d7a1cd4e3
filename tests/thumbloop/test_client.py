from thumbloop.messages import GenerateOptions, generate_request
from thumbloop.types import Message, Prompt, Role, Strategy
from thumbloop.v1 import policy_pb2


def test_what_is_not_said_is_left_to_the_server():
    request = generate_request(Prompt(messages=(Message(Role.USER, "hi"),)), GenerateOptions())
    (turn,) = request.chat.messages
    assert (turn.role, turn.content) == (policy_pb2.ROLE_USER, "hi")
    for field in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        assert not request.sampling.HasField(field)
    assert not request.guidance.HasField("num_candidates")
    assert request.guidance.strategy == policy_pb2.GUIDANCE_STRATEGY_UNSPECIFIED
    assert not request.HasField("policy_version")
    assert request.learning == policy_pb2.LEARNING_UNSPECIFIED


def test_what_is_said_is_sent_zeros_included():
    options = GenerateOptions(
        max_tokens=5,
        temperature=0.0,
        seed=0,
        strategy=Strategy.NONE,
        num_candidates=1,
        policy_version=0,
        is_excluded=True,
        include_candidates=True,
    )
    request = generate_request(
        Prompt(messages=(Message(Role.SYSTEM, "a"), Message(Role.ASSISTANT, "b"))), options
    )
    assert [m.role for m in request.chat.messages] == [
        policy_pb2.ROLE_SYSTEM,
        policy_pb2.ROLE_ASSISTANT,
    ]
    assert request.sampling.HasField("seed")
    assert request.sampling.HasField("temperature")
    assert request.HasField("policy_version")
    assert request.guidance.strategy == policy_pb2.GUIDANCE_STRATEGY_NONE
    assert request.learning == policy_pb2.LEARNING_EXCLUDED
    assert request.include_candidates


def test_every_strategy_has_a_name_on_the_wire():
    for strategy in Strategy:
        request = generate_request(Prompt(), GenerateOptions(strategy=strategy))
        assert request.guidance.strategy != policy_pb2.GUIDANCE_STRATEGY_UNSPECIFIED


def test_a_text_to_continue_is_sent_as_a_text():
    request = generate_request(Prompt(text="The soup"), GenerateOptions())
    assert (request.WhichOneof("prompt"), request.text) == ("text", "The soup")
