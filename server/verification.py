"""Checks of a published version's files, outside the engine: nothing unsafe is ever loaded.

A NaN or a huge adapter poisons other requests of the batch, so tensors are read and judged first.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from thumbloop import artifacts
from thumbloop.artifacts import AdapterFacts, BaseModelIdentity, Manifest
from thumbloop.config.delivery import Delivery
from thumbloop.errors import BadPolicyVersion
from thumbloop.rendering import VerdictTokens
from thumbloop.types import PolicyVersion

Tensors = Mapping[str, NDArray[np.float32]]
"""By name. NumPy's: torch's products would start threads that spin on the engine's cores."""
Shapes = Mapping[str, tuple[int, int]]  # module name -> (outputs, inputs)

_FORBIDDEN: dict[
    str, tuple[Any, ...]
] = {  # what vLLM would refuse or, worse, ignore: setting -> the only value allowed
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}
_PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight")


class Expected(NamedTuple):
    """What a version has to fit: this server's base model, verdict tokens and largest rank."""

    base_model: BaseModelIdentity
    verdict: VerdictTokens
    shapes: Shapes
    max_rank: int


def verify(
    versions: Path,
    version: PolicyVersion,
    parent: Path | None,
    expected: Expected,
    limits: Delivery,
) -> Manifest:
    """Check files, identity and tensors of a version; return its manifest.

    `parent` is the parent's folder, None when that is the base model.
    Raises BadPolicyVersion with a stable reason word.
    """
    folder = versions / version.folder
    manifest = artifacts.read_manifest(folder, version.manifest_digest)
    artifacts.verify_files(folder, manifest)
    _check_identity(version, manifest, expected)
    for role, facts in _adapters(manifest):
        norms = _check_adapter(folder / role, facts, expected)
        before = _norms(_read(parent / role), _settings(parent / role)) if parent else {}
        _check_norms(role, norms, before, limits)
    return manifest


def _adapters(manifest: Manifest) -> list[tuple[str, AdapterFacts]]:
    pairs = (
        (artifacts.POLICY, manifest.policy_adapter),
        (artifacts.REWARD, manifest.reward_adapter),
    )
    for role, facts in pairs:
        if facts is None:
            raise BadPolicyVersion("adapter_missing", f"the manifest has no {role} adapter")
    return [(role, facts) for role, facts in pairs if facts is not None]


def _check_identity(version: PolicyVersion, manifest: Manifest, expected: Expected) -> None:
    if (manifest.policy, manifest.version, manifest.parent) != (
        version.policy,
        version.version,
        version.parent,
    ):
        raise BadPolicyVersion("wrong_version", "the manifest is another version's")
    if manifest.base_model != expected.base_model:
        raise BadPolicyVersion("wrong_base_model", "it was trained on another base model")
    verdict, ours = manifest.verdict, expected.verdict
    if verdict is None or (verdict.prompt, verdict.up, verdict.down) != (
        ours.prompt,
        ours.up,
        ours.down,
    ):
        raise BadPolicyVersion("wrong_verdict", "its reward model answers another question")


def _check_adapter(folder: Path, facts: AdapterFacts, expected: Expected) -> dict[str, float]:
    """Check one adapter's settings and tensors; return the norm of each module's update."""
    weights = folder / artifacts.WEIGHTS
    if not weights.is_file() or artifacts.file_digest(weights) != facts.digest:
        raise BadPolicyVersion("wrong_digest", f"{folder.name}: not the weights of the manifest")
    settings = _settings(folder)
    rank = settings.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= expected.max_rank or rank != facts.rank:
        raise BadPolicyVersion(
            "wrong_rank", f"{folder.name}: rank {rank}; engine.max_rank is {expected.max_rank}"
        )
    if settings.get("lora_alpha") != facts.alpha:
        raise BadPolicyVersion(
            "wrong_alpha", f"{folder.name}: lora_alpha is not the manifest's {facts.alpha:g}"
        )
    tensors = _read(folder)
    _check_tensors(folder.name, tensors, rank, expected.shapes)
    return _norms(tensors, settings)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / artifacts.ADAPTER_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise BadPolicyVersion("adapter_config", f"{folder.name}: {error}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise BadPolicyVersion("adapter_config", f"{folder.name}: is not a LoRA adapter")
    for name, allowed in _FORBIDDEN.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise BadPolicyVersion("adapter_config", f"{folder.name}: {name} is not supported")
    return settings


def _check_tensors(role: str, tensors: Tensors, rank: int, shapes: Shapes) -> None:
    wanted = {f"{_PREFIX}{name}.{part}" for name in shapes for part in _PARTS}
    if strange := sorted(tensors.keys() - wanted):
        raise BadPolicyVersion("wrong_module", f"{role}: {strange[0]} fits no module")
    if not tensors:
        raise BadPolicyVersion("empty_adapter", f"{role}: holds no tensors")
    halves = {name.rpartition(".lora_")[0] for name in tensors}
    if missing := sorted({f"{m}.{part}" for m in halves for part in _PARTS} - tensors.keys()):
        raise BadPolicyVersion("wrong_module", f"{role}: {missing[0]} is missing")
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
        outputs, inputs = shapes[module]
        shape = (rank, inputs) if part.startswith("A") else (outputs, rank)
        if tensor.shape != shape:
            raise BadPolicyVersion("wrong_shape", f"{role}: {name} is {tensor.shape}")
        if not np.isfinite(tensor).all():
            raise BadPolicyVersion("not_finite", f"{role}: {name} holds NaN or infinity")


def _read(folder: Path) -> Tensors:
    try:
        with safe_open(folder / artifacts.WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadPolicyVersion("not_safetensors", f"{folder.name}: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise BadPolicyVersion("wrong_dtype", f"{folder.name}: {name} is {tensor.dtype}")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _norms(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, float]:
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


def _check_norms(
    role: str, norms: Mapping[str, float], before: Mapping[str, float], limits: Delivery
) -> None:
    for module, norm in norms.items():
        bound = limits.max_update_norm
        if module in before:
            grown = limits.max_norm_factor * max(before[module], limits.small_update_norm)
            bound = min(bound, grown)
        if not norm <= bound:
            raise BadPolicyVersion(
                "too_large", f"{role}: {module} has norm {norm:.3g}, the bound is {bound:.3g}"
            )
