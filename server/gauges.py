"""What is measured only when somebody looks: gauges that read what parts of the server hold anyway."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from server.admission import Admission
from server.calibration import Calibration
from server.collectors import CanaryEvidence
from server.evidence import Look
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.routes import Routes
from thumbloop.config.server import Checkpoint
from thumbloop.store import GroupWriter


def show_load(
    metrics: ServerMetrics, writer: GroupWriter, lifecycle: Lifecycle, admission: Admission
) -> None:
    """Show what waits and what is in flight."""
    metrics.store_queue.set_function(lambda: writer.waiting)
    metrics.in_flight.set_function(lambda: lifecycle.in_flight)
    metrics.candidates_in_flight.set_function(lambda: admission.candidates)
    metrics.candidates_queued.set_function(lambda: admission.queued)


def show_versions(
    metrics: ServerMetrics, routes: Routes, latest_look: Callable[[], Look | None]
) -> None:
    """Show which version is current, and what the trial beside it says."""
    metrics.version.set_function(routes.current_or_nan)
    metrics.registry.register(CanaryEvidence(latest_look))


def show_pruning(
    metrics: ServerMetrics,
    checkpoints: Sequence[Checkpoint],
    routes: Routes,
    calibration: Calibration,
) -> None:
    """Show what each checkpoint's partial rewards are worth, for the current version."""

    def of_current(of_version: Callable[[int, int], float], checkpoint: int) -> float:
        current = routes.routed.current
        return math.nan if current is None else of_version(current, checkpoint)

    for number, checkpoint in enumerate(checkpoints):
        label = f"{checkpoint.at:g}"
        for gauge, of_version in (
            (metrics.pruning_correlation, calibration.correlation),
            (metrics.pruning_enabled, calibration.is_pruning),
        ):
            gauge.labels(label).set_function(partial(of_current, of_version, number))
