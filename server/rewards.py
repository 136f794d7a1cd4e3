"""Settings -> scorers: what candidates are ranked by."""

from collections.abc import Mapping
from pathlib import Path

from server.engine import Engine
from server.scoring import FormatScorer, LengthScorer, Mixture, Scorer, VerdictScorer, Weighted
from thumbloop.config.shared import RewardComponent
from thumbloop.rendering import VerdictTokens


def make_scorer(
    rewards: Mapping[str, RewardComponent], engine: Engine, verdict: VerdictTokens
) -> Mixture:
    """Build every component, loading models where they have some. Raises SettingsError."""

    def build(name: str, component: RewardComponent) -> Scorer:
        match component.kind:
            case "thumbs":
                return VerdictScorer(engine, verdict)
            case "length":
                return LengthScorer(component.target_tokens, component.scale_tokens)
            case "format":
                return FormatScorer(component.pattern)
            case "classifier":
                from server.engine.classifier import ClassifierScorer  # seconds of imports

                return ClassifierScorer(
                    Path(component.path).expanduser(),
                    f"rewards.{name}.path",
                    threads=component.threads,
                )

    return Mixture({n: Weighted(c.weight, build(n, c)) for n, c in rewards.items()})
