"""What the trainer shows while it works: lines in the terminal, TensorBoard scalars, Prometheus."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from thumbloop.config.shared import Metrics
from thumbloop.errors import SettingsError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OUTCOMES = ("published", "blocked", "superseded", "failed")
_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class TrainerMetrics:
    """The trainer's metrics in all three forms. Labels are bounded: never a user or a text."""

    def __init__(self, tensorboard: Path | None, console: Console | None = None) -> None:
        """Write TensorBoard's scalars into a folder, or none."""
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.registry = r = CollectorRegistry()
        self._tensorboard = tensorboard
        self._writer = None if tensorboard is None else SummaryWriter(str(tensorboard))
        self._rounds = Counter(
            "thumbloop_trainer_rounds", "Rounds, by outcome.", ["outcome"], registry=r
        )
        self._round_seconds = Histogram(
            "thumbloop_trainer_round_seconds", "Time of a round.", buckets=_SECONDS, registry=r
        )
        self._stage_seconds = Histogram(
            "thumbloop_trainer_stage_seconds",
            "Time of a round's stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=r,
        )
        self._feedback = Counter(
            "thumbloop_trainer_feedback_used", "New thumbs in published rounds.", registry=r
        )
        self._left_out = Gauge(
            "thumbloop_trainer_left_out",
            "Replies, thumbs, preferences and candidates that the last round left out, by reason.",
            ["kind", "reason"],
            registry=r,
        )
        self._value = Gauge(
            "thumbloop_trainer_value", "What the last round measured.", ["name"], registry=r
        )
        self._rollouts = Counter(
            "thumbloop_trainer_rollouts_used", "Candidates in published rounds.", registry=r
        )
        self._steps = Counter(
            "thumbloop_trainer_optimizer_steps", "Steps of the policy's optimizer.", registry=r
        )
        self._round = Gauge(
            "thumbloop_trainer_round", "Number of the last round that ended.", registry=r
        )
        self._limit = Gauge(
            "thumbloop_trainer_limit",
            "What the gate lets a measured value be at most, by the value's name.",
            ["name"],
            registry=r,
        )
        self.last_look = Gauge(
            "thumbloop_trainer_last_look_timestamp_seconds",
            "When the trainer last looked for new feedback, unix time.",
            registry=r,
        )
        self.last_success = Gauge(
            "thumbloop_trainer_last_success_timestamp_seconds",
            "When a version was published last, unix time; 0 where there is none.",
            registry=r,
        )
        self.needed_feedback = Gauge(
            "thumbloop_trainer_needed_feedback", "New feedback that starts a round.", registry=r
        )
        self.new_feedback = Gauge(
            "thumbloop_trainer_new_feedback", "Thumbs not learned from yet.", registry=r
        )
        self.parent = Gauge(
            "thumbloop_trainer_parent_version", "The version trained from.", registry=r
        )
        for outcome in _OUTCOMES:  # Prometheus sees no increase in what begins with 1
            self._rounds.labels(outcome)

    def serve(self, where: Metrics) -> int:
        """Open the Prometheus endpoint; return its port. Raises SettingsError: it is taken."""
        try:
            server, _thread = start_http_server(where.port, where.host, self.registry)
        except OSError as error:
            raise SettingsError(
                f"metrics.port: {where.host}:{where.port} cannot be bound ({error.strerror});"
                " choose another port, or 0 for a free one"
            ) from None
        return int(server.server_port)

    def show_limits(self, limits: Mapping[str, float]) -> None:
        """Show what values may be at most, by their names."""
        for name, limit in limits.items():
            self._limit.labels(name).set(limit)

    def say(self, line: str) -> None:
        """Print one line of progress. Where the log's disk is full the line is lost, not the trainer."""
        try:
            self.console.print(line, markup=False)
        except OSError as error:
            if error.errno not in _FULL:
                raise

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage of a round."""
        started = perf_counter()
        yield
        seconds = perf_counter() - started
        self._stage_seconds.labels(name).observe(seconds)
        self.say(f"  {name} {seconds:.1f} s")

    def round_failed(self) -> None:
        """Count a round that could not be recorded."""
        self._rounds.labels("failed").inc()

    def round_ended(
        self,
        number: int,
        outcome: str,
        seconds: float,
        values: Mapping[str, float],
        left_out: Mapping[str, Mapping[str, int]],
    ) -> None:
        """Record a round under its number: how it ended, and what it measured."""
        self._rounds.labels(outcome).inc()
        self._round_seconds.observe(seconds)
        self._round.set(number)
        self._steps.inc(values.get("optimizer_steps", 0.0))
        if outcome == "published":
            self._feedback.inc(values["feedback_used"])
            self._rollouts.inc(values.get("rollouts", 0.0))
        self._left_out.clear()
        for kind, reasons in left_out.items():
            for reason, count in reasons.items():
                self._left_out.labels(kind, reason).set(count)
        for name, value in values.items():
            self._value.labels(name).set(value)
        self._draw(number, values)

    def _draw(self, number: int, values: Mapping[str, float]) -> None:
        """Write TensorBoard's scalars. Where the disk is full the round is missing in its curves."""
        if self._tensorboard is None:
            return
        try:
            self._writer = self._writer or SummaryWriter(str(self._tensorboard))
            for name, value in values.items():
                self._writer.add_scalar(f"round/{name}", value, number)
            self._writer.flush()
        except OSError as error:
            # it writes nothing more once it failed: the next round gets another
            self._writer = None
            self.say(f"TensorBoard's curves go without round {number}: {error}")
