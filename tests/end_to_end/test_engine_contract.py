"""What serving asks of an engine, asserted alike of the fake and of real vLLM, so that the fake
cannot lie."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import count
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from server.engine import Adapter, Engine
from tests.fakes import FakeEngine
from tests.publishing import write_adapter
from thumbloop.errors import BadPolicyVersion
from thumbloop.types import FinishReason, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = tuple(range(40, 52))
LONG_PROMPT = tuple(40 + (7 * i) % 200 for i in range(90))
EQUAL = {"abs": 1e-4}

_names = count()


class Bench:
    """An engine, and adapters that leave it when the test ends."""

    def __init__(self, engine: Engine, model: Path, folder: Path) -> None:
        self.engine = engine
        self._model = model
        self._folder = folder
        self._loaded: list[Adapter] = []

    async def load(self, seed: int = 1, scale: float = 0.3) -> Adapter:
        name = f"adapter-{next(_names)}"
        write_adapter(self._model, self._folder / name, scale=scale, seed=seed)
        return self._remember(await self.engine.load(name, self._folder / name))

    async def load_zero(self) -> Adapter:
        return self._remember(await self.engine.load_zero(f"zero-{next(_names)}"))

    async def unload(self, adapter: Adapter) -> None:
        self._loaded.remove(adapter)
        await self.engine.unload(adapter)

    async def close(self) -> None:
        for adapter in [*self._loaded]:
            await self.unload(adapter)

    def _remember(self, adapter: Adapter) -> Adapter:
        self._loaded.append(adapter)
        return adapter


@pytest.fixture(params=["fake", "vllm", "grouped"])
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> Engine:
    if request.param != "fake":
        return request.getfixturevalue(f"{request.param}_engine")
    return FakeEngine(tiny_model, max_model_len=256)


@pytest_asyncio.fixture(loop_scope="session")
async def bench(engine: Engine, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(engine, tiny_model, tmp_path)
    yield bench
    await bench.close()


async def test_it_says_what_it_is(bench: Bench):
    assert bench.engine.max_model_len == 256
    assert bench.engine.dtype == "float32"
    assert bench.engine.lora_shapes["model.layers.0.mlp.down_proj"] == (64, 128)
    assert bench.engine.tokenizer.chat_template
    await bench.engine.check()


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["short", "long"])
async def test_a_sample_has_a_logprob_for_each_of_its_tokens(bench: Bench, prompt):
    adapter = await bench.load()
    for seed in range(4):
        sampled = await bench.engine.sample(prompt, Sampling(12, seed=seed), adapter)
        assert 1 <= len(sampled.token_ids) == len(sampled.logprobs) <= 12
        assert all(-30 < logprob <= 0 for logprob in sampled.logprobs)
        has_ended = sampled.token_ids[-1] == 1
        assert sampled.finish_reason is (FinishReason.STOP if has_ended else FinishReason.LENGTH)


async def test_a_seed_decides_a_sample_and_another_seed_another(bench: Bench):
    adapter = await bench.load()
    first, again, other = [
        await bench.engine.sample(PROMPT, Sampling(12, seed=seed), adapter)
        for seed in (2**63 - 1, 2**63 - 1, 4)
    ]
    assert again.token_ids == first.token_ids
    assert again.logprobs == pytest.approx(first.logprobs, **EQUAL)
    assert other.token_ids != first.token_ids


async def test_without_a_seed_samples_differ(bench: Bench):
    adapter = await bench.load()
    samples = [await bench.engine.sample(PROMPT, Sampling(12), adapter) for _ in range(3)]
    assert len({s.token_ids for s in samples}) > 1


async def test_temperature_0_is_greedy_whatever_the_seed(bench: Bench):
    adapter = await bench.load()
    first, other = [
        await bench.engine.sample(PROMPT, Sampling(8, temperature=0.0, seed=seed), adapter)
        for seed in (1, 2)
    ]
    assert first.token_ids == other.token_ids


async def test_a_stop_text_ends_a_sample_with_the_token_that_completes_it(bench: Bench):
    adapter, decode = await bench.load(), bench.engine.tokenizer.decode
    for seed in range(50):
        free = await bench.engine.sample(PROMPT, Sampling(24, seed=seed), adapter)
        shown = decode(free.token_ids, skip_special_tokens=True)
        letters = [c for c in shown[2:] if c.isascii() and c.isalnum() and c not in shown[:2]]
        if letters:
            break
    sampling = Sampling(24, seed=seed, stop=("§§", letters[0]))
    stopped = await bench.engine.sample(PROMPT, sampling, adapter)
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.logprobs) == len(stopped.token_ids)
    assert letters[0] in decode(stopped.token_ids)
    assert letters[0] not in decode(stopped.token_ids[:-1])


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["short", "long"])
async def test_what_it_says_of_a_token_is_what_it_samples_with(bench: Bench, prompt):
    """Prefilled and decoded numbers agree, at temperature 1."""
    adapter = await bench.load()
    sampled = await bench.engine.sample(prompt, Sampling(8, seed=3), adapter)
    asked = [
        await bench.engine.next_logprobs([*prompt, *sampled.token_ids[:i]], (token,), adapter)
        for i, token in enumerate(sampled.token_ids)
    ]
    assert [a for (a,) in asked] == pytest.approx(sampled.logprobs, **EQUAL)
    at_once = await bench.engine.logprobs(prompt, sampled.token_ids, adapter)
    assert at_once == pytest.approx(sampled.logprobs, **EQUAL)


async def test_it_says_the_logprobs_of_the_tokens_it_is_asked_for_in_that_order(bench: Bench):
    adapter = await bench.load()
    up, down = await bench.engine.next_logprobs(PROMPT, (6, 7), adapter)
    assert await bench.engine.next_logprobs(PROMPT, (7, 6), adapter) == pytest.approx(
        (down, up), **EQUAL
    )
    assert up != down
    assert max(up, down) <= 0


async def test_adapters_differ_and_equal_weights_agree(bench: Bench):
    one, other, zero = await bench.load(1), await bench.load(2), await bench.load_zero()
    same, nothing = await bench.load(1), await bench.load(3, scale=0.0)
    numbers = {
        name: (await bench.engine.next_logprobs(PROMPT, (60,), adapter))[0]
        for name, adapter in {
            "one": one,
            "same": same,
            "other": other,
            "zero": zero,
            "nothing": nothing,
        }.items()
    }
    assert numbers["same"] == pytest.approx(numbers["one"], **EQUAL)
    assert numbers["nothing"] == pytest.approx(numbers["zero"], **EQUAL)
    distinct = [numbers["one"], numbers["other"], numbers["zero"]]
    assert min(abs(a - b) for a in distinct for b in distinct if a is not b) > 1e-3
    assert len({one.number, other.number, zero.number, same.number}) == 4


async def test_without_an_adapter_the_base_model_answers(bench: Bench):
    zero, other = await bench.load_zero(), await bench.load(1)
    base, by_zero, by_other = await asyncio.gather(
        *(bench.engine.next_logprobs(PROMPT, (60, 61), a) for a in (None, zero, other))
    )
    assert base == pytest.approx(by_zero, **EQUAL)
    assert base != pytest.approx(by_other, **EQUAL)


async def test_a_batch_of_many_adapters_gives_each_what_it_gets_alone(bench: Bench):
    adapters = [await bench.load(1), await bench.load(2), await bench.load_zero()]
    tasks = [(Sampling(10, seed=s), adapters[s % 3], PROMPT[: 4 + s]) for s in range(9)]
    together = await asyncio.gather(*(bench.engine.sample(p, s, a) for s, a, p in tasks))
    alone = [await bench.engine.sample(p, s, a) for s, a, p in tasks]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, **EQUAL)


async def test_an_adapter_is_forgotten_without_a_trace_in_the_others(bench: Bench):
    stays, goes = await bench.load(1), await bench.load(2)
    before = await bench.engine.next_logprobs(LONG_PROMPT, (60,), stays)
    await bench.engine.next_logprobs(LONG_PROMPT, (60,), goes)
    await bench.unload(goes)
    comes = await bench.load(4)
    assert comes.number != goes.number
    await bench.engine.next_logprobs(LONG_PROMPT, (60,), comes)
    after = await bench.engine.next_logprobs(LONG_PROMPT, (60,), stays)
    assert after == pytest.approx(before, **EQUAL)


async def test_a_stream_grows_into_the_sample_of_its_seed(bench: Bench):
    adapter = await bench.load()
    sampling = Sampling(12, seed=5)
    whole = await bench.engine.sample(PROMPT, sampling, adapter)
    pieces = [piece async for piece in bench.engine.stream(PROMPT, sampling, adapter)]
    assert pieces[-1].token_ids == whole.token_ids
    assert pieces[-1].logprobs == pytest.approx(whole.logprobs, **EQUAL)
    assert pieces[-1].finish_reason is whole.finish_reason
    lengths = [len(piece.token_ids) for piece in pieces]
    assert lengths == sorted(set(lengths))
    for piece in pieces[:-1]:
        assert piece.token_ids == whole.token_ids[: len(piece.token_ids)]
        assert len(piece.logprobs) == len(piece.token_ids)
        assert piece.finish_reason is FinishReason.ABORTED


async def test_closing_a_stream_aborts_it(bench: Bench):
    adapter = await bench.load()
    async with aclosing(bench.engine.stream(PROMPT, Sampling(200, seed=1), adapter)) as stream:
        first = await anext(stream)
    assert len(first.token_ids) >= 1
    if not isinstance(bench.engine, FakeEngine):
        assert bench.engine._llm.output_processor.get_num_unfinished_requests() == 0


async def test_a_cancelled_sample_is_aborted_and_the_engine_goes_on(bench: Bench):
    adapter = await bench.load()
    if isinstance(bench.engine, FakeEngine):
        bench.engine.may_sample.clear()
    tasks = [
        asyncio.create_task(bench.engine.sample(PROMPT, Sampling(200, seed=s), adapter))
        for s in range(4)
    ]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert any(isinstance(end, asyncio.CancelledError) for end in ends)
    if isinstance(bench.engine, FakeEngine):
        bench.engine.may_sample.set()
    else:
        assert bench.engine._llm.output_processor.get_num_unfinished_requests() == 0
    assert (await bench.engine.sample(PROMPT, Sampling(4, seed=1), adapter)).token_ids


def signals_blocked_by(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("SigBlk:")[1].split()[0], 16)


async def test_the_engines_process_never_hears_ctrl_c(vllm_engine: Engine):
    """A terminal sends it to all of a group; the server is to finish its calls in flight first."""
    processes = [p for p in psutil.Process().children(recursive=True) if "Engine" in p.name()]
    assert processes
    for process in processes:
        blocked = signals_blocked_by(process.pid)
        assert blocked >> (signal.SIGINT - 1) & 1
        assert not blocked >> (signal.SIGTERM - 1) & 1


async def test_a_bad_adapter_is_refused_and_costs_the_others_nothing(bench: Bench, tmp_path: Path):
    adapter = await bench.load()
    running = asyncio.create_task(bench.engine.sample(PROMPT, Sampling(60, seed=1), adapter))
    await asyncio.sleep(0.01)
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "adapter_config.json").write_text("{}")
    (tmp_path / "garbage" / "adapter_model.safetensors").write_bytes(b"garbage")
    for name in ("missing", "garbage"):
        with pytest.raises(BadPolicyVersion) as raised:
            await bench.engine.load(f"bad-{name}-{next(_names)}", tmp_path / name)
        assert raised.value.reason == "engine_refused"
    assert (await running).token_ids
    await bench.engine.check()
    assert (await bench.engine.sample(PROMPT, Sampling(4, seed=1), adapter)).token_ids
