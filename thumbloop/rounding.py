"""How far two programs that compute the same model differ, and how large a step has to be to be seen beside that."""

import math

INDISTINCT = 1e-4
"""Mean distances between adapters' numbers below this are rounding: the adapter counts as unchanged."""

# Root mean square of what one log-probability or reward differs by between vLLM in that dtype and transformers in
# float32, nats: 4e-6, 0.02 to 0.037 and 0.0025 were measured over 1,320 probes of twelve steps of the demo's model.
_ROUNDING = {"float32": 1e-5, "bfloat16": 3.5e-2, "float16": 5e-3}
_LEAST, _SURE = 8.0, 14.0


def least_step(engine: str, trainer: str, count: int) -> float:
    """Return the least Euclidean distance between two versions' numbers, `count` of them, that an engine can prove.

    Where a version stands on the way from its parent (0) to itself (1) is known up to rounding over step. With this
    step the bounds at 0.5 and 1.5 are four standard deviations away. `engine` and `trainer` are dtypes; the
    trainer's own rounding is in the numbers of both versions, so that much of their distance is no step.
    """
    return _step(engine, trainer, count, _LEAST)


def sure_step(engine: str, trainer: str, count: int) -> float:
    """Return a step with which rounding's rare outliers do not matter either: seven standard deviations."""
    return _step(engine, trainer, count, _SURE)


def _step(engine: str, trainer: str, count: int, times: float) -> float:
    engines, trainers = (_ROUNDING.get(dtype, _ROUNDING["bfloat16"]) for dtype in (engine, trainer))
    return math.sqrt(times**2 * (engines**2 + trainers**2) + 2 * count * trainers**2)
