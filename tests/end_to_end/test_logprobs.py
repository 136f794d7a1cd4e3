"""vLLM's numbers are those of transformers and PEFT: policy and reward, prefilled and decoded, alone and
in batches that mix versions, the base model among them; whichever way adapters are applied."""

import asyncio
import itertools
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from server.engine import Adapter, Engine
from tests.publishing import Publisher, RealSpeaker, write_adapter
from thumbloop.config import State, Verdict
from thumbloop.copying import copy_version
from thumbloop.rendering import verdict_tokens
from thumbloop.store import open_store
from thumbloop.types import DEFAULT_POLICY, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="session")

EQUAL = {"abs": 1e-4}
UP, DOWN = 6, 7
PROMPTS = [tuple(8 + (11 * i + 5 * n) % 280 for i in range(n)) for n in (2, 17, 33, 100)]

_names = itertools.count()


class Version(NamedTuple):
    """An adapter in the engine, and its folder; None is the base model."""

    adapter: Adapter | None
    folder: Path | None


class Row(NamedTuple):
    """What an engine said under a version: of the tokens it sampled, and as a verdict."""

    version: Version
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    verdict: tuple[float, ...]

    def distance(self, speaker: RealSpeaker, folder: Path | None) -> float:
        """Return how far all that is from what a folder's version says, nats, in the mean."""
        expected = (
            *speaker.logprobs(folder, self.prompt, self.token_ids),
            *speaker.next_logprobs(folder, self.prompt, (UP, DOWN)),
        )
        said = (*self.logprobs, *self.verdict)
        return sum(abs(a - b) for a, b in zip(said, expected, strict=True)) / len(said)


