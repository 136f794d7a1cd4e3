"""What users and the reward model say of each version: read from the server's metrics, which hold the latest few."""

from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from thumbloop.errors import Unavailable
from web.tables import Share

_THUMBS = "thumbloop_version_thumb_up_ratio"
_PROMISES = "thumbloop_version_promise_ratio"
_TIMEOUT_S = 5.0


class Liking(NamedTuple):
    """What is known of one version: thumbs up among those that came, and among those that rewards promised."""

    version: int
    thumbs_up: Share | None
    promised: Share | None


def likings_in(metrics: str) -> list[Liking]:
    """Return what a page of metrics says of each version, in their order."""
    sums: dict[tuple[str, int], float] = {}
    counts: dict[tuple[str, int], int] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples if family.name in (_THUMBS, _PROMISES) else ():
            of = (family.name, int(sample.labels["version"]))
            if sample.name.endswith("_sum"):
                sums[of] = sample.value
            elif sample.name.endswith("_count"):
                counts[of] = int(sample.value)
    means = {of: Share(sums[of] / count, count) for of, count in counts.items() if count}
    return [
        Liking(version, means.get((_THUMBS, version)), means.get((_PROMISES, version)))
        for version in sorted({version for _, version in means})
    ]


async def read(address: str) -> list[Liking]:
    """Return what the server's metrics say of each version now. Raises Unavailable."""
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
            answer = await client.get(f"http://{address}/metrics")
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise Unavailable(f"no metrics at {address}: {error}") from error
    return likings_in(answer.text)
