"""What serving asks of an engine. vLLM implements it, and a deterministic fake in the tests."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thumbloop.rendering import Tokenizer
from thumbloop.types import FinishReason, Sampling

PROBE_PRIORITY = -1  # before anybody's request: a swap waits for it
REPLY_PRIORITY = 0
SECOND_WAVE_PRIORITY = 1  # what may make a reply better, after what others wait for
BACKGROUND_PRIORITY = 2  # nobody waits for it


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter the engine holds. Name, number and folder are never used twice."""

    name: str
    number: int
    folder: str


@dataclass(frozen=True, slots=True)
class Sampled:
    """A sample: tokens, the log-probabilities they were drawn with, and why it ended.

    ABORTED is one that has not ended by itself: what was there when it was stopped or looked at.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class Engine(Protocol):
    """Samples and scores token sequences under LoRA adapters, many at once.

    Without an adapter the base model itself answers; only right beside others with grouped LoRA.
    """

    tokenizer: Tokenizer
    max_model_len: int
    dtype: str
    lora_shapes: Mapping[str, tuple[int, int]]
    """(outputs, inputs) of every module that an adapter may change, by name."""

    async def sample(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> Sampled:
        """Sample one response. Cancelling the call aborts it in the engine.

        `logprobs` are those of the processed distribution the sampler used.
        Raises EngineUnavailable: the engine died. Overloaded: its queue is full.
        """

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> AsyncGenerator[Sampled, None]:
        """Sample one response and yield what there is of it as it grows, ABORTED until it ends.

        Closing the generator aborts the sample in the engine. Raises as sample does.
        """

    async def next_logprobs(
        self,
        prompt: Sequence[int],
        token_ids: Sequence[int],
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> tuple[float, ...]:
        """Return the given tokens' log-probabilities right after `prompt`, at temperature 1.

        Raises EngineUnavailable: the engine died. Overloaded: its queue is full.
        """

    async def logprobs(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> tuple[float, ...]:
        """Return the log-probabilities of a given continuation's tokens, at temperature 1.

        All is read as a prompt, and nothing of it from the prefix cache. Raises as next_logprobs does.
        """

    async def load(self, name: str, folder: Path) -> Adapter:
        """Load an adapter that has been verified. Raises BadPolicyVersion: the engine refused it."""

    async def load_zero(self, name: str) -> Adapter:
        """Load an adapter that changes nothing: the base model, served like any version."""

    async def unload(self, adapter: Adapter) -> None:
        """Forget an adapter that no request uses any more. Raises EngineUnavailable: it died."""

    async def check(self) -> None:
        """Raise EngineUnavailable when the engine is dead."""

    def close(self) -> None:
        """Stop the engine and its processes."""
