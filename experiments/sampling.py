"""Replies of the trunk's policy, sampled with transformers: what vLLM does for the server."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from trainer.models import Trunk
from trainer.rollouts import Rollout

_AT_ONCE = 128


class Sample(NamedTuple):
    """One response, its last token an end where `has_ended`; logprobs are the sampler's."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    has_ended: bool


def sample(
    trunk: Trunk,
    prompts: Sequence[Sequence[int]],
    *,
    end: Sequence[int],
    max_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> list[Sample]:
    """Sample one response for each prompt (token ids) from the trunk's policy."""
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=list(end),
        pad_token_id=end[0],
        output_scores=True,
        return_dict_in_generate=True,
    )
    samples: dict[int, Sample] = {}
    model = merged(trunk)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for rows in by_length([len(prompt) for prompt in prompts], _AT_ONCE):
            drawn = _sample(model, [prompts[i] for i in rows], settings)
            samples |= dict(zip(rows, drawn, strict=True))
    return [samples[i] for i in range(len(prompts))]


def rollout_of(prompt: tuple[int, ...], drawn: Sample, version: int) -> Rollout:
    """Return what the trainer learns from a sample that a version drew at temperature 1."""
    return Rollout(
        response_id="",
        policy_version=version,
        prompt=prompt,
        response=drawn.token_ids,
        logprobs=drawn.logprobs,
        temperature=1.0,
        has_eos=drawn.has_ended,
    )


def merged(trunk: Trunk) -> Any:
    """Return a copy of the model with the policy adapter in its weights: a third faster, token by token."""
    return deepcopy(trunk.model).merge_and_unload(adapter_names=["policy"])


def _sample(
    model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig
) -> list[Sample]:
    width = max(len(prompt) for prompt in prompts)
    blanks = [width - len(prompt) for prompt in prompts]
    filler = settings.pad_token_id
    rows = [[filler] * blank + list(prompt) for blank, prompt in zip(blanks, prompts, strict=True)]
    tokens = torch.tensor(rows, device=model.device)
    columns = torch.arange(width, device=model.device)
    mask = (columns[None] >= torch.tensor(blanks, device=model.device)[:, None]).long()
    out = model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings)
    responses: Tensor = out.sequences[:, width:]
    # Of what was drawn from, as the server stores them: after the temperature.
    logprobs = torch.stack(out.scores, dim=1).float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
    return [
        _cut(ids, of_them, settings.eos_token_id)
        for ids, of_them in zip(responses.tolist(), chosen.tolist(), strict=True)
    ]


def _cut(ids: list[int], logprobs: list[float], end: Sequence[int]) -> Sample:
    """Return a row up to its first end, that included."""
    length = next((i + 1 for i, token in enumerate(ids) if token in end), len(ids))
    return Sample(tuple(ids[:length]), tuple(logprobs[:length]), ids[length - 1] in end)


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices in groups of similar length, at most `size` each, longest group first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    yield from (order[start : start + size] for start in range(0, len(order), size))
