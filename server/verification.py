"""Checks of a published version's files, outside the engine: nothing unsafe is ever loaded.

A NaN or a huge adapter poisons other requests of the batch, so tensors are read and judged first.
"""

from pathlib import Path
from typing import NamedTuple

from server import adapters
from server.adapters import DTYPES, Norms, Shapes
from thumbloop import artifacts
from thumbloop.artifacts import AdapterFacts, BaseModelIdentity, Manifest
from thumbloop.config.delivery import Delivery
from thumbloop.errors import BadPolicyVersion
from thumbloop.leases import hold
from thumbloop.rendering import VerdictTokens
from thumbloop.types import PolicyVersion

_FILES = frozenset(
    f"{role}/{name}"
    for role in (artifacts.POLICY, artifacts.REWARD)
    for name in (artifacts.ADAPTER_CONFIG, artifacts.WEIGHTS)
)


class Expected(NamedTuple):
    """What a version has to fit: this server's base model, verdict tokens and largest rank."""

    base_model: BaseModelIdentity
    verdict: VerdictTokens
    shapes: Shapes
    max_rank: int


def verify(
    versions: Path,
    version: PolicyVersion,
    parent: PolicyVersion | None,
    expected: Expected,
    limits: Delivery,
) -> Manifest:
    """Check files, identity and tensors of a version; return its manifest.

    `parent` is what its norms are compared with, None for the base model and for a version that served
    before: its bytes, as the manifest's digest says, were compared with the parent's then.
    Raises BadPolicyVersion with a stable reason word.
    """
    folder = find_folder(versions, version)
    manifest = artifacts.read_manifest(folder, version.manifest_digest)
    artifacts.verify_files(folder, manifest)
    _check_files(manifest)
    _check_identity(version, manifest, expected)
    norms = {
        role: adapters.check(folder / role, facts, expected.shapes, max_rank=expected.max_rank)
        for role, facts in _adapters(manifest).items()
    }
    before = _norms_of_parent(versions, parent) if parent else {}
    for role in norms:
        adapters.check_norms(role, norms[role], before.get(role), limits)
    return manifest


def find_folder(versions: Path, version: PolicyVersion) -> Path:
    """Return the folder that the row names, which nothing leads out of. Raises BadPolicyVersion."""
    folder = versions / version.folder
    if ".." in folder.parts or not folder.is_relative_to(versions):
        raise BadPolicyVersion("wrong_folder", f"{version.folder} leads out of the versions")
    if folder.is_symlink():
        raise BadPolicyVersion("link", f"{folder.name} is a link")
    return folder


def _check_files(manifest: Manifest) -> None:
    """Refuse what no part of a version reads, though the manifest lists it: weights in other formats, code."""
    of_value = f"{artifacts.VALUE}/"
    for name in sorted(manifest.files.keys() - _FILES):
        if not (name.startswith(of_value) and name.endswith(".safetensors")):
            raise BadPolicyVersion("extra_file", f"the manifest lists {name}, which nothing reads")


def _adapters(manifest: Manifest) -> dict[str, AdapterFacts]:
    pair = {artifacts.POLICY: manifest.policy_adapter, artifacts.REWARD: manifest.reward_adapter}
    for role, facts in pair.items():
        if facts is None:
            raise BadPolicyVersion("adapter_missing", f"the manifest has no {role} adapter")
    return {role: facts for role, facts in pair.items() if facts is not None}


def _check_identity(version: PolicyVersion, manifest: Manifest, expected: Expected) -> None:
    if (manifest.policy, manifest.version, manifest.parent) != (
        version.policy,
        version.version,
        version.parent,
    ):
        raise BadPolicyVersion("wrong_version", "the manifest is another version's")
    if manifest.base_model.digest != expected.base_model.digest:
        raise BadPolicyVersion("wrong_base_model", "it was trained on another base model")
    if manifest.base_model != expected.base_model:
        raise BadPolicyVersion("wrong_tokenizer", "it was trained with another tokenizer")
    verdict, ours = manifest.verdict, expected.verdict
    if verdict is None or (verdict.prompt, verdict.up, verdict.down) != (
        ours.prompt,
        ours.up,
        ours.down,
    ):
        raise BadPolicyVersion("wrong_verdict", "its reward model answers another question")
    if manifest.dtype not in DTYPES.values():
        raise BadPolicyVersion("wrong_dtype", f"it was trained in {manifest.dtype}")
    said = {artifacts.POLICY: version.policy_digest, artifacts.REWARD: version.reward_digest}
    for role, facts in _adapters(manifest).items():
        files = manifest.files.get(f"{role}/{artifacts.WEIGHTS}")
        if not said[role] == facts.digest == files:
            raise BadPolicyVersion(
                "wrong_digest", f"{role}: store, manifest and weights have different digests"
            )


def _norms_of_parent(versions: Path, parent: PolicyVersion) -> dict[str, Norms]:
    """Return the norms of each role, of what was published as the parent and nothing else."""
    folder = find_folder(versions, parent)
    try:
        with hold(folder):
            artifacts.verify_files(folder, artifacts.read_manifest(folder, parent.manifest_digest))
            return {r: adapters.norms(folder / r) for r in (artifacts.POLICY, artifacts.REWARD)}
    except BadPolicyVersion as error:
        raise BadPolicyVersion("parent_damaged", f"version {parent.version}: {error}") from None
