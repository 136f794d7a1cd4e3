"""The dashboard as a file; its queries are run against the demo and a trial, in tests/end_to_end."""

import json
import subprocess

from deploy.panels import ROWS
from tests.prometheus import DASHBOARD, ROOT, queries

WIDTH = 24
ONE_SCREEN = 32  # of Grafana's units, about 1,200 pixels


def test_the_file_is_what_the_code_gives():
    done = subprocess.run(
        [ROOT / "scripts/dashboard", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_that_was_edited_is_noticed(tmp_path):
    for name in ("scripts/dashboard", "deploy/grafana/thumbloop.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "scripts/dashboard").chmod(0o755)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    for name in ("__init__", "dashboard", "panels"):
        (tmp_path / f"deploy/{name}.py").write_bytes((ROOT / f"deploy/{name}.py").read_bytes())
    check = [tmp_path / "scripts/dashboard", "--check"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    edited = (tmp_path / "deploy/grafana/thumbloop.json").read_text().replace("Calls", "Sales", 1)
    (tmp_path / "deploy/grafana/thumbloop.json").write_text(edited)
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run make dashboard" in done.stderr


def test_it_fits_one_screen_and_says_where_its_numbers_come_from():
    board = json.loads(DASHBOARD.read_text())
    panels = board["panels"]
    assert [p["title"] for p in panels if p["type"] == "row"] == [*ROWS]
    places = [p["gridPos"] for p in panels]
    assert max(place["y"] + place["h"] for place in places) <= ONE_SCREEN
    assert max(place["x"] + place["w"] for place in places) == WIDTH
    (source,) = board["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    asked = [t["datasource"]["uid"] for p in panels for t in p.get("targets", ())]
    assert set(asked) == {"${datasource}"}
    assert len(asked) == len(queries()) + len(queries(of_trials=True)) > 35
