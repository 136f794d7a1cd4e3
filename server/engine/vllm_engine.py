"""vLLM's AsyncLLM behind the Engine protocol. Never reuses an adapter's name, number or folder."""

import itertools
import os
import tempfile
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast, get_args

from vllm import SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import QueueOverflowError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from server.engine.models import register_models
from server.engine.protocol import REPLY_PRIORITY, Adapter, Sampled
from server.engine.wrapping import ADAPTED, THREADS, leaves
from server.engine.zero_adapter import linear_shapes, write_zero_adapter
from thumbloop.config.server import EngineSettings
from thumbloop.errors import BadPolicyVersion, EngineUnavailable, Overloaded, SettingsError
from thumbloop.rendering import Tokenizer
from thumbloop.types import FinishReason, Sampling

WORKER = "server.engine.worker.Worker"
EXECUTOR = "server.engine.executor.InProcessExecutor"

_GIB = 1 << 30
_RETRY_AFTER_S = 0.5
_DEAD = "the engine stopped; it has to be restarted"
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class VllmEngine:
    """One vLLM engine with room for `max_versions` pairs of adapters."""

    def __init__(self, model: Path, settings: EngineSettings, *, seed: int) -> None:
        register_models()
        shapes = linear_shapes(model)
        try:
            self._llm = AsyncLLM.from_engine_args(_engine_args(model, shapes, settings, seed))
        except ValueError as error:
            raise SettingsError(f"engine: {' '.join(str(error).split())}") from None
        except RuntimeError as error:  # of the engine's own process, whose log has the cause
            raise SettingsError(
                f"engine: {' '.join(str(error).split())}; the lines above say why. Where the KV"
                " cache is too small: lower engine.max_model_len or raise engine.kv_cache_gib"
            ) from None
        self._model = model
        self._numbers = itertools.count(1)
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
        params = _sampling_params(sampling, RequestOutputKind.FINAL_ONLY)
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
        params = _sampling_params(sampling, RequestOutputKind.DELTA)
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
            {"prompt_token_ids": list(prompt)},
            params,
            request_id=f"r{next(self._requests)}",
            lora_request=None if adapter is None else _lora_request(adapter),
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
        adapter = Adapter(name, next(self._numbers), str(folder))
        try:
            loaded = await self._llm.add_lora(_lora_request(adapter))
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


def _lora_request(adapter: Adapter) -> LoRARequest:
    return LoRARequest(adapter.name, adapter.number, adapter.folder)


def _sampling_params(sampling: Sampling, kind: RequestOutputKind) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop=list(sampling.stop),
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=kind,
    )


def _slot_rank(max_rank: int) -> int:
    """Return the smallest rank vLLM has slots of that holds ours."""
    ranks: list[int] = sorted(get_args(MaxLoRARanks))
    if max_rank > ranks[-1]:
        raise SettingsError(f"engine.max_rank: vLLM serves ranks up to {ranks[-1]}")
    return next(rank for rank in ranks if rank >= max_rank)


def _on_cpu(adapted: Iterable[str], settings: EngineSettings) -> dict[str, Any]:
    """Return what is ours in vLLM on a CPU: the LoRA operators, and the worker's place."""
    if settings.threads and settings.tensor_parallel_size > 1:
        raise SettingsError("engine.threads: vLLM places the threads of several workers itself")
    threads = settings.threads or len(os.sched_getaffinity(0))
    arguments: dict[str, Any] = {
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * _GIB),
        "additional_config": {ADAPTED: sorted(adapted), THREADS: threads},
    }
    if settings.grouped_lora:
        arguments |= {"worker_cls": WORKER, "lora_target_modules": leaves(adapted)}
    if settings.tensor_parallel_size == 1:
        arguments |= {"distributed_executor_backend": EXECUTOR}
    return arguments


def _engine_args(
    model: Path, adapted: Iterable[str], settings: EngineSettings, seed: int
) -> AsyncEngineArgs:
    on_cpu = current_platform.is_cpu()
    adapters = 2 * settings.max_versions
    of_platform: dict[str, Any] = (
        _on_cpu(adapted, settings)
        if on_cpu
        else {"gpu_memory_utilization": settings.gpu_memory_utilization}
    )
    automatic = "float32" if on_cpu else "bfloat16"
    return AsyncEngineArgs(
        model=str(model),
        dtype=automatic if settings.dtype == "auto" else settings.dtype,
        seed=seed,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_queued_reqs=settings.max_queued,
        block_size=settings.block_size,
        tensor_parallel_size=settings.tensor_parallel_size,
        enable_prefix_caching=True,
        enable_lora=True,
        max_loras=adapters,
        max_cpu_loras=adapters,
        max_lora_rank=_slot_rank(settings.max_rank),
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        scheduling_policy="priority",
        enable_log_requests=False,
        **of_platform,
    )
