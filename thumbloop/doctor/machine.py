"""The machine: GPU, processor, memory, and whether they do for the model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from thumbloop.doctor.findings import Finding, Subject, ok, warning, wrong
from thumbloop.doctor.model import folder_at, weights_in

_TIMEOUT_S = 120
_GIB = 1 << 30
_CPU_INFO, _MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_ASK_TORCH = """
import json, torch
gpu = torch.cuda
there = gpu.is_available()
print(json.dumps([gpu.get_device_name(), gpu.is_bf16_supported(), *gpu.mem_get_info()] if there else None))
"""


def gpu(subject: Subject) -> Finding:
    """Look for a GPU, and whether torch can use it, and vLLM its share of it."""
    if shutil.which("nvidia-smi") is None:
        return ok("gpu", "none; models run on the CPU")
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, timeout=_TIMEOUT_S, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return wrong("gpu", "torch does not load", "set up again with ACCELERATOR=gpu")
    if (about := json.loads(answer.stdout)) is None:
        advice = "install torch and vllm for GPUs: ACCELERATOR=gpu make setup; see the driver"
        return warning("gpu", "nvidia-smi is here, torch finds no GPU", advice)
    name, has_bf16, free, total = about
    if not has_bf16:
        return warning("gpu", f"{name} has no bfloat16", "set engine.dtype: float16")
    found = f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    share = subject.server.engine.gpu_memory_utilization
    if free < share * total:
        advice = "end what else uses it, unless that is Thumbloop itself, or lower engine.gpu_memory_utilization"
        return warning("gpu", f"{found}, the engine takes {share:.0%} of it", advice)
    return ok("gpu", found)


def cpu(_subject: Subject) -> Finding:
    """Look at the processor's instructions."""
    flags = _flags()
    if "avx2" not in flags and shutil.which("nvidia-smi") is None:
        return wrong("cpu", "no AVX2", "vLLM on a CPU needs it: take another machine, or a GPU")
    best = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "none")
    return ok("cpu", f"the best of its instructions are {best}")


def memory(subject: Subject) -> Finding:
    """Compare memory with what server and trainer hold of the model."""
    folder = folder_at(subject.server.model)
    if folder is None:
        return warning("memory", "the model's size is not known", "see model")
    total, available = _memory("MemTotal"), _memory("MemAvailable")
    copies = len(subject.configs) * (1 if _is_float32(folder) else 2)  # float32 on a CPU
    size = copies * sum(file.stat().st_size for file in weights_in(folder))
    needed = size + subject.server.engine.kv_cache_gib * _GIB
    found = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB free, at least {needed / _GIB:.1f} needed"
    if shutil.which("nvidia-smi"):
        return ok("memory", found)
    if needed > total:
        return wrong(
            "memory", found, "a smaller model, a lower engine.kv_cache_gib, or more memory"
        )
    if needed > available:
        return warning("memory", found, "end what else runs here, unless that is Thumbloop itself")
    return ok("memory", found)


def _is_float32(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return True
    return bool(config.get("dtype", config.get("torch_dtype", "float32")) == "float32")


def _flags() -> set[str]:
    for line in _CPU_INFO.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _memory(name: str) -> int:
    """Return a row of the kernel's table, bytes."""
    for line in _MEMORY.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
