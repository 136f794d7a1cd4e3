"""Checks of one adapter before an engine sees it: settings, tensors, norms of what it changes.

Headers are judged before anything is read, so that nothing larger than a right adapter ever is.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from thumbloop import artifacts
from thumbloop.artifacts import AdapterFacts
from thumbloop.config.delivery import Delivery
from thumbloop.errors import BadPolicyVersion

Tensors = Mapping[str, NDArray[np.float32]]
"""By name. NumPy's: torch's products would start threads that spin on the engine's cores."""
Shapes = Mapping[str, tuple[int, int]]  # module name -> (outputs, inputs)
Norms = Mapping[str, float]
"""Frobenius norm of alpha / r * B A, by module."""

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What tensors may be, by their names in safetensors."""

_CHECKED = ("lora_alpha", "peft_type", "r", "target_modules")
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian"),  # others change the base model
}
_OF_NO_EFFECT = (  # on what an adapter's tensors do to the base model
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)
_UNSET: tuple[Any, ...] = (None, False, {}, [])
"""What any other setting may be: vLLM would refuse it or, worse, ignore it, and PEFT would not."""
_LARGEST = 65504.0  # of float16: what is beyond it is infinite in an engine that computes in that
_PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight")


def check(folder: Path, facts: AdapterFacts, shapes: Shapes, *, max_rank: int) -> Norms:
    """Check one adapter's settings and tensors; return its norms. Raises BadPolicyVersion."""
    role, settings = folder.name, _settings(folder)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not 1 <= rank <= max_rank or rank != facts.rank:
        raise BadPolicyVersion("wrong_rank", f"{role}: rank {rank}; engine.max_rank is {max_rank}")
    if alpha != facts.alpha or not 0 < facts.alpha < math.inf:
        raise BadPolicyVersion(
            "wrong_alpha", f"{role}: lora_alpha is {alpha}, the manifest's {facts.alpha:g}"
        )
    targets = _targets(role, settings.get("target_modules"), shapes)
    if targets != _targets(role, list(facts.target_modules), shapes):
        raise BadPolicyVersion("wrong_module", f"{role}: target_modules are not the manifest's")
    tensors = _read(folder, rank, {name: shapes[name] for name in targets})
    return _norms(tensors, settings)


def norms(folder: Path) -> Norms:
    """Return the norms of an adapter that was checked before. Raises BadPolicyVersion."""
    settings = _settings(folder)
    with safe_open(folder / artifacts.WEIGHTS, framework="pt") as file:
        return _norms({name: _values(file, name) for name in file.keys()}, settings)  # noqa: SIM118


def check_norms(role: str, norms: Norms, before: Norms | None, limits: Delivery) -> None:
    """Compare norms with the parent's; None where there is none, 0 of a module that it leaves alone.

    Raises BadPolicyVersion.
    """
    for module, norm in norms.items():
        bound = limits.max_update_norm
        if before is not None:
            grown = max(before.get(module, 0.0), limits.small_update_norm)
            bound = min(bound, limits.max_norm_factor * grown)
        if not norm <= bound:
            raise BadPolicyVersion(
                "too_large", f"{role}: {module} has norm {norm:.3g}, the bound is {bound:.3g}"
            )


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / artifacts.ADAPTER_CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadPolicyVersion("adapter_config", f"{folder.name}: {error}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise BadPolicyVersion("adapter_config", f"{folder.name}: is not a LoRA adapter")
    for name in sorted(settings.keys() - {*_CHECKED, *_OF_NO_EFFECT}):
        if settings[name] not in _ALLOWED.get(name, _UNSET):
            raise BadPolicyVersion("adapter_config", f"{folder.name}: {name} is not supported")
    return settings


def _targets(role: str, entries: object, shapes: Shapes) -> set[str]:
    """Return the modules that a list of whole names or their last parts means."""
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise BadPolicyVersion("wrong_module", f"{role}: target_modules is no list of names")
    found: set[str] = set()
    for entry in entries:
        fitting = {name for name in shapes if f".{name}".endswith(f".{entry}")}
        if not entry or not fitting:
            raise BadPolicyVersion("wrong_module", f"{role}: {entry} fits no module")
        found |= fitting
    return found


def _read(folder: Path, rank: int, shapes: Shapes) -> Tensors:
    """Return an adapter's tensors, read after their header has been found right."""
    role = folder.name
    try:
        with safe_open(folder / artifacts.WEIGHTS, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            _check_names(role, headers.keys(), shapes)
            for name, header in headers.items():
                _check_header(role, name, header.get_shape(), header.get_dtype(), rank, shapes)
            tensors = {name: _values(file, name) for name in headers}
    except (SafetensorError, OSError) as error:
        raise BadPolicyVersion("not_safetensors", f"{role}: {error}") from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise BadPolicyVersion("not_finite", f"{role}: {name} holds NaN or infinity")
        if (largest := float(np.abs(tensor).max())) > _LARGEST:
            raise BadPolicyVersion("too_large", f"{role}: {name} holds {largest:.3g}")
    return tensors


def _check_names(role: str, names: Iterable[str], shapes: Shapes) -> None:
    found = set(names)
    wanted = {f"{_PREFIX}{name}.{part}" for name in shapes for part in _PARTS}
    if strange := sorted(found - wanted):
        raise BadPolicyVersion("wrong_module", f"{role}: {strange[0]} fits no module")
    if not found:
        raise BadPolicyVersion("empty_adapter", f"{role}: holds no tensors")
    halves = {name.rpartition(".lora_")[0] for name in found}
    if missing := sorted({f"{m}.{part}" for m in halves for part in _PARTS} - found):
        raise BadPolicyVersion("wrong_module", f"{role}: {missing[0]} is missing")


def _check_header(
    role: str, name: str, shape: list[int], dtype: str, rank: int, shapes: Shapes
) -> None:
    module, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
    outputs, inputs = shapes[module]
    if shape != ([rank, inputs] if part.startswith("A") else [outputs, rank]):
        raise BadPolicyVersion("wrong_shape", f"{role}: {name} is {shape}")
    if dtype not in DTYPES:
        raise BadPolicyVersion("wrong_dtype", f"{role}: {name} is {dtype}")


def _values(file: Any, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = file.get_tensor(name).float().numpy()
    return values


def _norms(tensors: Tensors, settings: Mapping[str, Any]) -> Norms:
    """Return the Frobenius norm of alpha / r * B A for each module."""
    scale = float(settings["lora_alpha"]) / int(settings["r"])
    norms: dict[str, float] = {}
    for name, a in tensors.items():
        if name.endswith(_PARTS[0]):
            module = name.removesuffix(f".{_PARTS[0]}")
            b = tensors[f"{module}.{_PARTS[1]}"]
            squared = float(((b.T @ b) * (a @ a.T)).sum())  # trace((BA)^T BA), without forming BA
            norms[module] = scale * math.sqrt(max(squared, 0.0))
    return norms