@pytest.fixture(scope="module")
def speaker(tiny_model: Path) -> RealSpeaker:
    return RealSpeaker(tiny_model)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    written = [tmp_path_factory.mktemp("adapters") / f"numbers-{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(written, start=1):
        write_adapter(tiny_model, folder, scale=0.3, seed=seed)
    return written


@asynccontextmanager
async def loaded(engine: Engine, folders: list[Path]) -> AsyncIterator[list[Version]]:
    """Load the base model and every folder as versions; they leave the engine afterwards."""
    zero = await engine.load_zero(f"numbers-{next(_names)}")
    trained = [
        Version(await engine.load(f"numbers-{next(_names)}", folder), folder) for folder in folders
    ]
    found = [Version(zero, None), *trained]
    yield found
    for version in found:
        assert version.adapter is not None
        await engine.unload(version.adapter)


@pytest.fixture(scope="module", params=["vllm", "grouped"], ids=["merged", "grouped"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(f"{request.param}_engine")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def versions(engine: Engine, folders: list[Path]) -> AsyncIterator[list[Version]]:
    async with loaded(engine, folders) as found:
        yield found


@pytest.mark.parametrize("number", range(3), ids=["zero", "one", "two"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
async def test_a_sample_alone(engine: Engine, speaker, versions, prompt, number: int):
    version = versions[number]
    sampled = await engine.sample(prompt, Sampling(8, seed=len(prompt)), version.adapter)
    expected = speaker.logprobs(version.folder, prompt, sampled.token_ids)
    assert sampled.logprobs == pytest.approx(expected, **EQUAL)


@pytest.mark.parametrize("number", range(3), ids=["zero", "one", "two"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
async def test_a_verdict_alone(engine: Engine, speaker, versions, prompt, number: int):
    version = versions[number]
    said = await engine.next_logprobs(prompt, (UP, DOWN), version.adapter)
    expected = speaker.next_logprobs(version.folder, prompt, (UP, DOWN))
    assert said == pytest.approx(expected, **EQUAL)


async def test_greedy_tokens_are_the_same(engine: Engine, speaker, versions):
    for version in versions:
        greedy = Sampling(5, temperature=0.0)
        sampled = await engine.sample(PROMPTS[1], greedy, version.adapter)
        assert sampled.token_ids == speaker.continue_greedily(version.folder, PROMPTS[1])


async def rows_of_one_batch(engine: Engine, versions: list[Version]) -> list[Row]:
    """Sample and judge under all versions at once."""
    work = [(v, p, seed) for v in versions for p in PROMPTS for seed in (1, 2)]
    samples, verdicts = await asyncio.gather(
        asyncio.gather(
            *(engine.sample(p, Sampling(12, seed=seed), v.adapter) for v, p, seed in work)
        ),
        asyncio.gather(*(engine.next_logprobs(p, (UP, DOWN), v.adapter) for v, p, _ in work)),
    )
    return [
        Row(version, prompt, sampled.token_ids, sampled.logprobs, verdict)
        for (version, prompt, _), sampled, verdict in zip(work, samples, verdicts, strict=True)
    ]


async def test_samples_and_verdicts_of_three_versions_in_one_batch(
    engine: Engine, speaker, versions
):
    for row in await rows_of_one_batch(engine, versions):
        expected = speaker.logprobs(row.version.folder, row.prompt, row.token_ids)
        assert row.logprobs == pytest.approx(expected, **EQUAL)
        expected = speaker.next_logprobs(row.version.folder, row.prompt, (UP, DOWN))
        assert row.verdict == pytest.approx(expected, **EQUAL)


async def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(
    engine: Engine, versions
):
    """At temperature 0.5, log-probabilities are sharpened; with top_k 1 the only token is certain."""
    version = versions[1]
    certain = await engine.sample(PROMPTS[1], Sampling(4, top_k=1, seed=1), version.adapter)
    assert certain.logprobs == pytest.approx([0.0] * len(certain.logprobs), abs=1e-6)
    sharp = await engine.sample(PROMPTS[1], Sampling(1, temperature=0.5, seed=3), version.adapter)
    vocabulary = tuple(range(300))
    plain = await _logprobs(engine, PROMPTS[1], vocabulary, version.adapter)
    normaliser = math.log(sum(math.exp(2 * p) for p in plain))
    assert sharp.logprobs[0] == pytest.approx(2 * plain[sharp.token_ids[0]] - normaliser, **EQUAL)


async def _logprobs(engine: Engine, prompt, tokens, adapter) -> list[float]:
    asked = [tokens[i : i + 50] for i in range(0, len(tokens), 50)]
    answers = await asyncio.gather(*(engine.next_logprobs(prompt, t, adapter) for t in asked))
    return [value for answer in answers for value in answer]


async def test_rows_without_an_adapter_speak_for_the_base_model_in_a_mixed_batch(
    engine: Engine, speaker, versions
):
    """vLLM's own CPU operators give such rows another row's adapter."""
    base = Version(None, None)
    for row in await rows_of_one_batch(engine, [base, versions[1], base, versions[2]]):
        assert row.distance(speaker, row.version.folder) < EQUAL["abs"]


async def test_in_bfloat16_each_row_speaks_for_its_own_version(
    bfloat16_engine: Engine, speaker, folders
):
    """Rounding moves a row by hundredths of a nat, another version by more than one."""
    async with loaded(bfloat16_engine, folders) as versions:
        rows = await rows_of_one_batch(bfloat16_engine, [Version(None, None), *versions])
    for row in rows:
        others = {None, *folders} - {row.version.folder}
        assert row.distance(speaker, row.version.folder) < 0.2
        assert min(row.distance(speaker, other) for other in others) > 0.6


async def test_vllms_own_operators_are_right_where_every_row_has_an_adapter(
    stock_engine: Engine, speaker, folders
):
    async with loaded(stock_engine, folders) as versions:
        for row in await rows_of_one_batch(stock_engine, versions):
            assert row.distance(speaker, row.version.folder) < EQUAL["abs"]


async def test_a_copy_of_a_version_for_others_loads_in_plain_vllm(
    stock_engine: Engine, speaker, tiny_model: Path, tmp_path: Path
):
    """vLLM's own engine, operators and request, on the folder as `thumbloop versions export` leaves it."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    state = State(folder=tmp_path / "state")
    store = open_store(state)
    verdict = verdict_tokens(Verdict(), stock_engine.tokenizer)
    published = Publisher(tiny_model, state.versions, store, verdict, speaker).publish(1)
    copy = tmp_path / "copy"
    copy_version(store, state.versions, DEFAULT_POLICY, 1, copy)
    store.dispose()
    llm = stock_engine._llm  # type: ignore[attr-defined]
    for number, (there, here) in enumerate((("policy", copy), ("reward", copy / "reward"))):
        request = LoRARequest(f"copied-{there}", 10_000 + number, str(here))
        params = SamplingParams(max_tokens=6, temperature=1.0, seed=7, logprobs=0)
        prompt = {"prompt_token_ids": list(PROMPTS[1])}
        *_, output = [
            each async for each in llm.generate(prompt, params, there, lora_request=request)
        ]
        (sampled,) = output.outputs
        said = [
            position[token].logprob
            for position, token in zip(sampled.logprobs, sampled.token_ids, strict=True)
        ]
        folder = state.versions / published.folder / there
        assert said == pytest.approx(
            speaker.logprobs(folder, PROMPTS[1], sampled.token_ids), **EQUAL
        )
        assert said != pytest.approx(speaker.logprobs(None, PROMPTS[1], sampled.token_ids), **EQUAL)
        await llm.remove_lora(request.lora_int_id)
