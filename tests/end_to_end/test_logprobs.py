"""vLLM's numbers are those of transformers and PEFT, in float32: policy and reward, prefilled and
decoded, alone and in batches that mix versions, the base model among them."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from server.engine import Adapter, Engine
from tests.publishing import RealSpeaker, write_adapter
from thumbloop.types import Sampling

pytestmark = pytest.mark.asyncio(loop_scope="session")

EQUAL = {"abs": 1e-4}
UP, DOWN = 6, 7
PROMPTS = [tuple(8 + (11 * i + 5 * n) % 280 for i in range(n)) for n in (2, 17, 33, 100)]


class Version(NamedTuple):
    """An adapter in the engine, and its folder; None is the base model."""

    adapter: Adapter
    folder: Path | None


@pytest.fixture(scope="module")
def speaker(tiny_model: Path) -> RealSpeaker:
    return RealSpeaker(tiny_model)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def versions(
    vllm_engine: Engine, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[list[Version]]:
    folder = tmp_path_factory.mktemp("adapters")
    loaded = [Version(await vllm_engine.load_zero("numbers-zero"), None)]
    for seed in (1, 2):
        path = folder / f"numbers-{seed}"
        write_adapter(tiny_model, path, scale=0.3, seed=seed)
        loaded.append(Version(await vllm_engine.load(path.name, path), path))
    yield loaded
    for version in loaded:
        await vllm_engine.unload(version.adapter)


@pytest.mark.parametrize("number", range(3), ids=["zero", "one", "two"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
async def test_a_sample_alone(vllm_engine: Engine, speaker, versions, prompt, number: int):
    version = versions[number]
    sampled = await vllm_engine.sample(prompt, Sampling(8, seed=len(prompt)), version.adapter)
    expected = speaker.logprobs(version.folder, prompt, sampled.token_ids)
    assert sampled.logprobs == pytest.approx(expected, **EQUAL)


@pytest.mark.parametrize("number", range(3), ids=["zero", "one", "two"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
async def test_a_verdict_alone(vllm_engine: Engine, speaker, versions, prompt, number: int):
    version = versions[number]
    said = await vllm_engine.next_logprobs(prompt, (UP, DOWN), version.adapter)
    expected = speaker.next_logprobs(version.folder, prompt, (UP, DOWN))
    assert said == pytest.approx(expected, **EQUAL)


async def test_greedy_tokens_are_the_same(vllm_engine: Engine, speaker, versions):
    for version in versions:
        greedy = Sampling(5, temperature=0.0)
        sampled = await vllm_engine.sample(PROMPTS[1], greedy, version.adapter)
        assert sampled.token_ids == speaker.continue_greedily(version.folder, PROMPTS[1])


async def test_samples_and_verdicts_of_three_versions_in_one_batch(
    vllm_engine: Engine, speaker, versions
):
    work = [(v, p, seed) for v in versions for p in PROMPTS for seed in (1, 2)]
    samples = asyncio.gather(
        *(vllm_engine.sample(p, Sampling(12, seed=seed), v.adapter) for v, p, seed in work)
    )
    verdicts = asyncio.gather(
        *(vllm_engine.next_logprobs(p, (UP, DOWN), v.adapter) for v, p, _ in work)
    )
    for (version, prompt, _), sampled in zip(work, await samples, strict=True):
        expected = speaker.logprobs(version.folder, prompt, sampled.token_ids)
        assert sampled.logprobs == pytest.approx(expected, **EQUAL)
    for (version, prompt, _), said in zip(work, await verdicts, strict=True):
        expected = speaker.next_logprobs(version.folder, prompt, (UP, DOWN))
        assert said == pytest.approx(expected, **EQUAL)


async def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(
    vllm_engine: Engine, versions
):
    """At temperature 0.5, log-probabilities are sharpened; with top_k 1 the only token is certain."""
    version = versions[1]
    certain = await vllm_engine.sample(PROMPTS[1], Sampling(4, top_k=1, seed=1), version.adapter)
    assert certain.logprobs == pytest.approx([0.0] * len(certain.logprobs), abs=1e-6)
    sharp = await vllm_engine.sample(
        PROMPTS[1], Sampling(1, temperature=0.5, seed=3), version.adapter
    )
    vocabulary = tuple(range(300))
    plain = await _logprobs(vllm_engine, PROMPTS[1], vocabulary, version.adapter)
    normaliser = math.log(sum(math.exp(2 * p) for p in plain))
    assert sharp.logprobs[0] == pytest.approx(2 * plain[sharp.token_ids[0]] - normaliser, **EQUAL)


async def _logprobs(engine: Engine, prompt, tokens, adapter) -> list[float]:
    asked = [tokens[i : i + 50] for i in range(0, len(tokens), 50)]
    answers = await asyncio.gather(*(engine.next_logprobs(prompt, t, adapter) for t in asked))
    return [value for answer in answers for value in answer]


async def test_rows_without_an_adapter_speak_for_the_base_model_in_a_mixed_batch(
    vllm_engine: Engine, speaker, versions
):
    """vLLM's own CPU operators give such rows another row's adapter."""
    work = [(v, p) for v in (None, versions[1], None, versions[2]) for p in PROMPTS]
    said = await asyncio.gather(
        *(
            vllm_engine.next_logprobs(p, (UP, DOWN), None if v is None else v.adapter)
            for v, p in work
        )
    )
    for (version, prompt), numbers in zip(work, said, strict=True):
        folder = None if version is None else version.folder
        expected = speaker.next_logprobs(folder, prompt, (UP, DOWN))
        assert numbers == pytest.approx(expected, **EQUAL)
