"""The base model: whether its folder is whole, and the one that the state belongs to."""

from pathlib import Path

from thumbloop.artifacts import MANIFEST, folder_of, read_manifest
from thumbloop.base_model import identify
from thumbloop.config import Model
from thumbloop.doctor.findings import Finding, Subject, ok, warning, wrong
from thumbloop.errors import BadPolicyVersion
from thumbloop.types import DEFAULT_POLICY

_LAYOUT = "give a folder in Hugging Face layout: config.json, tokenizer, *.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def model(subject: Subject) -> Finding:
    """Look at the folder of the base model."""
    path = subject.server.model.path
    folder = folder_at(subject.server.model)
    if not path:
        fix = (
            "--config, or THUMBLOOP_SERVER_MODEL__PATH; make serve sets the demo's for itself alone"
        )
        return wrong("model", "none is set", fix)
    if folder is None:
        is_id = path.count("/") == 1 and not path.startswith((".", "~", "/"))
        if is_id:
            return warning("model", f"{path} is an id of the hub", "needs the network at the start")
        return wrong("model", f"there is no folder {path}", _LAYOUT)
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    missing += [] if any((folder / n).is_file() for n in _TOKENIZERS) else ["a tokenizer"]
    missing += [] if weights_in(folder) else ["*.safetensors"]
    if missing:
        return wrong("model", f"{folder} lacks {', '.join(missing)}", _LAYOUT)
    size = sum(file.stat().st_size for file in weights_in(folder))
    return ok("model", f"{folder}, {size / 1e6:.0f} MB of weights")


def base(subject: Subject) -> Finding:
    """Compare the model with that of the versions, by the digests of its files."""
    folder = folder_at(subject.server.model)
    claimed = subject.server.state.versions / folder_of(DEFAULT_POLICY, 0)
    if folder is None or not (folder / "config.json").is_file():
        return warning("base model", "there is no folder to compare", "see model")
    if not (claimed / MANIFEST).exists():
        return ok("base model", "no version yet")
    try:
        is_same = read_manifest(claimed).base_model == identify(folder)
    except BadPolicyVersion as error:
        return wrong("base model", str(error), "give version 0 back from a copy")
    if not is_same:
        return wrong(
            "base model",
            "the state folder belongs to another one",
            "give that model back, or choose a new state.folder",
        )
    return ok("base model", "that of the versions")


def folder_at(model: Model) -> Path | None:
    """Return the model's folder, None where it is none."""
    folder = Path(model.path).expanduser()
    return folder if model.path and folder.is_dir() else None


def weights_in(folder: Path) -> list[Path]:
    """Return the files of weights."""
    return sorted(folder.glob("*.safetensors"))
