"""Immutable version folders: write, verify, open.

    versions/<policy>/<000042>/manifest.json    what is inside, and what to expect of it
                               policy/ reward/  adapters in PEFT's own layout
                               value/           the critic; the trainer's own

A folder is written under a temporary name, synced and renamed; it is visible once its row is in the
store. Nothing is ever written into it again.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from thumbloop.errors import BadPolicyVersion, SettingsError
from thumbloop.folders import make_folder, sync
from thumbloop.types import PolicyVersion

MANIFEST = "manifest.json"
POLICY = "policy"
REWARD = "reward"
VALUE = "value"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MOST_PROBES = 64
"""Of a version: they are read before users' requests."""

_COLLECTED = re.compile(r"\.\d{6,}\.collected")
_OURS = re.compile(r"\d{6,}|\.\d{6,}\.\d+\.tmp")
"""Names that a writer gives, before and after the rename; whatever else lies there is somebody's."""


class Strict(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelIdentity(Strict):
    """Which base model a version belongs to: sha256 of its config and weights, and of its tokenizer."""

    digest: str
    tokenizer_digest: str


class VerdictIdentity(Strict):
    """The reward model's question and answers, token ids."""

    prompt: tuple[int, ...]
    up: int
    down: int


class AdapterFacts(Strict):
    """One adapter of a version.

    `distance` is the mean absolute difference from the parent's numbers over all probes
    (log-probabilities in nats for the policy, logits for the reward model); None when unchanged.
    """

    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    distance: float | None


class Probe(Strict):
    """A synthetic sequence and the trainer's own numbers for it.

    `continuation` is what the child decodes greedily after `prompt`; `logprobs` and
    `parent_logprobs` are its tokens' log-probabilities at temperature 1 under child and parent.
    `reward` and `parent_reward` are those of `continuation` as a reply to `prompt`; a parent without a
    reward adapter reads as the base model does. None in versions of releases that left that out.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    logprobs: tuple[float, ...]
    parent_logprobs: tuple[float, ...]
    reward: float
    parent_reward: float | None


class Lineage(Strict):
    """Where a version comes from."""

    round_id: str
    feedback_count: int = 0
    first_feedback_id: int = 0
    last_feedback_id: int = 0
    rollout_candidates: int = 0


class Manifest(Strict):
    """What a version folder holds, and what to expect of it."""

    format: int = 1
    policy: str
    version: int
    parent: int | None
    created_at: float
    base_model: BaseModelIdentity
    verdict: VerdictIdentity | None = None
    dtype: str = "float32"
    policy_adapter: AdapterFacts | None = None
    reward_adapter: AdapterFacts | None = None
    probes: tuple[Probe, ...] = ()
    lineage: Lineage | None = None
    settings: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    files: dict[str, str] = {}


class WrittenVersion(NamedTuple):
    """A folder that is complete on disk: its path relative to the versions folder, and digests."""

    folder: str
    manifest: Manifest
    manifest_digest: str

    def row(self) -> PolicyVersion:
        """Return what the store says of it, as of now; not of version 0, which nobody trained."""
        of = self.manifest
        assert of.lineage is not None
        assert of.policy_adapter is not None
        assert of.reward_adapter is not None
        return PolicyVersion(
            policy=of.policy,
            version=of.version,
            parent=of.parent,
            folder=self.folder,
            policy_digest=of.policy_adapter.digest,
            reward_digest=of.reward_adapter.digest,
            manifest_digest=self.manifest_digest,
            published_at=time(),
            round_id=of.lineage.round_id,
            feedback_count=of.lineage.feedback_count,
            first_feedback_id=of.lineage.first_feedback_id,
            last_feedback_id=of.lineage.last_feedback_id,
            metrics=of.metrics,
        )


def folder_of(policy: str, version: int) -> str:
    """Return a version's folder, relative to the folder of versions."""
    return f"{policy}/{version:06d}"


def write_version(
    versions: Path, policy: str, version: int, fill: Callable[[Path], Manifest]
) -> WrittenVersion:
    """Write a version folder: `fill` puts its files into the folder it is given, and describes them.

    Digests of all files are added to the manifest, and all is synced to disk before the rename. A folder
    that is there is never replaced, as a row may name it: remove_unpublished() makes room for the number
    that a killed writer had. Raises OSError: the disk is full or not writable, or there is such a folder.
    """
    relative = folder_of(policy, version)
    final = versions / relative
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(final.parent)
    temporary.mkdir()
    try:
        manifest, digest = _seal(temporary, fill(temporary))
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room at once
        raise
    sync(final.parent)
    return WrittenVersion(relative, manifest, digest)


def _seal(folder: Path, manifest: Manifest) -> tuple[Manifest, str]:
    """Write the manifest beside the files it names, sync everything; return it and its digest."""
    complete = manifest.model_copy(update={"files": _digests(folder)})
    data = complete.model_dump_json(indent=1).encode()
    (folder / MANIFEST).write_bytes(data)
    for path in [*_files(folder), *_folders(folder)]:
        sync(path)
    return complete, hashlib.sha256(data).hexdigest()


def discard(versions: Path, written: WrittenVersion) -> None:
    """Remove a folder that was written and never published, unless another's has its place."""
    folder = versions / written.folder
    with suppress(BadPolicyVersion):
        read_manifest(folder, written.manifest_digest)
        shutil.rmtree(folder, ignore_errors=True)  # what is left goes with remove_unpublished()


def read_manifest(folder: Path, expected_digest: str | None = None) -> Manifest:
    """Return a folder's manifest. Raises BadPolicyVersion: missing, altered or malformed."""
    if (folder / MANIFEST).is_fifo():  # nobody may ever write into it
        raise BadPolicyVersion("manifest_missing", f"{folder.name}: {MANIFEST} is a pipe")
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BadPolicyVersion("manifest_missing", f"{folder.name}: {error.strerror}") from None
    if expected_digest is not None and hashlib.sha256(data).hexdigest() != expected_digest:
        raise BadPolicyVersion("manifest_altered", f"{folder.name}: the store has another digest")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise BadPolicyVersion("manifest_malformed", f"{folder.name}: {error}") from None


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Check that the folder holds exactly the manifest's files, unaltered, and no links.

    Raises BadPolicyVersion with the reason `link`, `extra_file`, `file_missing`,
    `file_unreadable` or `file_altered`.
    """
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise BadPolicyVersion("link", f"{folder.name} holds the link {path.name}")
        if not (path.is_file() or path.is_dir()):
            raise BadPolicyVersion("extra_file", f"{folder.name} holds {path.name}, no plain file")
    found = {name for name in _names(folder) if name != MANIFEST}
    if extra := sorted(found - manifest.files.keys()):
        raise BadPolicyVersion("extra_file", f"{folder.name} holds {extra[0]}, not in its manifest")
    if missing := sorted(manifest.files.keys() - found):
        raise BadPolicyVersion("file_missing", f"{folder.name} lacks {missing[0]}")
    for name, digest in manifest.files.items():
        try:
            found_digest = file_digest(folder / name)
        except OSError as error:
            raise BadPolicyVersion("file_unreadable", f"{name}: {error.strerror}") from None
        if found_digest != digest:
            raise BadPolicyVersion("file_altered", f"{folder.name}: {name} is not what was written")


def verify(folder: Path, manifest_digest: str, base: BaseModelIdentity) -> None:
    """Check that a folder is what was published, and of this base model. Raises BadPolicyVersion."""
    manifest = read_manifest(folder, manifest_digest)
    verify_files(folder, manifest)
    if manifest.base_model != base:
        raise BadPolicyVersion(
            "wrong_base_model", f"{folder.name} was trained on another base model than model.path"
        )


def remove_unpublished(versions: Path, policy: str, published: Iterable[int]) -> list[str]:
    """Remove folders that a killed writer left behind; return their names.

    Only the one process that writes versions may call it, and not while it writes. A killed writer leaves
    nothing beyond the next number. Raises SettingsError: there is more, so the store that the versions were
    read from is not the one that these folders belong to; nothing is removed then.
    """
    rows = set(published)
    keep = {f"{version:06d}" for version in rows}
    folder = versions / policy
    orphans = [
        p for p in folder.glob("*") if p.is_dir() and p.name not in keep and _OURS.fullmatch(p.name)
    ]
    beyond = [
        p.name for p in orphans if p.name.isdigit() and int(p.name) > max(rows, default=0) + 1
    ]
    if beyond:
        raise SettingsError(
            f"state: {folder} holds version {max(beyond)}, of which the store knows nothing;"
            " give the folder's own database back, or choose a new state.folder"
        )
    for orphan in orphans:
        shutil.rmtree(orphan)
    return sorted(orphan.name for orphan in orphans)


def set_aside(versions: Path, policy: str, version: int) -> int:
    """Take a version's folder out of everybody's sight, for sweep() to remove; return its size in bytes.

    It goes at once, and for good before any of it is removed. Raises OSError.
    """
    folder = versions / folder_of(policy, version)
    if not folder.exists():
        return 0
    size_bytes = sum(path.lstat().st_size for path in folder.rglob("*"))
    folder.rename(folder.with_name(f".{folder.name}.collected"))
    sync(folder.parent)
    return size_bytes


def sweep(versions: Path, policy: str) -> None:
    """Remove what was set aside, now or before a crash; what does not go stays for the next time."""
    for path in (versions / policy).glob(".*"):
        if _COLLECTED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def file_digest(path: Path) -> str:
    """Return a file's sha256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in sorted(_names(folder))}


def _names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def _folders(folder: Path) -> list[Path]:
    return [folder, *(p for p in folder.rglob("*") if p.is_dir())]
