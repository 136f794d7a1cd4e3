"""vLLM's AsyncLLM without a server (`python -m server.engine.bare`), as a process that takes jobs."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.workload import Answer, Throughput
from thumbloop.processes import ProcessFailed

_LINE_BYTES = 1 << 24


class BareEngine:
    """One bare engine; its jobs run one after another."""

    def __init__(self, process: Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, name: str, folder: Path, arguments: Sequence[str]) -> "BareEngine":
        """Start one and wait until it takes jobs. Raises ProcessFailed."""
        log = folder / f"{name}.log"
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "server.engine.bare", *arguments),
                stdin=PIPE,
                stdout=PIPE,
                stderr=errors,
                limit=_LINE_BYTES,
                start_new_session=True,
                env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
            )
        engine = cls(process, log)
        while await engine._line() != "ready":
            pass  # whatever libraries print
        return engine

    async def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        at_once: int,
        max_tokens: int,
        rows: Sequence[str] = ("base",),
        temperature: float = 1.0,
        is_exact: bool = False,
    ) -> Throughput:
        """Answer prompts; `rows` says whose adapter answers them, in turn: base, policy, reward."""
        job: dict[str, Any] = {
            "prompts": [list(prompt) for prompt in prompts],
            "rows": list(rows),
            "at_once": at_once,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "is_exact": is_exact,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        await self._process.stdin.drain()
        line = await self._line()
        while not line.startswith("{"):
            line = await self._line()
        done = json.loads(line)
        return Throughput(
            seconds=done["seconds"],
            answers=tuple(Answer(tokens, tokens) for tokens in done["tokens"]),
            latencies_s=tuple(done["latencies_s"]),
            failed=0,
        )

    async def _line(self) -> str:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            words = self._log.read_text(errors="replace").strip().splitlines()[-8:]
            raise ProcessFailed(
                f"the bare engine stopped; the end of {self._log}:\n" + "\n".join(words)
            )
        return line.decode().strip()

    async def stop(self) -> None:
        """End its input, and wait until it has gone."""
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self._process.wait()
