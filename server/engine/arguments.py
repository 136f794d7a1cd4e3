"""What vLLM is told: how to run, how to sample, which adapter."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from vllm import SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from server.engine.protocol import Adapter
from server.engine.wrapping import ADAPTED, MERGED_BYTES, THREADS, leaves
from thumbloop.config.server import EngineSettings
from thumbloop.errors import SettingsError
from thumbloop.types import Sampling

WORKER = "server.engine.worker.Worker"
EXECUTOR = "server.engine.executor.InProcessExecutor"

_JSON_LOGS = Path(__file__).with_name("json_logs.json")
_GIB = 1 << 30
_BLOCK = 32  # tokens of a KV block that the CPU's attention can read at once


def lora_request(adapter: Adapter) -> LoRARequest:
    """Return what a request says of its adapter."""
    return LoRARequest(adapter.name, adapter.number, adapter.folder)


def sampling_params(sampling: Sampling, kind: RequestOutputKind) -> SamplingParams:
    """Return how one candidate is sampled, with the log-probabilities of its tokens."""
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
    if settings.block_size % _BLOCK:
        raise SettingsError(f"engine.block_size: on a CPU vLLM takes multiples of {_BLOCK}")
    threads = settings.threads or max(len(os.sched_getaffinity(0)) - 1, 1)
    arguments: dict[str, Any] = {
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * _GIB),
        "compilation_config": {"custom_ops": ["all"]},  # there is nothing to compile them in
        "additional_config": {
            ADAPTED: sorted(adapted),
            MERGED_BYTES: settings.merged_gib * _GIB,
            THREADS: threads,
        },
    }
    if settings.grouped_lora:
        arguments["worker_cls"] = WORKER
    if settings.tensor_parallel_size == 1:
        arguments |= {"distributed_executor_backend": EXECUTOR}
    return arguments


def engine_args(
    model: Path,
    adapted: Iterable[str],
    settings: EngineSettings,
    seed: int,
    *,
    has_json_logs: bool = False,
) -> AsyncEngineArgs:
    """Return how the engine runs. Raises SettingsError: what vLLM cannot do."""
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
        lora_target_modules=leaves(adapted),  # a wrapped head breaks log-probabilities of prompts
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        scheduling_policy="priority",
        enable_log_requests=False,  # they would hold prompts
        log_config_file=str(_JSON_LOGS) if has_json_logs else None,
        **of_platform,
    )
