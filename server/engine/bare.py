"""python -m server.engine.bare: vLLM's AsyncLLM without a server, for `make bench` to compare with.

Reads one job per line on standard input and answers each with a line: JSON, both. `--stock` runs vLLM
as it comes, without adapters; otherwise it runs as the server runs it.
"""

import asyncio
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal, NamedTuple

import typer
import uvloop
from pydantic import BaseModel
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.arguments import engine_args, sampling_params
from server.engine.zero_adapter import linear_shapes
from thumbloop.config.server import EngineSettings
from thumbloop.types import Sampling

Row = Literal["base", "policy", "reward"]


class Job(BaseModel, frozen=True, extra="forbid"):
    """Prompts to answer: `rows` says by which adapter, in turn; `is_exact` lets no reply end early."""

    prompts: list[tuple[int, ...]]
    rows: list[Row]
    at_once: int
    max_tokens: int
    temperature: float = 1.0
    is_exact: bool = False


class Done(BaseModel, frozen=True):
    """What a job took: tokens and a latency for each prompt, in order."""

    seconds: float
    tokens: list[int]
    latencies_s: list[float]


class Reply(NamedTuple):
    """One answer's length and time."""

    tokens: int
    seconds: float


async def answer(llm: AsyncLLM, job: Job, adapters: dict[Row, LoRARequest], first: int) -> Done:
    """Answer all prompts of a job, `at_once` at a time."""
    gate = asyncio.Semaphore(job.at_once)
    params = _params(job)

    async def one(number: int, prompt: Sequence[int], row: Row) -> Reply:
        async with gate:
            started = perf_counter()
            async for output in llm.generate(
                tokens_input(list(prompt)),
                params,
                request_id=f"b{first + number}",
                lora_request=adapters.get(row),
            ):
                last = output
            return Reply(len(last.outputs[0].token_ids), perf_counter() - started)

    started = perf_counter()
    rows = itertools.cycle(job.rows)
    replies = await asyncio.gather(
        *(
            one(i, prompt, row)
            for i, (prompt, row) in enumerate(zip(job.prompts, rows, strict=False))
        )
    )
    return Done(
        seconds=perf_counter() - started,
        tokens=[reply.tokens for reply in replies],
        latencies_s=[reply.seconds for reply in replies],
    )


def _params(job: Job) -> SamplingParams:
    sampling = Sampling(max_tokens=job.max_tokens, temperature=job.temperature)
    params = sampling_params(sampling, RequestOutputKind.FINAL_ONLY)
    if job.is_exact:
        params.min_tokens, params.ignore_eos = job.max_tokens, True
    return params


async def serve(arguments: AsyncEngineArgs, adapters: dict[Row, LoRARequest]) -> None:
    """Do the jobs of standard input until it ends."""
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        for adapter in adapters.values():
            await llm.add_lora(adapter)
        print("ready", flush=True)
        first = 0
        while line := await asyncio.to_thread(sys.stdin.readline):
            job = Job.model_validate_json(line)
            done = await answer(llm, job, adapters, first)
            first += len(job.prompts)
            print(done.model_dump_json(), flush=True)
    finally:
        llm.shutdown()


def main(
    model: Annotated[Path, typer.Option(help="Folder of the base model.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    version: Annotated[
        Path | None, typer.Option(help="Folder of the policy version whose adapters are there.")
    ] = None,
    stock: Annotated[bool, typer.Option(help="vLLM as it comes, without adapters.")] = False,
    stock_lora: Annotated[bool, typer.Option(help="vLLM's own LoRA operators.")] = False,
) -> None:
    """Answer jobs with a bare engine."""
    settings = EngineSettings.model_validate(
        {
            "dtype": dtype,
            "kv_cache_gib": 0.5,
            "max_num_seqs": 128,
            "grouped_lora": not stock_lora,
        }
    )
    if stock:
        arguments = AsyncEngineArgs(
            model=str(model),
            dtype=dtype,
            max_num_seqs=settings.max_num_seqs,
            block_size=settings.block_size,
            kv_cache_memory_bytes=1 << 29,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            enable_log_requests=False,
        )
    else:
        arguments = engine_args(model, linear_shapes(model), settings, seed=0)
    adapters: dict[Row, LoRARequest] = {}
    if version is not None and not stock:
        adapters = {
            "policy": LoRARequest("policy", 1, str(version / "policy")),
            "reward": LoRARequest("reward", 2, str(version / "reward")),
        }
    uvloop.run(serve(arguments, adapters))


if __name__ == "__main__":
    typer.run(main)
