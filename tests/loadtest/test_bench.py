"""What a benchmark makes of its measurements; the measurements themselves are no tests."""

import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from loadtest import benchmark, figures, results, setting
from loadtest.bench import SERVING
from loadtest.peers import picked
from loadtest.reranked import describe_reranked
from loadtest.swaps import describe_swaps
from loadtest.workload import Answer, Throughput

BEGIN, END = SERVING.marks


def runs(seconds: float, reward: float, tokens: int, *, candidates: int = 8) -> list[Throughput]:
    """Two repeats of two answers; candidates' rewards lie around 0."""
    rewards = tuple(float(i) for i in range(-candidates // 2, candidates // 2))
    answer = Answer(tokens, tokens * candidates, 1, reward, rewards)
    return [Throughput(seconds, (answer, answer), (seconds, seconds), 0)] * 2


def measured() -> dict[str, list[Throughput]]:
    return {
        "best_of_8": runs(1.0, 3.0, 10),
        "pruned_8": runs(0.5, 2.0, 6),
        "pruned_10": runs(0.6, 2.9, 8),
        "waves_8": runs(0.75, 2.99, 9),
        "one_server": runs(4.0, 3.0, 10),
        "two_servers": runs(3.0, 3.0, 10),
    }


def test_we_are_compared_with_the_better_peer():
    assert describe_reranked(measured())["reranked.ratio_to_peer"].value == pytest.approx(3.0)


def test_an_equal_reward_is_one_that_keeps_98_of_100():
    # The mean is -0.5, so best-of-8 gains 3.5: pruned_10 keeps 3.4 / 3.5 = 0.971, waves_8 0.997.
    found = describe_reranked(measured())
    assert found["reranked.pruned_10_gain_kept"].value == pytest.approx(3.4 / 3.5)
    assert found["reranked.ratio_at_equal_reward"].value == pytest.approx(4.0)  # 3 / 0.75


def test_where_nothing_cheaper_is_equal_best_of_8_itself_counts():
    slow = measured() | {"waves_8": runs(0.75, 2.0, 9)}
    assert describe_reranked(slow)["reranked.ratio_at_equal_reward"].value == pytest.approx(3.0)


def test_pruning_is_told_by_gain_kept_and_tokens_spent():
    found = describe_reranked(measured())
    assert found["pruned.gain_kept"].value == pytest.approx(2.5 / 3.5)
    assert found["pruned.tokens_share"].value == pytest.approx(0.6)


def test_a_reward_that_is_missing_shifts_none_of_the_others():
    def of(*rewards: float | None) -> list[Throughput]:
        answers = tuple(Answer(10, 80, 1, reward, (-1.0, 0.0, 1.0)) for reward in rewards)
        return [Throughput(1.0, answers, (1.0,) * len(rewards), 0)]

    whole = dict.fromkeys(measured(), of(1.0, 6.0, 2.0, 5.0))  # all ways show the same replies
    fell_back = {"pruned_8": of(None, 6.0, 2.0, 5.0), "waves_8": of(1.0, 6.0, None, 5.0)}
    for runs in (whole | fell_back, whole | {"best_of_8": of(1.0, None, 2.0, 5.0)}):
        found = describe_reranked(runs)
        for name in ("pruned_8", "pruned_10", "waves_8"):
            kept = found[f"reranked.{name}_gain_kept"]
            assert kept == pytest.approx(figures.exactly(1.0)), name
    assert found["reranked.gain"].value == pytest.approx(8 / 3)


def test_swaps_are_counted_by_the_versions_that_answered():
    def run(seconds: float, *versions: int) -> Throughput:
        answers = tuple(Answer(10, 10, version) for version in versions)
        return Throughput(seconds, answers, (0.1,) * len(versions), 0)

    runs = {"without": [run(2.0, 1, 1, 1)] * 3, "with": [run(4.0, 1, 2, 3), run(4.0, 3, 3, 3)]}
    found = describe_swaps(runs | {"without": runs["without"][:2]})
    assert found["swap.throughput_ratio"].value == pytest.approx(0.5)
    assert found["swap.versions_served"].value == 3
    assert found["swap.swaps_per_s"] == figures.Figure(0.25, 0.0, 0.5)


def test_a_hand_wired_reranker_picks_the_best():
    answer = picked([[1], [1, 2, 3], [1, 2]], [0.0, 2.0, 1.0])
    assert (answer.reply_tokens, answer.decoded_tokens, answer.reward) == (3, 6, 2.0)


async def test_turns_alternate_on_the_same_questions_and_the_warm_up_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(setting, "_SETTLE_S", 0.0)
    monkeypatch.setattr(setting, "_WARM_UP_CALLS", 2)
    asked: list[tuple[str, range]] = []

    def turn(name: str):
        async def ask(numbers: range) -> int:
            asked.append((name, numbers))
            return numbers.start

        return ask

    any_policy: Any = None
    of = setting.Setting(any_policy, "float32", 2, tmp_path, tmp_path)
    results = await setting.in_turn(of, {"a": turn("a"), "b": turn("b")}, 4)
    assert results == {"a": [0, 4], "b": [0, 4]}
    assert asked == [
        *(("b", range(2)), ("a", range(2))),
        *(("a", range(4)), ("b", range(4))),
        *(("b", range(4, 8)), ("a", range(4, 8))),
    ]


async def test_a_measurement_without_all_of_its_answers_is_none():
    async def ask(number: int) -> Answer:
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata()
        )

    with pytest.raises(setting.CallsFailed, match="3 of 3 calls failed"):
        await setting.calling(ask, 2)(range(3))


def test_the_table_takes_the_place_of_the_last_one(tmp_path: Path):
    document = tmp_path / "benchmarks.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    SERVING.write_table(document, "new")
    assert document.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"


def test_the_table_is_written_once_every_part_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    document = tmp_path / "benchmarks.md"
    document.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(benchmark, "TABLE", document)
    commits = iter(["abc", *["def"] * 99])
    under = {"cpu": "one"}
    for dtype in SERVING.dtypes:
        for number, part in enumerate(SERVING.parts):
            SERVING.summarise(tmp_path, under)
            assert document.read_text() == f"{BEGIN}\n{END}\n"
            (tmp_path / dtype / part).mkdir(parents=True)
            measured = {part: figures.exactly(number)}
            results.keep(tmp_path / dtype / part, under, measured, commit=next(commits))
    SERVING.summarise(tmp_path, under)
    assert "| `swap` |  | 3 | 3 |" in document.read_text()
    assert (
        f"cpu one, commit def; {SERVING.parts[0]} in {SERVING.dtypes[0]}: abc."
        in document.read_text()
    )
    written = json.loads((tmp_path / "serving.json").read_text())
    assert written["figures"]["bfloat16"]["lora"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_figures_that_a_part_did_not_have_when_it_was_measured_are_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    document = tmp_path / "benchmarks.md"
    document.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(benchmark, "TABLE", document)
    under = {"cpu": "one"}
    older = {"swap.failed": figures.exactly(0), "pruned.tokens_share": figures.exactly(0.6)}
    for dtype in SERVING.dtypes:
        for part in SERVING.parts:
            (tmp_path / dtype / part).mkdir(parents=True)
            measured = older if part == "swap" else {}
            results.keep(tmp_path / dtype / part, under, measured, commit="abc")
    newer = older | {"swap.swaps_per_s": figures.Figure(1.0, 0.9, 1.0)}
    results.keep(tmp_path / "bfloat16" / "swap", under, newer, commit="abc")
    SERVING.summarise(tmp_path, under)
    assert "| `swap.swaps_per_s` |  | not measured | 1 (0.9 to 1) |" in document.read_text()
    assert "| `pruned.tokens_share` | at most 0.7 | 0.6 | 0.6 |" in document.read_text()
    assert "| `swap.failed` | at most 0 | 0 | 0 |" in document.read_text()


def test_figures_of_another_machine_or_policy_are_not_mixed_in(tmp_path: Path):
    assert results.kept(tmp_path, {"cpu": "one"}) is None
    commit = results.checked_out()
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", commit)
    results.keep(tmp_path, {"cpu": "one"}, {"a": figures.Figure(1, 0.5, 2)}, commit=commit)
    kept = results.kept(tmp_path, {"cpu": "one"})
    assert kept == (commit, {"a": figures.Figure(1, 0.5, 2)})
    assert results.kept(tmp_path, {"cpu": "two"}) is None


def test_the_documents_table_has_its_place():
    words = (Path(benchmark.__file__).parent.parent / benchmark.TABLE).read_text()
    assert words.index(BEGIN) < words.index(END)
