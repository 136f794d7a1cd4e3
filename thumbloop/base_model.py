"""Finding the base model, a folder as it is or a hub id through the hub's own cache; its identity, and the
state folder that is for it alone.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from thumbloop.artifacts import (
    MANIFEST,
    BaseModelIdentity,
    Manifest,
    file_digest,
    folder_of,
    read_manifest,
    write_version,
)
from thumbloop.config import Model
from thumbloop.errors import SettingsError
from thumbloop.folders import make_folder


def locate(model: Model) -> Path:
    """Return the folder of the base model, fetching a hub id first.

    Raises SettingsError: no model is set, the folder is missing, or the hub does not have it.
    """
    if not model.path:
        raise SettingsError(
            "model.path: no model is set; give a folder or a hub id,"
            " or run `make serve`, which builds the demo's"
        )
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") != 1:
        raise SettingsError(f"model.path: there is no folder {model.path}")
    return _fetch(model)


def identify(model: Path) -> BaseModelIdentity:
    """Return the identity of a base model's folder. Raises SettingsError: it is no such folder."""
    if not (model / "config.json").is_file():
        raise SettingsError(
            f"model.path: {model} is no model folder (it has no config.json);"
            " give a folder in Hugging Face layout, or build the demo's with `make demo`"
        )
    weights = [p for p in model.iterdir() if p.suffix == ".safetensors"]
    tokenizer = [p for p in model.iterdir() if p.name.startswith(("tokenizer", "vocab", "merges"))]
    return BaseModelIdentity(
        digest=_digest_of([model / "config.json", *weights]), tokenizer_digest=_digest_of(tokenizer)
    )


def claim_base(versions: Path, policy: str, identity: BaseModelIdentity, at: float) -> None:
    """Write version 0's folder, or check that it names the same base model.

    Server and trainer may start at the same time: one writes, under a lock, the other checks.
    Raises SettingsError: the state belongs to another base model, or cannot be written.
    """
    folder = versions / folder_of(policy, 0)
    try:
        make_folder(versions)
        with (versions / "claim.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / MANIFEST).exists():
                base = Manifest(
                    policy=policy, version=0, parent=None, created_at=at, base_model=identity
                )
                write_version(versions, policy, base.version, lambda _folder: base)
    except OSError as error:
        raise SettingsError(
            f"state.folder: {versions} cannot be written ({error.strerror});"
            " choose a folder this user may write to"
        ) from None
    if read_manifest(folder).base_model != identity:
        raise SettingsError(
            "model.path: this state folder belongs to another base model;"
            " give that one back, or choose a new state.folder"
        )


def _fetch(model: Model) -> Path:
    # Imported here: the wheel does without it, and a folder needs no hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.path, revision=model.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SettingsError(
            f"model.path: {model.path} is no folder, and the hub did not give it:"
            f" {' '.join(str(error).split())[:200]}"
        ) from None


def _digest_of(paths: Iterable[Path]) -> str:
    digests: Mapping[str, str] = {p.name: file_digest(p) for p in sorted(paths)}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
