"""Copies of versions for others: what PEFT and vLLM load, unchanged, and a card that says what it is."""

import json
import os
import shutil
from pathlib import Path

from sqlalchemy import Connection, Engine

from thumbloop import artifacts, leases, lines
from thumbloop.artifacts import ADAPTER_CONFIG, POLICY, REWARD, WEIGHTS, Manifest
from thumbloop.errors import (
    BadDataFile,
    BadPolicyVersion,
    PolicyVersionUnavailable,
    UnknownPolicyVersion,
)
from thumbloop.folders import sync
from thumbloop.model_card import Subject, model_card
from thumbloop.store import lineage, reading, versions
from thumbloop.types import BASE_VERSION, PolicyVersion

CARD = "README.md"
_PLACES = {
    f"{POLICY}/{ADAPTER_CONFIG}": ADAPTER_CONFIG,
    f"{POLICY}/{WEIGHTS}": WEIGHTS,
    f"{REWARD}/{ADAPTER_CONFIG}": f"{REWARD}/{ADAPTER_CONFIG}",
    f"{REWARD}/{WEIGHTS}": f"{REWARD}/{WEIGHTS}",
}
"""Where a version's files go in a copy: the policy adapter, which others look for, to the top."""


def copy_version(
    store: Engine, folders: Path, policy: str, number: int, to: Path, base_model: str = ""
) -> PolicyVersion:
    """Copy a version's adapters into a new folder, whole or not at all, with a model card; return the version.

    `folders` holds all versions' folders; `base_model` is what others call the base model, where that is not what
    the adapter says. Raises UnknownPolicyVersion. PolicyVersionUnavailable: its folder was deleted, or it has no
    adapter. BadPolicyVersion: its folder is not what was published. BadDataFile: `to` is there already, or cannot
    be written. StoreUnavailable.
    """
    with reading(store) as connection:
        version = _find(connection, policy, number)
        known = versions.list_versions(connection, policy)
        used = lineage.inputs_behind(connection, policy, number)
    folder = folders / version.folder
    with leases.hold(folder):
        manifest = artifacts.read_manifest(folder, version.manifest_digest)
        artifacts.verify_files(folder, manifest)
        name = base_model or _base_model(folder)
        card = model_card(Subject(version, manifest, list(lines.line(known, version)), used, name))
        try:
            _copy(folder, manifest, card, to)
        except OSError as error:
            raise BadDataFile(f"{to} cannot be written: {error.strerror or error}") from None
    return version


def _find(connection: Connection, policy: str, number: int) -> PolicyVersion:
    version = versions.get(connection, policy, number)
    if version is None:
        raise UnknownPolicyVersion(f"there is no version {number}")
    if version.version == BASE_VERSION:
        raise PolicyVersionUnavailable("version 0 is the base model: it has no adapter to copy")
    if version.collected_at is not None:
        raise PolicyVersionUnavailable(f"the folder of version {number} was deleted to save space")
    return version


def _base_model(folder: Path) -> str:
    """Return what the adapter calls its base model, empty where that is a place on this machine."""
    config = json.loads((folder / POLICY / ADAPTER_CONFIG).read_bytes())
    name = config.get("base_model_name_or_path")
    is_hub_id = (
        isinstance(name, str) and name.count("/") <= 1 and not name.startswith(("/", ".", "~"))
    )
    return name if is_hub_id else ""


def _copy(folder: Path, manifest: Manifest, card: str, to: Path) -> None:
    """Write the copy beside its place, then move it there. Raises OSError, BadDataFile, BadPolicyVersion."""
    if to.exists() or to.is_symlink():
        raise BadDataFile(f"{to} is there already; name a folder that is not")
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / REWARD).mkdir(parents=True)
    try:
        for source, place in _PLACES.items():
            shutil.copyfile(folder / source, temporary / place)
            _check(temporary / place, source, manifest)
        (temporary / CARD).write_text(card, encoding="utf-8")
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        temporary.rename(to)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(to.parent)


def _check(path: Path, source: str, manifest: Manifest) -> None:
    """Raise BadPolicyVersion: a copy is not what was published."""
    if artifacts.file_digest(path) != manifest.files.get(source):
        raise BadPolicyVersion("file_altered", f"{source} changed while it was copied")
