"""What vLLM is asked for; nothing is started here."""

import itertools
import os
import warnings
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thumbloop.config.server import EngineSettings
from thumbloop.errors import EngineUnavailable, Overloaded, SettingsError
from thumbloop.types import Sampling

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's imports have to say of torch
    from server.engine import vllm_engine
    from server.engine.arguments import engine_args

ADAPTED = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.fc"]


def arguments(**settings: Any) -> Any:
    return engine_args(Path("model"), ADAPTED, EngineSettings(**settings), seed=3)


def test_each_version_has_two_slots_and_logprobs_are_the_samplers():
    asked = arguments(max_versions=4, max_rank=12)
    assert (asked.max_loras, asked.max_cpu_loras, asked.max_lora_rank) == (8, 8, 16)
    assert asked.logprobs_mode == "processed_logprobs"
    assert (asked.dtype, asked.seed) == ("float32", 3)


def test_the_engines_process_writes_json_where_the_server_does():
    given = engine_args(Path("model"), ADAPTED, EngineSettings(), seed=3, has_json_logs=True)
    assert Path(given.create_logging_config().pylogging_config_file).is_file()
    assert arguments().log_config_file is None


def test_on_a_cpu_the_worker_is_ours_and_in_the_engines_process():
    asked = arguments(threads=1)
    assert asked.worker_cls == "server.engine.worker.Worker"
    assert asked.distributed_executor_backend == "server.engine.executor.InProcessExecutor"
    assert asked.lora_target_modules == ["fc", "q_proj"]
    assert asked.additional_config["thumbloop_threads"] == 1
    assert asked.additional_config["thumbloop_adapted_modules"] == sorted(ADAPTED)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (8, 7)])
def test_threads_leave_one_core_to_the_server_unless_set(cores, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))
    assert arguments().additional_config["thumbloop_threads"] == threads


def test_grouped_lora_can_be_switched_off():
    asked = arguments(grouped_lora=False)
    assert asked.worker_cls == "auto"
    assert asked.lora_target_modules == ["fc", "q_proj"]


def test_a_block_that_the_cpu_does_not_take_is_refused():
    with pytest.raises(SettingsError, match=r"engine\.block_size.*multiples of 32"):
        arguments(block_size=16)


def test_several_workers_stay_with_vllms_own_executor_which_places_their_threads():
    assert arguments(tensor_parallel_size=2).distributed_executor_backend is None
    with pytest.raises(SettingsError, match=r"engine\.threads"):
        arguments(tensor_parallel_size=2, threads=1)


def test_a_rank_that_vllm_cannot_hold_is_refused():
    with pytest.raises(SettingsError, match=r"engine\.max_rank"):
        arguments(max_rank=100_000)


class FailingLlm:
    """An AsyncLLM that answers every request with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def generate(self, *_arguments: object, **_options: object) -> AsyncGenerator[None, None]:
        raise self._error
        yield


class AbortingLlm:
    """An AsyncLLM that gives up on every request without a word."""

    async def generate(
        self, *_arguments: object, **_options: object
    ) -> AsyncGenerator[SimpleNamespace, None]:
        yield SimpleNamespace(
            finished=True, prompt_logprobs=[None], outputs=[SimpleNamespace(logprobs=[])]
        )


async def test_numbers_that_the_engine_gave_up_on_are_not_taken_for_numbers():
    engine = object.__new__(vllm_engine.VllmEngine)
    engine._llm, engine._requests = AbortingLlm(), itertools.count()
    with pytest.raises(EngineUnavailable, match="gave up"):
        await engine.next_logprobs((1, 2), (3,), None)
    with pytest.raises(EngineUnavailable, match="gave up"):
        await engine.logprobs((1, 2), (3,), None)


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (vllm_engine.EngineDeadError(), EngineUnavailable),
        (vllm_engine.EngineGenerateError("odd"), EngineUnavailable),
        (vllm_engine.QueueOverflowError(), Overloaded),
    ],
    ids=["dead", "gave up", "full"],
)
async def test_what_vllm_raises_is_one_of_our_errors(error: Exception, ours: type[Exception]):
    engine = object.__new__(vllm_engine.VllmEngine)
    engine._llm, engine._requests = FailingLlm(error), itertools.count()
    with pytest.raises(ours):
        await engine.sample((1, 2), Sampling(4), None)
    with pytest.raises(ours):
        await engine.next_logprobs((1, 2), (3,), None)
    with pytest.raises(ours):
        await engine.logprobs((1, 2), (3,), None)
    with pytest.raises(ours):
        await anext(engine.stream((1, 2), Sampling(4), None))
