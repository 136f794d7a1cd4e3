"""One candidate a call: servers over the engines they wrap, and adapters over the base model."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from statistics import median

import aiohttp

from loadtest import figures
from loadtest.bare import BareEngine
from loadtest.figures import Figure
from loadtest.peers import TUNED, Completions
from loadtest.setting import MAX_TOKENS, Setting, calling, in_turn, ours, serving, started
from loadtest.vllm_grpc import VllmGrpcServer, install
from loadtest.workload import Ask, Throughput
from thumbloop.types import Strategy

_CALLS, _AT_ONCE = 320, 16
_SINGLE_CALLS = 40
_FULL_BATCHES = 4
"""Batches of the same size, as every reply is as long: none ends while another is half done."""
_LORA_CALLS = _FULL_BATCHES * 32


async def plain(setting: Setting) -> dict[str, Figure]:
    """One candidate, 16 calls at a time: servers over the bare engine that each of them wraps."""
    return await _ours(setting) | await _peers(setting)


async def _ours(setting: Setting) -> dict[str, Figure]:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ours(setting))
        bare = await started(stack, setting.bare("bare", "--version", str(setting.found.version)))
        turns = {
            "ours": calling(server.asking(Strategy.NONE, 1), _AT_ONCE),
            "bare": asking_bare(setting, bare, "policy"),
        }
        runs = await in_turn(setting, turns, _CALLS)
        added = await _added_ms(setting, server.asking_greedily(), bare)
    found = _over("bare", runs)
    return {
        "plain.ratio_to_bare": found.pop("plain.ours_ratio_to_bare"),
        "plain.added_ms_p50": added,
        **found,
    }


async def _peers(setting: Setting) -> dict[str, Figure]:
    async with AsyncExitStack() as stack, aiohttp.ClientSession() as session:
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
        turns = {
            "openai_default": calling(http(server=default).plain, _AT_ONCE),
            "openai_tuned": calling(http(server=tuned).plain, _AT_ONCE),
            "vllm_grpc": calling(grpc_peer.plain, _AT_ONCE),
            "bare_stock": asking_bare(setting, stock, "base"),
        }
        runs = await in_turn(setting, turns, _CALLS)
    return _over("bare_stock", runs)


def _over(bare: str, runs: Mapping[str, Sequence[Throughput]]) -> dict[str, Figure]:
    """Return each server's throughput over the bare engine's, and the rates themselves."""
    rates = {name: [run.tokens_per_s for run in of] for name, of in runs.items()}
    ratios = {n: figures.ratio(of, rates[bare]) for n, of in rates.items() if n != bare}
    return {
        **{f"plain.{name}_ratio_to_bare": ratio for name, ratio in ratios.items()},
        **{f"plain.{name}_tokens_per_s": figures.of_repeats(of) for name, of in rates.items()},
    }


def asking_bare(
    setting: Setting, engine: BareEngine, row: str
) -> Callable[[range], Awaitable[Throughput]]:
    """Return the turn that asks a bare engine."""

    def turn(numbers: range) -> Awaitable[Throughput]:
        return engine.run(
            setting.prompts(numbers), at_once=_AT_ONCE, max_tokens=MAX_TOKENS, rows=(row,)
        )

    return turn


async def _added_ms(setting: Setting, ask: Ask, bare: BareEngine) -> Figure:
    """Return what the server adds to one call at temperature 0: the same reply on both sides.

    Both sides answer each question right after one another: the machine's speed drifts by more.
    """

    def directly(numbers: range) -> Awaitable[Throughput]:
        return bare.run(
            setting.prompts(numbers),
            at_once=1,
            max_tokens=MAX_TOKENS,
            rows=("policy",),
            temperature=0.0,
        )

    sides = {"ours": calling(ask, 1), "bare": directly}
    added: list[float] = []
    for number in range(setting.repeats * _SINGLE_CALLS):
        order = sorted(sides, reverse=bool(number % 2))
        latency_s = {s: (await sides[s](range(number, number + 1))).latencies_s[0] for s in order}
        added.append(1000 * (latency_s["ours"] - latency_s["bare"]))
    firsts = range(0, len(added), _SINGLE_CALLS)
    return figures.of_repeats([median(added[i : i + _SINGLE_CALLS]) for i in firsts])


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

    def case(rows: tuple[str, ...], at_once: int) -> Callable[[range], Awaitable[Throughput]]:
        def turn(numbers: range) -> Awaitable[Throughput]:
            prompts = setting.prompts(numbers)[: _FULL_BATCHES * at_once]
            return engine.run(
                prompts, at_once=at_once, max_tokens=MAX_TOKENS, rows=rows, is_exact=True
            )

        return turn

    turns = {name: case(*of) for name, of in cases.items()}
    runs = await in_turn(setting, turns, _LORA_CALLS)
    return {name: [run.tokens_per_s for run in of] for name, of in runs.items()}
