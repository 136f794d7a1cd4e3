"""Best-of-8 beside the rerankers that a team would wire by hand, and what costs less."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from statistics import median

import aiohttp

from loadtest import figures
from loadtest.classifier import make_classifier
from loadtest.figures import Figure, Group
from loadtest.peers import (
    POLICY,
    TUNED,
    Completions,
    OneServerReranker,
    TwoServerReranker,
    adapters,
)
from loadtest.setting import MAX_TOKENS, Ours, Setting, answers, calling, in_turn, ours, serving
from loadtest.workload import Answer, Ask, Throughput
from thumbloop.types import Strategy

_CALLS, _AT_ONCE, _CANDIDATES = 48, 8, 8
_WAVES = {"first_wave": 4, "first_wave_quantile": 0.25, "min_audits": 10}
_CALIBRATION_CALLS = 700
"""21 audits are expected, and 10 missed once in four hundred runs: the threshold is taken from them."""
_PEERS = ("one_server", "two_servers")
_EQUAL_GAIN = 0.98
"""Share of best-of-8's gain from which on a reward counts as equal."""


async def reranked(setting: Setting) -> dict[str, Figure]:
    """Best-of-8, 8 requests at a time, over the better hand-wired reranker; and what is cheaper."""
    async with AsyncExitStack() as stack, aiohttp.ClientSession() as session:
        server = await stack.enter_async_context(ours(setting))
        waves = await stack.enter_async_context(_in_waves(setting))
        both = serving(stack, setting.vllm("reranker", *TUNED, *adapters(setting.found.version)))
        model = make_classifier(setting.found.model, setting.folder / "classifier-model")
        second = serving(
            stack, setting.vllm("classifier", *TUNED, "--runner", "pooling", model=model)
        )
        for peer in (both, second):
            await peer.ready(session)
        policy = Completions(session, both, setting.found.prompts, MAX_TOKENS, POLICY)
        one = OneServerReranker(session, both, policy, setting.found.verdict)
        two = TwoServerReranker(session, policy, second)
        asks: dict[str, Ask] = {
            "best_of_8": server.asking(Strategy.BEST_OF_N, _CANDIDATES),
            "pruned_8": server.asking(Strategy.SPECULATIVE_REJECTION, _CANDIDATES),
            "pruned_10": server.asking(Strategy.SPECULATIVE_REJECTION, 10),
            "waves_8": waves.asking(Strategy.BEST_OF_N, _CANDIDATES),
            "one_server": partial(one.best_of, n=_CANDIDATES),
            "two_servers": partial(two.best_of, n=_CANDIDATES),
        }
        turns = {name: calling(ask, _AT_ONCE) for name, ask in asks.items()}
        runs = await in_turn(setting, turns, _CALLS)
    return describe_reranked(runs)


@asynccontextmanager
async def _in_waves(setting: Setting) -> AsyncIterator[Ours]:
    """Start a server that samples half of the candidates first, and let it see its audits."""
    folder = setting.folder / "waves"
    folder.mkdir(exist_ok=True)
    async with ours(replace(setting, folder=folder), **_WAVES) as server:
        ask = server.asking(Strategy.BEST_OF_N, _CANDIDATES)
        await calling(ask, _AT_ONCE)(range(_CALIBRATION_CALLS))
        yield server


def describe_reranked(runs: Mapping[str, Sequence[Throughput]]) -> dict[str, Figure]:
    """Return the figures of reranking from what each way of doing it did, repeat by repeat."""
    rates = {name: [run.requests_per_s for run in of] for name, of in runs.items()}
    better = max((rates[name] for name in _PEERS), key=median)
    full = [group_of(answer) for answer in answers(runs["best_of_8"])]
    found = {
        "reranked.ratio_to_peer": figures.ratio(rates["best_of_8"], better),
        "reranked.gain": figures.exactly(figures.gain([g for g in full if g is not None])),
        **{f"reranked.{n}_requests_per_s": figures.of_repeats(of) for n, of in rates.items()},
    }
    for name in runs:
        counts = [answer.num_candidates for answer in answers(runs[name])]
        found[f"reranked.{name}_candidates"] = figures.exactly(sum(counts) / len(counts))
        fallbacks = sum(not answer.reranked for answer in answers(runs[name]))
        found[f"reranked.{name}_fallbacks"] = figures.exactly(fallbacks)
    equal = [found["reranked.ratio_to_peer"]]
    for name in (n for n in runs if n not in ("best_of_8", *_PEERS)):
        kept = figures.gain_kept(full, [answer.reward for answer in answers(runs[name])])
        found[f"reranked.{name}_gain_kept"] = kept
        found[f"reranked.{name}_ratio_to_peer"] = figures.ratio(rates[name], better)
        if kept.value >= _EQUAL_GAIN:
            equal.append(found[f"reranked.{name}_ratio_to_peer"])
    tokens = {name: [a.decoded_tokens for a in answers(of)] for name, of in runs.items()}
    found["reranked.ratio_at_equal_reward"] = max(equal, key=lambda figure: figure.value)
    found["pruned.gain_kept"] = found["reranked.pruned_8_gain_kept"]
    found["pruned.tokens_share"] = figures.share_of(tokens["pruned_8"], tokens["best_of_8"])
    return found


def group_of(answer: Answer) -> Group | None:
    """Return what an answer's candidates earned; None where they were not all scored."""
    if answer.reward is None or not answer.reranked:
        return None
    return Group(answer.reward, sum(answer.candidate_rewards) / len(answer.candidate_rewards))
