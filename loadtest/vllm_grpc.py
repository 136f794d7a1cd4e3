"""vLLM's own gRPC server. Its servicer patches any vLLM it is installed beside, so it lives apart."""

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from loadtest.peers import free_port
from loadtest.workload import Answer
from thumbloop.processes import Process

PACKAGES = ("smg-grpc-servicer==0.14.1", "smg-grpc-proto==0.4.28")


def install(folder: Path) -> Path:
    """Install the servicer into a folder of its own, if it is not there; return the folder.

    Raises subprocess.CalledProcessError: the registry does not have it.
    """
    if not folder.is_dir():
        uv = Path(sys.executable).with_name("uv")
        subprocess.run(
            [str(uv), "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES],
            check=True,
        )
    return folder


class VllmGrpcServer:
    """The server as a process, and calls to it."""

    def __init__(
        self,
        packages: Path,
        model: Path,
        dtype: str,
        folder: Path,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
    ) -> None:
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._requests = 0
        if str(packages) not in sys.path:
            sys.path.append(str(packages))
        self._pb2: Any = importlib.import_module("smg_grpc_proto.generated.vllm_engine_pb2")
        stubs: Any = importlib.import_module("smg_grpc_proto.generated.vllm_engine_pb2_grpc")
        port = free_port()
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.launchers.grpc_server"),
            *("--model", str(model), "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)),
            *("--block-size", "32", "--max-num-seqs", "128", "--generation-config", "vllm"),
        ]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(packages)}
        environment["VLLM_LOGGING_LEVEL"] = "WARNING"  # it says a line for every request
        self.process = Process("vllm-grpc", command, folder, environment=environment)
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._stub = stubs.VllmEngineStub(self._channel)

    async def ready(self) -> None:
        """Wait until it answers. Raises ProcessFailed: it ended before."""
        waiting = self._pb2.HealthCheckRequest()
        while True:
            self.process.check()
            try:
                await self._stub.HealthCheck(waiting, wait_for_ready=True, timeout=2)
            except grpc.aio.AioRpcError:
                continue
            return

    async def plain(self, number: int) -> Answer:
        """Ask for one reply."""
        self._requests += 1
        request = self._pb2.GenerateRequest(
            request_id=f"g{self._requests}",
            tokenized=self._pb2.TokenizedInput(
                input_ids=self._prompts[number % len(self._prompts)]
            ),
            sampling_params=self._pb2.SamplingParams(
                temperature=1.0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_tokens=self._max_tokens,
                n=1,
                skip_special_tokens=True,
            ),
            stream=False,
        )
        tokens = 0
        async for response in self._stub.Generate(request):
            if response.HasField("complete"):
                tokens = response.complete.completion_tokens
        return Answer(reply_tokens=tokens, decoded_tokens=tokens)

    async def stop(self) -> None:
        """Stop it."""
        await self._channel.close()
        self.process.stop()
