"""The alerts, tried by promtool."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.collectors import CanaryEvidence
from server.metrics import ServerMetrics
from tests.prometheus import ROOT, promtool
from trainer.metrics import TrainerMetrics

FOLDER = ROOT / "deploy/prometheus"
RULES = FOLDER / "rules.yml"
CASES = ("rules_test.yml", "rules_slow_test.yml", "rules_days_test.yml")


def rules_of(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule["alert"] for rule in rules_of(RULES)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The rules and their cases, to be broken."""
    return Path(shutil.copytree(FOLDER, tmp_path / "prometheus"))


def test_the_rules_can_be_read():
    checked = promtool("check", "rules", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert len(ALERTS) == len(set(ALERTS)) > 20


@pytest.mark.parametrize("cases", CASES)
def test_each_alert_fires_when_it_should_and_only_then(cases: str):
    tried = promtool("test", "rules", str(FOLDER / cases))
    assert tried.returncode == 0, tried.stdout + tried.stderr


@pytest.mark.parametrize("expression", ["vector(1) > 1", "vector(1)"], ids=["never", "always"])
def test_an_alert_that_never_or_always_fires_is_found_by_its_cases(copy: Path, expression: str):
    rules = copy / RULES.name
    broken = yaml.safe_load(rules.read_text())
    for group in broken["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expression
            rule.pop("for", None)
    rules.write_text(yaml.safe_dump(broken))
    tried = promtool("test", "rules", *(str(copy / cases) for cases in CASES))
    assert tried.returncode == 1
    failed = set(re.findall(r"alertname: (\w+), time", tried.stdout + tried.stderr))
    assert failed == set(ALERTS)


def test_every_alert_has_a_line_in_the_runbook_and_no_other_has():
    page = (ROOT / "docs/operations.md").read_text()
    table = page.partition("## Alerts")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == ALERTS


def test_every_metric_that_an_alert_asks_for_exists(tmp_path: Path):
    of_server = ServerMetrics().registry
    of_server.register(CanaryEvidence(lambda: None))
    registries = (of_server, TrainerMetrics(tmp_path).registry)
    known = {family.name for registry in registries for family in registry.collect()}
    asked = set(re.findall(r"\b(thumbloop_\w+|grpc_server_\w+)", RULES.read_text()))
    assert len(asked) > 20
    assert {
        name for name in asked if re.sub(r"_(total|sum|count|bucket)$", "", name) not in known
    } == set()
