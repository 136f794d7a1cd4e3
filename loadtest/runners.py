"""python -m loadtest.runners: who should run a sequence classifier beside the engine on this machine?

transformers and vLLM's pooling runner read the same replies in turn, in batches of one request's
candidates and in larger ones. docs/decisions/0009 has what came of it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from loadtest import figures, midway
from loadtest.classifier import make_classifier

_READINGS, _REPLY_TOKENS = 256, 32
_SETTLE_S = 1.5

Tokens = list[list[int]]


def by_transformers(folder: Path) -> Callable[[Tokens], object]:
    """Return what reads one batch as the server's own scorer does."""
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    pad = int(model.config.pad_token_id)

    @torch.inference_mode()
    def read(batch: Tokens) -> object:
        width = max(len(row) for row in batch)
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in batch])
        attended = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        return model(input_ids=ids, attention_mask=attended).logits

    return read


def by_vllm(folder: Path, threads: int) -> Callable[[Tokens], object]:
    """Return what reads one batch through vLLM's pooling runner, an engine of its own."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    from vllm import LLM  # seconds of imports, and it reads the environment

    engine = LLM(str(folder), runner="pooling", dtype="float32", disable_log_stats=True)

    def read(batch: Tokens) -> object:
        prompts = [{"prompt_token_ids": row} for row in batch]
        return engine.classify(prompts, use_tqdm=False)

    return read


def rate(read: Callable[[Tokens], object], readings: Tokens, size: int) -> float:
    """Return replies read per second, one batch after the other."""
    time.sleep(_SETTLE_S)
    started = time.perf_counter()
    for start in range(0, len(readings), size):
        read(readings[start : start + size])
    return len(readings) / (time.perf_counter() - started)


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of either.")] = 1,
    folder: Annotated[Path, typer.Option(help="Of `make bench`.")] = Path("runs/bench"),
) -> None:
    """Measure in turn and print rates and their ratio."""
    torch.set_num_threads(threads)
    found = midway.find_or_make(folder / "policy", 0)
    model = make_classifier(found.model, folder / "classifier-model")
    rng = np.random.default_rng(0)
    replies = rng.integers(100, 900, size=(_READINGS, _REPLY_TOKENS)).tolist()
    readings = [[*found.prompts[i % len(found.prompts)], *reply] for i, reply in enumerate(replies)]
    readers = {"transformers": by_transformers(model), "vllm": by_vllm(model, threads)}
    console = Console(highlight=False)
    for size in (8, 32):
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for repeat in range(-1, repeats):
            for name, read in readers.items():
                found_rate = rate(read, readings, size)
                if repeat >= 0:
                    rates[name].append(found_rate)
        ratio = figures.ratio(rates["transformers"], rates["vllm"])
        words = ", ".join(
            f"{name} {figures.of_repeats(of).value:.0f}/s" for name, of in rates.items()
        )
        console.print(
            f"batches of {size}: {words}; transformers over vllm"
            f" {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        )


if __name__ == "__main__":
    typer.run(main)
