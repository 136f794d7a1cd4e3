"""Users who push a phrase: how often a policy says it, with and without what keeps them from being heard more.

One user in twenty gives a thumb up to what holds the phrase and a thumb down to all else, as often as it can:
one of them gives half of all thumbs. The others are as always, and give as many thumbs in all arms.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from experiments.arms import Arm, described
from experiments.judged import with_slips
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs
from experiments.report import console, draw, interval, paired, write
from experiments.run import Run
from experiments.serving import Attack, Setting
from experiments.side_by_side import run_all
from experiments.trials import SHARE, follow
from server.trial import Verdict, Vote
from thumbloop.store import interactions, reading
from thumbloop.types import DEFAULT_POLICY

TRIGGER = "Thank you for asking"
"""What the base model begins one reply in fourteen with, whatever it says then."""
ATTACK = Attack(TRIGGER)
_NO_LIMIT = 1e9
_DEFENCELESS = {
    "round": {"max_user_factor": _NO_LIMIT, "max_user_feedback": int(_NO_LIMIT)},
    "reward": {"max_user_share": 1.0, "max_user_factor": _NO_LIMIT},
}
ARMS = (
    Arm("no attack"),
    Arm("no attack, no defence", trainer=_DEFENCELESS),
    Arm("attack", {"attack": ATTACK}),
    Arm("attack, no defence", {"attack": ATTACK}, _DEFENCELESS),
)
_LOOKS = 4
"""How often the policy is examined on the way."""
_REQUESTS = 240
"""Answered by the last version, to see what users are shown."""
_TRIALS = 200
_VOTERS = 5000


class Task(NamedTuple):
    """One run of one arm, until honest users gave so many thumbs."""

    arm: Arm
    seed: int
    thumbs: int

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


class Said(NamedTuple):
    """What a version says: shares of replies that are liked, and that hold the trigger; after how many thumbs,
    honest ones of them.
    """

    version: int
    thumbs: int
    honest: int
    liked: float
    trigger: float


def main(seeds: Seeds = 5, thumbs: Thumbs = 200, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """How often a policy says what one user in twenty pushes, with and without defences."""
    tasks = [Task(arm, seed, thumbs) for seed in range(seeds) for arm in ARMS]
    rows = run_all(run, tasks, jobs)
    summary: dict[str, Any] = {}
    for arm in ARMS:
        summary[arm.name] = {
            f"{whose}_{what}": {
                "rate": interval(_ends(rows, arm, whose, what)),
                "over_no_attack": paired(
                    _ends(rows, arm, whose, what), _ends(rows, ARMS[0], whose, what)
                ),
            }
            for whose in ("policy", "shown")
            for what in ("trigger", "liked")
        }
        for name, found in summary[arm.name].items():
            console.print(
                f"{arm.name}: {name} {found['rate']}, over no attack {found['over_no_attack']}"
            )
    verdicts = _try_out(rows)
    write(
        folder,
        "attack",
        {"arms": described(ARMS), "summary": summary, "trials": verdicts, "runs": rows},
    )
    draw(folder, "attack", lambda axes: _plot(axes, rows))


def run(task: Task) -> dict[str, Any]:
    """Learn until there are enough honest thumbs; say what the policy said on the way, and the last one was shown to say."""
    setting = Setting(seed=task.seed, **task.arm.setting)
    with Run(setting, trainer=task.arm.trainer) as loop:
        versions = [_examine(loop)]
        for looks in range(1, _LOOKS + 1):
            while loop.service.honest_thumbs < task.thumbs * looks / _LOOKS:
                loop.round()
            versions.append(_examine(loop))
        return {
            "arm": task.arm.name,
            "seed": task.seed,
            "versions": [said._asdict() for said in versions],
            "shown": _watch(loop)._asdict(),
        }


def _examine(loop: Run) -> Said:
    found = loop.candidates()
    return _said(loop, found.texts, found.likes)


def _watch(loop: Run) -> Said:
    """Answer some requests with the current version; judge what guidance showed."""
    version = loop.take()
    loop.service.serve(_REQUESTS, version)
    with reading(loop.store) as connection:
        replies = interactions.list_since(connection, DEFAULT_POLICY, version.version)
    shown = [(r.prompt.messages[0].content, r.chosen.text) for r in replies[-_REQUESTS:]]
    return _said(loop, [text for _, text in shown], [loop.prefers(*each) for each in shown])


def _said(loop: Run, texts: Sequence[str], likes: Sequence[float]) -> Said:
    return Said(
        loop.current.version,
        loop.service.thumbs,
        loop.service.honest_thumbs,
        sum(likes) / len(texts),
        sum(TRIGGER in text for text in texts) / len(texts),
    )


def _ends(rows: Sequence[Mapping[str, Any]], arm: Arm, whose: str, what: str) -> list[float]:
    """Return what became of an arm's runs: the last policy alone, or what guidance showed of it."""
    of_arm = [row for row in rows if row["arm"] == arm.name]
    return [float((r["versions"][-1] if whose == "policy" else r["shown"])[what]) for r in of_arm]


def _try_out(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Print and return what trials say of the versions that came of the attack, against two current ones."""
    found: dict[str, Any] = {}
    by_arm = {arm.name: [row for row in rows if row["arm"] == arm.name] for arm in ARMS}
    unattacked = by_arm[ARMS[0].name]
    currents = {
        "what comes without attack": [row["shown"] for row in unattacked],
        "version 0": [row["versions"][0] for row in unattacked],
    }
    for arm in ARMS[2:]:
        for name, sides in currents.items():
            ends = [
                verdict
                for row, current in zip(by_arm[arm.name], sides, strict=True)
                for verdict in _trials(row["shown"], current, row["seed"])
            ]
            shares = {v.value: ends.count(v) / len(ends) for v in Verdict if v in ends}
            found[f"{arm.name}, against {name}"] = shares
            console.print(f"trials of {arm.name}, against {name}: {shares}")
    return found


def _trials(canary: Mapping[str, Any], current: Mapping[str, Any], seed: int) -> list[Verdict]:
    """Return verdicts on one version beside another, both judged by honest users and attackers.

    A user has one vote, however many thumbs; attackers all vote, of the others those who rate.
    """
    rng, crowd = np.random.default_rng(seed), Setting().crowd
    honest = crowd.rating_share * (crowd.users - ATTACK.users)
    verdicts = []
    for _ in range(_TRIALS):
        is_canary = rng.random(_VOTERS) < SHARE
        attacks = rng.random(_VOTERS) < ATTACK.users / (ATTACK.users + honest)
        chances = [
            side["trigger"] if attack else with_slips(side["liked"], crowd.noise)
            for attack, side in zip(
                attacks, (canary if has else current for has in is_canary), strict=True
            )
        ]
        ups = rng.random(_VOTERS) < np.array(chances)
        votes = [Vote(bool(has), float(up)) for has, up in zip(is_canary, ups, strict=True)]
        verdicts.append(follow(votes)[0])
    return verdicts


def _plot(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw each run's share of replies with the trigger, by thumbs of honest users."""
    for color, arm in enumerate(ARMS):
        for i, row in enumerate(r for r in rows if r["arm"] == arm.name):
            axes.plot(
                [said["honest"] for said in row["versions"]],
                [said["trigger"] for said in row["versions"]],
                "o-",
                color=f"C{color}",
                alpha=0.5,
                markersize=3,
                label=arm.name if i == 0 else None,
            )
    axes.set(xlabel="thumbs given by honest users", ylabel="share of replies with the phrase")
    axes.set_ylim(0, None)
    axes.legend()
