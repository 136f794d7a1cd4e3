"""What spans say, in the words of OpenTelemetry's GenAI conventions where these have some."""

import json

from opentelemetry.util.types import AttributeValue

from server.guidance import Outcome
from thumbloop.types import DEFAULT_POLICY, Candidate, Feedback, Interaction, Preference, Prompt
from thumbloop.v1 import policy_pb2

EVALUATION = "gen_ai.evaluation.result"
RESPONSE_ID = "gen_ai.response.id"

_OPERATION = "gen_ai.operation.name"
_MODEL = "gen_ai.request.model"

Attributes = dict[str, AttributeValue]


def of_request(message: policy_pb2.GenerateRequest) -> Attributes:
    """Return what is known before a request is checked."""
    is_text = message.WhichOneof("prompt") == "text"
    is_known = message.policy in ("", DEFAULT_POLICY)
    return {
        _OPERATION: "text_completion" if is_text else "chat",
        _MODEL: DEFAULT_POLICY if is_known else "unknown",  # a name that callers make up
        "gen_ai.provider.name": "thumbloop",
    }


def name_of(request: Attributes) -> str:
    """Return the name of a request's span."""
    return f"{request[_OPERATION]!s} {request[_MODEL]!s}"


def of_reply(reply: Interaction) -> Attributes:
    """Return what is known of a reply."""
    sampling, chosen = reply.sampling, reply.chosen
    said: Attributes = {
        RESPONSE_ID: reply.response_id,
        "gen_ai.response.finish_reasons": (chosen.finish_reason.value,),
        "gen_ai.usage.input_tokens": len(reply.prompt_token_ids),
        "gen_ai.usage.output_tokens": len(chosen.token_ids),
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "thumbloop.policy_version": reply.policy_version,
        "thumbloop.candidates": len(reply.candidates),
    }
    if sampling.top_k:
        said["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        said["gen_ai.request.seed"] = sampling.seed
    return said


def of_content(reply: Interaction) -> Attributes:
    """Return what was said."""
    answer = _message("assistant", reply.chosen.text)
    answer["finish_reason"] = reply.chosen.finish_reason.value
    return {
        "gen_ai.input.messages": json.dumps(_turns(reply.prompt), ensure_ascii=False),
        "gen_ai.output.messages": json.dumps([answer], ensure_ascii=False),
    }


def _turns(prompt: Prompt) -> list[dict[str, object]]:
    if prompt.text is not None:
        return [_message("user", prompt.text)]
    return [_message(turn.role.value, turn.content) for turn in prompt.messages]


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def of_candidate(candidate: Candidate) -> Attributes:
    """Return what is known of a candidate that was sampled."""
    return {
        "thumbloop.policy_version": candidate.policy_version,
        "gen_ai.usage.output_tokens": len(candidate.token_ids),
        "gen_ai.response.finish_reasons": (candidate.finish_reason.value,),
    }


def of_choice(strategy: str, outcome: Outcome) -> Attributes:
    """Return how a reply was chosen."""
    chosen = outcome.chosen
    said: Attributes = {
        "thumbloop.guidance.strategy": strategy,
        "thumbloop.guidance.arm": outcome.arm.value,
        "thumbloop.guidance.reranked": outcome.reranked,
        "thumbloop.guidance.extent": outcome.extent.value,
        "thumbloop.candidate.index": chosen.index,
    }
    if outcome.fallback:
        said["thumbloop.guidance.fallback"] = outcome.fallback
    if chosen.reward is not None:
        said["thumbloop.reward"] = chosen.reward
    if chosen.propensity is not None:
        said["thumbloop.propensity"] = chosen.propensity
    return said


def of_thumb(thumb: Feedback, comment: str) -> Attributes:
    """Return a thumb as an evaluation."""
    said: Attributes = {
        RESPONSE_ID: thumb.response_id,
        "gen_ai.evaluation.name": "thumb",
        "gen_ai.evaluation.score.value": float(thumb.value),
        "gen_ai.evaluation.score.label": "up" if thumb.value > 0 else "down",
        "thumbloop.policy_version": thumb.policy_version,
    }
    if comment:
        said["gen_ai.evaluation.explanation"] = comment
    return said


def of_preference(preference: Preference) -> Attributes:
    """Return a preference as an evaluation of the better candidate."""
    return {
        RESPONSE_ID: preference.response_id,
        "gen_ai.evaluation.name": "preference",
        "gen_ai.evaluation.score.label": f"{preference.better} over {preference.worse}",
        "thumbloop.policy_version": preference.policy_version,
    }
