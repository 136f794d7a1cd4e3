"""python -m server: parse settings, build the application, serve until told to stop. Wiring only."""

import asyncio
import gc
import signal
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from server.application import Application
from server.engine import Engine
from thumbloop import logs
from thumbloop.config import ServerConfig, load
from thumbloop.errors import ThumbloopError


def make_engine(model: Path, config: ServerConfig) -> Engine:
    """Start vLLM."""
    from server.engine.vllm_engine import VllmEngine  # seconds of imports: only when ports are ours

    return VllmEngine(
        model, config.engine, seed=config.seed, has_json_logs=config.logging.format == "json"
    )


async def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, or until something fails that cannot be mended."""
    application = Application(config, make_engine)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    wait = asyncio.create_task(stopping.wait())
    life = asyncio.create_task(_live(application))
    try:
        await asyncio.wait((wait, life), return_when=asyncio.FIRST_COMPLETED)
    finally:
        wait.cancel()
        if not life.done():
            life.cancel()
        await application.stop()
    if life.done() and not life.cancelled() and (error := life.exception()):
        raise error


async def _live(application: Application) -> None:
    await application.start()
    gc.collect()
    gc.freeze()  # what starting made stays: no later collection walks through it, which takes 0.1 s
    ports = {
        "serving on port": application.port,
        "metrics on": application.metrics_port,
        "HTTP on": application.http_port,
        "health on": application.health_port,
    }
    print(", ".join(f"{what} {port}" for what, port in ports.items() if port), flush=True)
    await application.run()


def _told(config: ServerConfig, *, insecure: bool) -> ServerConfig:
    """Return the settings as the command line changes them."""
    if not insecure:
        return config
    listen = config.listen.model_copy(update={"insecure": True})
    return config.model_copy(update={"listen": listen})


def main(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    *,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen where strangers are, without TLS and tokens.")
    ] = False,
) -> None:
    """Serve the current policy version."""
    try:
        settings = _told(load(ServerConfig, config), insecure=insecure)
        logs.configure(settings.logging)
        uvloop.run(serve(settings))
    except ThumbloopError as error:
        logs.say_error(str(error))
        raise SystemExit(2) from None


if __name__ == "__main__":
    typer.run(main)
