"""Where versions come from, as operators see it: rows and manifests -> protocol buffers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from server.answers import step_of
from thumbloop import artifacts, lines
from thumbloop.errors import BadPolicyVersion
from thumbloop.store import deployments, lineage, versions
from thumbloop.store.lineage import Inputs
from thumbloop.types import PolicyVersion, User
from thumbloop.v1 import admin_pb2


def lineage_of(
    connection: Connection, known: Sequence[PolicyVersion], version: PolicyVersion, folder: Path
) -> admin_pb2.Lineage:
    """Return what a version and its ancestors learned from; `folder` holds all versions' folders."""
    used = lineage.inputs_behind(connection, version.policy, version.version)
    line = list(lines.line(known, version))
    firsts = [each.first_feedback_id for each in line if each.first_feedback_id]
    return admin_pb2.Lineage(
        line=[step_of(each, used.get(each.round_id or "", Inputs())) for each in line],
        feedback_count=sum(each.feedback_count for each in line),
        first_feedback_id=min(firsts, default=0),
        last_feedback_id=max(each.last_feedback_id for each in line),
        settings_json=_settings_json(connection, folder, version),
    )


def _settings_json(connection: Connection, folder: Path, version: PolicyVersion) -> str | None:
    """Return the settings that a version was trained with; None: it was not, or its folder is damaged."""
    if version.round_id is None:
        return None
    settings: Mapping[str, Any] | None
    try:
        manifest = artifacts.read_manifest(folder / version.folder, version.manifest_digest)
    except BadPolicyVersion:
        settings = deployments.settings_of_collected(connection, version.policy, version.version)
    else:
        settings = manifest.settings
    return None if settings is None else json.dumps(settings, sort_keys=True)


def influence_of(
    connection: Connection, policy: str, user: User
) -> admin_pb2.GetUserLineageResponse:
    """Return which versions learned from a user, and which grew from them."""
    learned = lineage.learned_from(connection, policy, user)
    known = versions.list_versions(connection, policy, has_metrics=False)
    return admin_pb2.GetUserLineageResponse(
        learned=[
            admin_pb2.UserInfluence(
                policy_version=version,
                thumbs=used.thumbs,
                preferences=used.preferences,
                replies=used.replies,
            )
            for version, used in learned.items()
        ],
        descendants=lines.descendants(known, learned),
    )
