"""How far two programs that compute the same model differ, and how surely a step is seen beside that."""

import math
from collections.abc import Sequence

INDISTINCT = 1e-4
"""Differences between two versions' numbers up to this are rounding: the adapter counts as unchanged."""
LEAST_SURENESS, WANTED_SURENESS = 4.0, 7.0
"""What a version has to be told from its parent with, and what rounding's rare outliers do not matter with."""

# Root mean square of what one log-probability or reward differs by between vLLM in that dtype and transformers in
# float32, nats, with some to spare: over 110 probes of each of twelve steps of the demo's model at most 0.033 was found
# in bfloat16, of three of them 0.0025 in float16; in float32 4e-6 in the mean.
_ROUNDING = {"float32": 1e-5, "bfloat16": 3.5e-2, "float16": 5e-3}


def sureness(child: Sequence[float], parent: Sequence[float], engine: str, trainer: str) -> float:
    """Return how many standard deviations an engine's place between two versions' numbers is away from the middle;
    below 0 where even what differs is rounding.

    An engine that computes the child stands at 1 on the way from the parent's numbers (0) to the child's, one that
    computes the parent at 0, both give or take rounding over the step, the Euclidean distance of the two. `engine` and
    `trainer` are dtypes. A trainer's own rounding is in both versions' numbers: of the squared distance of n
    numbers 2 n times its variance is no step, taken twice here, as probes are chosen by what differs most.
    """
    engines, trainers = (
        _ROUNDING.get(dtype, _ROUNDING["bfloat16"]) ** 2 for dtype in (engine, trainer)
    )
    apart = math.dist(child, parent)
    step = apart**2 - 4 * len(child) * trainers
    return step / (2 * apart * math.sqrt(engines + trainers)) if apart else 0.0
