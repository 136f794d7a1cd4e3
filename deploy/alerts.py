"""python -m deploy.alerts: the alerts as Prometheus' operator reads them, a PrometheusRule on stdout."""

import sys
from typing import Any

import yaml

from deploy.observe import RULES

_HEADER = "# Written by scripts/alerts from deploy/prometheus/rules.yml; do not edit.\n"


def prometheus_rule() -> dict[str, Any]:
    """Return our rules as an object of Kubernetes."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "thumbloop"},
        "spec": yaml.safe_load(RULES.read_text()),
    }


if __name__ == "__main__":
    sys.stdout.write(_HEADER)
    yaml.safe_dump(prometheus_rule(), sys.stdout, sort_keys=False, allow_unicode=True, width=120)
