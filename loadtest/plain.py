"""One candidate a call: servers over the engines they wrap, and adapters over the base model."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from statistics import median

import aiohttp

from loadtest import figures
from loadtest.bare import BareEngine
from loadtest.figures import Figure
from loadtest.peers import TUNED, Completions
from loadtest.setting import MAX_TOKENS, Setting, ours, repeat_numbers, serving, started
from loadtest.vllm_grpc import VllmGrpcServer, install
from loadtest.workload import Ask, closed_loop
from thumbloop.types import Strategy

_CALLS, _AT_ONCE = 320, 16
_SINGLE_CALLS = 40


async def plain(setting: Setting) -> dict[str, Figure]:
    """One candidate, 16 calls at a time: servers over the bare engine that each of them wraps."""
    async with AsyncExitStack() as stack, aiohttp.ClientSession() as session:
        server = await stack.enter_async_context(ours(setting))
        bare = await started(stack, setting.bare("bare", "--version", str(setting.found.version)))
        stock = await started(stack, setting.bare("bare-stock", "--stock"))
        default = serving(stack, setting.vllm("openai-default"))
        tuned = serving(stack, setting.vllm("openai-tuned", *TUNED))
        grpc_peer = VllmGrpcServer(
            install(setting.packages),
            setting.found.model,
            setting.dtype,
            setting.folder,
            setting.found.prompts,
            MAX_TOKENS,
        )
        stack.push_async_callback(grpc_peer.stop)
        for peer in (default, tuned):
            await peer.ready(session)
        await grpc_peer.ready()
        http = partial(Completions, session, prompts=setting.found.prompts, max_tokens=MAX_TOKENS)
        asks: dict[str, Ask] = {
            "ours": server.asking(Strategy.NONE, 1),
            "openai_default": http(server=default).plain,
            "openai_tuned": http(server=tuned).plain,
            "vllm_grpc": grpc_peer.plain,
        }
        engines = {"bare": (bare, "policy"), "bare_stock": (stock, "base")}
        rates = await _plain_rates(setting, asks, engines)
        added = await _added_ms(setting, server.asking_greedily(), bare)
    return {
        "plain.ratio_to_bare": figures.ratio(rates["ours"], rates["bare"]),
        "plain.added_ms_p50": added,
        "plain.openai_default_ratio_to_bare": figures.ratio(
            rates["openai_default"], rates["bare_stock"]
        ),
        "plain.openai_tuned_ratio_to_bare": figures.ratio(
            rates["openai_tuned"], rates["bare_stock"]
        ),
        "plain.vllm_grpc_ratio_to_bare": figures.ratio(rates["vllm_grpc"], rates["bare_stock"]),
        **{f"plain.{name}_tokens_per_s": figures.of_repeats(rates[name]) for name in rates},
    }


async def _plain_rates(
    setting: Setting, asks: Mapping[str, Ask], engines: Mapping[str, tuple[BareEngine, str]]
) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in (*asks, *engines)}
    for repeat in range(-1, setting.repeats):  # the first warms up
        numbers = repeat_numbers(repeat, _CALLS)
        for name, ask in asks.items():
            rates[name].append((await closed_loop(ask, numbers, _AT_ONCE)).tokens_per_s)
        for name, (engine, row) in engines.items():
            done = await engine.run(
                setting.prompts(max(repeat, 0), _CALLS),
                at_once=_AT_ONCE,
                max_tokens=MAX_TOKENS,
                rows=(row,),
            )
            rates[name].append(done.tokens_per_s)
    return {name: of[1:] for name, of in rates.items()}


async def _added_ms(setting: Setting, ask: Ask, bare: BareEngine) -> Figure:
    """Return what the server adds to one call at temperature 0: the same reply on both sides."""
    added = []
    for repeat in range(-1, setting.repeats):
        numbers = repeat_numbers(repeat, _SINGLE_CALLS)
        through = await closed_loop(ask, numbers, 1)
        direct = await bare.run(
            setting.prompts(max(repeat, 0), _SINGLE_CALLS),
            at_once=1,
            max_tokens=MAX_TOKENS,
            rows=("policy",),
            temperature=0.0,
        )
        pairs = zip(through.latencies_s, direct.latencies_s, strict=True)
        added.append(1000 * median(a - b for a, b in pairs))
    return figures.of_repeats(added[1:])


async def lora(setting: Setting) -> dict[str, Figure]:
    """Rows with an adapter over rows of the base model in one engine; 64 tokens each, no less."""
    found: dict[str, Figure] = {}
    version = ("--version", str(setting.found.version))
    for name, flags in (("lora", ()), ("lora.stock", ("--stock-lora",))):
        async with AsyncExitStack() as stack:
            engine = await started(stack, setting.bare(name, *version, *flags))
            rates = await _lora_rates(setting, engine)
        found |= {
            f"{name}.ratio_to_base": figures.ratio(rates["policy_32"], rates["base_32"]),
            f"{name}.ratio_to_base_1": figures.ratio(rates["policy_1"], rates["base_1"]),
            f"{name}.ratio_mixed": figures.ratio(rates["mixed_32"], rates["base_32"]),
        }
    return found


async def _lora_rates(setting: Setting, engine: BareEngine) -> dict[str, list[float]]:
    cases: dict[str, tuple[tuple[str, ...], int]] = {
        "base_32": (("base",), 32),
        "policy_32": (("policy",), 32),
        "mixed_32": (("policy", "reward"), 32),
        "base_1": (("base",), 1),
        "policy_1": (("policy",), 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-1, setting.repeats):
        for name, (rows, at_once) in cases.items():
            prompts = setting.prompts(max(repeat, 0), at_once) * (2 if at_once > 1 else 4)
            done = await engine.run(
                prompts, at_once=at_once, max_tokens=MAX_TOKENS, rows=rows, is_exact=True
            )
            rates[name].append(done.tokens_per_s)
    return {name: of[1:] for name, of in rates.items()}
