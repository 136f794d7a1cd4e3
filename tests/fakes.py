"""A deterministic engine: the same arguments give the same tokens, on every machine, in no time.

Its numbers depend on an adapter's weights, as a real engine's do: a folder whose adapter changes
nothing speaks like the base model, two folders of equal weights speak alike.
"""

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from server.engine import Adapter, Sampled
from server.engine.protocol import REPLY_PRIORITY
from server.engine.zero_adapter import linear_shapes
from thumbloop.artifacts import WEIGHTS
from thumbloop.errors import BadPolicyVersion, EngineUnavailable, Overloaded
from thumbloop.types import FinishReason, Sampling

BASE = ""  # the weights of an adapter that changes nothing
_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz ")
_END_SHARE = 0.08  # how often a token ends the response

Reward = Callable[[Sequence[int]], float]


class FakeEngine:
    """An Engine without a model. Its switches make it slow, full, dead, or a liar.

    What a real engine answers with corruption or a crash (an adapter that is not loaded, a name or a
    number used twice, more adapters than there are slots) is an AssertionError here.
    """

    def __init__(self, model: Path, *, max_model_len: int = 512, max_versions: int = 5) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_model_len = max_model_len
        self.dtype = "float32"
        self.lora_shapes: Mapping[str, tuple[int, int]] = linear_shapes(model)
        self.max_adapters = 2 * max_versions

        self.is_dead = False
        self.is_full = False
        self.is_too_full_to_score = False
        self.may_sample = asyncio.Event()  # clear it, and samples wait until it is set
        self.may_sample.set()
        self.reward: Reward | None = None  # what the reward model says of the tokens it reads
        self.speaks_for: dict[str, str] = {}  # adapter name -> weights that answer in its stead

        self.loaded: dict[int, Adapter] = {}
        self.most_loaded = 0
        self.started = 0
        self.finished = 0
        self.aborted = 0
        self.streaming = 0  # streams that somebody still reads
        self.sampled_under: Counter[str] = Counter()
        self.is_closed = False
        self._weights: dict[str, str] = {}
        self._in_use: Counter[int] = Counter()
        self._letters = [
            self.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in _LETTERS
        ]

    async def sample(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> Sampled:
        """Sample one response; see Engine."""
        with self._using(adapter):
            self._raise_if_unwell(is_full=self.is_full)
            self.started += 1
            call = f"call {self.started}"  # without a seed, every call is another draw
            try:
                await self.may_sample.wait()
                self._raise_if_unwell(is_full=False)
            except asyncio.CancelledError:
                self.aborted += 1
                raise
            self.finished += 1
            self.sampled_under[adapter.name if adapter else BASE] += 1
            seed = call if sampling.seed is None else sampling.seed
            return self.speak(self._weights_of(adapter), prompt, sampling, seed)

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> AsyncGenerator[Sampled, None]:
        """Sample one response, token by token; see Engine."""
        with self._using(adapter):
            whole = await self.sample(prompt, sampling, adapter, priority=priority)
            self.streaming += 1
            try:
                for n in range(1, len(whole.token_ids)):
                    yield Sampled(whole.token_ids[:n], whole.logprobs[:n], FinishReason.ABORTED)
                    await asyncio.sleep(0)
                yield whole
            finally:
                self.streaming -= 1

    async def next_logprobs(
        self,
        prompt: Sequence[int],
        token_ids: Sequence[int],
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> tuple[float, ...]:
        """Return log-probabilities of the given next tokens; see Engine."""
        with self._using(adapter):
            self._raise_if_unwell(is_full=self.is_full or self.is_too_full_to_score)
            await asyncio.sleep(0)
            if self.reward is not None and len(token_ids) == 2:
                reward = self.reward(prompt)
                return -math.log1p(math.exp(-reward)), -math.log1p(math.exp(reward))
            weights = self._weights_of(adapter)
            return tuple(logprob(weights, prompt, token) for token in token_ids)

    async def logprobs(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> tuple[float, ...]:
        """Return the log-probabilities of a continuation's tokens; see Engine."""
        with self._using(adapter):
            self._raise_if_unwell(is_full=self.is_full or self.is_too_full_to_score)
            await asyncio.sleep(0)
            weights = self._weights_of(adapter)
            return tuple(
                logprob(weights, (*prompt, *continuation[:i]), token)
                for i, token in enumerate(continuation)
            )

    async def load(self, name: str, folder: Path) -> Adapter:
        """Load an adapter under a new number; see Engine."""
        self._raise_if_unwell(is_full=False)
        try:
            weights = weights_in(folder)
        except (OSError, SafetensorError) as error:
            raise BadPolicyVersion("engine_refused", f"{name}: {error}") from None
        assert self._weights.setdefault(name, weights) == weights, f"{name} had other weights"
        return self._add(name, str(folder))

    async def load_zero(self, name: str) -> Adapter:
        """Load an adapter that changes nothing; see Engine."""
        self._raise_if_unwell(is_full=False)
        self._weights[name] = BASE
        return self._add(name, f"zero/{name}")

    def _add(self, name: str, folder: str) -> Adapter:
        assert name not in {a.name for a in self.loaded.values()}, f"{name} is loaded already"
        adapter = Adapter(name, len(self._in_use) + 1, folder)
        self._in_use[adapter.number] = 0
        self.loaded[adapter.number] = adapter
        self.most_loaded = max(self.most_loaded, len(self.loaded))
        assert len(self.loaded) <= self.max_adapters, "an adapter in use would be evicted"
        return adapter

    async def unload(self, adapter: Adapter) -> None:
        """Forget an adapter; see Engine."""
        assert not self._in_use[adapter.number], f"{adapter.name} still answers requests"
        del self.loaded[adapter.number]

    async def check(self) -> None:
        """Raise when the engine is dead; see Engine."""
        self._raise_if_unwell(is_full=False)

    def close(self) -> None:
        """Stop; see Engine."""
        self.is_closed = True

    def speak(
        self, weights: str, prompt: Sequence[int], sampling: Sampling, seed: object = None
    ) -> Sampled:
        """Return what an adapter of these weights answers; at temperature 0 whatever the seed."""
        seed = "greedy" if sampling.temperature == 0 else seed
        tokens: list[int] = []
        numbers: list[float] = []
        reason = FinishReason.LENGTH
        for index in range(sampling.max_tokens):
            tokens.append(self._draw(weights, prompt, seed, index))
            numbers.append(logprob(weights, [*prompt, *tokens[:-1]], tokens[-1]))
            text = self.tokenizer.decode(tokens)
            is_stopped = any(stop in text for stop in sampling.stop)
            if is_stopped or tokens[-1] == self.tokenizer.eos_token_id:
                reason = FinishReason.STOP
                break
        return Sampled(tuple(tokens), tuple(numbers), reason)

    def _draw(self, weights: str, prompt: Sequence[int], seed: object, index: int) -> int:
        chance = _uniform(weights, tuple(prompt), seed, index)
        if index and chance < _END_SHARE:
            return int(self.tokenizer.eos_token_id)
        return self._letters[int(chance * 1e9) % len(self._letters)]

    def _weights_of(self, adapter: Adapter | None) -> str:
        if adapter is None:
            return BASE
        return self.speaks_for.get(adapter.name, self._weights[adapter.name])

    @contextmanager
    def _using(self, adapter: Adapter | None) -> Iterator[None]:
        if adapter is None:
            yield
            return
        assert adapter.number in self.loaded, f"{adapter.name} is not loaded"
        self._in_use[adapter.number] += 1
        try:
            yield
        finally:
            self._in_use[adapter.number] -= 1
            assert adapter.number in self.loaded, f"{adapter.name} went away under a request"

    def _raise_if_unwell(self, *, is_full: bool) -> None:
        if self.is_dead:
            raise EngineUnavailable("the engine died")
        if is_full:
            raise Overloaded("the engine's queue is full; try again", retry_after_s=0.25)


def logprob(weights: str, prefix: Sequence[int], token: int) -> float:
    """Return the log-probability of `token` after `prefix`, nats in (-6, -0.1)."""
    return -0.1 - 5.9 * _uniform("logprob", weights, tuple(prefix), token)


def weights_in(folder: Path) -> str:
    """Return what tells an adapter's weights from others'; BASE when they change nothing."""
    tensors = load_file(folder / WEIGHTS)
    if not any(t.any() for name, t in tensors.items() if name.endswith("lora_B.weight")):
        return BASE
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _uniform(*arguments: object) -> float:
    """Return a number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.blake2b(repr(arguments).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
