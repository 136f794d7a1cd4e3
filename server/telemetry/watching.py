"""Whether requests are traced: what answers them as it is, or with spans around it."""

from server.telemetry.unwatched import Unwatched
from thumbloop.config.tracing import Tracing
from thumbloop.errors import SettingsError


def watch(settings: Tracing) -> Unwatched:
    """Return who watches. Raises SettingsError: traces are wanted, and OpenTelemetry is not installed."""
    if not settings.enabled:
        return Unwatched()
    try:
        from server.telemetry.watched import Watched  # nothing of it is needed without traces
    except ImportError as error:
        raise SettingsError(
            f"tracing.enabled: {error.name} is not installed; install the extra: thumbloop[tracing]"
        ) from None
    return Watched(settings)
