"""vLLM's AsyncLLM behind the Engine protocol. Never reuses an adapter's name, number or folder."""

import itertools
import signal
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import cast

from vllm import SamplingParams
from vllm.envs import enable_envs_cache
from vllm.exceptions import QueueOverflowError
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from server.engine.arguments import engine_args, lora_request, sampling_params
from server.engine.models import register_models
from server.engine.protocol import REPLY_PRIORITY, Adapter, Sampled
from server.engine.zero_adapter import linear_shapes, write_zero_adapter
from thumbloop.config.server import EngineSettings
from thumbloop.errors import BadPolicyVersion, EngineUnavailable, Overloaded, SettingsError
from thumbloop.rendering import Tokenizer
from thumbloop.types import FinishReason, Sampling

_RETRY_AFTER_S = 0.5
_DEAD = "the engine died"
_NUMBERS = itertools.count()  # of adapters, also those of an engine that died
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let processes that start here never hear SIGINT: a terminal sends it to all of a group, and the
    engine's process would abort the calls that the server is about to finish."""
    resource_tracker.ensure_running()  # else it starts inside, and unblocks them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class VllmEngine:
    """One vLLM engine with room for `max_versions` pairs of adapters."""

    def __init__(
        self, model: Path, settings: EngineSettings, *, seed: int, has_json_logs: bool = False
    ) -> None:
        register_models()
        shapes = linear_shapes(model)
        try:
            arguments = engine_args(model, shapes, settings, seed, has_json_logs=has_json_logs)
            with _deaf_to_interrupts():
                self._llm = AsyncLLM.from_engine_args(arguments)
        except ValueError as error:
            raise SettingsError(f"engine: {' '.join(str(error).split())}") from None
        except RuntimeError as error:  # of the engine's own process, whose log has the cause
            raise SettingsError(
                f"engine: {' '.join(str(error).split())}; the lines above say why. Where the KV"
                " cache is too small: lower engine.max_model_len or raise engine.kv_cache_gib"
            ) from None
        enable_envs_cache()  # vLLM looks them up for every request
        self._model = model
        # vLLM's own dummies, should it ever warm up with some, are numbered from 1 on.
        self._first_number = 2 * settings.max_versions + 1
        self._requests = itertools.count()
        self.lora_shapes: Mapping[str, tuple[int, int]] = shapes
        self._zero = tempfile.TemporaryDirectory(prefix="thumbloop-zero-")
        self.tokenizer = cast(Tokenizer, self._llm.get_tokenizer())
        self.max_model_len: int = self._llm.model_config.max_model_len
        self.dtype = str(self._llm.model_config.dtype).removeprefix("torch.")

    async def sample(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> Sampled:
        """Sample one response; see Engine."""
        params = sampling_params(sampling, RequestOutputKind.FINAL_ONLY)
        output = (await self._finish(prompt, params, adapter, priority)).outputs[0]
        return Sampled(
            token_ids=tuple(output.token_ids),
            logprobs=tuple(output.logprobs.logprobs),
            finish_reason=_FINISH.get(output.finish_reason or "", FinishReason.ABORTED),
        )

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> AsyncGenerator[Sampled, None]:
        """Sample one response, piece by piece; see Engine."""
        params = sampling_params(sampling, RequestOutputKind.DELTA)
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[float, ...] = ()
        async with aclosing(self._outputs(prompt, params, adapter, priority)) as outputs:
            async for output in outputs:
                piece = output.outputs[0]
                token_ids += tuple(piece.token_ids)
                logprobs += tuple(piece.logprobs.logprobs)
                reason = _FINISH.get(piece.finish_reason or "", FinishReason.ABORTED)
                yield Sampled(token_ids, logprobs, reason)

    async def next_logprobs(
        self,
        prompt: Sequence[int],
        token_ids: Sequence[int],
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> tuple[float, ...]:
        """Return log-probabilities of the given next tokens; see Engine."""
        params = SamplingParams(
            max_tokens=1,
            temperature=1.0,
            logprob_token_ids=list(token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = (await self._finish(prompt, params, adapter, priority)).outputs[0]
        if not output.logprobs:
            raise EngineUnavailable("the engine gave up on a score")
        (position,) = output.logprobs
        return tuple(position[token].logprob for token in token_ids)

    async def logprobs(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> tuple[float, ...]:
        """Return the log-probabilities of a continuation's tokens; see Engine."""
        params = SamplingParams(
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._finish((*prompt, *continuation), params, adapter, priority)
        numbers = output.prompt_logprobs or []
        if len(numbers) != len(prompt) + len(continuation):
            raise EngineUnavailable("the engine gave up on a text it was to read")
        read = zip(numbers[len(prompt) :], continuation, strict=True)
        return tuple(position[token].logprob for position, token in read)

    async def _finish(
        self, prompt: Sequence[int], params: SamplingParams, adapter: Adapter | None, priority: int
    ) -> RequestOutput:
        """Run one engine request to its end; cancelling aborts it."""
        async with aclosing(self._outputs(prompt, params, adapter, priority)) as outputs:
            async for output in outputs:
                if output.finished:
                    return output
        raise EngineUnavailable(_DEAD)

    async def _outputs(
        self, prompt: Sequence[int], params: SamplingParams, adapter: Adapter | None, priority: int
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield what the engine says of one request; closing the generator aborts it."""
        stream: AsyncGenerator[RequestOutput, None] = self._llm.generate(
            tokens_input(list(prompt)),  # rendered: no detour through vLLM's tokenizer threads
            params,
            request_id=f"r{next(self._requests)}",
            lora_request=None if adapter is None else lora_request(adapter),
            priority=priority,
        )
        try:
            async for output in stream:
                yield output
        except EngineDeadError:
            raise EngineUnavailable(_DEAD) from None
        except QueueOverflowError:
            raise Overloaded(
                "the engine's queue is full; try again", retry_after_s=_RETRY_AFTER_S
            ) from None
        except EngineGenerateError as error:
            raise EngineUnavailable(f"the engine gave up on a request: {error}") from error
        finally:
            await stream.aclose()

    async def load(self, name: str, folder: Path) -> Adapter:
        """Load an adapter under a new number; see Engine."""
        adapter = Adapter(name, self._first_number + next(_NUMBERS), str(folder))
        try:
            loaded = await self._llm.add_lora(lora_request(adapter))
        except EngineDeadError:
            raise EngineUnavailable(_DEAD) from None
        except Exception as error:  # whatever the engine's process raised, it refused the adapter
            raise BadPolicyVersion("engine_refused", f"{name}: {error}") from error
        if not loaded:
            raise BadPolicyVersion("engine_refused", f"{name}: not loaded")
        return adapter

    async def load_zero(self, name: str) -> Adapter:
        """Load an adapter that changes nothing; see Engine."""
        folder = Path(self._zero.name) / name
        return await self.load(name, write_zero_adapter(self._model, folder))

    async def unload(self, adapter: Adapter) -> None:
        """Forget an adapter; see Engine."""
        try:
            await self._llm.remove_lora(adapter.number)
        except EngineDeadError:
            raise EngineUnavailable(_DEAD) from None

    async def check(self) -> None:
        """Raise when the engine is dead; see Engine."""
        if self._llm.errored:
            raise EngineUnavailable(_DEAD)

    def close(self) -> None:
        """Stop the engine and its processes; see Engine."""
        self._llm.shutdown()
        del self._llm  # its finalizer must not run when the interpreter is half gone
        self._zero.cleanup()
