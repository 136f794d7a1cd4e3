"""The pages under docs/ keep up with the code."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from server.collectors import CanaryEvidence
from server.metrics import ServerMetrics
from server.performing import OF_THE_SERVER
from thumbloop.config import ServerConfig
from thumbloop.config.reference import reference
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2
from trainer.metrics import TrainerMetrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_SHELL = re.compile(r"^```sh.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_what_readers_write_into_their_checkout_git_leaves_alone():
    """Tokens and users' words among it: one `git add .` would show them to everybody."""
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    blocks = [block for page in pages for block in _SHELL.findall(page.read_text())]
    written = {
        name for block in blocks for name in re.findall(r"(?<![-=])>\s?([\w-]+\.?[\w.-]*)", block)
    }
    assert {"token", "operator.token", "access.yaml", "thumbs.jsonl"} <= written
    asked = ["git", "check-ignore", *written]
    ignored = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert written - set(ignored.stdout.split()) == set()


def test_the_settings_page_is_what_the_settings_say():
    assert (DOCS / "configuration.md").read_text() == reference()


def test_the_examples_of_settings_can_be_set():
    examples = re.findall(r"```yaml\n(.*?)```", (DOCS / "guidance.md").read_text(), re.DOTALL)
    sections = [yaml.safe_load(example) for example in examples]
    assert [list(section) for section in sections] == [["guidance"], ["rewards"]]
    for section in sections:
        ServerConfig(**section)


def test_every_metric_is_explained(tmp_path):
    page = (DOCS / "operations.md").read_text()
    of_server = ServerMetrics().registry
    of_server.register(CanaryEvidence(lambda: None))
    registries = (of_server, TrainerMetrics(tmp_path).registry)
    families = {
        family.name
        for registry in registries
        for family in registry.collect()
        if family.name.startswith(("thumbloop_", "grpc_"))
    }
    assert len(families) > 50
    named = set(re.findall(r"`(\w+?)(?:_total)?(?:\{[^`]*)?`", page))
    assert [name for name in families if name not in named] == []


def test_every_reason_for_which_a_version_is_refused_says_what_to_do():
    page = (DOCS / "operations.md").read_text()
    table = page.partition("## Why a version was rejected")[2].partition("\n## ")[0]
    rows = [line.partition("|")[2].partition("|")[0] for line in table.splitlines()]
    explained = set(re.findall(r"`([a-z_]+)`", " ".join(rows)))
    raised = {
        reason
        for package in ("server", "thumbloop")
        for path in (ROOT / package).rglob("*.py")
        for reason in re.findall(r'BadPolicyVersion\(\s*"([a-z_]+)"', path.read_text())
    }
    assert len(raised) > 25
    assert explained == raised | {"superseded", "parent"}
    assert set(re.findall(r"`([a-z_]+)`\*", " ".join(rows))) == OF_THE_SERVER


@pytest.mark.parametrize("file", [policy_pb2, feedback_pb2, admin_pb2])
def test_every_rpc_is_mentioned(file):
    page = (DOCS / "operations.md").read_text()
    rpcs = [m.name for s in file.DESCRIPTOR.services_by_name.values() for m in s.methods]
    assert [name for name in rpcs if f"`{name}`" not in page] == []


def test_links_in_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
