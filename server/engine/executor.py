"""The worker in the engine's own process: on a CPU, with one worker, there is nobody to talk to.

vLLM gives its CPU worker a process of its own, and both sides spin on shared memory for a second after
each message: that takes a core which the trainer, or the worker itself, could use.
"""

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from server.engine.models import register_models
from server.engine.wrapping import THREADS


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """Runs the only worker here, on as many threads as it is told."""

    def _init_executor(self) -> None:
        register_models()
        torch.set_num_threads(self.vllm_config.additional_config[THREADS])  # the worker forbids it
        super()._init_executor()
