"""The versions: what the store says of them, and what their folders hold."""

from contextlib import suppress
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from thumbloop import artifacts
from thumbloop.doctor.findings import Finding, Subject, ok, warning, wrong
from thumbloop.errors import BadPolicyVersion, ThumbloopError
from thumbloop.store import inspection, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion

_COPY = "give it back from a copy; thumbloop rollback leads away from one that is damaged"


def current(subject: Subject) -> Finding:
    """Compare every byte of the current version with what was published."""
    rows = _rows(subject)
    if rows is None:
        return _unknown("current version")
    row = next((row for row in rows if row.state == "current"), None)
    if row is None:
        return ok("current version", "none yet")
    folder = _folder(subject, row)
    if row.version == 0 and not folder.exists():
        return ok("current version", "version 0, the base model")
    try:
        manifest = artifacts.read_manifest(folder, row.manifest_digest or None)
        artifacts.verify_files(folder, manifest)
    except BadPolicyVersion as error:
        return wrong("current version", str(error), _COPY)
    return ok("current version", f"version {row.version}, as it was published")


def folders(subject: Subject) -> Finding:
    """Compare the folders of all other versions with their rows."""
    rows = _rows(subject)
    if rows is None:
        return _unknown("versions")
    kept = [row for row in rows if row.version and row.collected_at is None]
    amiss = []
    for row in kept:
        try:
            artifacts.read_manifest(_folder(subject, row), row.manifest_digest)
        except BadPolicyVersion as error:
            amiss.append(str(error))
    if amiss:
        return wrong("versions", "; ".join(amiss), _COPY)
    return ok("versions", f"{len(kept)} beside the base model, each with its folder")


def leftovers(subject: Subject) -> Finding:
    """Look for folders that no row names."""
    rows = _rows(subject)
    if rows is None:
        return _unknown("leftovers")
    known = {f"{row.version:06d}" for row in rows} | {"000000"}
    home = subject.server.state.versions / DEFAULT_POLICY
    found = sorted(p.name for p in home.glob("*") if p.is_dir() and p.name not in known)
    if not found:
        return ok("leftovers", "none")
    numbers = [int(name) for name in found if name.isdigit()]
    if max(numbers, default=0) > max(map(int, known)) + 1:
        return wrong(
            "leftovers",
            f"{', '.join(found)}: of another database",
            "give the folders' own database back, or choose a new state.folder",
        )
    return warning(
        "leftovers", ", ".join(found), "a trainer that starts removes what it left behind"
    )


def _rows(subject: Subject) -> list[PolicyVersion] | None:
    """Return what the store says: nothing where there is none yet, None where it cannot say it."""
    state = subject.server.state
    if state.url is None and not state.database_file.exists():
        return []
    with suppress(ThumbloopError, DBAPIError), inspection.inspecting(state) as connection:
        if inspection.level(connection) == inspection.known_levels()[0]:
            return versions.list_versions(connection, DEFAULT_POLICY, has_metrics=False)
    return None


def _unknown(check: str) -> Finding:
    return warning(check, "the store cannot be asked", "see database")


def _folder(subject: Subject, row: PolicyVersion) -> Path:
    return subject.server.state.versions / row.folder
