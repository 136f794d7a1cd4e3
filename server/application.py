"""The server's objects and their life: ports, store, engine, versions, and back in reverse order."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import grpc
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from server.access import Doorkeeper, refuse_strangers
from server.admission import Admission, Quota
from server.calibration import Calibration
from server.collecting import Collector
from server.concurrency import end_all
from server.engine import Engine
from server.engine.supervised import SupervisedEngine
from server.erasures import Erasures
from server.evidence import Look
from server.exposition import serve_metrics
from server.gauges import show_load, show_pruning, show_versions
from server.grpc_port import SERVICES, serve_calls, serve_health
from server.guidance import find_strategies
from server.health import Health
from server.hotswap import Swapper
from server.http import OpenAi
from server.http_port import HttpServer
from server.imports import Imports
from server.interceptors import Translator
from server.ledger import Ledger
from server.lifecycle import Lifecycle, Phase
from server.loading import Loader
from server.metrics import ServerMetrics
from server.pipeline import Pipeline
from server.ports import port_taken
from server.ratings import Ratings
from server.reception import Answering, Reception
from server.repeats import Repeats
from server.rewards import make_scorer
from server.routes import Routes
from server.servicers import AdminServicer, FeedbackServicer, PolicyServicer
from server.supervision import Supervisor
from server.telemetry.unwatched import Unwatched
from server.telemetry.watching import watch
from server.translation import Defaults
from server.verification import Expected
from thumbloop import logs
from thumbloop.artifacts import BaseModelIdentity
from thumbloop.base_model import claim_base, identify, locate
from thumbloop.config import ServerConfig
from thumbloop.errors import SettingsError
from thumbloop.rendering import verdict_tokens
from thumbloop.store import GroupWriter, feedback, interactions, open_store, reading
from thumbloop.types import DEFAULT_POLICY, Interaction

log = logging.getLogger(__name__)

EngineFactory = Callable[[Path, ServerConfig], Engine]


class Application:
    """One server. `start` returns when it serves; `stop` drains and releases everything."""

    def __init__(self, config: ServerConfig, make_engine: EngineFactory) -> None:
        self._config = config
        self._make_engine = make_engine
        self._strategies = find_strategies()
        self._routes = Routes()
        self._metrics = ServerMetrics(self._routes)
        self._doorkeeper = Doorkeeper(config.access)
        self._admission = Admission(config.limits)
        self._lifecycle = Lifecycle(config.limits.max_requests_in_flight)
        self._health = Health(SERVICES)
        self._stack = AsyncExitStack()
        self._watch = Unwatched()
        self._supervisor: Supervisor | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0
        self.health_port = 0
        self.http_port = 0
        self.metrics_port = 0

    async def start(self) -> None:
        """Open the ports, then the engine and the current version; then say SERVING.

        Raises SettingsError, StoreIncompatible, StoreUnavailable, BadPolicyVersion, EngineUnavailable.
        """
        if self._config.guidance.strategy not in self._strategies:
            raise SettingsError(
                f"guidance.strategy: there is no {self._config.guidance.strategy};"
                f" served: {', '.join(sorted(self._strategies))}"
            )
        refuse_strangers(self._config)
        model = locate(self._config.model)
        database = open_store(self._config.state)
        self._stack.callback(database.dispose)
        identity = identify(model)
        claim_base(self._config.state.versions, DEFAULT_POLICY, identity, time.time())
        self._watch = watch(self._config.tracing)
        self._stack.push_async_callback(self._watch.stop)
        metrics = self._metrics
        writer = GroupWriter(
            database, on_commit=metrics.observe_commit, on_error=metrics.store_errors.inc
        )
        self._stack.callback(writer.close)
        with reading(database) as connection:
            metrics.last_feedback.set(feedback.last_given_at(connection))
        self._start_metrics(writer)
        reception = self._make_reception(database)
        ratings = Ratings(writer, self._metrics, self._config.feedback, self._watch.listener)
        erasures = Erasures(database, writer)
        self._metrics.unscrubbed.set_function(lambda: not erasures.is_scrubbed)
        self._tasks.append(asyncio.create_task(erasures.watch(), name="scrub files"))
        imports = Imports(writer, self._lifecycle, self._metrics, self._config.limits)
        grpc_server = await self._start_grpc(database, reception, ratings, erasures, imports)
        engine = SupervisedEngine(partial(self._make_engine, model, self._config))
        self._stack.push_async_callback(engine.end)
        self._stack.push_async_callback(grpc_server.stop, 1.0)  # no call outlives the engine
        await engine.start()
        supervisor = await self._supervise(engine, identity, database, writer)
        await supervisor.start()
        self._supervisor = supervisor
        self._admin.serve(supervisor.swapper)
        await self._start_http(reception, ratings)
        self._tasks += [
            asyncio.create_task(supervisor.run(), name="supervise engine"),
            asyncio.create_task(self._collector.watch(), name="collect folders"),
        ]
        await self._health.say(serving=True)

    def _make_reception(self, database: Database) -> Answering:
        strategies = self._watch.strategies(self._strategies)
        defaults = Defaults(
            self._config.sampling, self._config.guidance, self._config.limits, strategies
        )
        return self._watch.reception(
            Reception(
                self._lifecycle,
                defaults,
                self._admission,
                Quota(self._config.quotas),
                Repeats(database, self._config.limits),
                self._metrics,
            )
        )

    async def _supervise(
        self,
        engine: SupervisedEngine,
        identity: BaseModelIdentity,
        database: Database,
        writer: GroupWriter,
    ) -> Supervisor:
        verdict = verdict_tokens(self._config.verdict, engine.tokenizer)
        expected = Expected(identity, verdict, engine.lora_shapes, self._config.engine.max_rank)
        folder, delivery = self._config.state.versions, self._config.delivery
        max_versions = self._config.engine.max_versions
        loader = Loader(engine, self._routes, folder, expected, delivery, max_versions=max_versions)
        ledger = Ledger(database, writer)
        self._collector = Collector(
            ledger,
            lambda: loader.held,
            folder,
            delivery.keep_versions,
            on_collected=self._metrics.delivery.observe_collected,
        )
        swapper = Swapper(
            loader,
            self._routes,
            ledger,
            folder,
            delivery,
            max_versions=max_versions,
            on_swap=self._metrics.delivery.observe_swap,
        )

        def append(interaction: Interaction) -> Awaitable[None]:
            self._metrics.observe_row(interaction)
            logs.note(response_id=interaction.response_id)

            def change(connection: Connection) -> None:
                interactions.append(connection, interaction)

            return writer.start(change)

        scorer = await asyncio.to_thread(make_scorer, self._config.rewards, engine, verdict)
        calibration = Calibration(self._config.guidance, self._config.engine.max_num_seqs)
        pipeline = Pipeline(
            engine,
            scorer,
            verdict,
            self._routes,
            self._watch.log(append),
            calibration,
            scoring_timeout_s=self._config.guidance.scoring_timeout_s,
            max_prompt_tokens=self._config.limits.max_prompt_tokens,
            on_fallback=self._metrics.observe_fallback,
            on_rerank=self._metrics.observe_rerank,
        )
        show_pruning(self._metrics, self._config.guidance.checkpoints, self._routes, calibration)
        return Supervisor(
            engine,
            swapper,
            self._routes,
            self._lifecycle,
            pipeline,
            max_restarts_per_hour=self._config.engine.max_restarts_per_hour,
            say_serving=self._say_serving,
            on_restart=self._metrics.engine_restarts.inc,
        )

    async def _say_serving(self, is_serving: bool) -> None:
        """Tell health checks, unless the server is stopping."""
        if self._lifecycle.phase is not Phase.DRAINING:
            await self._health.say(serving=is_serving)

    async def run(self) -> None:
        """Serve until cancelled. Raises whatever ended a background task."""
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        """Refuse new calls, let those in flight finish within the grace period, release all."""
        await self._health.say(serving=False)
        if not await self._lifecycle.drain(self._config.listen.grace_s):
            log.warning("%d calls did not finish in time", self._lifecycle.in_flight)
        await end_all(self._tasks)
        if self._supervisor is not None:
            await self._supervisor.swapper.finish_moves()
        await self._stack.aclose()

    def _start_metrics(self, writer: GroupWriter) -> None:
        show_load(self._metrics, writer, self._lifecycle, self._admission)
        show_versions(self._metrics, self._routes, self._latest_look)
        where = self._config.metrics
        try:
            http, thread = serve_metrics(where.host, where.port, self._metrics.registry)
        except OSError as error:
            raise port_taken("metrics.port", where.host, where.port, error.strerror) from None
        self.metrics_port = int(http.server_port)
        self._stack.callback(thread.join)
        self._stack.callback(http.server_close)
        self._stack.callback(http.shutdown)

    def _latest_look(self) -> Look | None:
        return self._supervisor.swapper.latest_look if self._supervisor else None

    async def _start_grpc(
        self,
        database: Database,
        reception: Answering,
        ratings: Ratings,
        erasures: Erasures,
        imports: Imports,
    ) -> grpc.aio.Server:
        listen = self._config.listen
        self._admin = AdminServicer(database, self._routes, self._config.state.versions, imports)
        await self._health.say(serving=False)
        server, self.port = await serve_calls(
            listen,
            Translator(self._doorkeeper, self._metrics),
            self._health,
            PolicyServicer(reception),
            FeedbackServicer(ratings, erasures),
            self._admin,
        )
        self._stack.push_async_callback(server.stop, 1.0)
        if listen.health_port is not None:
            probed, self.health_port = await serve_health(listen, listen.health_port, self._health)
            self._stack.push_async_callback(probed.stop, 1.0)
        return server

    async def _start_http(self, reception: Answering, ratings: Ratings) -> None:
        """Open the HTTP port last: it has no health check to say that the server is starting."""
        if not self._config.http.enabled:
            return
        names = tuple(sorted(self._strategies))
        routes = OpenAi(
            reception,
            ratings,
            self._doorkeeper,
            self._metrics,
            names,
            max_body_bytes=self._config.listen.max_message_bytes,
            body_timeout_s=self._config.http.body_timeout_s,
        )
        server = HttpServer(self._config, routes.application(), self._metrics)
        self.http_port = await server.start()
        self._stack.push_async_callback(server.stop)
